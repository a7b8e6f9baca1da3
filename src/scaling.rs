//! How a gold reward R moves with the distance that a policy has gone, `d = sqrt(KL(policy || reference))`, KL in nats:
//!
//! ```text
//! log        R = c + d (alpha - beta ln d)       Gao et al., arXiv:2210.10760, for reinforcement learning; Rafailov et al.,
//!                                                arXiv:2406.02900, for direct alignment
//! linear     R = c + d (alpha - beta d)          Gao et al., for best-of-n
//! quadratic  R = c + alpha d^2 + beta d^4        a parabola in KL, which those papers compare with
//! ```
//!
//! Each with and without the intercept c. All are linear in their coefficients, so they are fitted by least squares, exactly.
//! What a fit says of points that it has not seen, and how sure it is, is said beside it: in-sample errors of forms with other
//! numbers of coefficients are not comparable.

use crate::device::Philox;

/// Fewer seeds than this cannot be resampled: points are, as if they were independent.
const SEEDS: usize = 4;

/// One measurement of one run.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Point {
    /// sqrt(KL), >= 0.
    pub d: f64,
    pub gold: f64,
    /// Which run it is of; those of one run are not independent.
    pub run: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Curve {
    Log,
    Linear,
    Quadratic,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Form {
    pub curve: Curve,
    pub intercept: bool,
}

/// All that are compared.
pub const FORMS: [Form; 6] = [
    Form { curve: Curve::Log, intercept: false },
    Form { curve: Curve::Linear, intercept: false },
    Form { curve: Curve::Quadratic, intercept: false },
    Form { curve: Curve::Log, intercept: true },
    Form { curve: Curve::Linear, intercept: true },
    Form { curve: Curve::Quadratic, intercept: true },
];

/// Where a curve is highest.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Peak {
    pub d: f64,
    pub gold: f64,
}

impl Form {
    pub fn name(self) -> &'static str {
        match (self.curve, self.intercept) {
            (Curve::Log, false) => "log",
            (Curve::Linear, false) => "linear",
            (Curve::Quadratic, false) => "quadratic",
            (Curve::Log, true) => "log_intercept",
            (Curve::Linear, true) => "linear_intercept",
            (Curve::Quadratic, true) => "quadratic_intercept",
        }
    }

    pub fn formula(self) -> &'static str {
        match (self.curve, self.intercept) {
            (Curve::Log, false) => "d (α - β ln d)",
            (Curve::Linear, false) => "d (α - β d)",
            (Curve::Quadratic, false) => "α KL + β KL²",
            (Curve::Log, true) => "c + d (α - β ln d)",
            (Curve::Linear, true) => "c + d (α - β d)",
            (Curve::Quadratic, true) => "c + α KL + β KL²",
        }
    }

    /// What the coefficients weigh, in their order: c if there is one, alpha, beta.
    pub fn features(self, d: f64) -> Vec<f64> {
        let two = match self.curve {
            // The limit at 0, where the logarithm has none.
            Curve::Log => [d, if d > 0.0 { -d * d.ln() } else { 0.0 }],
            Curve::Linear => [d, -d * d],
            Curve::Quadratic => [d.powi(2), d.powi(4)],
        };
        self.intercept.then_some(1.0).into_iter().chain(two).collect()
    }

    pub fn at(self, coefficients: &[f64], d: f64) -> f64 {
        self.features(d).iter().zip(coefficients).map(|(x, c)| x * c).sum()
    }

    /// `[c, alpha, beta]`, c = 0 without an intercept.
    pub fn named(self, coefficients: &[f64]) -> [f64; 3] {
        match coefficients {
            [c, alpha, beta] => [*c, *alpha, *beta],
            [alpha, beta] => [0.0, *alpha, *beta],
            _ => unreachable!("a form has two or three coefficients"),
        }
    }

    /// None where the curve only rises, or only falls.
    pub fn peak(self, coefficients: &[f64]) -> Option<Peak> {
        let [_, alpha, beta] = self.named(coefficients);
        let d = match self.curve {
            Curve::Log => (beta > 0.0).then(|| (alpha / beta - 1.0).exp()),
            Curve::Linear => (beta > 0.0 && alpha > 0.0).then(|| alpha / (2.0 * beta)),
            Curve::Quadratic => (beta < 0.0 && alpha > 0.0).then(|| (-alpha / (2.0 * beta)).sqrt()),
        };
        let gold = |d: f64| self.at(coefficients, d);
        d.filter(|d| d.is_finite()).map(|d| Peak { d, gold: gold(d) })
    }
}

