//! What a run came to: one table over seeds, figures of gold over distance and of soups, where every number comes from; as one page, as
//! JSON and as Markdown.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value as Json, json};
use toml::Value;

use super::estimate::duration;
use super::plan::Plan;
use super::recipe::{Axis, Stage};
use crate::checkpoint::json::write_json;
use crate::checkpoint::write_file;
use crate::cli::compare::{command, why};
use crate::error::Result;
use crate::lab::{
    Cell, Dot, FittedGroup, Found, Hump, Metrics, Outcome, Overopt, STYLE, Scatter, SweepPlan, figure, html_table,
    hump_svg, scatter_svg,
};
use crate::train::Estimate;
use crate::train::plot::{COLOURS, escape};

/// What is called so where the recipe names no report.
const NAME: &str = "report";
/// Numbers of training, before those of the evaluation.
const TRAINED: [&str; 2] = ["steps", "sampled tokens"];

/// A line of the table: one variant over seeds.
struct Row {
    name: String,
    /// Weight of the last model of a soup, and the soup.
    soup: Option<(String, f64)>,
    /// By seed, with the place of what measured it.
    runs: Vec<(u64, usize, Metrics)>,
    /// How each run that stopped early did.
    stopped: Vec<String>,
}

/// A number over the seeds of a row.
#[derive(Clone, Copy)]
struct Spread {
    mean: f64,
    /// Standard deviation; 0 of one.
    sd: f64,
    runs: usize,
}

pub struct Report<'a> {
    plan: &'a Plan<'a>,
    /// Names of numbers, in the order of the table.
    columns: Vec<String>,
    rows: Vec<Row>,
    overopt: Option<Overopt>,
    /// Of each job: seconds that it took.
    seconds: Vec<Option<f64>>,
    missing: Vec<String>,
}

impl<'a> Report<'a> {
    /// Of what is there. `outcomes` are of the jobs that were looked at.
    pub fn of(plan: &'a Plan<'a>, outcomes: &[Option<Outcome>]) -> Result<Self> {
        let mut report = Self {
            plan,
            columns: Vec::new(),
            rows: Vec::new(),
            overopt: None,
            seconds: Vec::new(),
            missing: Vec::new(),
        };
        for (made, job) in plan.jobs.iter().enumerate() {
            let found = job.found()?;
            report.seconds.push(if let Found::Done(seconds) = found { Some(seconds) } else { None });
            if let Some(why) = outcomes[made].as_ref().and_then(why) {
                report.missing.push(format!("{}: {}", job.name, why.trim()));
            }
        }
        let mut numbers = Vec::new();
        for at in &plan.recipe.report.tables {
            let stage = &plan.recipe.stages[*at];
            numbers.extend(stage.numbers.iter().map(|(name, _)| name.clone()));
            for variant in 0..stage.variants.len() {
                report.row(*at, stage, variant)?;
            }
        }
        if numbers.is_empty() {
            let all = report.rows.iter().flat_map(|row| &row.runs).flat_map(|run| run.2.keys());
            numbers =
                all.filter(|name| !name.ends_with("_stderr") && !TRAINED.contains(&name.as_str())).cloned().collect();
            numbers.sort();
        }
        let trained = TRAINED.map(String::from).into_iter();
        let has = |name: &String| report.rows.iter().flat_map(|row| &row.runs).any(|run| run.2.contains_key(name));
        let mut columns: Vec<String> = trained.filter(has).collect();
        for name in numbers {
            if !columns.contains(&name) {
                columns.push(name);
            }
        }
        report.columns = columns;
        report.overopt = report.overopt()?;
        Ok(report)
    }

    fn row(&mut self, at: usize, stage: &Stage, variant: usize) -> Result<()> {
        let plan = self.plan;
        let of = &stage.variants[variant];
        let mut row = Row { name: of.name.clone(), soup: None, runs: Vec::new(), stopped: Vec::new() };
        if let (Some((soup, _)), Some(weight)) = (of.of, of.weight) {
            row.soup = Some((plan.recipe.stages[soup].name.clone(), weight));
        }
        for seed in plan.recipe.seed..plan.recipe.seed + plan.recipe.seeds {
            let made = plan.of(at, variant, seed);
            if self.seconds[made].is_none() {
                continue;
            }
            let mut numbers = plan.numbers(made)?;
            if let Some((stage, variant)) = of.of
                && plan.recipe.stages[stage].kind.trains()
            {
                let logs = &plan.made[plan.of(stage, variant, seed)].logs;
                numbers.extend(trained(logs));
                row.stopped.extend(stopped(logs).map(|how| format!("seed {seed}: {how}")));
            }
            row.runs.push((seed, made, numbers));
        }
        self.rows.push(row);
        Ok(())
    }

