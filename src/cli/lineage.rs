//! `cuvee lineage`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::error::{Error, Result};
use crate::lineage::{FILE, Lineage, Parent, short};

#[derive(Debug, Clone, PartialEq, Args)]
#[command(after_help = "\
Examples:
  cuvee lineage runs/soup
  cuvee lineage runs/soup --verify
  cuvee lineage runs/soup --json | jq .parents")]
pub struct LineageArgs {
    /// A model, a checkpoint or an adapter
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Fail if the weights are not those that the lineage was written for; reads all of them
    #[arg(long)]
    pub verify: bool,
    /// Print everything that is known, as JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &LineageArgs) -> Result<()> {
    let Some(lineage) = Lineage::read(&args.dir)? else { return foreign(args) };
    if args.verify {
        lineage.verify(&args.dir)?;
    }
    if args.json {
        return super::print(&format!("{}\n", serde_json::to_string_pretty(&lineage).expect("plain data")));
    }
    super::print(&lineage.tree())?;
    if args.verify { super::print("the weights are those that this was written for\n") } else { Ok(()) }
}

/// What can be said of a folder that cuvee did not write.
fn foreign(args: &LineageArgs) -> Result<()> {
    let parent = Parent::open("model", &args.dir)?;
    if args.verify {
        let detail = format!("holds no {FILE}, so there is nothing to compare its weights with; leave --verify out");
        return Err(Error::file(&args.dir, detail));
    }
    if args.json {
        let known = json!({"name": parent.name, "hash": parent.hash, "license": parent.license});
        return super::print(&format!("{}\n", serde_json::to_string_pretty(&known).expect("plain data")));
    }
    let license = parent.license.map_or(String::new(), |license| format!(", {license}"));
    let hash = parent.hash.unwrap_or_default();
    super::print(&format!("{} {}{license}: not made by cuvee (no {FILE})\n", parent.name, short(&hash)))
}