/// Least squares of `[columns][n]` on `[n]`.
struct Solved {
    coefficients: Vec<f64>,
    residuals: Vec<f64>,
    /// Of each point on its own prediction, [0, 1].
    leverages: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// By Gram and Schmidt, twice, on columns of length 1. None where a column is a sum of others, or there are fewer points than columns.
fn solve(columns: &[Vec<f64>], y: &[f64]) -> Option<Solved> {
    let (p, n) = (columns.len(), y.len());
    if n < p {
        return None;
    }
    let (mut q, mut r) = (Vec::<Vec<f64>>::new(), vec![vec![0.0; p]; p]);
    for (j, column) in columns.iter().enumerate() {
        let mut v = column.clone();
        for _ in 0..2 {
            for (i, q) in q.iter().enumerate() {
                let along = dot(q, &v);
                r[i][j] += along;
                v.iter_mut().zip(q).for_each(|(v, q)| *v -= along * q);
            }
        }
        r[j][j] = dot(&v, &v).sqrt();
        let independent = r[j][j] > 1e-12 * dot(column, column).sqrt();
        if !independent {
            return None;
        }
        v.iter_mut().for_each(|v| *v /= r[j][j]);
        q.push(v);
    }
    let (mut residuals, mut coefficients) = (y.to_vec(), vec![0.0; p]);
    // Once more on what is left, against rounding.
    for _ in 0..2 {
        let b: Vec<f64> = q.iter().map(|q| dot(q, &residuals)).collect();
        let mut step = vec![0.0; p];
        for i in (0..p).rev() {
            step[i] = (b[i] - (i + 1..p).map(|j| r[i][j] * step[j]).sum::<f64>()) / r[i][i];
        }
        coefficients.iter_mut().zip(&step).for_each(|(c, s)| *c += s);
        let of = |k: usize| y[k] - columns.iter().zip(&coefficients).map(|(x, c)| x[k] * c).sum::<f64>();
        residuals = (0..n).map(of).collect();
    }
    let leverages = (0..n).map(|k| q.iter().map(|q| q[k] * q[k]).sum()).collect();
    Some(Solved { coefficients, residuals, leverages })
}

fn root_mean_square(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, n) = values.into_iter().fold((0.0, 0.0_f64), |(sum, n), x| (sum + x * x, n + 1.0));
    (sum / n).sqrt()
}

fn solve_form(form: Form, points: &[Point]) -> Option<Solved> {
    let rows: Vec<Vec<f64>> = points.iter().map(|point| form.features(point.d)).collect();
    let columns: Vec<Vec<f64>> = (0..rows.first()?.len()).map(|j| rows.iter().map(|row| row[j]).collect()).collect();
    solve(&columns, &points.iter().map(|point| point.gold).collect::<Vec<_>>())
}

/// A range that holds the truth at the stated rate; an end that is infinite is one that the data do not show.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Interval {
    pub low: f64,
    pub high: f64,
}

impl Interval {
    pub fn holds(self, x: f64) -> bool {
        self.low <= x && x <= self.high
    }
}

/// What resampling says.
#[derive(Clone, PartialEq, Debug)]
pub struct Bootstrap {
    pub alpha: Interval,
    pub beta: Interval,
    /// A resample without a peak counts as one at infinity.
    pub peak_d: Interval,
    pub peak_gold: Interval,
    /// Share of the resamples whose curve has a peak.
    pub peaks: f64,
    /// Runs were drawn; else points, as if they were independent.
    pub by_run: bool,
    /// Share of the resamples in which this form predicts the points that were not drawn better than all other forms.
    pub best: f64,
    replicates: Vec<Vec<f64>>,
    tail: f64,
}