    /// Gold over distance of every run that measured both along training.
    fn overopt(&self) -> Result<Option<Overopt>> {
        let plan = self.plan;
        let (mut cells, mut samples) = (Vec::new(), 0);
        for (at, made) in plan.made.iter().enumerate() {
            let (stage, table) = (plan.stage(at), &plan.variant(at).table);
            if !stage.kind.trains() || !table.contains_key("gold_reward") || self.seconds[at].is_none() {
                continue;
            }
            let text = |key: &str| table.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
            samples = table.get("kl_samples").and_then(Value::as_integer).unwrap_or(0) as usize;
            cells.push(Cell {
                name: plan.jobs[at].name.clone(),
                group: plan.variant(at).name.clone(),
                size: text("model").trim_start_matches('@').to_string(),
                objective: text("objective"),
                beta: table.get("beta").and_then(Value::as_float),
                seed: Some(made.seed),
                dir: made.logs.strip_prefix(&plan.recipe.output_dir).unwrap_or(&made.logs).to_path_buf(),
                command: command(&plan.jobs[at]),
            });
        }
        if cells.is_empty() {
            return Ok(None);
        }
        SweepPlan { recipe: plan.recipe.path.clone(), samples, cells, halving: None }.write(&plan.recipe.output_dir)?;
        Overopt::read(&plan.recipe.output_dir).map(Some)
    }

    /// Of a column; none where no run has it.
    fn spread(row: &Row, column: &str) -> Option<Spread> {
        let values: Vec<f64> = row.runs.iter().filter_map(|run| run.2.get(column)).copied().collect();
        let Estimate { mean, stderr } = (!values.is_empty()).then(|| Estimate::of(&values))?;
        Some(Spread { mean, sd: stderr * (values.len() as f64).sqrt(), runs: values.len() })
    }

    /// The table: a head, and a row for each variant.
    fn cells(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let stops = self.rows.iter().any(|row| !row.stopped.is_empty());
        let mut head = vec!["".to_string()];
        head.extend(self.columns.iter().cloned());
        head.extend(stops.then(|| "stopped by".to_string()));
        let row = |row: &Row| {
            let mut cells = vec![row.name.clone()];
            cells.extend(self.columns.iter().map(|column| match Self::spread(row, column) {
                None => String::new(),
                Some(Spread { mean, sd, .. }) if sd > 0.0 => format!("{} ± {}", number(mean), number(sd)),
                Some(Spread { mean, .. }) => number(mean),
            }));
            cells.extend(stops.then(|| row.stopped.join("; ")));
            cells
        };
        (head, self.rows.iter().map(row).collect())
    }

    pub fn markdown(&self) -> String {
        let (head, rows) = self.cells();
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let under = format!("|---|{}\n", "--:|".repeat(head.len() - 1));
        let rows: String = rows.iter().map(|row| line(row)).collect();
        let missing: String = self.missing.iter().map(|line| format!("\nmissing: {line}\n")).collect();
        format!("{}{under}{rows}\n{}\n{missing}", line(&head), self.remark())
    }

    fn remark(&self) -> String {
        let (seeds, time) = (self.plan.recipe.seeds, self.seconds.iter().flatten().sum::<f64>());
        let runs = self.seconds.iter().flatten().count();
        let spread = match seeds {
            1 => "One seed says nothing of the spread between seeds.".to_string(),
            seeds => format!("± is the standard deviation over {seeds} seeds."),
        };
        format!("{spread} {runs} jobs took {} of processes.", duration(time))
    }

    /// All arms, in as many figures as there must be for each to have a colour of its own.
    fn hump(&self) -> Vec<String> {
        let groups = self.overopt.as_ref().map_or(&[][..], |found| &found.fitted.groups);
        let figures = groups.len().div_ceil(COLOURS).max(1);
        let draw = |groups: &[FittedGroup]| {
            hump_svg(&Hump {
                title: "Gold reward over distance".into(),
                x_label: "d = √KL from the reference".into(),
                y_label: "gold reward, standard deviations at the start".into(),
                groups: groups.iter().map(FittedGroup::drawn).collect(),
            })
        };
        groups.chunks(groups.len().div_ceil(figures).max(1)).map(draw).collect()
    }

    /// Each arm alone.
    fn humps(&self) -> Vec<String> {
        let groups = self.overopt.iter().flat_map(|found| &found.fitted.groups);
        let alone = |group: &FittedGroup| {
            let (x_label, y_label) = ("d = √KL from the reference".into(), "gold reward".into());
            hump_svg(&Hump { title: group.name.clone(), x_label, y_label, groups: vec![group.drawn()] })
        };
        groups.map(alone).collect()
    }

