//! Measured points of gold reward over distance, from files, and the table, JSON and figure of what is fitted to them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::hump::{Dot, Group, Hump, hump_svg};
use crate::checkpoint::json::write_json;
use crate::checkpoint::write_file;
use crate::error::{At, Error, Result};
use crate::scaling::{Bootstrap, Curve, Fit, Form, Interval, Peak, Point, fits};

/// Names under which a distance is looked for; those of the second list hold its square.
const DISTANCES: [&str; 2] = ["d", "eval_sqrt_kl"];
const SQUARES: [&str; 3] = ["kl", "eval_kl", "KL"];

/// One measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    pub group: String,
    pub run: u64,
    pub d: f64,
    pub gold: f64,
    pub stderr: f64,
    /// Whether the gold reward can be believed there.
    pub valid: bool,
}

/// What `cuvee lab fit` reads of a line.
#[derive(Clone, Debug, PartialEq)]
pub struct Keys {
    /// `gold` also stands for `eval_gold`.
    pub gold: String,
    /// Subtracted from it: the win rate or reward of the reference.
    pub offset: f64,
}

/// Points of JSON lines, of a JSON list, of the `points` of an object, or of the evaluations of a run's folder; runs are files, or what a
/// line calls its `run` or `seed`.
///
/// # Errors
/// A file that cannot be read or parsed, or a line without distance or gold: which, and what is expected.
pub fn read_measurements(paths: &[PathBuf], keys: &Keys) -> Result<Vec<Measurement>> {
    let (mut found, mut runs) = (Vec::new(), BTreeMap::new());
    for path in paths {
        let file = if path.is_dir() { path.join("evaluations.jsonl") } else { path.clone() };
        let text = std::fs::read_to_string(&file).at(&file)?;
        for (line, point) in entries(&text, &file)?.into_iter().enumerate() {
            let wrong = |detail: String| Error::file(&file, format!("point {}: {detail}", line + 1));
            let point = point.as_object().cloned().ok_or_else(|| wrong("expected an object".into()))?;
            let run = ["run", "seed"].iter().find_map(|key| point.get(*key)).map(Value::to_string).unwrap_or_default();
            let next = runs.len() as u64;
            let run = *runs.entry((file.clone(), run)).or_insert(next);
            found.push(measurement(&point, run, keys).map_err(wrong)?);
        }
    }
    if found.is_empty() {
        let files: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        let detail =
            "has no point: of a run those are evaluations, which want --eval-steps, --kl-samples and --gold-reward";
        return Err(Error::file(files.join(", "), detail));
    }
    Ok(found)
}

fn entries(text: &str, file: &Path) -> Result<Vec<Value>> {
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Array(points)) => Ok(points),
        Ok(Value::Object(mut whole)) if whole.contains_key("points") => match whole.remove("points") {
            Some(Value::Array(points)) => Ok(points),
            _ => Err(Error::file(file, "\"points\" is no list")),
        },
        Ok(one @ Value::Object(_)) => Ok(vec![one]),
        _ => text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(|line| serde_json::from_str(line).at(file))
            .collect(),
    }
}

fn measurement(point: &Map<String, Value>, run: u64, keys: &Keys) -> Result<Measurement, String> {
    let number = |key: &str| point.get(key).and_then(Value::as_f64);
    let d = DISTANCES.iter().find_map(|key| number(key));
    // An unbiased estimate of a KL near 0 may lie below it.
    let d = d.or_else(|| SQUARES.iter().find_map(|key| number(key)).map(|kl| kl.max(0.0).sqrt()));
    let d = d.filter(|d| *d >= 0.0).ok_or_else(|| {
        format!(
            "has no distance; expected one of {} (a run has eval_kl with --kl-samples)",
            [&DISTANCES[..], &SQUARES[..]].concat().join(", ")
        )
    })?;
    let logged = format!("eval_{}", keys.gold);
    let name = [&keys.gold, &logged].into_iter().find(|key| number(key).is_some());
    let name = name.ok_or_else(|| {
        let has: Vec<&str> = point.iter().filter(|(_, value)| value.is_number()).map(|(key, _)| key.as_str()).collect();
        format!("has no number {:?}; it has {}; choose one with --gold", keys.gold, has.join(", "))
    })?;
    Ok(Measurement {
        group: point.get("group").and_then(Value::as_str).unwrap_or_default().to_string(),
        run,
        d,
        gold: number(name).expect("found above") - keys.offset,
        stderr: number(&format!("{name}_stderr")).unwrap_or(0.0),
        valid: point.get("valid").and_then(Value::as_bool).unwrap_or(true),
    })
}