/// Fitted to the points with d up to the median, and asked about the others.
#[derive(Clone, PartialEq, Debug)]
pub struct Extrapolation {
    pub coefficients: Vec<f64>,
    pub rmse: f64,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Fit {
    pub form: Form,
    /// `[c, alpha, beta]`, without c where the form has none.
    pub coefficients: Vec<f64>,
    pub rmse: f64,
    /// Share of the variance around the mean; negative where a constant would fit better.
    pub r2: f64,
    /// Of each point, predicted from all the others.
    pub rmse_left_out: f64,
    pub peak: Option<Peak>,
    pub extrapolation: Option<Extrapolation>,
    pub bootstrap: Option<Bootstrap>,
}

impl Fit {
    /// None with fewer points than coefficients, or where they do not decide.
    pub fn of(form: Form, points: &[Point]) -> Option<Self> {
        let Solved { coefficients, residuals, leverages } = solve_form(form, points)?;
        let mean = points.iter().map(|point| point.gold).sum::<f64>() / points.len() as f64;
        let around = points.iter().map(|point| (point.gold - mean).powi(2)).sum::<f64>();
        // A point that decides its own prediction cannot be left out.
        let left_out = residuals.iter().zip(&leverages).map(|(e, h)| e / (1.0 - h).max(1e-12));
        Some(Self {
            form,
            rmse: root_mean_square(residuals.iter().copied()),
            r2: 1.0 - dot(&residuals, &residuals) / around,
            rmse_left_out: root_mean_square(left_out),
            peak: form.peak(&coefficients),
            extrapolation: extrapolation(form, points),
            coefficients,
            bootstrap: None,
        })
    }

    pub fn at(&self, d: f64) -> f64 {
        self.form.at(&self.coefficients, d)
    }

