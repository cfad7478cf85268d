//! The processes of a training job, from the command line to the end: one, or the ranks that
//! torchrun or srun have started.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result;
use cpift_core::Stopped;
use cpift_core::error::usage;
use cpift_core::record::provenance::argv;
use cpift_core::run::cli::Common;
use log::{LevelFilter, info};
use serde_json::{Map, Value};
use tch::Device;

use crate::args::TrainingArgs;
use crate::dist::{Backend, Group, Place};
use crate::placement::{DeviceChoice, Placement};

/// Time that ranks wait for one another in a collective. A rank that is gone is noticed earlier.
const TIMEOUT: Duration = Duration::from_secs(600);

/// This process's place in its job.
pub struct Workers {
    /// Placement of the model.
    pub placement: Placement,
    /// All ranks have found the same error: none needs to tell the others.
    all_know: Cell<bool>,
}

impl Workers {
    /// Opens the device of a training run and joins the other ranks, if there are any.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for arguments that do not go with several ranks;
    /// [`cpift_core::BadInput`] for a directory that cannot have the state; a rank that is missing.
    pub fn start(training: &TrainingArgs, common: &Common) -> Result<Self> {
        let place = Place::from_env()?;
        let device = training.device.open_for(common.threads, place.as_ref())?;
        let [weights, moments] = training.storage(device)?;
        let world = place.as_ref().map_or(1, |place| place.world);
        if training.batch_size < world {
            return Err(usage(format!(
                "--batch-size {} is the batch of all {world} ranks together: it must be at least {world}",
                training.batch_size
            )));
        }
        let group = place.map(|place| join(place, device)).transpose()?;
        // Another node may have another disk: its ranks are told.
        if let Err(error) = weights.check().and_then(|()| moments.check()) {
            if let Some(group) = &group {
                group.fail(&error);
            }
            return Err(error);
        }
        let placement = Placement { group, device, weights, moments, reduce: training.reduce };
        Ok(Self { placement, all_know: Cell::new(false) })
    }

    /// Opens a device and joins the other ranks, if there are any, each with a whole model.
    ///
    /// # Errors
    /// [`cpift_core::Usage`] for a device that is not there; a rank that is missing.
    pub fn for_inference(device: DeviceChoice, common: &Common) -> Result<Self> {
        let place = Place::from_env()?;
        let device = device.open_for(common.threads, place.as_ref())?;
        let group = place.map(|place| join(place, device)).transpose()?;
        Ok(Self { placement: Placement { group, ..Placement::on(device) }, all_know: Cell::new(false) })
    }

    /// Returns true on the rank that writes and prints: 0.
    pub fn leads(&self) -> bool {
        self.placement.rank() == 0
    }

    /// Rank 0's answer to a question whose answer ranks could see differently.
    ///
    /// # Errors
    /// A failed rank.
    pub fn agree(&self, what: &str, ask: impl FnOnce() -> bool) -> Result<bool> {
        self.placement.decide(what, || Ok(ask()))
    }

    /// Refuses a rank whose arguments or inputs, described by `run`, are not those of rank 0.
    ///
    /// # Errors
    /// The first key that differs, with the rank; a failed rank.
    pub fn check_same(&self, run: &Map<String, Value>) -> Result<()> {
        let Some(group) = &self.placement.group else { return Ok(()) };
        let mut run = run.clone();
        // Last, so that an argument is named by what it changes where that is known.
        run.insert("arguments".into(), argv().into());
        let own = serde_json::to_string(&run)?;
        let texts = group.exchange("arguments and inputs", &own)?;
        // Every rank reads the texts of all ranks, so that all fail if any two differ.
        for (rank, text) in texts.iter().enumerate() {
            let other: Map<String, Value> = serde_json::from_str(text)?;
            let differs = |key: &&String| run.get(*key) != other.get(*key);
            if let Some(key) = run.keys().chain(other.keys()).find(differs) {
                self.all_know.set(true);
                let shown = |run: &Map<String, Value>| run.get(key).map_or("nothing".to_owned(), Value::to_string);
                return Err(usage(format!(
                    "ranks {} and {rank} have another {key}: {} and {}\n  hint: start all ranks with the same arguments \
                     and the same files",
                    group.rank(),
                    shown(&run),
                    shown(&other)
                )));
            }
        }
        Ok(())
    }

    /// Ends this process's part of the job with `result`, which it returns: after an error the
    /// other ranks end too.
    ///
    /// # Errors
    /// The error of `result`; a rank that failed at the end.
    pub fn finish<T>(self, result: Result<T>) -> Result<T> {
        let Some(group) = self.placement.group else { return result };
        match result {
            Err(error) if !error.is::<Stopped>() && !self.all_know.get() => {
                group.fail(&error);
                Err(error)
            }
            done => group.leave().and(done),
        }
    }
}

/// Joins the other ranks. Ranks other than 0 log warnings and errors only.
fn join(place: Place, device: Device) -> Result<Rc<Group>> {
    let (backend, name) = if device.is_cuda() { (Backend::Nccl, "NCCL") } else { (Backend::Gloo, "Gloo") };
    let group = Group::join(backend, place, TIMEOUT)?;
    if group.rank() > 0 {
        log::set_max_level(LevelFilter::Warn.min(log::max_level()));
    }
    info!("{} ranks over {name}", group.world());
    Ok(group)
}
