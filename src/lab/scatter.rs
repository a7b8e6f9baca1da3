//! Points with error bars on two axes as a self-contained SVG: methods as colours and shapes, the points of one joined along
//! its grid, the front drawn. Better is always up and to the right.

use std::fmt::Write;

use crate::train::plot::{Axis, COLOURS, STYLE, escape, line, text};

/// One arm.
pub struct Dot {
    pub method: String,
    /// Where on the method's grid it is.
    pub label: String,
    pub at: (f64, f64),
    /// Standard deviations.
    pub spread: (f64, f64),
    pub on_front: bool,
}

pub struct Scatter {
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    /// Whether less is better.
    pub x_down: bool,
    pub y_down: bool,
    /// The method whose place is marked by lines.
    pub baseline: String,
    pub dots: Vec<Dot>,
}

const WIDTH: f64 = 940.0;
const HEIGHT: f64 = 560.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 680.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 500.0;
/// Points that are all shown, wherever they are.
const FEW: usize = 8;
const LETTER: f64 = 6.2;
const LINE: f64 = 12.0;

const MORE_STYLE: &str = "
.plot .bar { stroke: currentColor; stroke-width: 1; opacity: 0.55; } .plot .path { fill: none; stroke: currentColor; stroke-width: 1.2; opacity: 0.55; }
.plot .front { fill: none; stroke: #6b7280; stroke-width: 1.5; stroke-dasharray: 5 4; }
.plot text.label { fill: currentColor; stroke: #ffffff; stroke-width: 3px; paint-order: stroke; }
.plot .zero { stroke: #9ca3af; stroke-dasharray: 2 3; }
.plot .shape { fill: currentColor; stroke: #ffffff; stroke-width: 1; }
@media (prefers-color-scheme: dark) { .plot .front { stroke: #aab2bf; } .plot .zero { stroke: #5b6472; } .plot .shape, .plot text.label { stroke: #14171c; } }";

/// A rectangle that is taken: left, top, right, bottom.
type Area = [f64; 4];

fn apart(a: &Area, b: &Area) -> bool {
    a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1]
}

/// Both ends of what an axis shows: all that is not far out, so that one ruined arm does not squash the rest.
fn shown(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    if values.len() < FEW {
        return (values[0], values[values.len() - 1]);
    }
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    let (low, high) = (at(0.25), at(0.75));
    let reach = 3.0 * (high - low).max(1e-9 * high.abs());
    let kept = || values.iter().copied().filter(|x| (low - reach..=high + reach).contains(x));
    (kept().fold(f64::INFINITY, f64::min), kept().fold(f64::NEG_INFINITY, f64::max))
}

/// Values to places, with some room at the ends.
struct Scale {
    axis: Axis,
    down: bool,
    from: f64,
    to: f64,
}

impl Scale {
    fn new((low, high): (f64, f64), down: bool, from: f64, to: f64) -> Self {
        let room = 0.06 * (high - low);
        Self { axis: Axis::new([low - room, high + room].into_iter()), down, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let share = self.axis.share(value).clamp(0.0, 1.0);
        self.from + (self.to - self.from) * if self.down { 1.0 - share } else { share }
    }

    fn shows(&self, value: f64) -> bool {
        (0.0..=1.0).contains(&self.axis.share(value))
    }
}

pub fn scatter_svg(scatter: &Scatter) -> String {
    let title = escape(&scatter.title);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
         height=\"{HEIGHT}\" role=\"img\">\n<title>{title}</title>\n<style>{STYLE}{MORE_STYLE}\n</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n"
    );
    svg += &text("strong", (24.0, 34.0), "start", 17, &title);
    if scatter.dots.is_empty() {
        return svg + &text("none", (WIDTH / 2.0, HEIGHT / 2.0), "middle", 12, "no data") + "</svg>\n";
    }
    let ends = |of: fn(&Dot) -> (f64, f64)| {
        let (low, high) = shown(scatter.dots.iter().map(|dot| of(dot).0));
        let kept = scatter.dots.iter().map(of).filter(|(x, _)| (low..=high).contains(x));
        // Error bars are shown whole where they do not take more room than the points.
        let most = (high - low) / 2.0;
        kept.fold((low, high), |(low, high), (x, sd)| (low.min(x - sd.min(most)), high.max(x + sd.min(most))))
    };
    let x = Scale::new(ends(|dot| (dot.at.0, dot.spread.0)), scatter.x_down, LEFT, RIGHT);
    let y = Scale::new(ends(|dot| (dot.at.1, dot.spread.1)), scatter.y_down, BOTTOM, TOP);
    svg += &frame(scatter, &x, &y);
    svg += &front(scatter, &x, &y);
    let mut methods: Vec<&str> = Vec::new();
    scatter.dots.iter().for_each(|dot| {
        if !methods.contains(&dot.method.as_str()) {
            methods.push(&dot.method)
        }
    });
    for (index, method) in methods.iter().enumerate() {
        svg += &series(scatter.dots.iter().filter(|dot| dot.method == *method), index, &x, &y);
    }
    svg += &labels(scatter, &methods, &x, &y);
    svg += &legend(scatter, &methods, &x, &y);
    svg + "</svg>\n"
}

/// Figures below each other in one.
pub fn stacked_svg(panels: &[Scatter]) -> String {
    let high = HEIGHT * panels.len() as f64;
    let panel = |(at, panel): (usize, &Scatter)| {
        scatter_svg(panel).replacen("<svg ", &format!("<svg y=\"{}\" ", HEIGHT * at as f64), 1)
    };
    let panels: String = panels.iter().enumerate().map(panel).collect();
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {high}\" width=\"{WIDTH}\" height=\"{high}\">\n{panels}</svg>\n"
    )
}

fn frame(scatter: &Scatter, x: &Scale, y: &Scale) -> String {
    let mut svg = String::new();
    for tick in y.axis.ticks() {
        let at = y.place(tick);
        svg += &line("grid", (LEFT, at), (RIGHT, at));
        svg += &text("tick", (LEFT - 8.0, at + 4.0), "end", 11, &y.axis.label(tick));
    }
    for tick in x.axis.ticks() {
        let at = x.place(tick);
        svg += &line("grid", (at, TOP), (at, BOTTOM));
        svg += &text("tick", (at, BOTTOM + 18.0), "middle", 11, &x.axis.label(tick));
    }
    svg += &line("axis", (LEFT, BOTTOM), (RIGHT, BOTTOM));
    svg += &line("axis", (LEFT, TOP), (LEFT, BOTTOM));
    if let Some(Dot { at, .. }) = scatter.dots.iter().find(|dot| dot.method == scatter.baseline) {
        let (px, py) = (x.place(at.0), y.place(at.1));
        svg += &line("zero", (px, TOP), (px, BOTTOM));
        svg += &line("zero", (LEFT, py), (RIGHT, py));
    }
    let named = |name: &str, down: bool| match down {
        true => format!("{} (less is better: the axis is turned round)", escape(name)),
        false => escape(name),
    };
    svg += &text("name", ((LEFT + RIGHT) / 2.0, BOTTOM + 40.0), "middle", 12, &named(&scatter.x_label, scatter.x_down));
    let (middle, label) = ((TOP + BOTTOM) / 2.0, named(&scatter.y_label, scatter.y_down));
    svg + &format!("<text transform=\"translate(18 {middle}) rotate(-90)\" text-anchor=\"middle\">{label}</text>\n")
}

/// The front as steps: between two of its arms nothing better was found.
fn front(scatter: &Scatter, x: &Scale, y: &Scale) -> String {
    let on = scatter.dots.iter().filter(|dot| dot.on_front && x.shows(dot.at.0) && y.shows(dot.at.1));
    let mut places: Vec<(f64, f64)> = on.map(|dot| (x.place(dot.at.0), y.place(dot.at.1))).collect();
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut path = Vec::new();
    for (at, (px, py)) in places.iter().enumerate() {
        if at > 0 {
            path.push(format!("{:.1},{py:.1}", places[at - 1].0));
        }
        path.push(format!("{px:.1},{py:.1}"));
    }
    format!("<polyline class=\"front\" points=\"{}\"/>\n", path.join(" "))
}

fn series<'a>(dots: impl Iterator<Item = &'a Dot>, index: usize, x: &Scale, y: &Scale) -> String {
    let colour = index % COLOURS;
    let (mut bars, mut shapes, mut path) = (String::new(), String::new(), Vec::new());
    for dot in dots {
        let (at, (wide, high)) = ((x.place(dot.at.0), y.place(dot.at.1)), dot.spread);
        // Points that are nowhere on a grid have no order.
        if !dot.label.is_empty() {
            path.push(format!("{:.1},{:.1}", at.0, at.1));
        }
        if wide > 0.0 && y.shows(dot.at.1) {
            bars += &line("bar", (x.place(dot.at.0 - wide), at.1), (x.place(dot.at.0 + wide), at.1));
        }
        if high > 0.0 && x.shows(dot.at.0) {
            bars += &line("bar", (at.0, y.place(dot.at.1 - high)), (at.0, y.place(dot.at.1 + high)));
        }
        shapes += &shape(index, at, dot.on_front);
    }
    let path = path.join(" ");
    format!("<g class=\"c{colour}\">\n<polyline class=\"path\" points=\"{path}\"/>\n{bars}{shapes}</g>\n")
}

/// Colours repeat after six methods, shapes after five: thirty can be told apart.
fn shape(index: usize, (x, y): (f64, f64), large: bool) -> String {
    let r = if large { 6.5 } else { 4.5 };
    let polygon = |corners: &[(f64, f64)]| {
        let corners: Vec<String> =
            corners.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + r * dx, y + r * dy)).collect();
        format!("<polygon class=\"shape\" points=\"{}\"/>\n", corners.join(" "))
    };
    match index % 5 {
        0 => format!("<circle class=\"shape\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r}\"/>\n"),
        1 => polygon(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
        2 => polygon(&[(0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)]),
        3 => polygon(&[(0.0, -1.2), (1.2, 0.0), (0.0, 1.2), (-1.2, 0.0)]),
        _ => polygon(&[(0.0, 1.2), (1.1, -0.8), (-1.1, -0.8)]),
    }
}

/// Names of points where there is room: beside its point, or nowhere. The legend and the table have them all.
fn labels(scatter: &Scatter, methods: &[&str], x: &Scale, y: &Scale) -> String {
    let places: Vec<(f64, f64)> = scatter.dots.iter().map(|dot| (x.place(dot.at.0), y.place(dot.at.1))).collect();
    let mut taken: Vec<Area> = places.iter().map(|(x, y)| [x - 6.0, y - 6.0, x + 6.0, y + 6.0]).collect();
    let mut svg = String::new();
    for (dot, (px, py)) in scatter.dots.iter().zip(places) {
        let alone = scatter.dots.iter().filter(|other| other.method == dot.method).count() == 1;
        let label = if alone { dot.method.as_str() } else { dot.label.as_str() };
        // The numbers of a grid are enough: its keys are in the legend.
        let words: Vec<&str> = label.split(' ').map(|word| word.rsplit('=').next().unwrap_or(word)).collect();
        let label = if alone { label.to_string() } else { words.join(" ") };
        let wide = LETTER * label.chars().count() as f64;
        // Beside the error bars first.
        let (left, middle) = (-7.0 - wide, -wide / 2.0);
        let corners = [(7.0, -5.0), (7.0, 13.0), (left, -5.0), (left, 13.0), (middle, -10.0), (middle, 19.0)];
        let corners = corners.into_iter().chain([(8.0, 4.0), (left - 1.0, 4.0)]);
        let area = |(dx, dy): (f64, f64)| [px + dx, py + dy - 0.8 * LINE, px + dx + wide, py + dy + 0.2 * LINE];
        let inside = |a: &Area| a[0] > LEFT && a[2] < RIGHT && a[1] > TOP && a[3] < BOTTOM;
        let free = corners.map(|corner| (corner, area(corner)));
        let free = free.into_iter().find(|(_, area)| inside(area) && taken.iter().all(|other| apart(other, area)));
        if let Some(((dx, dy), area)) = free {
            taken.push(area);
            let colour = methods.iter().position(|method| *method == dot.method).unwrap_or(0) % COLOURS;
            svg += &text(&format!("label c{colour}"), (px + dx, py + dy), "start", 10, &escape(&label));
        }
    }
    svg
}

/// Every method with its sign, the keys of its grid, and what of it lies outside the figure.
fn legend(scatter: &Scatter, methods: &[&str], x: &Scale, y: &Scale) -> String {
    let (left, mut at) = (RIGHT + 24.0, TOP + 8.0);
    let mut svg = String::new();
    for (index, method) in methods.iter().enumerate() {
        let dots: Vec<&Dot> = scatter.dots.iter().filter(|dot| dot.method == *method).collect();
        let mut keys: Vec<&str> =
            dots[0].label.split(' ').filter_map(|word| word.split_once('=')).map(|w| w.0).collect();
        keys.dedup();
        let keys = if keys.is_empty() { String::new() } else { format!(": {}", keys.join(", ")) };
        let _ =
            writeln!(svg, "<g class=\"c{}\">{}</g>", index % COLOURS, shape(index, (left, at - 4.0), false).trim_end());
        svg += &text("key", (left + 12.0, at), "start", 12, &escape(&format!("{method}{keys}")));
        at += 18.0;
        for dot in dots.iter().filter(|dot| !x.shows(dot.at.0) || !y.shows(dot.at.1)) {
            let outside = format!("outside: {} ({:.2}, {:.2})", dot.label, dot.at.0, dot.at.1);
            svg += &text("tick", (left + 12.0, at - 2.0), "start", 10, &escape(&outside));
            at += 15.0;
        }
    }
    svg += &line("front", (left - 8.0, at), (left + 8.0, at));
    svg + &text("key", (left + 12.0, at + 4.0), "start", 12, "front (larger signs)")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot(method: &str, label: &str, at: (f64, f64)) -> Dot {
        Dot { method: method.into(), label: label.into(), at, spread: (0.1, 0.02), on_front: method == "ondare" }
    }

    #[test]
    fn labels_keep_apart_and_what_is_far_out_is_said() {
        let mut dots: Vec<Dot> = (0..40)
            .map(|i| dot("dpo", &format!("beta={i}"), (f64::from(i % 7) / 7.0, 4.0 + f64::from(i % 5) / 9.0)))
            .collect();
        dots.extend([
            dot("sft", "", (0.0, 3.9)),
            dot("ondare", "merge_weight=1e-5", (0.8, 3.95)),
            dot("wild", "", (1.0, 90.0)),
        ]);
        let scatter = Scatter {
            title: "<A> & b".into(),
            x_label: "reward".into(),
            y_label: "nll".into(),
            x_down: false,
            y_down: true,
            baseline: "sft".into(),
            dots,
        };
        let svg = scatter_svg(&scatter);
        // To look at it: CUVEE_PLOT=plot.svg cargo test --release scatter
        if let Some(path) = std::env::var_os("CUVEE_PLOT") {
            std::fs::write(path, &svg).unwrap();
        }
        assert!(svg.contains("&lt;A&gt; &amp; b") && svg.contains("outside:  (1.00, 90.00)"), "{svg}");
        assert!(svg.contains("ondare: merge_weight") && svg.contains("less is better"));
        let areas: Vec<Area> = svg
            .lines()
            .filter(|line| line.contains("class=\"label"))
            .map(|line| {
                let of = |key: &str| {
                    let (_, rest) = line.split_once(&format!(" {key}=\"")).unwrap();
                    rest.split_once('"').unwrap().0.parse::<f64>().unwrap()
                };
                let wide = LETTER * line.split(['<', '>']).nth(2).unwrap().chars().count() as f64;
                [of("x"), of("y") - 9.0, of("x") + wide, of("y") + 2.0]
            })
            .collect();
        assert!(areas.len() > 5, "{svg}");
        for (i, a) in areas.iter().enumerate() {
            assert!(areas[..i].iter().all(|b| apart(a, b)), "{a:?}");
        }
        let nothing = Scatter { dots: Vec::new(), ..scatter };
        assert!(scatter_svg(&nothing).contains("no data"));
    }
}