    /// Where the curve passes at d, at the rate of the bootstrap's intervals.
    pub fn band(&self, d: f64) -> Option<Interval> {
        let bootstrap = self.bootstrap.as_ref()?;
        let values = bootstrap.replicates.iter().map(|coefficients| self.form.at(coefficients, d)).collect();
        Some(quantiles(values, bootstrap.tail))
    }
}

fn extrapolation(form: Form, points: &[Point]) -> Option<Extrapolation> {
    let mut sorted: Vec<f64> = points.iter().map(|point| point.d).collect();
    sorted.sort_by(f64::total_cmp);
    let (n, half) = (sorted.len(), sorted.len() / 2);
    let median = if n % 2 == 1 { *sorted.get(half)? } else { 0.5 * (sorted.get(half.checked_sub(1)?)? + sorted[half]) };
    let (near, far): (Vec<Point>, Vec<Point>) = points.iter().partition(|point| point.d <= median);
    let coefficients = solve_form(form, &near)?.coefficients;
    let rmse = root_mean_square(far.iter().map(|point| point.gold - form.at(&coefficients, point.d)));
    rmse.is_finite().then_some(Extrapolation { coefficients, rmse })
}

/// All forms that the points can decide, with intervals at 95 % from `resamples` resamples; 0 = without.
///
/// Runs are drawn where there are [`SEEDS`] or more, else points. Percentiles of a bootstrap are too narrow for few points; they
/// are taken further out, as far as Student's distribution is wider than the normal (Hesterberg, arXiv:1411.5279, 3.3).
pub fn fits(points: &[Point], resamples: usize, seed: u64) -> Vec<Fit> {
    let mut fits: Vec<Fit> = FORMS.iter().filter_map(|form| Fit::of(*form, points)).collect();
    if resamples == 0 || points.len() < 5 {
        return fits;
    }
    let mut runs: Vec<u64> = points.iter().map(|point| point.run).collect();
    runs.sort_unstable();
    runs.dedup();
    let by_run = runs.len() >= SEEDS;
    let units: Vec<Vec<usize>> = match by_run {
        true => runs.iter().map(|run| (0..points.len()).filter(|k| points[*k].run == *run).collect()).collect(),
        false => (0..points.len()).map(|k| vec![k]).collect(),
    };
    let random = Philox::named(seed, "bootstrap");
    let (mut replicates, mut best) = (vec![Vec::new(); fits.len()], vec![0.0; fits.len()]);
    for b in 0..resamples {
        let draw = |u: usize| {
            ((random.uniform((b * units.len() + u) as u64) * units.len() as f64) as usize).min(units.len() - 1)
        };
        let drawn: Vec<usize> = (0..units.len()).map(draw).collect();
        let sample: Vec<Point> = drawn.iter().flat_map(|u| &units[*u]).map(|k| points[*k]).collect();
        let left: Vec<Point> =
            (0..units.len()).filter(|u| !drawn.contains(u)).flat_map(|u| &units[u]).map(|k| points[*k]).collect();
        let mut errors = Vec::new();
        for (replicates, fit) in replicates.iter_mut().zip(&fits) {
            let solved = solve_form(fit.form, &sample).map(|solved| solved.coefficients);
            let error = solved.as_ref().map_or(f64::INFINITY, |coefficients| {
                root_mean_square(left.iter().map(|point| point.gold - fit.form.at(coefficients, point.d)))
            });
            errors.push(error);
            replicates.extend(solved);
        }
        if let Some(first) = (0..errors.len()).min_by(|a, b| errors[*a].total_cmp(&errors[*b])) {
            best[first] += 1.0 / resamples as f64;
        }
    }
    for ((fit, replicates), best) in fits.iter_mut().zip(replicates).zip(best) {
        let free = if by_run { 1 } else { fit.coefficients.len() };
        fit.bootstrap = bootstrap(fit.form, replicates, (units.len(), free), by_run, best);
    }
    fits
}

fn bootstrap(
    form: Form,
    replicates: Vec<Vec<f64>>,
    (units, free): (usize, usize),
    by_run: bool,
    best: f64,
) -> Option<Bootstrap> {
    if replicates.len() < 20 {
        return None;
    }
    let (n, left) = (units as f64, (units.saturating_sub(free)).max(1) as f64);
    let tail = normal_cdf(-(n / left).sqrt() * student_975(left));
    let of = |value: &dyn Fn(&[f64]) -> f64| quantiles(replicates.iter().map(|c| value(c)).collect(), tail);
    let peak = |c: &[f64]| form.peak(c);
    let with = replicates.iter().filter(|c| peak(c).is_some()).count();
    Some(Bootstrap {
        alpha: of(&|c| form.named(c)[1]),
        beta: of(&|c| form.named(c)[2]),
        peak_d: of(&|c| peak(c).map_or(f64::INFINITY, |peak| peak.d)),
        peak_gold: of(&|c| peak(c).map_or(f64::INFINITY, |peak| peak.gold)),
        peaks: with as f64 / replicates.len() as f64,
        by_run,
        best,
        tail,
        replicates,
    })
}

/// The values between which all but a share of `tail` on each side lie.
fn quantiles(mut values: Vec<f64>, tail: f64) -> Interval {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    let at = |share: f64| {
        let place = share * last as f64;
        let (below, above) = (values[place.floor() as usize], values[place.ceil() as usize]);
        // Between infinities there is nothing to weigh.
        if below == above { below } else { below + (above - below) * (place - place.floor()) }
    };
    Interval { low: at(tail), high: at(1.0 - tail) }
}

/// P(Z < x), to 2e-7 (Abramowitz and Stegun 26.2.17).
fn normal_cdf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let terms = [1.330_274_429, -1.821_255_978, 1.781_477_937, -0.356_563_782, 0.319_381_530];
    let sum = terms.iter().fold(0.0, |sum, term| (sum + term) * t);
    let upper = sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if x > 0.0 { 1.0 - upper } else { upper }
}

/// The 97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, else by Cornish and Fisher, to 1 %.
pub fn student_975(df: f64) -> f64 {
    let z: f64 = 1.959_963_985;
    match df {
        ..1.5 => 12.706_205,
        ..2.5 => 4.302_653,
        _ => {
            z + (z.powi(3) + z) / (4.0 * df)
                + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * df.powi(2))
                + (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / (384.0 * df.powi(3))
        }
    }
}

/// KL of best-of-n from what it is sampled from, nats: ln n - (n - 1) / n.
pub fn best_of_n_kl(n: usize) -> f64 {
    (n as f64).ln() - (n as f64 - 1.0) / n as f64
}

