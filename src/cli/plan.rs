//! `cuvee plan`

use super::args::PlanArgs;
use crate::error::Result;
use crate::train::{Plan, plan, plan_without_data};

pub fn run(args: &PlanArgs) -> Result<()> {
    let mut settings = super::train::from_run(&args.run)?;
    let plan = match &args.dataset {
        Some(dataset) => {
            settings.dataset = dataset.clone();
            plan(&settings)?
        }
        None => plan_without_data(&settings, args.run.data.max_length)?,
    };
    if args.json {
        return super::print(&format!("{}\n", serde_json::to_string_pretty(&plan).expect("a plan is plain data")));
    }
    super::print(&table(&plan))
}

fn table(plan: &Plan) -> String {
    let mib = |bytes: usize| format!("{:.1}", bytes as f64 / (1 << 20) as f64);
    let columns = ["weights", "grads", "states", "activations", "workspace", "host", "total"];
    let mut out = format!("{:<10}", "MiB");
    columns.iter().for_each(|c| out += &format!("{c:>13}"));
    out.push('\n');
    for p in &plan.phases {
        out += &format!("{:<10}", p.name);
        let cells = [p.weights, p.grads, p.states, p.activations, p.workspace, p.host, p.total()];
        cells.iter().for_each(|bytes| out += &format!("{:>13}", mib(*bytes)));
        out.push('\n');
    }
    out += &format!("\npeak {} MiB\n", mib(plan.peak_bytes));
    out += &format!("{:.3} GFLOP a step, {} parameters\n", plan.flops_per_step / 1e9, plan.parameters);
    out
}
