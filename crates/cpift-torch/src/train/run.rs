//! The training loop over the stages of a run.

use std::fs;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use cpift_core::Stopped;
use cpift_core::files::StagedDir;
use cpift_core::format::checkpoint::ADAPTER_WEIGHTS;
use cpift_core::record::provenance::Recorder;
use cpift_core::run::cli::Common;
use cpift_core::run::{Phase, SignalScope, stop_asked};
use cpift_core::stream::random::splitmix64;
use log::info;

use super::importance::{self, FisherConfig};
use super::isolation::{DynamicMask, Isolation};
use super::lora::{self, LoraConfig, LoraOutput};
use super::pass::PassConfig;
use super::stage::{HeldOut, Stage, StageReport, held_out_losses, plan_steps, receive};
use super::state::{Part, Progress, RUN, SavedState, States, average, averaged_steps};
use super::step::{StepConfig, StepInput, StepOutcome, Trainer};
use super::watch::{METRICS, StageWatch, StepFigures, Watch};
use crate::args::{Budget, TrainingArgs};
use crate::data::{FeedConfig, Feeder, StepShare};
use crate::freeze::Freeze;
use crate::oom;
use crate::placement::Pieces;
use crate::schedule::Schedule;
use crate::session::Session;

/// Random stream of a stage that draws the rows importance is measured on.
const IMPORTANCE: u64 = u64::MAX;

/// A training run: trains a model in place through its stages, from the start or from a saved
/// state. With several ranks each runs it; rank 0 writes all but the ranks' own parts of a state.
pub struct Run<'a> {
    /// The open checkpoint.
    pub session: &'a Session,
    /// Training arguments.
    pub args: &'a TrainingArgs,
    /// The stages in order.
    pub stages: Vec<Stage<'a>>,
    /// Held-out examples, if the arguments ask for their loss.
    pub held_out: Vec<HeldOut>,
    /// Trains low-rank adapters instead of the parameters, the same in all stages.
    pub lora: Option<LoraConfig>,
    /// Saves sums of squared gradients on the last stage's examples with the model.
    pub fisher: Option<FisherConfig>,
    /// Saved training states.
    pub states: States,
}

/// A step whose loss and norm have not been read from the device.
struct Pending {
    step: usize,
    lr: f64,
    tokens: usize,
    outcome: StepOutcome,
    /// Indices of its examples.
    chosen: Vec<usize>,
}

