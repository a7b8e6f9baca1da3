//! Training curves as one self-contained SVG (no script, no font, readable on light and dark), and as a line
//! of text for the terminal.

use std::fmt::Write;

/// Points in order of x. A point that is not finite is left out.
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

pub struct Panel {
    pub title: String,
    pub y_label: String,
    pub series: Vec<Series>,
}

// Sizes in SVG user units, pixels unless scaled.
const PANEL_WIDTH: f64 = 460.0;
const PANEL_HEIGHT: f64 = 290.0;
const HEADER: f64 = 52.0;
const MARGIN: f64 = 12.0;
/// Room inside a panel for its title and legend, tick labels and axis labels.
const TOP: f64 = 56.0;
const RIGHT: f64 = 16.0;
const BOTTOM: f64 = 46.0;
const LEFT: f64 = 66.0;

/// Above this many points a series is drawn thin, with its moving average on top.
const RAW_POINTS: usize = 30;

/// Colours are those of Okabe and Ito, which colour-blind readers can tell apart, brightened for dark pages.
pub const STYLE: &str = "
.plot { font-family: system-ui, sans-serif; font-size: 12px; }
.plot .page { fill: #ffffff; } .plot text { fill: #4b5563; } .plot .strong { fill: #111827; font-weight: 600; }
.plot .grid { stroke: #e5e7eb; } .plot .axis { stroke: #9ca3af; }
.plot .line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.plot .raw { stroke-width: 1; opacity: 0.35; } .plot .dot { fill: currentColor; }
.plot .c0 { color: #0072b2; } .plot .c1 { color: #d55e00; } .plot .c2 { color: #009e73; }
.plot .c3 { color: #b8569a; } .plot .c4 { color: #c98a00; } .plot .c5 { color: #56b4e9; }
@media (prefers-color-scheme: dark) {
.plot .page { fill: #14171c; } .plot text { fill: #aab2bf; } .plot .strong { fill: #f3f4f6; }
.plot .grid { stroke: #2a2f38; } .plot .axis { stroke: #5b6472; }
.plot .c0 { color: #4aa8e0; } .plot .c1 { color: #ff8a3d; } .plot .c2 { color: #2cc79c; }
.plot .c3 { color: #e39acb; } .plot .c4 { color: #f0b429; } .plot .c5 { color: #9fd8ff; }
}";
pub const COLOURS: usize = 6;

/// Draws `panels` two abreast under a common title. `x_label` belongs to every panel.
pub fn curves_svg(title: &str, x_label: &str, panels: &[Panel]) -> String {
    let columns = panels.len().clamp(1, 2);
    let width = columns as f64 * PANEL_WIDTH + 2.0 * MARGIN;
    let height = panels.len().div_ceil(columns) as f64 * PANEL_HEIGHT + HEADER + MARGIN;
    let title = escape(title);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" role=\"img\">\n<title>{title}</title>\n<style>{STYLE}\n</style>\n\
         <rect class=\"page\" width=\"{width}\" height=\"{height}\"/>\n"
    );
    svg += &text("strong", (MARGIN + 12.0, 34.0), "start", 17, &title);
    for (index, panel) in panels.iter().enumerate() {
        let x = MARGIN + (index % columns) as f64 * PANEL_WIDTH;
        let y = HEADER + (index / columns) as f64 * PANEL_HEIGHT;
        add(&mut svg, format_args!("<g transform=\"translate({x} {y})\">\n{}</g>\n", panel_svg(panel, x_label)));
    }
    svg + "</svg>\n"
}

fn panel_svg(panel: &Panel, x_label: &str) -> String {
    let series: Vec<Vec<(f64, f64)>> = panel.series.iter().map(|series| finite(&series.points)).collect();
    let mut svg = text("strong", (12.0, 18.0), "start", 14, &escape(&panel.title));
    let (right, bottom) = (PANEL_WIDTH - RIGHT, PANEL_HEIGHT - BOTTOM);
    let Some((x, y)) = axes(&series) else {
        let middle = ((LEFT + right) / 2.0, (TOP + bottom) / 2.0);
        return svg + &text("none", middle, "middle", 12, "no data");
    };
    if panel.series.len() > 1 {
        svg += &legend(&panel.series);
    }
    let place = |(px, py): (f64, f64)| (LEFT + x.share(px) * (right - LEFT), bottom - y.share(py) * (bottom - TOP));

    for tick in y.ticks() {
        let (_, at) = place((x.low, tick));
        svg += &line("grid", (LEFT, at), (right, at));
        svg += &text("tick", (LEFT - 8.0, at + 4.0), "end", 11, &y.label(tick));
    }
    for tick in x.ticks() {
        let (at, _) = place((tick, y.low));
        svg += &line("axis", (at, bottom), (at, bottom + 4.0));
        svg += &text("tick", (at, bottom + 18.0), "middle", 11, &x.label(tick));
    }
    svg += &line("axis", (LEFT, bottom), (right, bottom));
    svg += &text("name", ((LEFT + right) / 2.0, bottom + 36.0), "middle", 12, &escape(x_label));
    let (middle, label) = ((TOP + bottom) / 2.0, escape(&panel.y_label));
    add(
        &mut svg,
        format_args!("<text transform=\"translate(16 {middle}) rotate(-90)\" text-anchor=\"middle\">{label}</text>\n"),
    );

    for (index, points) in series.iter().enumerate() {
        svg += &curve(index % COLOURS, points, place);
    }
    svg
}

fn curve(colour: usize, points: &[(f64, f64)], place: impl Fn((f64, f64)) -> (f64, f64)) -> String {
    let path = |points: &[(f64, f64)], class: &str| {
        let places: Vec<String> = points.iter().map(|&p| place(p)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        format!("<polyline class=\"line {class}c{colour}\" points=\"{}\"/>\n", places.join(" "))
    };
    if points.len() > RAW_POINTS {
        // A learning rate is no noise: an average would only round off its corner.
        return if turns_often(points) { path(points, "raw ") + &path(&smooth(points), "") } else { path(points, "") };
    }
    // With few points each one counts, and a single one makes no line.
    let mut svg = path(points, "");
    for (x, y) in points.iter().map(|&p| place(p)) {
        add(&mut svg, format_args!("<circle class=\"dot c{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>\n"));
    }
    svg
}

/// One row under the panel's title. Widths of letters are estimated: an SVG cannot measure its text.
fn legend(series: &[Series]) -> String {
    let mut svg = String::new();
    let mut x = LEFT;
    for (index, series) in series.iter().enumerate() {
        let class = format!("line c{}", index % COLOURS);
        svg += &line(&class, (x, 37.0), (x + 18.0, 37.0));
        svg += &text("key", (x + 24.0, 41.0), "start", 12, &escape(&series.name));
        x += 24.0 + 7.0 * series.name.chars().count() as f64 + 16.0;
    }
    svg
}

pub fn line(class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) -> String {
    format!("<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>\n")
}

/// `content` is escaped already.
pub fn text(class: &str, (x, y): (f64, f64), anchor: &str, size: u32, content: &str) -> String {
    format!(
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{content}</text>\n"
    )
}

fn add(svg: &mut String, part: std::fmt::Arguments<'_>) {
    svg.write_fmt(part).expect("a String takes everything");
}

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn finite(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
}

/// Whether the curve turns more often than every tenth point.
fn turns_often(points: &[(f64, f64)]) -> bool {
    let turns = |w: &&[(f64, f64)]| (w[1].1 - w[0].1) * (w[2].1 - w[1].1) < 0.0;
    points.windows(3).filter(turns).count() * 10 > points.len()
}

/// Centred moving average over about a tenth of the series, where the whole window exists: a shorter one at the ends
/// would let a single odd step look like a trend.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = (points.len() / 20).max(2);
    let mean = |window: &[(f64, f64)]| window.iter().map(|(_, y)| y / window.len() as f64).sum();
    points.windows(2 * reach + 1).map(|window| (window[reach].0, mean(window))).collect()
}

/// A linear axis with ticks at multiples of 1, 2 or 5 times a power of ten.
pub struct Axis {
    low: f64,
    high: f64,
    step: f64,
}

/// The x axis ends with the data, the y axis at a tick above and below it. None without any point.
fn axes(series: &[Vec<(f64, f64)>]) -> Option<(Axis, Axis)> {
    let points = || series.iter().flatten();
    points().next()?;
    let x = Axis::new(points().map(|p| p.0));
    let y = Axis::new(points().map(|p| p.1));
    let (low, high) = ((y.low / y.step).floor() * y.step, (y.high / y.step).ceil() * y.step);
    Some((x, Axis { low, high, ..y }))
}

impl Axis {
    pub fn new(values: impl Iterator<Item = f64> + Clone) -> Self {
        let (mut low, mut high) =
            (values.clone().fold(f64::INFINITY, f64::min), values.fold(f64::NEG_INFINITY, f64::max));
        // A constant gets an axis around it; f64 must also be able to tell its ends apart.
        if high - low <= 1e-12 * low.abs().max(high.abs()) {
            let room = if low == 0.0 { 1.0 } else { 0.1 * low.abs() };
            (low, high) = (low - room, high + room);
        }
        // About five steps, the rough size rounded up to 1, 2, 5 or 10.
        let rough = (high - low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|nice| nice * power).into_iter().find(|&step| step >= rough * (1.0 - 1e-9));
        Self { low, high, step: step.unwrap_or(10.0 * power) }
    }

    pub fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    pub fn ticks(&self) -> impl Iterator<Item = f64> {
        // A hair of slack, as neither end need be an exact multiple.
        let (first, last) = ((self.low / self.step - 1e-6).ceil(), (self.high / self.step + 1e-6).floor());
        let step = self.step;
        (0..=(last - first) as u32).map(move |n| (first + f64::from(n)) * step)
    }

    /// All the digits that tell neighbouring ticks apart, and no more.
    pub fn label(&self, tick: f64) -> String {
        let largest = self.low.abs().max(self.high.abs());
        let decimals = (-self.step.log10() - 1e-9).ceil().max(0.0) as usize;
        let scientific = largest >= 1e6 || decimals > 4;
        let is_zero = tick.abs() < self.step / 2.0;
        match (scientific, is_zero) {
            (true, true) => "0".to_owned(),
            (true, false) => {
                let digits = (tick.abs() / self.step).log10().max(0.0).ceil() as usize;
                let label = format!("{tick:.digits$e}");
                let (mantissa, exponent) = label.split_once('e').expect("the format has an exponent");
                format!("{}e{exponent}", mantissa.parse::<f64>().expect("a mantissa is a number"))
            }
            // Never "-0.0".
            (false, _) => format!("{:.decimals$}", if is_zero { 0.0 } else { tick }),
        }
    }
}

/// `values` as a row of at most `width` blocks, each the mean of its share of them; a gap where none is finite.
pub fn sparkline(values: &[f64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let width = width.min(values.len());
    let mean = |column: usize| {
        let share = &values[column * values.len() / width..(column + 1) * values.len() / width];
        let finite: Vec<f64> = share.iter().copied().filter(|value| value.is_finite()).collect();
        finite.iter().map(|value| value / finite.len() as f64).sum::<f64>()
            + if finite.is_empty() { f64::NAN } else { 0.0 }
    };
    let means: Vec<f64> = (0..width).map(mean).collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let block = |mean: f64| match (mean - low) / (high - low) {
        _ if mean.is_nan() => ' ',
        share if share.is_nan() => BLOCKS[3],
        share => BLOCKS[(share * 7.0).round() as usize],
    };
    means.into_iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, points: impl IntoIterator<Item = (f64, f64)>) -> Series {
        Series { name: name.to_owned(), points: points.into_iter().collect() }
    }

    fn panel(title: &str, series: Vec<Series>) -> Panel {
        Panel { title: title.to_owned(), y_label: "nats".to_owned(), series }
    }

    fn noisy(n: usize, curve: impl Fn(f64) -> f64) -> Vec<(f64, f64)> {
        (0..n).map(|i| i as f64).map(|x| (x, curve(x) + 0.05 * (x * 12.9898).sin() * (x * 78.233).cos())).collect()
    }

    #[test]
    fn every_sort_of_series_is_drawn() {
        let panels = [
            panel("Loss", vec![series("train", noisy(100, |x| 0.3 + 0.4 * (-x / 30.0).exp()))]),
            panel(
                "Rewards",
                vec![
                    series("chosen", noisy(100, |x| x / 200.0)),
                    series("rejected", noisy(100, |x| -x / 80.0)),
                    series("margin", noisy(100, |x| x / 60.0)),
                ],
            ),
            panel("Held-out accuracy", vec![series("eval", [(0.0, 0.5), (50.0, 0.81), (100.0, 0.84)])]),
            panel("Learning rate", vec![series("lr", (0..100).map(|i| (f64::from(i), 5e-6 * f64::from(100 - i))))]),
            panel("Constant", vec![series("c", (0..100).map(|i| (f64::from(i), 1.0)))]),
            panel("One point", vec![series("one", [(3.0, -2.5e7)])]),
            panel("Gaps", vec![series("gaps", [(0.0, 1.0), (1.0, f64::NAN), (2.0, f64::INFINITY), (3.0, 2.0)])]),
            panel("Nothing < \"here\" & now", vec![series("none", [(0.0, f64::NAN)])]),
        ];
        let svg = curves_svg("A run & its <curves>", "step", &panels);
        // To look at it: CUVEE_PLOT=plot.svg cargo test --release plot
        if let Some(path) = std::env::var_os("CUVEE_PLOT") {
            std::fs::write(path, &svg).unwrap();
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert!(
            svg.contains("A run &amp; its &lt;curves&gt;") && svg.contains("Nothing &lt; &quot;here&quot; &amp; now")
        );
        assert_eq!(svg.matches("no data").count(), 1);
        assert_eq!(svg.matches("<circle").count(), 3 + 1 + 2);
        assert_eq!(svg.matches(">rejected<").count(), 1);
        assert_eq!(svg.matches(">train<").count(), 0, "one series needs no legend");
        // Four noisy lines with their averages, and five as they are.
        assert_eq!(svg.matches("<polyline").count(), 2 * 4 + 5);
        assert!(curves_svg("", "", &[]).ends_with("</svg>\n"));
    }

    #[test]
    fn ticks_are_round_numbers() {
        let labels = |values: &[f64]| {
            let axis = Axis::new(values.iter().copied());
            axis.ticks().map(|tick| axis.label(tick)).collect::<Vec<_>>()
        };
        assert_eq!(labels(&[0.0, 100.0]), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(labels(&[-0.31, 0.55]), ["-0.2", "0.0", "0.2", "0.4"]);
        assert_eq!(labels(&[0.0, 5e-4]), ["0.0000", "0.0001", "0.0002", "0.0003", "0.0004", "0.0005"]);
        assert_eq!(labels(&[0.0, 5e-6]), ["0", "1e-6", "2e-6", "3e-6", "4e-6", "5e-6"]);
        assert_eq!(labels(&[0.0, 4.0e7]), ["0", "1e7", "2e7", "3e7", "4e7"]);
        assert_eq!(labels(&[1.0e6, 1.2e6]), ["1e6", "1.05e6", "1.1e6", "1.15e6", "1.2e6"]);
        assert_eq!(labels(&[0.0]), ["-1.0", "-0.5", "0.0", "0.5", "1.0"]);
        assert_eq!(labels(&[f64::MIN_POSITIVE, -f64::MIN_POSITIVE]).len(), 5);
        assert!(labels(&[1.0, 1.0 + 1e-15]).len() > 2);
    }

    #[test]
    fn smoothing_keeps_straight_lines() {
        let straight: Vec<(f64, f64)> = (0..50).map(f64::from).map(|x| (x, 2.0 * x)).collect();
        let smoothed = smooth(&straight);
        assert_eq!((smoothed.len(), smoothed[0].0), (46, 2.0));
        assert!(smoothed.iter().all(|(x, y)| (y - 2.0 * x).abs() < 1e-9));
        assert!(!turns_often(&straight));
    }

    #[test]
    fn sparklines_span_their_values() {
        assert_eq!(sparkline(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 80), "▁▂▃▄▅▆▇█");
        assert_eq!(sparkline(&[0.0, 0.0, 7.0, 7.0], 2), "▁█");
        assert_eq!(sparkline(&[1.0, 1.0], 5), "▄▄");
        assert_eq!(sparkline(&[1.0, f64::NAN, 2.0], 5), "▁ █");
        assert_eq!(sparkline(&[], 5), "");
        assert_eq!(sparkline(&[1.0], 0), "");
    }
}
