//! Gold reward over distance as an SVG: points with what their group is fitted by, its band, and its peak.

use std::fmt::Write;

use crate::scaling::{Fit, Interval};
use crate::train::plot::{Axis, COLOURS, STYLE, escape, line, text};

/// A point of the figure.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Dot {
    pub d: f64,
    pub gold: f64,
    /// 0 where it is not known.
    pub stderr: f64,
    /// Counts in the fit.
    pub valid: bool,
}

/// What has one colour.
pub struct Group<'a> {
    pub name: String,
    pub dots: Vec<Dot>,
    pub fit: Option<&'a Fit>,
}

pub struct Hump<'a> {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    pub groups: Vec<Group<'a>>,
}

const WIDTH: f64 = 620.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 604.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 318.0;
/// Points of a drawn curve.
const CURVE: usize = 80;
/// How far beyond the points' own range of gold a curve or band may be drawn.
const BEYOND: f64 = 0.35;

/// Curves are drawn over the range of their group's points alone: beyond it they are guesses.
pub fn hump_svg(figure: &Hump) -> String {
    let dots =
        || figure.groups.iter().flat_map(|group| &group.dots).filter(|dot| dot.d.is_finite() && dot.gold.is_finite());
    let title = escape(&figure.title);
    let rows = figure.groups.len().div_ceil(3) as f64;
    let height = HEIGHT + 18.0 * rows;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\">\n<title>{title}</title>\n<style>{STYLE}\n.plot .band {{ fill: currentColor; opacity: 0.15; }} \
         .plot .hollow {{ fill: none; stroke: currentColor; }}\n</style>\n<rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\"/>\n"
    );
    svg += &text("strong", (LEFT, 26.0), "start", 15, &title);
    if dots().next().is_none() {
        return svg + &text("none", (WIDTH / 2.0, HEIGHT / 2.0), "middle", 12, "no data") + "</svg>\n";
    }
    // A curve starts at 0.
    let start = figure.groups.iter().any(|group| group.fit.is_some()).then_some(0.0);
    let x = Axis::new(with_zero(dots().map(|dot| dot.d).chain(start).collect()).into_iter());
    let reach = with_zero(dots().flat_map(|dot| [dot.gold - dot.stderr, dot.gold + dot.stderr]).collect());
    let (low, high) =
        reach.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), y| (low.min(*y), high.max(*y)));
    let room = BEYOND * (high - low);
    let inside = |y: f64| y.clamp(low - room, high + room);
    let curve = |group: &Group, of: &dyn Fn(&Fit, f64) -> f64| -> Vec<(f64, f64)> {
        let Some(fit) = group.fit else { return Vec::new() };
        let most = group.dots.iter().filter(|dot| dot.d.is_finite()).map(|dot| dot.d).fold(0.0, f64::max);
        (0..=CURVE).map(|k| most * k as f64 / CURVE as f64).map(|d| (d, of(fit, d))).collect()
    };
    let curves: Vec<Vec<(f64, f64)>> =
        figure.groups.iter().map(|group| curve(group, &|fit, d| inside(fit.at(d)))).collect();
    let ends = curves.iter().flatten().map(|point| point.1).chain([low, high]);
    let y = Axis::new(ends.collect::<Vec<_>>().into_iter());
    let place = |(px, py): (f64, f64)| (LEFT + x.share(px) * (RIGHT - LEFT), BOTTOM - y.share(py) * (BOTTOM - TOP));
    svg += &axes(figure, (&x, &y), &place);
    for (at, (group, curve_points)) in figure.groups.iter().zip(&curves).enumerate() {
        let colour = at % COLOURS;
        let edge = |end: fn(Interval) -> f64| {
            curve(group, &|fit, d| {
                fit.band(d).map_or(f64::NAN, |band| inside(end(band)).clamp(y_end(&y, 0.0), y_end(&y, 1.0)))
            })
        };
        let band: Vec<(f64, f64)> =
            edge(|band| band.low).into_iter().chain(edge(|band| band.high).into_iter().rev()).collect();
        if !band.is_empty() && band.iter().all(|point| point.1.is_finite()) {
            let _ = writeln!(svg, "<polygon class=\"band c{colour}\" points=\"{}\"/>", list(&band, &place));
        }
        if !curve_points.is_empty() {
            let _ = writeln!(svg, "<polyline class=\"line c{colour}\" points=\"{}\"/>", list(curve_points, &place));
        }
        svg += &marks(group, colour, &place);
        svg += &key(group, at, colour);
    }
    svg + "</svg>\n"
}

/// And 0, where it is not far from them.
fn with_zero(mut values: Vec<f64>) -> Vec<f64> {
    let (low, high) =
        values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(*x), high.max(*x)));
    if low < 0.5 * high {
        values.push(0.0);
    }
    values
}

