//! `cuvee lab toy`

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use crate::checkpoint::json::write_json;
use crate::checkpoint::write_file;
use crate::cli::print;
use crate::error::{At, Result};
use crate::lab::toy::{Loss, bandit, tree};
use crate::lab::{Measurement, fit_groups};
use crate::scaling::correlation;
use crate::train::plot::{Panel, Series, curves_svg};

/// Betas of the tree, those of the paper.
const TREE_BETAS: [f64; 3] = [0.01, 0.1, 0.5];
const TREE_STEPS: [usize; 9] = [0, 1, 10, 25, 50, 100, 200, 300, 400];
/// Comparisons that proxies are fitted to.
const COMPARISONS: [usize; 3] = [500, 4000, 20_000];
const RESAMPLES: usize = 500;

#[derive(Debug, Clone, PartialEq, Args)]
pub struct ToyArgs {
    /// Of everything that is drawn
    #[arg(long, value_name = "N", default_value = "11")]
    pub seed: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write toy.json, tree.svg, bandit.svg and proxy.svg here
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
}

/// What both toys come to.
struct Toys {
    text: String,
    json: Value,
    figures: [(&'static str, String); 3],
}

pub fn run(args: &ToyArgs) -> Result<()> {
    let toys = play(args.seed);
    if let Some(dir) = &args.output_dir {
        std::fs::create_dir_all(dir).at(dir)?;
        write_json(&dir.join("toy.json"), &toys.json)?;
        for (name, svg) in &toys.figures {
            write_file(&dir.join(name), |out| out.write_all(svg.as_bytes()))?;
        }
    }
    match args.json {
        true => print(&format!("{}\n", toys.json)),
        false => print(&toys.text),
    }
}

fn play(seed: u64) -> Toys {
    let (mut text, mut tree_json, mut daa) = (String::new(), Vec::new(), Vec::new());
    let tree = tree::Tree::drawn(seed);
    let _ =
        writeln!(text, "A tree of 27 leaves and one preference pair: probability of the 25 leaves that no pair names");
    let mut panels = Vec::new();
    for loss in Loss::ALL {
        let mut series = Vec::new();
        for beta in TREE_BETAS {
            let seen = tree.descend(loss, beta, 1.0, &TREE_STEPS);
            let (first, last) = (seen[0], seen[seen.len() - 1]);
            let _ = writeln!(
                text,
                "  {:<4} beta {beta:<4}  chosen {:.3} -> {:.3}, rejected {:.3} -> {:.1e}, others {:.3} -> {:.3}, KL {:.2}",
                loss.name(),
                first.p_chosen,
                last.p_chosen,
                first.p_rejected,
                last.p_rejected,
                first.p_ood,
                last.p_ood,
                last.kl
            );
            let points = seen.iter().map(|seen| (seen.step as f64, seen.p_ood)).collect();
            series.push(Series { name: format!("beta {beta}"), points });
            let trace: Vec<Value> = seen.into_iter().map(tree::Seen::to_json).collect();
            tree_json.push(json!({"loss": loss.name(), "beta": beta, "trace": trace}));
        }
        panels.push(Panel {
            title: loss.name().to_uppercase(),
            y_label: "probability of unseen leaves".into(),
            series,
        });
    }
    let bandit = bandit::Bandit::new(seed);
    let aligned: Vec<(Loss, Vec<bandit::Seen>)> = Loss::ALL.map(|loss| (loss, bandit.align(loss))).into();
    let points = aligned.iter().flat_map(|(loss, seen)| seen.iter().map(|seen| win_rate(*loss, seen)));
    let fitted = fit_groups(points.collect(), "win rate - 1/2", RESAMPLES, seed);
    let _ = writeln!(
        text,
        "\nA bandit of 24 tokens of 12 kinds: one epoch at {} betas, win rate against the reference by gold",
        bandit::BETAS.len()
    );
    for (loss, seen) in &aligned {
        text += &story(*loss, seen);
        daa.push(json!({"loss": loss.name(), "points": seen.iter().map(|seen| seen.to_json()).collect::<Vec<_>>()}));
    }
    text += "\nFits of win rate - 1/2 over d = sqrt(KL)\n";
    text += &fitted.text();
    let (tilted, proxies) = play_proxies(&bandit, &mut text);
    let proxy_fits = fit_groups(tilted, "gold, standard deviations", 0, seed);
    let figures = [
        ("tree.svg", curves_svg("One preference pair in a tree", "step", &panels)),
        ("bandit.svg", fitted.svg("Direct alignment, one epoch: win rate over distance")),
        ("proxy.svg", proxy_fits.svg("A proxy maximised: gold reward over distance")),
    ];
    let json = json!({"seed": seed, "tree": tree_json, "daa": daa, "fits": fitted.to_json(), "proxy": proxies});
    Toys { text, json, figures }
}

/// Proxies from so many comparisons: points of their tilted policies for the figure, and everything as JSON.
fn play_proxies(bandit: &bandit::Bandit, text: &mut String) -> (Vec<Measurement>, Vec<Value>) {
    let (mut tilted, mut proxies) = (Vec::new(), Vec::new());
    let _ = writeln!(text, "\nA proxy from so many comparisons, maximised: gold reward by KL");
    for comparisons in COMPARISONS {
        let proxy = bandit.proxy(comparisons);
        let (accuracy, path, bon) = (bandit.proxy_accuracy(&proxy), bandit.tilt(&proxy), bandit.best_of_n(&proxy));
        let best = path.iter().copied().max_by(|a, b| a.gold.total_cmp(&b.gold)).expect("37 points");
        let last = path[path.len() - 1];
        let _ = writeln!(
            text,
            "  {comparisons:>5} comparisons, held-out accuracy {accuracy:.3}: best {:.2} at KL {:.1}, then {:.2} at KL {:.0}; best of \
             1024: {:.2}",
            best.gold,
            best.kl,
            last.gold,
            last.kl,
            bon[bon.len() - 1].gold
        );
        tilted.extend(path.iter().filter(|point| point.kl < 25.0).map(|point| tilt_point(comparisons, point)));
        let json_of = |points: &[bandit::Optimised]| points.iter().map(|point| point.to_json()).collect::<Vec<_>>();
        proxies.push(json!({"comparisons": comparisons, "heldout_accuracy": accuracy,
                            "kl_tilt[e,KL,proxy,gold]": json_of(&path), "bon[n,KL,proxy,gold]": json_of(&bon)}));
    }
    (tilted, proxies)
}

fn win_rate(loss: Loss, seen: &bandit::Seen) -> Measurement {
    let run = (1000.0 * seen.beta) as u64;
    Measurement {
        group: loss.name().into(),
        run,
        d: seen.kl.sqrt(),
        gold: seen.win_rate - 0.5,
        stderr: 0.0,
        valid: true,
    }
}

fn tilt_point(comparisons: usize, point: &bandit::Optimised) -> Measurement {
    let d = point.kl.max(0.0).sqrt();
    Measurement { group: format!("{comparisons} comparisons"), run: 0, d, gold: point.gold, stderr: 0.0, valid: true }
}

/// What a loss comes to, and whether its own accuracy tells.
fn story(loss: Loss, seen: &[bandit::Seen]) -> String {
    let best = seen.iter().copied().max_by(|a, b| a.win_rate.total_cmp(&b.win_rate)).expect("points");
    let far = seen.iter().copied().max_by(|a, b| a.kl.total_cmp(&b.kl)).expect("points");
    let of = |value: fn(&bandit::Seen) -> f64| seen.iter().map(value).collect::<Vec<_>>();
    let told = correlation(&of(|seen| seen.implicit_accuracy), &of(|seen| seen.win_rate));
    format!(
        "  {:<4} best {:.2} (beta {}, {:.0} % of the epoch, KL {:.1}); furthest, KL {:.1}: {:.2}; correlation with held-out implicit \
         accuracy {told:.2}\n",
        loss.name(),
        best.win_rate,
        best.beta,
        100.0 * best.epoch,
        best.kl,
        far.kl,
        far.win_rate
    )
}