/// Fits of every group, in the order in which they come.
pub struct Fitted {
    pub groups: Vec<FittedGroup>,
    gold: String,
}

pub struct FittedGroup {
    pub name: String,
    pub points: Vec<Measurement>,
    pub fits: Vec<Fit>,
}

impl FittedGroup {
    /// The log form, which the figures show; with an intercept where points have one of their own.
    pub fn shown(&self) -> Option<&Fit> {
        let of = |intercept| self.fits.iter().find(move |fit| fit.form == Form { curve: Curve::Log, intercept });
        let (plain, with) = (of(false), of(true));
        match (plain, with) {
            (Some(plain), Some(with)) if with.rmse_left_out < plain.rmse_left_out => Some(with),
            (plain, with) => plain.or(with),
        }
    }

    /// In a figure.
    pub fn drawn(&self) -> Group<'_> {
        let dot = |p: &Measurement| Dot { d: p.d, gold: p.gold, stderr: p.stderr, valid: p.valid };
        Group { name: self.name.clone(), dots: self.points.iter().map(dot).collect(), fit: self.shown() }
    }
}

/// Fits all forms to what can be believed of each group.
pub fn fit_groups(points: Vec<Measurement>, gold: &str, resamples: usize, seed: u64) -> Fitted {
    let mut groups: Vec<FittedGroup> = Vec::new();
    for point in points {
        match groups.iter_mut().find(|group| group.name == point.group) {
            Some(group) => group.points.push(point),
            None => groups.push(FittedGroup { name: point.group.clone(), points: vec![point], fits: Vec::new() }),
        }
    }
    for group in &mut groups {
        let valid = group.points.iter().filter(|point| point.valid);
        let points: Vec<Point> = valid.map(|p| Point { d: p.d, gold: p.gold, run: p.run }).collect();
        group.fits = fits(&points, resamples, seed);
    }
    Fitted { groups, gold: gold.to_string() }
}

fn short(x: f64) -> String {
    match x.abs() {
        _ if x.is_infinite() => {
            if x > 0.0 {
                "∞".into()
            } else {
                "-∞".into()
            }
        }
        size if size != 0.0 && !(1e-3..1e4).contains(&size) => format!("{x:.2e}"),
        _ => format!("{x:.3}"),
    }
}

pub fn range(interval: Interval) -> String {
    format!("[{}, {}]", short(interval.low), short(interval.high))
}

/// What a group's fits say, and what they do not, a line each.
pub fn remarks(group: &FittedGroup) -> Vec<String> {
    let mut lines = Vec::new();
    let invalid = group.points.iter().filter(|point| !point.valid).count();
    if invalid > 0 {
        lines.push(format!(
            "{invalid} of {} points are left out: their gold reward is not to be believed",
            group.points.len()
        ));
    }
    let Some(best) = group.fits.iter().min_by(|a, b| a.rmse_left_out.total_cmp(&b.rmse_left_out)) else {
        let points = group.points.len() - invalid;
        lines.push(format!("{points} points decide no form"));
        return lines;
    };
    if let Some(Bootstrap { best: share, by_run, .. }) = &best.bootstrap {
        let clear = if *share >= 0.95 { "" } else { ", which is no proof: the points do not tell the forms apart" };
        lines.push(format!(
            "{} predicts points that it has not seen best (error {}), in {:.0} % of the resamples{clear}",
            best.form.formula(),
            short(best.rmse_left_out),
            100.0 * share,
        ));
        if !by_run {
            lines.push(
                "fewer than 4 runs: points are resampled as if they were independent, which makes intervals too narrow"
                    .into(),
            );
        }
    }
    if let Some(fit) = group.shown() {
        let most = group.points.iter().map(|point| point.d).fold(0.0, f64::max);
        lines.push(match (fit.peak, &fit.bootstrap) {
            (None, _) => format!("{}: no peak in sight", fit.form.formula()),
            (Some(Peak { d, .. }), _) if d > most => {
                format!(
                    "{}: the peak, d* = {}, lies beyond the last point, {}: a guess",
                    fit.form.formula(),
                    short(d),
                    short(most)
                )
            }
            (Some(Peak { d, gold }), Some(Bootstrap { peak_d, peak_gold, peaks, .. })) => format!(
                "{}: peak at d* = {} {} (KL {}), R* = {} {}; {:.0} % of the resamples have one",
                fit.form.formula(),
                short(d),
                range(*peak_d),
                short(d * d),
                short(gold),
                range(*peak_gold),
                100.0 * peaks
            ),
            (Some(Peak { d, gold }), None) => {
                format!("{}: peak at d* = {}, R* = {}", fit.form.formula(), short(d), short(gold))
            }
        });
    }
    lines
}