/// What each of `samples`, in order of a proxy from worst to best, counts in the mean over all best-of-n's that can be drawn from
/// them without replacement: C(i, n - 1) / C(samples, n) for i from 0. Unbiased (Nakano et al., arXiv:2112.09332, appendix I).
pub fn best_of_n_weights(samples: usize, n: usize) -> Vec<f64> {
    assert!((1..=samples).contains(&n), "best of {n} of {samples}");
    let mut weights = vec![0.0; samples];
    weights[samples - 1] = n as f64 / samples as f64;
    // From the top down: what rounds to 0 is 0.
    for i in (n..samples).rev() {
        weights[i - 1] = weights[i] * (i - (n - 1)) as f64 / i as f64;
    }
    weights
}

/// The gold reward of the best of n by a proxy, in expectation over who is drawn; samples that the proxy cannot tell apart count alike.
pub fn best_of_n(proxy: &[f64], gold: &[f64], n: usize) -> f64 {
    let mut order: Vec<usize> = (0..proxy.len()).collect();
    order.sort_by(|a, b| proxy[*a].total_cmp(&proxy[*b]));
    let weights = best_of_n_weights(proxy.len(), n);
    let equal = order.chunk_by(|a, b| proxy[*a] == proxy[*b]);
    let (mut first, mut sum) = (0, 0.0);
    for equal in equal {
        let weight = weights[first..first + equal.len()].iter().sum::<f64>() / equal.len() as f64;
        sum += equal.iter().map(|k| weight * gold[*k]).sum::<f64>();
        first += equal.len();
    }
    sum
}

/// How well length alone explains a log-ratio (or any y): y = gamma |y|, and y = c + gamma |y|.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LengthFit {
    pub gamma: f64,
    /// Of the sum of squares.
    pub r2_uncentered: f64,
    /// Of the sum of squares around the mean.
    pub r2: f64,
    /// `[c, gamma]`
    pub with_intercept: [f64; 2],
    pub r2_with_intercept: f64,
}

/// None where lengths are all the same.
pub fn on_length(lengths: &[f64], y: &[f64]) -> Option<LengthFit> {
    let line = solve(&[vec![1.0; lengths.len()], lengths.to_vec()], y)?;
    let gamma = dot(lengths, y) / dot(lengths, lengths);
    let mean = y.iter().sum::<f64>() / y.len() as f64;
    let around = y.iter().map(|y| (y - mean).powi(2)).sum::<f64>();
    let rest = lengths.iter().zip(y).map(|(l, y)| (y - gamma * l).powi(2)).sum::<f64>();
    Some(LengthFit {
        gamma,
        r2_uncentered: 1.0 - rest / dot(y, y),
        r2: 1.0 - rest / around,
        with_intercept: [line.coefficients[0], line.coefficients[1]],
        r2_with_intercept: 1.0 - dot(&line.residuals, &line.residuals) / around,
    })
}

