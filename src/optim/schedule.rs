/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decay {
    Constant,
    Linear,
    Cosine,
}

/// The learning rate over a run, as transformers' schedulers give it: linear warm-up from 0, then `decay`. The
/// first step of a warm-up has rate 0, and linear and cosine would reach 0 one step after the last.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Schedule {
    pub peak: f64,
    pub decay: Decay,
    pub warmup_steps: u64,
    pub max_steps: u64,
}

/// How long the rate rises from 0.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Warmup {
    /// Of all steps, rounded up.
    Share(f64),
    Steps(u64),
}

impl Schedule {
    pub fn new(peak: f64, decay: Decay, warmup: Warmup, max_steps: u64) -> Self {
        let warmup_steps = match warmup {
            Warmup::Share(share) => (share * max_steps as f64).ceil() as u64,
            Warmup::Steps(steps) => steps,
        };
        Self { peak, decay, warmup_steps, max_steps }
    }

    /// The rate of step `step`, counted from 1.
    pub fn rate(&self, step: u64) -> f64 {
        let done = step - 1;
        if done < self.warmup_steps {
            return self.peak * done as f64 / self.warmup_steps as f64;
        }
        let length = self.max_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = (done - self.warmup_steps) as f64 / length as f64;
        let left = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.peak * left.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(decay: Decay, warmup_ratio: f64, max_steps: u64) -> Vec<f64> {
        let schedule = Schedule::new(1.0, decay, Warmup::Share(warmup_ratio), max_steps);
        (1..=max_steps).map(|step| (schedule.rate(step) * 1e6).round() / 1e6).collect()
    }

    /// transformers.get_scheduler(..., num_warmup_steps=2, num_training_steps=6)
    #[test]
    fn agrees_with_transformers() {
        assert_eq!(rates(Decay::Linear, 0.3, 6), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(rates(Decay::Cosine, 0.3, 6), [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]);
        assert_eq!(rates(Decay::Constant, 0.3, 6), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(rates(Decay::Linear, 0.0, 4), [1.0, 0.75, 0.5, 0.25]);
    }
}