/// A fit as a row: form, α, β, errors, peak.
pub fn cells(fit: &Fit) -> Vec<String> {
    let [c, alpha, beta] = fit.form.named(&fit.coefficients);
    let with = |x: f64, of: &dyn Fn(&Bootstrap) -> Interval| match &fit.bootstrap {
        Some(bootstrap) => format!("{} {}", short(x), range(of(bootstrap))),
        None => short(x),
    };
    let intercept = if fit.form.intercept { short(c) } else { String::new() };
    let peak = |x: Option<f64>, of: &dyn Fn(&Bootstrap) -> Interval| x.map_or("none".to_string(), |x| with(x, of));
    vec![
        fit.form.formula().to_string(),
        intercept,
        with(alpha, &|b| b.alpha),
        with(beta, &|b| b.beta),
        short(fit.rmse),
        short(fit.rmse_left_out),
        fit.extrapolation.as_ref().map_or(String::new(), |e| short(e.rmse)),
        peak(fit.peak.map(|peak| peak.d), &|b| b.peak_d),
        peak(fit.peak.map(|peak| peak.gold), &|b| b.peak_gold),
        fit.bootstrap.as_ref().map_or(String::new(), |b| format!("{:.0} %", 100.0 * b.best)),
    ]
}

/// The head of [`cells`].
pub const COLUMNS: [&str; 10] = ["form", "c", "α", "β", "RMSE", "left out", "far half", "d*", "R*", "best in"];

pub fn fit_json(fit: &Fit) -> Value {
    let end = |x: f64| if x.is_finite() { json!(x) } else { Value::Null };
    let interval = |i: Interval| json!([end(i.low), end(i.high)]);
    let bootstrap = fit.bootstrap.as_ref().map(|b| {
        json!({"alpha": interval(b.alpha), "beta": interval(b.beta), "peak_d": interval(b.peak_d),
               "peak_R": interval(b.peak_gold), "share_with_peak": b.peaks, "share_best": b.best,
               "resampled": if b.by_run { "runs" } else { "points" }})
    });
    json!({"form": fit.form.name(), "formula": fit.form.formula(), "coef": fit.coefficients, "rmse": fit.rmse,
           "r2": end(fit.r2), "rmse_left_out": fit.rmse_left_out,
           "extrapolation": fit.extrapolation.as_ref().map(|e| json!({"coef": e.coefficients, "rmse_held_out": e.rmse})),
           "peak_d": fit.peak.map(|peak| peak.d), "peak_R": fit.peak.map(|peak| peak.gold), "interval95": bootstrap})
}

impl Fitted {
    pub fn text(&self) -> String {
        let mut out = String::new();
        for group in &self.groups {
            let name = if group.name.is_empty() { String::new() } else { format!("{}: ", group.name) };
            let _ = writeln!(out, "{name}{} points", group.points.len());
            let rows: Vec<Vec<String>> =
                std::iter::once(COLUMNS.map(String::from).to_vec()).chain(group.fits.iter().map(cells)).collect();
            let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            let widths: Vec<usize> = (0..COLUMNS.len()).map(width).collect();
            for row in &rows {
                let cell = |(text, width): (&String, &usize)| format!("{text:<width$}  ");
                let line: String = row.iter().zip(&widths).map(cell).collect();
                let _ = writeln!(out, "  {}", line.trim_end());
            }
            out.extend(remarks(group).into_iter().map(|line| format!("  {line}\n")));
        }
        out
    }