/// The value at this share of an axis.
fn y_end(y: &Axis, share: f64) -> f64 {
    let (first, last) = (y.share(0.0), y.share(1.0));
    (share - first) / (last - first)
}

fn axes(figure: &Hump, (x, y): (&Axis, &Axis), place: &dyn Fn((f64, f64)) -> (f64, f64)) -> String {
    let mut svg = String::new();
    for tick in y.ticks() {
        let at = place((0.0, tick)).1;
        svg += &line("grid", (LEFT, at), (RIGHT, at));
        svg += &text("tick", (LEFT - 8.0, at + 4.0), "end", 11, &y.label(tick));
    }
    for tick in x.ticks() {
        let at = place((tick, 0.0)).0;
        svg += &line("axis", (at, BOTTOM), (at, BOTTOM + 4.0));
        svg += &text("tick", (at, BOTTOM + 18.0), "middle", 11, &x.label(tick));
    }
    svg += &line("axis", (LEFT, BOTTOM), (RIGHT, BOTTOM));
    svg += &text("name", ((LEFT + RIGHT) / 2.0, BOTTOM + 36.0), "middle", 12, &escape(&figure.x_label));
    let (middle, label) = ((TOP + BOTTOM) / 2.0, escape(&figure.y_label));
    svg + &format!("<text transform=\"translate(16 {middle}) rotate(-90)\" text-anchor=\"middle\">{label}</text>\n")
}

fn list(points: &[(f64, f64)], place: &dyn Fn((f64, f64)) -> (f64, f64)) -> String {
    points.iter().map(|point| place(*point)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ")
}

/// Every point with its standard error, hollow where it does not count; where the curve is highest, a dashed line.
fn marks(group: &Group, colour: usize, place: &dyn Fn((f64, f64)) -> (f64, f64)) -> String {
    let mut svg = String::new();
    for Dot { d, gold, stderr, valid } in group.dots.iter().filter(|dot| dot.d.is_finite() && dot.gold.is_finite()) {
        let (x, y) = place((*d, *gold));
        if *stderr > 0.0 {
            let (up, down) = (place((*d, gold + stderr)).1, place((*d, gold - stderr)).1);
            svg += &line(&format!("line raw c{colour}"), (x, up), (x, down));
        }
        let class = if *valid { "dot" } else { "hollow" };
        let _ = writeln!(svg, "<circle class=\"{class} c{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
    }
    let most = group.dots.iter().map(|dot| dot.d).fold(0.0, f64::max);
    if let Some(peak) = group.fit.and_then(|fit| fit.peak).filter(|peak| peak.d <= most) {
        let x = place((peak.d, 0.0)).0;
        svg += &line(&format!("line raw c{colour}"), (x, TOP), (x, BOTTOM));
    }
    svg
}

fn key(group: &Group, at: usize, colour: usize) -> String {
    let (x, y) = (LEFT + 180.0 * (at % 3) as f64, BOTTOM + 58.0 + 18.0 * (at / 3) as f64);
    let dot = format!("<circle class=\"dot c{colour}\" cx=\"{x:.1}\" cy=\"{:.1}\" r=\"4\"/>\n", y - 4.0);
    dot + &text("key", (x + 10.0, y), "start", 12, &escape(&group.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaling::{Point, fits};

    #[test]
    fn what_is_drawn_is_finite_and_what_does_not_count_is_hollow() {
        let of = |k: u32| Point { d: f64::from(k) / 3.0, gold: f64::from(k) * (0.3 - f64::from(k) / 60.0), run: 0 };
        let points: Vec<Point> = (0..20).map(of).collect();
        let fits = fits(&points, 100, 1);
        let dots = points.iter().map(|p| Dot { d: p.d, gold: p.gold, stderr: 0.1, valid: p.run == 0 });
        let dots: Vec<Dot> = dots.chain([Dot { d: 5.0, gold: 9.0, stderr: 0.0, valid: false }]).collect();
        let group = Group { name: "a <b>".into(), dots, fit: fits.first() };
        let empty = Group { name: "none".into(), dots: vec![], fit: None };
        let [title, x_label, y_label] = ["t & u", "d", "gold"].map(String::from);
        let mut figure = Hump { title, x_label, y_label, groups: vec![group, empty] };
        let svg = hump_svg(&figure);
        assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.contains("a &lt;b&gt;"), "{svg}");
        assert_eq!((svg.matches("class=\"hollow").count(), svg.matches("class=\"band").count()), (1, 1));
        figure.groups.clear();
        assert!(hump_svg(&figure).contains("no data"));
    }
}
