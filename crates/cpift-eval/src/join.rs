//! `cpift-eval join`: joins the scores of one checkpoint from several runs into the directory that
//! one run would have written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::error::usage;
use cpift_core::files::{self, StagedDir, check_not_input, check_output};
use cpift_core::format::digest::Digest;
use cpift_core::format::scores::{self, FORMAT_VERSION, OUTPUTS, Scores, TaskScore};
use cpift_core::record::provenance::Recorder;
use cpift_core::run::cli::Common;
use serde_json::json;

use crate::args::JoinArgs;
use crate::run::{STAGE, keep_verdicts, up_to_date};

/// A directory to join.
struct Part {
    folder: PathBuf,
    scores: Scores,
    outputs: String,
}

impl Part {
    /// # Errors
    /// [`BadInput`] if scores.json or outputs.jsonl is missing or malformed.
    fn read(folder: &Path, recorder: &mut Recorder) -> Result<Self> {
        let scores = Scores::read(folder)?;
        let mut outputs = files::read_text(&folder.join(OUTPUTS))?;
        if !outputs.is_empty() && !outputs.ends_with('\n') {
            outputs.push('\n');
        }
        let tasks = scores.tasks.iter().map(|task| task.task.as_str()).collect::<Vec<_>>().join(",");
        for name in [scores::FILE_NAME, OUTPUTS] {
            let path = folder.join(name);
            recorder.input(format!("{name}:{tasks}"), &path, Digest::of_file(&path)?);
        }
        Ok(Self { folder: folder.to_owned(), scores, outputs })
    }
}

/// Joins the directories and writes the output directory.
///
/// # Errors
/// [`cpift_core::Usage`], and [`BadInput`] for scores of different checkpoints or a task scored
/// twice. Nothing is written then.
pub(crate) fn join(args: &JoinArgs, common: &Common) -> Result<()> {
    let mut recorder = Recorder::start(STAGE);
    if up_to_date(common, &args.out) {
        return Ok(());
    }
    check_output(&args.out, common.force())?;
    check_not_input("--out", &args.out, args.parts.iter().map(PathBuf::as_path))?;
    [scores::FILE_NAME, OUTPUTS].iter().for_each(|name| recorder.also(&args.out.join(name)));
    let parts: Vec<Part> = args.parts.iter().map(|folder| Part::read(folder, &mut recorder)).collect::<Result<_>>()?;
    let first = parts.first().ok_or_else(|| usage("no directories to join"))?;
    for part in &parts {
        if part.scores.model_digest != first.scores.model_digest {
            return Err(BadInput::new(
                &part.folder,
                format!("scores of another checkpoint than {}", first.folder.display()),
            )
            .expected(format!("{} ({})", first.scores.model_digest, first.scores.model))
            .found(format!("{} ({})", part.scores.model_digest, part.scores.model))
            .into());
        }
    }
    let joined = Scores {
        format_version: FORMAT_VERSION,
        model: first.scores.model.clone(),
        model_digest: first.scores.model_digest.clone(),
        tasks: tasks(&parts)?,
    };
    let staged = StagedDir::create(&args.out, common.force())?;
    let outputs: String = parts.iter().map(|part| part.outputs.as_str()).collect();
    files::write_text(&staged.path().join(OUTPUTS), &outputs, false)?;
    joined.write(&staged.path().join(scores::FILE_NAME), false)?;
    keep_verdicts(
        [args.out.as_path()].into_iter().chain(parts.iter().map(|part| part.folder.as_path())),
        staged.path(),
    )?;
    recorder.write_into_for(staged.path(), scores::FILE_NAME)?;
    staged.commit()?;
    common.print_json(&json!(joined));
    Ok(())
}

/// Scores of all tasks in the order of the directories.
fn tasks(parts: &[Part]) -> Result<Vec<TaskScore>> {
    let (mut owner, mut all) = (BTreeMap::new(), Vec::new());
    for part in parts {
        for score in &part.scores.tasks {
            if let Some(other) = owner.insert(&score.task, &part.folder) {
                return Err(BadInput::new(&part.folder, format!("task {} is scored twice", score.task))
                    .hint(format!("{} scores it as well: omit one of the two", other.display()))
                    .into());
            }
            all.push(score.clone());
        }
    }
    Ok(all)
}