    fn front(&self) -> Option<String> {
        let [x, y] = self.plan.recipe.report.front.as_ref()?;
        let place = |row: &Row| Some((Self::spread(row, &x.name)?, Self::spread(row, &y.name)?));
        let places: Vec<(&Row, (Spread, Spread))> =
            self.rows.iter().filter_map(|row| Some((row, place(row)?))).collect();
        let better = |value: Spread, axis: &Axis| if axis.down { -value.mean } else { value.mean };
        let good = |place: &(Spread, Spread)| (better(place.0, x), better(place.1, y));
        let dot = |(row, place): &(&Row, (Spread, Spread))| {
            let (a, b) = good(place);
            let beats = |(c, d): (f64, f64)| c >= a && d >= b && (c > a || d > b);
            let (method, label) = match &row.soup {
                Some((soup, weight)) => (soup.clone(), weight.to_string()),
                None => (row.name.clone(), String::new()),
            };
            let on_front = !places.iter().any(|(_, other)| beats(good(other)));
            Dot { method, label, at: (place.0.mean, place.1.mean), spread: (place.0.sd, place.1.sd), on_front }
        };
        let dots: Vec<Dot> = places.iter().map(dot).collect();
        let baseline = dots.first()?.method.clone();
        let (x_label, y_label, x_down, y_down) = (x.name.clone(), y.name.clone(), x.down, y.down);
        let title = format!("{y_label} against {x_label}, {} seed(s)", self.plan.recipe.seeds);
        Some(scatter_svg(&Scatter { title, x_label, y_label, x_down, y_down, baseline, dots }))
    }

    pub fn to_json(&self) -> Json {
        let plan = self.plan;
        let finite = |x: f64| if x.is_finite() { json!(x) } else { Json::Null };
        let row = |row: &Row| {
            let (mut mean, mut sd) = (Map::new(), Map::new());
            for column in &self.columns {
                if let Some(of) = Self::spread(row, column) {
                    mean.insert(column.clone(), finite(of.mean));
                    sd.insert(column.clone(), if of.runs > 1 { finite(of.sd) } else { Json::Null });
                }
            }
            let run = |(seed, made, numbers): &(u64, usize, Metrics)| {
                let numbers: Map<String, Json> = numbers.iter().map(|(k, v)| (k.clone(), finite(*v))).collect();
                json!({"seed": seed, "job": plan.jobs[*made].name, "numbers": numbers})
            };
            json!({"row": row.name, "mean": mean, "sd": sd, "stopped_by": row.stopped,
                   "runs": row.runs.iter().map(run).collect::<Vec<_>>()})
        };
        let job = |(at, job): (usize, &crate::lab::Job)| {
            let read = |read: &super::plan::Read| {
                let made = read.made.map(|made| plan.jobs[made].name.clone());
                json!({"path": read.path, "key": read.key, "job": made})
            };
            let reads: Vec<Json> = plan.made[at].reads.iter().map(read).collect();
            json!({"job": job.name, "stage": plan.stage(at).name, "kind": plan.stage(at).kind.name(), "seed": plan.made[at].seed,
                   "key": job.key, "makes": plan.made[at].out, "reads": reads, "command": command(job),
                   "seconds": self.seconds[at]})
        };
        json!({
            "recipe": plan.recipe.path,
            "cuvee": env!("CARGO_PKG_VERSION"),
            "seeds": (plan.recipe.seed..plan.recipe.seed + plan.recipe.seeds).collect::<Vec<_>>(),
            "columns": self.columns,
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "missing": self.missing,
            "gold_over_distance": self.overopt.as_ref().map(Overopt::to_json),
            "data": plan.sliced.iter().map(|of| json!({"path": of.path, "rows": of.rows(), "key": of.hash()})).collect::<Vec<_>>(),
            "jobs": plan.jobs.iter().enumerate().map(job).collect::<Vec<_>>(),
        })
    }

    fn page(&self) -> String {
        let recipe = &self.plan.recipe;
        let title = recipe.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut page = format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\n\
             <link rel=\"icon\" href=\"data:,\"><title>{0}</title><style>{STYLE}</style></head><body>\n<h1>{0}</h1>\n\
             <p>{1} Everything here again: <code>{2}</code></p>\n",
            escape(&title),
            escape(&self.remark()),
            escape(&self.again()),
        );
        let (head, rows) = self.cells();
        html_table(&mut page, &head.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
        self.missing.iter().for_each(|line| page += &format!("<p><b>missing</b>: {}</p>\n", escape(line)));
        if let Some(svg) = self.front() {
            figure(&mut page, &svg, "Means and standard deviations over seeds; better is up and to the right.");
        }
        if let Some(found) = &self.overopt {
            page += "<h2>Gold reward over distance</h2>\n<ul>\n";
            for (group, verdict) in found.verdicts() {
                page += &format!("<li><b>{}</b>: {}</li>\n", escape(&group), escape(&verdict));
            }
            page += "</ul>\n";
            let caption = "Every evaluation of every seed with its standard error; the log form with its 95 % band over what was \
                           measured. Hollow points do not count: they repeat themselves or are too unlikely under the reference.";
            self.hump().iter().for_each(|svg| figure(&mut page, svg, caption));
            self.humps().iter().for_each(|svg| figure(&mut page, svg, ""));
        }
        self.lineage(&mut page);
        page + "</body></html>\n"
    }