impl Run<'_> {
    /// Trains through all stages and writes the directory `out`: the model, metrics.jsonl and the
    /// provenance, to which `record` adds facts. Returns none if this run has already written
    /// `out`. `--force` removes old states.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for a schedule that does not fit a stage; a loss or norm that is not
    /// finite, with step and examples; [`Stopped`] after a signal, with
    /// the state saved; [`cpift_core::BadInput`] for a state of another run, or if another run is
    /// writing `out`; failed writes.
    pub fn write(
        &self,
        out: &Path,
        common: &Common,
        mut recorder: Recorder,
        record: impl FnOnce(&mut Recorder, &[StageReport]),
    ) -> Result<Option<Vec<StageReport>>> {
        let placement = &self.session.placement;
        let leads = placement.rank() == 0;
        let finished = || -> Result<bool> { Ok(self.args.resume && !common.force() && self.states.finished(out)?) };
        if placement.decide("the run is finished", finished)? {
            info!("{} is finished already", out.display());
            return Ok(None);
        }
        // A schedule that does not fit a stage is refused before the first stage starts.
        self.stages.iter().try_for_each(|stage| self.schedule(stage).map(drop))?;
        if let Some(last) = self.stages.last() {
            self.averaged(last, &self.schedule(last)?)?;
        }
        let _held = leads.then(|| self.states.hold()).transpose()?;
        let _steps = SignalScope::begin(Phase::Steps);
        let staged = leads.then(|| StagedDir::create(out, common.force())).transpose()?;
        let reports = self.train(common.force())?;
        // A signal while the output is written must not lose the trained weights.
        let _output = SignalScope::begin(Phase::Output);
        let folder = staged.as_ref().map(StagedDir::path);
        self.save(folder)?;
        if let Some(config) = self.fisher {
            let examples = self.stages.last().expect("a run has a stage").examples;
            let tokens = importance::save(self.session, examples, config, self.step_config().pass, folder)?;
            recorder.fact("fisher_tokens", tokens);
        }
        if let Some(staged) = staged {
            fs::copy(self.states.metrics(), staged.path().join(METRICS)).context("copying metrics.jsonl")?;
            recorder.seed(self.args.seed);
            record(&mut recorder, &reports);
            recorder.fact(RUN, self.states.run());
            match self.adapters_alone() {
                true => recorder.write_into_for(staged.path(), ADAPTER_WEIGHTS)?,
                false => recorder.write_into(staged.path())?,
            }
            staged.commit()?;
            self.states.remove()?;
        }
        Ok(Some(reports))
    }

    /// Returns true if the output has the adapters without the model.
    fn adapters_alone(&self) -> bool {
        self.lora.as_ref().is_some_and(|lora| lora.output == LoraOutput::Adapter)
    }

    /// Writes what was trained into the directory `folder`; every rank but the first takes part
    /// without one.
    fn save(&self, folder: Option<&Path>) -> Result<()> {
        let (session, dtype) = (self.session, self.args.save_dtype);
        match (&self.lora, folder) {
            (None, folder) => session.save(folder, dtype),
            (Some(lora), Some(folder)) if self.adapters_alone() => lora::save_adapter(session, lora, folder, dtype),
            (Some(_), folder) => session.save_each(folder, dtype, |name| lora::merged(session, name)),
        }
    }

    /// Trains through all stages.
    fn train(&self, force: bool) -> Result<Vec<StageReport>> {
        let placement = &self.session.placement;
        if let Some(config) = &self.lora {
            lora::attach(&self.session.model, &self.session.parameters, config)?;
        }
        let mut found = self.find_state(force)?;
        match &found {
            Some(state) => info!("resuming from {}", state.folder.display()),
            None => drop(placement.decide("old states are removed", || {
                self.states.start_afresh(force || self.args.resume).map(|()| true)
            })?),
        }
        let mut reports = found.as_ref().map_or_else(Vec::new, |f| f.position.finished.clone());
        let earlier = found.as_ref().map(|f| f.folder.join(METRICS));
        let first = steps_of(&reports) + found.as_ref().map_or(0, |f| f.position.step);
        let board = self.args.tensorboard.as_deref();
        let device = self.session.model.device();
        let mut watch = match placement.rank() {
            0 => Watch::start(self.states.metrics(), earlier.as_deref(), board, first, device)?,
            _ => Watch::silent(device),
        };
        for stage in &self.stages[reports.len()..] {
            let report = StageRun::new(self, stage, &reports, found.take())?.go(&mut watch)?;
            reports.push(report);
        }
        Ok(reports)
    }

    /// The state to resume from, which rank 0 chooses.
    fn find_state(&self, force: bool) -> Result<Option<SavedState>> {
        if !self.args.resume {
            return Ok(None);
        }
        let Some(group) = &self.session.placement.group else { return self.states.newest(force) };
        let newest = (group.rank() == 0).then(|| self.states.newest(force)).transpose()?.flatten();
        let own = newest.as_ref().map_or_else(String::new, |state| state.folder.to_string_lossy().into_owned());
        let chosen = group.share("the state to resume from", (group.rank() == 0).then_some(own.as_str()))?;
        match newest {
            None if !chosen.is_empty() => self.states.read(Path::new(&chosen)).map(Some),
            found => Ok(found),
        }
    }

    /// The learning rate of a stage.
    fn schedule(&self, stage: &Stage<'_>) -> Result<Schedule> {
        self.args.schedule.of(&stage.label, stage.lr, plan_steps(stage, self.feed_config(stage)))
    }

    /// Steps of `stage`, the last one, whose states are averaged with the weights at its end.
    fn averaged(&self, stage: &Stage<'_>, schedule: &Schedule) -> Result<Vec<usize>> {
        match (self.args.average_last, self.args.save_every) {
            (Some(count), Some(every)) => averaged_steps(&stage.label, schedule.total_steps, every, count),
            _ => Ok(Vec::new()),
        }
    }

    fn step_config(&self) -> StepConfig {
        StepConfig {
            optimizer: self.args.optimizer(),
            max_grad_norm: self.args.max_grad_norm,
            pass: PassConfig {
                checkpointing: self.args.gradient_checkpointing,
                loss_chunk: self.args.loss_chunk,
                reshard_after_forward: self.args.reshard_after_forward,
            },
            optimizer_in_backward: self.args.optimizer_in_backward,
            train_embeddings: !self.args.freeze_embeddings,
        }
    }

    fn feed_config(&self, stage: &Stage<'_>) -> FeedConfig {
        let longest = stage.examples.iter().map(|e| e.ids.len()).max().unwrap_or(0);
        FeedConfig {
            batch_size: self.args.batch_size,
            grad_accum: self.args.grad_accum,
            ranks: self.session.placement.world(),
            row: self.args.packing.then(|| self.args.max_length.unwrap_or(longest).max(longest)),
        }
    }
}