/// Pearson's; NaN where one of the two is constant.
pub fn correlation(x: &[f64], y: &[f64]) -> f64 {
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (mx, my) = (mean(x), mean(y));
    let (x, y): (Vec<f64>, Vec<f64>) = (x.iter().map(|x| x - mx).collect(), y.iter().map(|y| y - my).collect());
    dot(&x, &y) / (dot(&x, &x) * dot(&y, &y)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: Form = FORMS[0];

    /// A planted curve with noise of normal draws.
    fn planted(set: u64, (alpha, beta): (f64, f64), noise: f64, n: usize) -> Vec<Point> {
        let random = Philox::named(set, "planted");
        let point = |k: usize| {
            let d = (0.5 + 60.0 * random.uniform(2 * k as u64)).sqrt();
            Point { d, gold: d * (alpha - beta * d.ln()) + noise * random.normal(2 * k as u64 + 1), run: k as u64 % 2 }
        };
        (0..n).map(point).collect()
    }

    /// 200 synthetic sets: every stated interval holds what was planted about as often as it says.
    #[test]
    fn intervals_hold_what_was_planted() {
        let (alpha, beta) = (0.35, 0.12);
        let truth = Peak { d: (alpha / beta - 1.0_f64).exp(), gold: beta * (alpha / beta - 1.0_f64).exp() };
        for (n, noise) in [(14, 0.03), (35, 0.05)] {
            let mut held = [0; 4];
            for set in 0..200 {
                let points = planted(set, (alpha, beta), noise, n);
                let fits = fits(&points, 300, set);
                let Bootstrap { alpha: a, beta: b, peak_d, peak_gold, .. } =
                    fits.iter().find(|fit| fit.form == LOG).unwrap().bootstrap.clone().unwrap();
                let holds = [a.holds(alpha), b.holds(beta), peak_d.holds(truth.d), peak_gold.holds(truth.gold)];
                held.iter_mut().zip(holds).for_each(|(held, holds)| *held += i32::from(holds));
            }
            // 190 of 200 expected, 3.1 their standard deviation.
            assert!(held.iter().all(|held| (180..=199).contains(held)), "{n} points: {held:?} of 200");
        }
    }

    #[test]
    fn the_form_that_made_the_points_predicts_best() {
        let fits = fits(&planted(7, (0.35, 0.12), 0.02, 40), 400, 1);
        let error = |form: Form| fits.iter().find(|fit| fit.form == form).unwrap().rmse_left_out;
        assert!(FORMS[1..3].iter().all(|form| error(*form) > error(LOG)), "{fits:?}");
        let best: f64 = fits.iter().map(|fit| fit.bootstrap.as_ref().unwrap().best).sum();
        assert!((best - 1.0).abs() < 1e-9);
        let band = fits[0].band(3.0).unwrap();
        assert!(band.holds(fits[0].at(3.0)) && band.high - band.low < 0.1, "{band:?}");
    }

    #[test]
    fn a_curve_that_only_rises_has_no_peak_and_says_so() {
        let points: Vec<Point> = (1..12)
            .map(|k| Point { d: f64::from(k), gold: f64::from(k * k) + f64::from(k % 3), run: k as u64 })
            .collect();
        let fit = fits(&points, 200, 3).into_iter().find(|fit| fit.form == LOG).unwrap();
        let bootstrap = fit.bootstrap.unwrap();
        assert!(fit.peak.is_none() && bootstrap.peaks < 0.05 && bootstrap.by_run, "{bootstrap:?}");
        assert_eq!(bootstrap.peak_d.high, f64::INFINITY);
    }

    #[test]
    fn too_few_points_and_equal_ones_decide_nothing() {
        let point = |d: f64| Point { d, gold: 1.0, run: 0 };
        assert!(fits(&[], 100, 0).is_empty() && fits(&[point(1.0)], 100, 0).is_empty());
        assert!(fits(&[point(2.0); 9], 100, 0).is_empty());
        assert!(Fit::of(LOG, &[point(0.0), point(1.0), point(2.0)]).is_some_and(|fit| fit.at(0.0) == 0.0));
        assert_eq!(on_length(&[3.0; 4], &[1.0, 2.0, 3.0, 4.0]), None);
    }

    #[test]
    fn best_of_n_counts_ties_alike() {
        let gold = [1.0, 5.0, 3.0, 7.0];
        let mean = gold.iter().sum::<f64>() / 4.0;
        assert_eq!(best_of_n(&[0.0; 4], &gold, 3), mean);
        assert!((best_of_n(&[4.0, 2.0, 1.0, 3.0], &gold, 1) - mean).abs() < 1e-15);
        assert_eq!(best_of_n(&[4.0, 2.0, 1.0, 3.0], &gold, 4), 1.0);
        // Of two of four: six pairs, of which the best is best in three, the second in two, the third in one.
        let expected = (3.0 * 1.0 + 2.0 * 7.0 + 5.0) / 6.0;
        assert!((best_of_n(&[4.0, 2.0, 1.0, 3.0], &gold, 2) - expected).abs() < 1e-15);
        assert!((best_of_n_weights(20_000, 1024).iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn quantiles_of_known_distributions() {
        assert!((normal_cdf(-1.959_964) - 0.025).abs() < 1e-6 && (normal_cdf(1.0) - 0.841_344_75).abs() < 1e-6);
        for (df, t) in [(1.0, 12.7062), (2.0, 4.3027), (3.0, 3.1824), (5.0, 2.5706), (10.0, 2.2281), (30.0, 2.0423)] {
            assert!((student_975(df) / t - 1.0).abs() < 0.02, "{df}: {}", student_975(df));
        }
    }
}
