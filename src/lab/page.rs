//! The report of a sweep as one page: no script, no network, figures inside, readable in print.

use std::fmt::Write;
use std::path::Path;

use super::equal::{Arm, Matched, Reached};
use super::fit::{COLUMNS, cells, remarks};
use super::hump::{Dot, Group, Hump, hump_svg};
use super::overopt::{Cell, Look, Overopt};
use super::race::Place;
use crate::checkpoint::json::write_json;
use crate::checkpoint::write_file;
use crate::error::Result;
use crate::train::plot::{Panel, Series, curves_svg, escape};

pub const PAGE: &str = "report.html";
pub const NUMBERS: &str = "report.json";

pub const STYLE: &str = "
:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 12.5px; } td, th { padding: 2px 8px; text-align: right; border-bottom: 1px solid #9ca3af55; }
td:first-child, th:first-child { text-align: left; } figure { margin: 1.5rem 0; break-inside: avoid; } svg { max-width: 100%; height: auto; }
figcaption, .how { font-size: 13px; opacity: 0.8; } code { font-size: 12.5px; overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
@media print { body { max-width: none; margin: 0; } h2 { break-after: avoid; } .scroll { overflow: visible; } }";

/// Writes `report.html` and, beside it, all its numbers as `report.json`.
pub fn write_report(dir: &Path) -> Result<Overopt> {
    let found = Overopt::read(dir)?;
    write_json(&dir.join(NUMBERS), &found.to_json())?;
    let page = page(&found, dir);
    write_file(&dir.join(PAGE), |out| out.write_all(page.as_bytes()))?;
    Ok(found)
}

fn page(found: &Overopt, dir: &Path) -> String {
    let (all, begun) = (
        found.plan.cells.len(),
        (0..found.plan.cells.len()).filter(|cell| found.of_cell(*cell).next().is_some()).count(),
    );
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\n\
         <link rel=\"icon\" href=\"data:,\"><title>Over-optimisation</title><style>{STYLE}</style></head><body>\n\
         <h1>Where alignment starts to hurt</h1>\n<p>{begun} of {all} runs of {} have been evaluated. Distance is d = √KL(policy ‖ reference), \
         nats, on {} completions of held-out prompts; the gold reward is shifted and scaled to mean 0 and standard deviation 1 before \
         training, for each size.</p>\n",
        code(&found.plan.recipe.display().to_string()),
        found.plan.samples
    );
    page += "<ul>\n";
    for (group, verdict) in found.verdicts() {
        let _ = writeln!(page, "<li><b>{}</b>: {}</li>", escape(&group), escape(&verdict));
    }
    page += "</ul>\n<h2>Gold reward over distance</h2>\n";
    humps(found, &mut page);
    dynamics(found, &mut page);
    predictors(found, &mut page);
    lengths(found, &mut page);
    pareto(found, &mut page);
    equals(found, &mut page);
    race(found, &mut page);
    fit_table(found, &mut page);
    cell_table(found, &mut page);
    reproduce(found, dir, &mut page);
    page + "</body></html>\n"
}

fn code(text: &str) -> String {
    format!("<code>{}</code>", escape(text))
}

pub fn figure(page: &mut String, svg: &str, caption: &str) {
    let _ = writeln!(page, "<figure>{svg}<figcaption>{caption}</figcaption></figure>");
}

pub fn table(page: &mut String, head: &[&str], rows: &[Vec<String>]) {
    let cells = |tag: &str, row: &[String]| {
        row.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect::<String>()
    };
    let head: Vec<String> = head.iter().map(|cell| cell.to_string()).collect();
    let _ = writeln!(page, "<div class=\"scroll\"><table><thead><tr>{}</tr></thead><tbody>", cells("th", &head));
    rows.iter().for_each(|row| *page += &format!("<tr>{}</tr>\n", cells("td", row)));
    *page += "</tbody></table></div>\n";
}

fn number(x: f64) -> String {
    match x {
        _ if !x.is_finite() => "–".into(),
        _ if x != 0.0 && x.abs() < 1e-3 => format!("{x:.1e}"),
        _ => format!("{x:.3}"),
    }
}

fn humps(found: &Overopt, page: &mut String) {
    for size in found.sizes() {
        let of_size = |group: &str| found.plan.cells.iter().any(|cell| cell.group == group && cell.size == size);
        let groups: Vec<Group> =
            found.fitted.groups.iter().filter(|group| of_size(&group.name)).map(|group| group.drawn()).collect();
        let figure_of = Hump {
            title: format!("Starting from {size}"),
            x_label: "d = √KL from the reference".into(),
            y_label: "gold reward".into(),
            groups,
        };
        figure(
            page,
            &hump_svg(&figure_of),
            "Every evaluation of every beta and seed with its standard error; the log form with its 95 % band over what was measured; a \
             thin upright line is its peak. Hollow points do not count: their completions repeat themselves or are too unlikely under the \
             reference.",
        );
    }
}

/// The mean over seeds at each evaluation of a beta.
fn path(found: &Overopt, group: &str, beta: Option<f64>, of: &dyn Fn(&Look) -> (f64, f64)) -> Vec<(f64, f64)> {
    let mut by_step: Vec<(f64, Vec<(f64, f64)>)> = Vec::new();
    for look in found.of_group(group).filter(|look| found.plan.cells[look.cell].beta == beta) {
        match by_step.iter_mut().find(|(step, _)| *step == look.step) {
            Some((_, points)) => points.push(of(look)),
            None => by_step.push((look.step, vec![of(look)])),
        }
    }
    by_step.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mean =
        |points: &[(f64, f64)], k: fn(&(f64, f64)) -> f64| points.iter().map(k).sum::<f64>() / points.len() as f64;
    by_step.iter().map(|(_, points)| (mean(points, |p| p.0), mean(points, |p| p.1))).collect()
}

fn betas(found: &Overopt, group: &str) -> Vec<Option<f64>> {
    let mut betas: Vec<Option<f64>> =
        found.plan.cells.iter().filter(|cell| cell.group == group).map(|cell| cell.beta).collect();
    betas.sort_by(|a, b| a.unwrap_or(0.0).total_cmp(&b.unwrap_or(0.0)));
    betas.dedup();
    betas
}

fn label(beta: Option<f64>) -> String {
    beta.map_or("all".into(), |beta| format!("β {beta}"))
}

fn dynamics(found: &Overopt, page: &mut String) {
    *page += "<h2>Within the run</h2>\n";
    let panel = |name: &String, y_label: &str, of: &dyn Fn(&Look) -> (f64, f64)| {
        let series = |beta: Option<f64>| Series { name: label(beta), points: path(found, name, beta, of) };
        Panel {
            title: name.clone(),
            y_label: y_label.into(),
            series: betas(found, name).into_iter().map(series).collect(),
        }
    };
    let names: Vec<String> = found.groups().iter().map(|group| group.name.clone()).collect();
    let gold: Vec<Panel> =
        names.iter().map(|name| panel(name, "gold reward", &|look| (look.epoch, look.gold))).collect();
    figure(
        page,
        &curves_svg("Gold reward over epochs", "epoch", &gold),
        "Means over seeds. Small betas spend more KL in as many steps.",
    );
    let spent: Vec<Panel> = names.iter().map(|name| panel(name, "d", &|look| (look.epoch, look.d))).collect();
    figure(page, &curves_svg("Distance over epochs", "epoch", &spent), "Means over seeds.");
}

fn predictors(found: &Overopt, page: &mut String) {
    *page += "<h2>Do loss and implicit accuracy tell?</h2>\n";
    for (name, title) in [("loss", "held-out loss"), ("accuracy", "held-out implicit accuracy")] {
        let group = |name_of: &str| {
            let dots = found.of_group(name_of).filter(|look| look.step > 0.0);
            let dot = |look: &Look| Dot { d: look.of(name), gold: look.gold, stderr: 0.0, valid: look.valid };
            Group { name: name_of.to_string(), dots: dots.map(dot).collect(), fit: None }
        };
        let groups = found.groups().iter().map(|g| group(&g.name)).collect();
        let svg = hump_svg(&Hump {
            title: format!("Gold reward against {title}"),
            x_label: title.into(),
            y_label: "gold reward".into(),
            groups,
        });
        figure(page, &svg, "One point for each evaluation. If it told, points would lie on a line.");
    }
    let row = |name: &str| {
        let cell = |what: &str| number(found.told(name, what));
        vec![name.to_string(), cell("loss"), cell("accuracy")]
    };
    let rows: Vec<Vec<String>> = found.groups().iter().map(|group| row(&group.name)).collect();
    table(page, &["correlation with the gold reward", "loss", "implicit accuracy"], &rows);
}

fn lengths(found: &Overopt, page: &mut String) {
    *page += "<h2>Length</h2>\n";
    let groups = found.groups().into_iter().map(|group| {
        let dot =
            |look: &Look| Dot { d: look.d, gold: look.of("completions/mean_length"), stderr: 0.0, valid: look.valid };
        Group { name: group.name.clone(), dots: found.of_group(&group.name).map(dot).collect(), fit: None }
    });
    let hump = Hump {
        title: "Length over distance".into(),
        x_label: "d = √KL from the reference".into(),
        y_label: "tokens of a completion".into(),
        groups: groups.collect(),
    };
    figure(page, &hump_svg(&hump), "Mean length of the sampled completions.");
    let mut rows = Vec::new();
    for group in found.groups() {
        for beta in betas(found, &group.name) {
            let last = |of: &str| {
                path(found, &group.name, beta, &|look| (look.epoch, look.of(of)))
                    .last()
                    .map_or(f64::NAN, |point| point.1)
            };
            let cells = ["completions/mean_length", "length/gamma", "length/r2"].map(|name| number(last(name)));
            rows.push([vec![group.name.clone(), label(beta)], cells.to_vec()].concat());
        }
    }
    table(page, &["at the end", "beta", "tokens", "γ, nats a token", "R²"], &rows);
    *page += "<p class=\"how\">γ and R² are of the line c + γ|y| through the log-ratios ln π/ref of the sampled completions: how much of what the \
              policy learned is length alone.</p>\n";
}

fn pareto(found: &Overopt, page: &mut String) {
    let Some(tax) = &found.tax else { return };
    let groups = found.groups().into_iter().map(|group| {
        let dot = |look: &Look| Dot { d: look.of(tax), gold: look.gold, stderr: look.gold_stderr, valid: look.valid };
        Group { name: group.name.clone(), dots: found.of_group(&group.name).map(dot).collect(), fit: None }
    });
    let hump = Hump {
        title: "Gold reward against what it costs".into(),
        x_label: format!("{tax}, less is better"),
        y_label: "gold reward".into(),
        groups: groups.collect(),
    };
    let _ = writeln!(page, "<h2>What it costs</h2>");
    figure(page, &hump_svg(&hump), "Every evaluation. The best lie up and to the left.");
}

/// `1.21 ± 0.03`, of those runs that get there.
fn there(found: &Reached, runs: usize, most: f64) -> String {
    let spread = if found.sd.is_finite() { format!(" ± {:.2}", found.sd) } else { String::new() };
    match found.runs {
        0 => format!("never (≤ {most:.2})"),
        n if n < runs => format!("{:.2}{spread} ({n} of {runs})", found.mean),
        _ => format!("{:.2}{spread}", found.mean),
    }
}

fn equals(found: &Overopt, page: &mut String) {
    let matched = Matched::of(found);
    *page += "<h2>At equal distance, at equal gold</h2>\n";
    let mut write = |what: &str, at: &[f64], of: &dyn Fn(&Arm) -> (Vec<Reached>, f64)| {
        let heads: Vec<String> = at.iter().map(|at| format!("{what} {at}")).collect();
        let row = |arm: &Arm| {
            let beta = if arm.together { "all".into() } else { label(arm.beta) };
            let (found, most) = of(arm);
            let cells = found.iter().map(|found| there(found, arm.runs, most));
            [arm.group.clone(), beta].into_iter().chain(cells).collect::<Vec<_>>()
        };
        let head: Vec<&str> = ["arm", "beta"].into_iter().chain(heads.iter().map(String::as_str)).collect();
        table(page, &head, &matched.arms.iter().map(row).collect::<Vec<_>>());
    };
    write("gold at d =", &matched.distances, &|arm| (arm.gold.clone(), arm.furthest));
    write("d for gold", &matched.levels, &|arm| (arm.d.clone(), arm.best));
    *page += "<p class=\"how\">Where a run first goes as far, or becomes as good, in a straight line between two evaluations; ± is the \
              standard deviation over the runs that get there (seeds; of \"all\", seeds and betas), and how many do where some do not. \
              What never gets there shows the most that it came to. A first time favours runs that are looked at more often, and luck.</p>\n";
}

fn race(found: &Overopt, page: &mut String) {
    let Some(halving) = &found.plan.halving else { return };
    let bound = halving.constraint.as_ref();
    *page += "<h2>Who left the race</h2>\n";
    let known = |value: Option<f64>| value.map_or("–".into(), number);
    let row = |place: &Place| {
        let (beta, what) = (label(place.beta), if place.goes_on { "goes on" } else { "leaves" });
        vec![
            place.group.clone(),
            beta,
            place.rung.to_string(),
            known(place.step),
            known(place.d),
            known(place.gold),
            known(place.bounded),
            what.into(),
            place.why.clone(),
        ]
    };
    let metric = bound.map_or("bound".into(), |bound| bound.metric.clone());
    let head = ["arm", "beta", "rung", "step", "d", "gold", &metric, "", "why"];
    table(page, &head, &found.places.iter().map(row).collect::<Vec<_>>());
    let must = bound.map_or(String::new(), |bound| format!(", of those that keep {}", code(&bound.to_string())));
    let _ = writeln!(
        page,
        "<p class=\"how\">At each rung, a share of a run's steps, {} of those that start from the same model go on at most, by their gold \
         reward there{must}; means over seeds. Whoever leaves stops there: its later points are not missing by chance.</p>",
        percent(halving.keep)
    );
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

fn fit_table(found: &Overopt, page: &mut String) {
    *page += "<h2>Fits</h2>\n";
    let rows = found.groups().into_iter().flat_map(|group| {
        group.fits.iter().map(|fit| [vec![group.name.clone()], cells(fit)].concat()).collect::<Vec<_>>()
    });
    let head: Vec<&str> = std::iter::once("group").chain(COLUMNS).collect();
    table(page, &head, &rows.collect::<Vec<_>>());
    *page += "<p class=\"how\">Least squares. Intervals hold 95 %, from resampled runs. \"left out\": error of each point predicted from all others; \
              \"far half\": fitted to the half with small d, error on the other; \"best in\": share of the resamples in which the form predicts \
              what was not drawn better than the others do.</p>\n<ul>\n";
    for group in found.groups() {
        remarks(group)
            .iter()
            .for_each(|line| *page += &format!("<li>{}: {}</li>\n", escape(&group.name), escape(line)));
    }
    *page += "</ul>\n";
}

fn cell_table(found: &Overopt, page: &mut String) {
    *page += "<h2>Runs</h2>\n";
    let row = |(at, cell): (usize, &Cell)| {
        let looks: Vec<&Look> = found.of_cell(at).collect();
        let Some(last) = looks.last() else {
            return [vec![cell.name.clone()], vec!["–".to_string(); 8]].concat();
        };
        let best = looks.iter().max_by(|a, b| a.gold.total_cmp(&b.gold)).expect("there is a last one");
        let invalid = looks.iter().filter(|look| !look.valid).count();
        let validity = if invalid == 0 { "yes".into() } else { format!("{invalid} of {} not", looks.len()) };
        vec![
            cell.name.clone(),
            format!("{} at step {}", number(best.gold), best.step),
            number(best.d),
            number(last.gold),
            number(last.d),
            number(last.of("gold_win_rate")),
            number(last.of("completions/distinct_2")),
            number(last.of("completions/ref_logp")),
            validity,
        ]
    };
    let rows: Vec<Vec<String>> = found.plan.cells.iter().enumerate().map(row).collect();
    let head =
        ["run", "best gold", "its d", "last gold", "its d", "win rate", "distinct-2", "ref log-prob", "gold valid"];
    table(page, &head, &rows);
    *page += "<p class=\"how\">Win rate, distinct-2 and the log-probability under the reference (nats a token) are of the last evaluation. A best of \
              many is too good by chance.</p>\n";
}

fn reproduce(found: &Overopt, dir: &Path, page: &mut String) {
    let folder = dir.display();
    *page += "<h2>Again</h2>\n<ul>\n";
    for (what, command) in [
        ("everything", format!("cuvee lab sweep {}", found.plan.recipe.display())),
        ("this page", format!("cuvee lab report {folder}")),
        (
            "the fits and their figure, from the points of the JSON",
            format!("cuvee lab fit {folder}/{NUMBERS} --output-dir {folder}/fit"),
        ),
    ] {
        let _ = writeln!(page, "<li>{what}: {}</li>", code(&command));
    }
    *page += "</ul>\n<p class=\"how\">Every number of every figure is in <code>report.json</code>: points (humps, dynamics, scatters, length, cost), fits, \
              correlation_with_gold, equal, race, verdicts. Single runs:</p>\n<ul>\n";
    found.plan.cells.iter().for_each(|cell| *page += &format!("<li>{}</li>\n", code(&cell.command)));
    *page += "</ul>\n";
}

#[cfg(test)]
mod tests {
    use super::super::overopt::tests::sweep;
    use super::*;

    #[test]
    fn the_page_is_whole_alone_and_says_what_the_json_says() {
        let folder = tempfile::tempdir().unwrap();
        sweep(folder.path());
        let found = write_report(folder.path()).unwrap();
        let page = std::fs::read_to_string(folder.path().join(PAGE)).unwrap();
        // To look at it: CUVEE_PLOT=report.html cargo test --release the_page
        if let Some(path) = std::env::var_os("CUVEE_PLOT") {
            std::fs::write(path, &page).unwrap();
        }
        assert!(!page.contains("NaN") && !page.contains("<script") && !page.contains("src="), "self-contained");
        assert!(!page.replace("http://www.w3.org/2000/svg", "").contains("http"), "no network");
        assert!(page.contains("cuvee train &lt;x&gt;") && page.contains("5 of 6 runs"));
        for (open, close) in [("<figure>", "</figure>"), ("<table>", "</table>"), ("<svg", "</svg>"), ("<tr>", "</tr>")]
        {
            assert_eq!(page.matches(open).count(), page.matches(close).count(), "{open}");
        }
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.path().join(NUMBERS)).unwrap()).unwrap();
        let peak = json["fits"][0]["fits"][0]["peak_d"].as_f64().unwrap();
        assert!(page.contains(&format!("{peak:.3} [")), "{peak}");
        // Every point of the JSON is drawn: two humps, two scatters, length and cost.
        let drawn = page.matches("class=\"dot c").count() + page.matches("class=\"hollow c").count();
        assert!(drawn >= 55 + 55 * 2 + 60 * 2, "{drawn}");
        assert_eq!(found.looks.len(), 60);
    }

    /// Numbers between two texts, of each line that holds both.
    fn between(text: &str, start: &str, end: &str) -> Vec<f64> {
        let of = |line: &str| line.split_once(start)?.1.split_once(end)?.0.parse().ok();
        text.lines().filter_map(of).collect()
    }

    /// What a position in a figure stands for, from two ticks and their labels.
    fn reader(svg: &str, anchor: &str, axis: &str) -> impl Fn(f64) -> f64 {
        let ticks: Vec<&str> =
            svg.lines().filter(|line| line.contains("class=\"tick\"") && line.contains(anchor)).collect();
        let of = |line: &str| (between(line, axis, "\"")[0], between(line, "font-size=\"11\">", "<")[0]);
        let (first, last) = (of(ticks[0]), of(ticks[ticks.len() - 1]));
        move |at| first.1 + (at - first.0) * (last.1 - first.1) / (last.0 - first.0)
    }

    /// As a person with a ruler reads it.
    #[test]
    fn figures_show_the_numbers_of_the_json() {
        let folder = tempfile::tempdir().unwrap();
        sweep(folder.path());
        let json = write_report(folder.path()).unwrap().to_json();
        let page = std::fs::read_to_string(folder.path().join(PAGE)).unwrap();
        let (figures, tax): (Vec<&str>, &str) = (page.split("<figure>").skip(1).collect(), "base/nll");
        let read = |title: &str, x_of: &dyn Fn(&serde_json::Value) -> f64, size: &str, first: f64| {
            let figure = figures.iter().find(|figure| figure.contains(&format!(">{title}</title>"))).unwrap();
            let svg = figure.split("</svg>").next().unwrap();
            let (x, y) = (reader(svg, "\"middle\"", " x=\""), reader(svg, "\"end\"", " y=\""));
            // Labels of the y axis stand a little below their tick.
            let circles = svg.lines().filter(|line| line.contains("r=\"3\""));
            let mut drawn: Vec<(f64, f64)> = circles
                .map(|line| (x(between(line, "cx=\"", "\"")[0]), y(between(line, "cy=\"", "\"")[0] + 4.0)))
                .collect();
            let points = json["points"].as_array().unwrap().iter();
            let points =
                points.filter(|p| p["step"].as_f64() >= Some(first) && p["size"].as_str().unwrap().contains(size));
            let mut known: Vec<(f64, f64)> = points.map(|p| (x_of(p), p["gold"].as_f64().unwrap())).collect();
            let order = |a: &(f64, f64), b: &(f64, f64)| (a.0, a.1).partial_cmp(&(b.0, b.1)).unwrap();
            drawn.sort_by(order);
            known.sort_by(order);
            assert_eq!(drawn.len(), known.len(), "{title}");
            let pixel = [x(1.0) - x(0.0), y(1.0) - y(0.0)].map(f64::abs);
            // Neighbours may change places by a tenth of a pixel.
            for (d, gold) in known {
                let near = |p: &&(f64, f64)| (p.0 - d).abs() < 0.15 * pixel[0] && (p.1 - gold).abs() < 0.15 * pixel[1];
                assert!(drawn.iter().any(|p| near(&p)), "{title}: no dot at {d}, {gold}");
            }
        };
        let d = |point: &serde_json::Value| point["d"].as_f64().unwrap();
        read("Starting from small", &d, "small", 1.0);
        read("Starting from large", &d, "large", 1.0);
        let logged = |name: &'static str| move |point: &serde_json::Value| point["logged"][name].as_f64().unwrap();
        read("Gold reward against what it costs", &logged(tax), "", 0.0);
        read("Gold reward against held-out loss", &logged("loss"), "", 1.0);
        // And tables those of `equal`: gold where both seeds with beta 0.01 first get to d = 2.
        let arm = &json["equal"][0];
        let at = arm["at_equal_d"].as_array().unwrap().iter().find(|at| at["d"] == 2.0).unwrap();
        let cell = format!("<td>{:.2} ± {:.2}</td>", at["gold"].as_f64().unwrap(), at["sd"].as_f64().unwrap());
        assert!(arm["runs"] == 2 && page.contains(&cell), "{cell}");
    }
}