/// A stage in progress.
struct StageRun<'a> {
    run: &'a Run<'a>,
    stage: &'a Stage<'a>,
    schedule: Schedule,
    position: Progress,
    found: Option<SavedState>,
    /// A step has told all ranks to stop.
    stop: bool,
    /// Steps of the run whose states are averaged with the weights at its end.
    averaged: Vec<usize>,
}

impl<'a> StageRun<'a> {
    fn new(
        run: &'a Run<'a>,
        stage: &'a Stage<'a>,
        finished: &[StageReport],
        found: Option<SavedState>,
    ) -> Result<Self> {
        if let Some(found) = &found {
            let trained = match run.lora {
                Some(_) => lora::pieces(&run.session.model),
                None => run.session.pieces(),
            };
            found.load(Part::Weights, &trained)?;
        }
        let finished = finished.to_vec();
        let fresh = Progress { finished, step: 0, tokens: 0, losses: Vec::new(), importance_tokens: 0 };
        let position = found.as_ref().map_or(fresh, |f| f.position.clone());
        let schedule = run.schedule(stage)?;
        let (before, last) = (steps_of(&position.finished), position.finished.len() + 1 == run.stages.len());
        let averaged = if last { run.averaged(stage, &schedule)? } else { Vec::new() };
        let averaged: Vec<usize> = averaged.into_iter().map(|step| before + step).collect();
        // Not found out at the end of the run.
        averaged
            .iter()
            .filter(|step| **step <= before + position.step)
            .try_for_each(|step| run.states.after(*step).map(drop))?;
        Ok(Self { run, stage, schedule, position, found, stop: false, averaged })
    }