    fn again(&self) -> String {
        let recipe = &self.plan.recipe;
        format!(
            "cuvee run {} --seeds {} --output-dir {}",
            recipe.path.display(),
            recipe.seeds,
            recipe.output_dir.display()
        )
    }

    /// What each job was made of, and its command.
    fn lineage(&self, page: &mut String) {
        *page += "<h2>Where it comes from</h2>\n";
        let plan = self.plan;
        let reads = |at: usize| {
            let read = |read: &super::plan::Read| match read.made {
                Some(made) => plan.variant(made).name.clone(),
                None => format!("{} ({})", read.path, read.key),
            };
            plan.made[at].reads.iter().map(read).collect::<Vec<_>>().join(", ")
        };
        let row = |(at, job): (usize, &crate::lab::Job)| {
            let seconds = self.seconds[at].map_or("not there".into(), duration);
            vec![job.name.clone(), plan.stage(at).kind.name().into(), job.key.clone(), reads(at), seconds]
        };
        let rows: Vec<Vec<String>> = plan.jobs.iter().enumerate().map(row).collect();
        html_table(page, &["job", "kind", "key", "reads", "time"], &rows);
        *page += "<p class=\"how\">A key is a hash of settings, of the content of files, of the keys of what is read and of the version of cuvee. \
                  <code>cuvee lineage</code> says of every model what made it. Each number is the output of its job's command, which may be \
                  run again alone:</p>\n<ul>\n";
        for job in &plan.jobs {
            *page += &format!("<li>{}: <code>{}</code></li>\n", escape(&job.name), escape(&command(job)));
        }
        *page += "</ul>\n";
    }

    /// Writes the page, numbers and table, and figures beside them; returns where the page is.
    pub fn write(&self) -> Result<std::path::PathBuf> {
        let recipe = &self.plan.recipe;
        let name = recipe.report.name.as_deref().unwrap_or(NAME);
        let path = |extension: &str| recipe.output_dir.join(format!("{name}.{extension}"));
        write_json(&path("json"), &self.to_json())?;
        let text = |path: &Path, text: &str| write_file(path, |out| out.write_all(text.as_bytes()));
        text(&path("md"), &self.markdown())?;
        for (at, svg) in (1..).zip(self.hump()) {
            text(&recipe.output_dir.join(format!("gold-{at}.svg")), &svg)?;
        }
        self.front().map(|svg| text(&recipe.output_dir.join("front.svg"), &svg)).transpose()?;
        text(&path("html"), &self.page())?;
        Ok(path("html"))
    }
}

/// Steps and sampled tokens of a run, as its log has them; one that went back to its start has taken no step.
fn trained(logs: &Path) -> Metrics {
    let Ok(text) = fs::read_to_string(logs.join("metrics.jsonl")) else { return Metrics::new() };
    let last: Option<Json> = text.lines().last().and_then(|line| serde_json::from_str(line).ok());
    let Some(last) = last else { return Metrics::from([(TRAINED[0].to_string(), 0.0)]) };
    let of = |key: &str, name: &str| Some((name.to_string(), last[key].as_f64()?));
    [of("step", TRAINED[0]), of("num_sampled_tokens", TRAINED[1])].into_iter().flatten().collect()
}

/// What ended a run before its last step.
fn stopped(logs: &Path) -> Option<String> {
    let text = fs::read_to_string(logs.join("alarms.jsonl")).ok()?;
    let last: Json = serde_json::from_str(text.lines().last()?).ok()?;
    let why = last["why"].as_str()?.split(':').next()?.to_string();
    (last["action"] == "stop").then(|| format!("{why} at step {}, model of {}", last["step"], last["best_step"]))
}

fn number(x: f64) -> String {
    match x.abs() {
        _ if !x.is_finite() => "–".into(),
        size if size >= 1000.0 => format!("{:.1}k", x / 1000.0),
        size if size >= 100.0 || x == x.trunc() => format!("{x:.0}"),
        size if size >= 10.0 => format!("{x:.1}"),
        _ => format!("{x:.3}"),
    }
}
