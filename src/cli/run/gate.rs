//! Gates: `require = "gold > 0.2 and tax < 4.1"`, what a stage's numbers must be for anything to come after it.

use std::fmt;

use crate::cli::recipe::nearest;
use crate::lab::Metrics;

type Comparison = (&'static str, fn(f64, f64) -> bool);

/// Longer ones first: `>` is the start of `>=`.
const COMPARISONS: [Comparison; 4] =
    [(">=", |a, b| a >= b), ("<=", |a, b| a <= b), (">", |a, b| a > b), ("<", |a, b| a < b)];

/// All of these must hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    terms: Vec<Term>,
}

#[derive(Clone, Debug, PartialEq)]
struct Term {
    name: String,
    /// Place in [`COMPARISONS`].
    comparison: usize,
    bound: f64,
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {} {}", self.name, COMPARISONS[self.comparison].0, self.bound)
    }
}

impl Gate {
    /// # Errors
    /// What was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let terms = text.split(" and ").map(|term| {
            let wrong = || format!("require: expected NAME > NUMBER, joined by \"and\", found {:?}", term.trim());
            let found = COMPARISONS.iter().enumerate().find_map(|(at, (sign, _))| Some((at, term.split_once(sign)?)));
            let (comparison, (name, bound)) = found.ok_or_else(wrong)?;
            let bound: f64 = bound.trim().parse().map_err(|_| wrong())?;
            match (name.trim(), bound.is_nan()) {
                ("", _) | (_, true) => Err(wrong()),
                (name, false) => Ok(Term { name: name.to_string(), comparison, bound }),
            }
        });
        Ok(Self { terms: terms.collect::<Result<_, String>>()? })
    }

    /// Names of numbers that it looks at.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.terms.iter().map(|term| term.name.as_str())
    }

    /// # Errors
    /// Every number that is not as it must be, or is not there.
    pub fn check(&self, numbers: &Metrics) -> Result<(), String> {
        let fails = |term: &Term| match numbers.get(&term.name) {
            Some(value) if COMPARISONS[term.comparison].1(*value, term.bound) => None,
            Some(value) => Some(format!("{} is {value}, required is {term}", term.name)),
            None => Some(format!("required is {term}, and {}", missing(&term.name, numbers))),
        };
        let failed: Vec<String> = self.terms.iter().filter_map(fails).collect();
        if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
    }
}

fn missing(name: &str, numbers: &Metrics) -> String {
    let all = || numbers.keys().cloned();
    match nearest(name, all()) {
        Some(meant) => format!("there is no number {name:?}; did you mean {meant:?}?"),
        None => {
            let known: Vec<String> = all().filter(|name| !name.ends_with("_stderr")).collect();
            format!("there is no number {name:?}; there are {}", known.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_says_which_number_fails_and_what_it_should_be() {
        let numbers = Metrics::from([("gold".into(), 0.12), ("tax".into(), 4.0)]);
        let check = |text: &str| Gate::parse(text).unwrap().check(&numbers);
        assert_eq!(check("gold > 0.1 and tax <= 4"), Ok(()));
        assert_eq!(check("gold>=0.2 and tax < 4.1"), Err("gold is 0.12, required is gold >= 0.2".into()));
        assert_eq!(
            check("gold > 0.2 and tax < 4"),
            Err("gold is 0.12, required is gold > 0.2; tax is 4, required is tax < 4".into())
        );
        assert!(check("golt > 0").unwrap_err().contains("did you mean \"gold\"?"));
        assert!(check("xyzzy > 0").unwrap_err().contains("there are gold, tax"));
        // What is not a number is never as it must be.
        let nan = Metrics::from([("gold".into(), f64::NAN)]);
        assert!(Gate::parse("gold < 1").unwrap().check(&nan).unwrap_err().contains("gold is NaN"));
    }

    #[test]
    fn what_is_no_gate_is_refused() {
        for text in ["", "gold", "gold > ", "> 3", "gold > x", "gold > 1 or tax < 2", "gold = 1", "gold > nan"] {
            assert!(Gate::parse(text).is_err_and(|e| e.contains("expected NAME > NUMBER")), "{text}");
        }
    }
}