    fn go(mut self, watch: &mut Watch) -> Result<StageReport> {
        let (run, stage, session) = (self.run, self.stage, self.run.session);
        // Frozen elements have their values from the start of the stage, in a saved state too.
        let placement = &session.placement;
        let freeze = stage.isolation.freeze(&session.pieces())?;
        let frozen = placement.total_count(freeze.as_ref().map_or(0, Freeze::len))?;
        let attention = session.model.attention();
        info!(
            "{}: {} examples, {} steps{}, {frozen} elements frozen; {attention}",
            stage.label,
            stage.examples.len(),
            self.total(),
            match stage.budget {
                Budget::Epochs(epochs) => format!(" ({epochs} epoch{})", if epochs == 1.0 { "" } else { "s" }),
                _ => String::new(),
            }
        );
        let mut trainer = Trainer::placed(&session.model, &session.parameters, freeze, run.step_config(), placement)?;
        let mut moving = match &stage.isolation {
            Isolation::Dynamic(config) => {
                Some(DynamicMask::new(config, &trainer, run.feed_config(stage), splitmix64(stage.seed, IMPORTANCE)))
            }
            _ => None,
        };
        if let Some(found) = self.found.take() {
            self.restore(&found, &mut trainer, moving.as_mut())?;
        }
        let mut watch = watch.stage(&stage.label, self.total(), steps_of(&self.position.finished), run.args.log_every);
        watch.skip_to(self.position.step, self.position.tokens);
        let steps = self.position.step..self.total();
        let mut feeder = Feeder::mixed(stage.examples, stage.mixture, run.feed_config(stage), stage.seed);
        feeder.skip(self.position.step);
        thread::scope(|scope| {
            // Batches are made while the device runs the previous steps.
            let (sender, batches) = sync_channel(2);
            let (count, device, examples) = (steps.len(), session.model.device(), stage.examples);
            let (rank, world) = (placement.rank(), placement.world());
            let maker = scope.spawn(move || {
                oom::handled_by_another_thread();
                for _ in 0..count {
                    let share = StepShare::new(examples, feeder.next_step(), rank, world).pinned(device);
                    // The receiver is gone if the stage has ended early.
                    if sender.send(share).is_err() {
                        return;
                    }
                }
            });
            let (mut maker, mut pending) = (Some(maker), Vec::new());
            for step in steps {
                if let Some(mask) = moving.as_mut().filter(|mask| mask.is_due(step)) {
                    let clock = Instant::now();
                    let drift = mask.renew(&mut trainer)?;
                    self.position.importance_tokens = mask.tokens;
                    watch.mask(step + 1, drift.protected, drift.jaccard, clock.elapsed())?;
                }
                let share = receive(&batches, &mut maker)?;
                pending.push(self.step(&mut trainer, step, share)?);
                self.after_step(&trainer, moving.as_ref(), &mut pending, &mut watch)?;
            }
            Ok::<(), anyhow::Error>(())
        })?;
        let frozen = placement.total_count(trainer.freeze.as_ref().map_or(0, Freeze::len))?;
        drop(trainer);
        if !self.averaged.is_empty() {
            info!("{}: averaging the weights at {} saved steps", stage.label, self.averaged.len() + 1);
            average(&session.pieces(), &run.states, &self.averaged)?;
        }
        Ok(self.report(frozen))
    }

    /// Restores the rest of a state whose weights are already loaded.
    fn restore(
        &self,
        found: &SavedState,
        trainer: &mut Trainer<'_>,
        moving: Option<&mut DynamicMask<'_>>,
    ) -> Result<()> {
        let position = &self.position;
        found.load(Part::Moments, &trainer.optimizer.moments())?;
        trainer.optimizer.set_steps(position.step);
        if let Some(mask) = moving {
            let extra = mask.blank(trainer.pieces());
            found.load(Part::Extra, &extra)?;
            mask.restore(&extra, position.step, position.importance_tokens, trainer)?;
        }
        Ok(())
    }

    fn total(&self) -> usize {
        self.schedule.total_steps
    }

    /// Starts step `step`, counted from 0; on CUDA it may still be running when this returns.
    fn step(&mut self, trainer: &mut Trainer<'_>, step: usize, share: StepShare) -> Result<Pending> {
        let batches = share.on(self.run.session.model.device());
        let lr = self.schedule.rate(step);
        let input = StepInput::of(&share, &batches, stop_asked().is_some());
        let outcome = trainer
            .step(&input, lr, splitmix64(self.stage.seed, step as u64))
            .with_context(|| format!("{}, step {}", self.stage.label, step + 1))?;
        self.position.step = step + 1;
        self.position.tokens += share.tokens;
        Ok(Pending { step: step + 1, lr, tokens: self.position.tokens, outcome, chosen: share.chosen })
    }

