//! `cuvee generate`

use serde_json::json;

use super::args::GenerateArgs;
use super::device::{self, Job};
use crate::data::{Message, Tokenizer};
use crate::device::{Arena, Dry};
use crate::error::Result;
use crate::model::{Checkpoint, Init, Model, Options};
use crate::ops::Backend;
use crate::rollout::{Request, Sampling, generate};

pub fn run(args: &GenerateArgs) -> Result<()> {
    device::run(&args.engine, args.precision.dtype, None, args)
}

impl Job for &GenerateArgs {
    type Output = ();

    fn run<B: Backend>(self, device: &B) -> Result<()> {
        let args = self;
        device::check_dtype(device, args.precision.dtype)?;
        let checkpoint = args.adapters.open(&args.model, Checkpoint::open)?;
        let tokenizer = Tokenizer::load(&args.model)?;
        let prompt = match args.chat {
            true => {
                let message = Message::from_iter([
                    ("role".into(), "user".into()),
                    ("content".into(), args.prompt.as_str().into()),
                ]);
                tokenizer.encode_plain(&tokenizer.chat_template()?.render(&[message], &Default::default(), true)?)?
            }
            false => tokenizer.encode(&args.prompt)?,
        };
        let options = Options::frozen(prompt.len() + args.max_new_tokens).with_adapters(&checkpoint);
        let (spec, naming) = (&checkpoint.spec, checkpoint.architecture.naming);
        let mut arena = Arena::new(device, &Model::<Dry>::plan(device.storage(), spec, naming, options))?;
        let mut model = Model::new(&mut arena, spec, naming, options);
        Init::Checkpoint.fill(device, &checkpoint, &mut model)?;
        let request = Request {
            prompt: &prompt,
            samples: args.samples,
            first_sample: 0,
            max_new_tokens: args.max_new_tokens,
            sampling: Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed },
            eos: tokenizer.stops(),
        };
        let completions = generate(device, &model, &request)?;
        for completion in completions {
            let text = tokenizer.decode(&completion.ids)?;
            if args.json {
                let line = json!({
                    "prompt": args.prompt,
                    "completion": text,
                    "ids": completion.ids,
                    "finished": completion.finished,
                });
                super::print(&format!("{line}\n"))?;
            } else {
                let prompt = if args.chat { "" } else { &args.prompt };
                super::print(&format!("{prompt}{text}\n"))?;
            }
        }
        Ok(())
    }
}