    pub fn to_json(&self) -> Value {
        let group = |group: &FittedGroup| {
            let fits: Vec<Value> = group.fits.iter().map(fit_json).collect();
            let point = |p: &Measurement| json!({"d": p.d, "gold": p.gold, "gold_stderr": p.stderr, "run": p.run, "valid": p.valid});
            json!({"group": group.name, "fits": fits, "points": group.points.iter().map(point).collect::<Vec<_>>(),
                   "remarks": remarks(group)})
        };
        json!({"gold": self.gold, "groups": self.groups.iter().map(group).collect::<Vec<_>>()})
    }

    pub fn svg(&self, title: &str) -> String {
        hump_svg(&Hump {
            title: title.into(),
            x_label: "d = √KL from the reference".into(),
            y_label: self.gold.clone(),
            groups: self.groups.iter().map(FittedGroup::drawn).collect(),
        })
    }

    /// Writes `fit.json`, `fit.txt` and `fit.svg`.
    pub fn write(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).at(dir)?;
        write_json(&dir.join("fit.json"), &self.to_json())?;
        write_file(&dir.join("fit.txt"), |out| out.write_all(self.text().as_bytes()))?;
        write_file(&dir.join("fit.svg"), |out| out.write_all(self.svg("Gold reward over distance").as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys { gold: "gold".into(), offset: 0.5 }
    }

    #[test]
    fn points_are_read_wherever_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let lines = "{\"eval_kl\": 4.0, \"eval_gold\": 1.5, \"eval_gold_stderr\": 0.1, \"step\": 1}\n\n{\"eval_kl\": -0.1, \"eval_gold\": 0}\n";
        let run = write("evaluations.jsonl", lines);
        let list = write(
            "list.json",
            "[{\"d\": 3, \"gold\": 2, \"seed\": 1, \"group\": \"g\"}, {\"d\": 1, \"gold\": 2, \"seed\": 2, \"valid\": false}]",
        );
        let found = read_measurements(&[folder.path().into(), list], &keys()).unwrap();
        let seen: Vec<_> = found.iter().map(|p| (p.d, p.gold, p.run, p.valid)).collect();
        assert_eq!(seen, [(2.0, 1.0, 0, true), (0.0, -0.5, 0, true), (3.0, 1.5, 1, true), (1.0, 1.5, 2, false)]);
        assert_eq!((found[0].stderr, &found[2].group[..]), (0.1, "g"));

        for (text, expected) in [
            ("{\"gold\": 1}", "point 1: has no distance; expected one of d, eval_sqrt_kl, kl"),
            ("{\"kl\": 1, \"win\": 2}", "has no number \"gold\"; it has kl, win; choose one with --gold"),
            ("[3]", "expected an object"),
            ("{\"points\": 3}", "\"points\" is no list"),
            ("nonsense", "expected"),
        ] {
            let message = read_measurements(&[write("bad.json", text)], &keys()).unwrap_err().to_string();
            assert!(message.contains("bad.json") && message.contains(expected), "{text}: {message}");
        }
        assert!(read_measurements(&[run.with_file_name("none")], &keys()).is_err());
    }

    #[test]
    fn text_json_and_figure_agree() {
        let point = |k: u32, valid| {
            let d = f64::from(k) / 2.0;
            let gold = if k == 0 { 0.0 } else { d * (0.6 - 0.3 * d.ln()) } + 0.01 * f64::from(k % 3);
            Measurement { group: "dpo".into(), run: u64::from(k % 5), d, gold, stderr: 0.0, valid }
        };
        let mut points: Vec<Measurement> = (0..24).map(|k| point(k, true)).collect();
        points.push(point(30, false));
        let fitted = fit_groups(points, "gold", 200, 1);
        let (text, json) = (fitted.text(), fitted.to_json());
        let group = &json["groups"][0];
        assert_eq!(group["fits"].as_array().unwrap().len(), 6, "{text}");
        let peak = group["fits"][0]["peak_d"].as_f64().unwrap();
        assert!((peak / (0.6_f64 / 0.3 - 1.0).exp() - 1.0).abs() < 0.05, "{text}");
        assert!(text.contains("1 of 25 points are left out") && text.contains("peak at d* = "), "{text}");
        assert!(fitted.svg("t").contains("class=\"hollow"));
    }
}