    /// After a step: metrics, held-out losses, a saved state, stopping.
    fn after_step(
        &mut self,
        trainer: &Trainer<'_>,
        moving: Option<&DynamicMask<'_>>,
        pending: &mut Vec<Pending>,
        watch: &mut StageWatch<'_>,
    ) -> Result<()> {
        let (args, session, step, total) = (self.run.args, self.run.session, self.position.step, self.total());
        let every = |n: Option<usize>| n.is_some_and(|n| step % n == 0);
        let evaluate = args.eval_every.is_some() && (every(args.eval_every) || step == total);
        // The last step of the last stage is followed by the output itself.
        let last = step == total && self.position.finished.len() + 1 == self.run.stages.len();
        let stop = self.must_stop(pending);
        let save = (every(args.save_every) && !last) || stop;
        // Reading metrics synchronises with the device.
        if !session.model.device().is_cuda() || evaluate || save || step == total || step % args.log_every == 0 {
            let count = pending.len();
            for (i, done) in pending.drain(..).enumerate() {
                self.read(&done, i + 1 == count, watch)?;
            }
        }
        if evaluate {
            let clock = Instant::now();
            let losses = held_out_losses(session, &self.run.held_out, args.batch_size)?;
            watch.held_out(step, &losses, clock.elapsed())?;
        }
        if save {
            let (clock, _saving) = (Instant::now(), SignalScope::begin(Phase::State));
            let steps = steps_of(&self.position.finished) + step;
            let extra = moving.map_or_else(Pieces::new, |mask| mask.state(trainer.pieces()));
            let (weights, moments) = trainer.stored();
            let parts = [(Part::Weights, weights), (Part::Moments, moments), (Part::Extra, extra)];
            let folder = self.run.states.save(steps, &self.position, &parts, &session.placement, &self.averaged)?;
            watch.saved(clock);
            // A signal may have arrived while the state was saved; ranks wait for the next step,
            // which tells them all.
            let alone = session.placement.group.is_none();
            if stop || (alone && stop_asked().is_some()) {
                // Until the end of the process.
                drop(SignalScope::begin(Phase::Saved));
                let message = format!(
                    "stopped by {} after step {step} of {}; saved {}",
                    stop_asked().unwrap_or("a signal to another rank"),
                    self.stage.label,
                    folder.display()
                );
                return Err(Stopped(message + "\n  hint: the same command with --resume continues from there").into());
            }
        }
        Ok(())
    }

    /// Returns true if the run must stop after this step. Ranks decide by what a step has told them
    /// all: this one on the CPU, the one before on CUDA, so that the device does not wait.
    fn must_stop(&mut self, pending: &[Pending]) -> bool {
        let placement = &self.run.session.placement;
        if placement.group.is_none() {
            return stop_asked().is_some();
        }
        let behind = usize::from(placement.device.is_cuda());
        let told = pending.iter().rev().nth(behind).is_some_and(|done| done.outcome.stop_asked());
        self.stop |= told;
        self.stop
    }

    /// Reads a step's loss and norm; values that are not finite end the run.
    fn read(&mut self, done: &Pending, timed: bool, watch: &mut StageWatch<'_>) -> Result<()> {
        let (loss, grad_norm) = done.outcome.read();
        if !loss.is_finite() || !grad_norm.is_finite() {
            let place = |&i: &usize| self.stage.examples[i].place.to_string();
            let mut examples: Vec<String> = done.chosen.iter().take(8).map(place).collect();
            if done.chosen.len() > examples.len() {
                examples.push(format!("and {} more", done.chosen.len() - examples.len()));
            }
            // With updates in the backward pass, the head and the last blocks are updated before
            // the first blocks' gradients are known.
            let stopped = if self.run.args.optimizer_in_backward && loss.is_finite() {
                "stopped there; the blocks above the first bad gradient were updated already (--optimizer-in-backward)"
            } else {
                "stopped before the update"
            };
            return Err(anyhow!(
                "{}, step {}: loss {loss}, gradient norm {grad_norm}; {stopped}\n  batch: {}\n  hint: lower --lr, or look \
                 at these rows with cpift-train preview; --resume starts from the last saved state",
                self.stage.label,
                done.step,
                examples.join(", ")
            ));
        }
        self.position.losses.push(loss);
        self.stop |= done.outcome.stop_asked();
        watch.step(&StepFigures { step: done.step, loss, grad_norm, lr: done.lr, tokens: done.tokens, timed })
    }

    fn report(&self, frozen: u64) -> StageReport {
        let losses = &self.position.losses;
        let tail = &losses[losses.len() - losses.len().div_ceil(10)..];
        StageReport {
            steps: self.total(),
            tokens: self.position.tokens,
            first_loss: losses[0],
            final_loss: tail.iter().sum::<f64>() / tail.len() as f64,
            frozen,
            importance_tokens: self.position.importance_tokens,
        }
    }
}

fn steps_of(reports: &[StageReport]) -> usize {
    reports.iter().map(|r| r.steps).sum()
}
