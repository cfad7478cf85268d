//! `cpift-pipeline slurm`: submits what is due as jobs of Slurm, each after those whose artifacts
//! it reads.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use cpift_core::error::usage;
use cpift_core::run::cli::print;

use crate::artifacts::{self, Artifact, QueuedJob};
use crate::settings::{Settings, output_of, text_of};

/// Jobs of which no program shares its work over ranks.
const ONE_RANK_JOBS: [&str; 3] = ["groups", "fused", "report"];

/// The file with the requests of the jobs, unless CLUSTER names another.
const CLUSTER: &str = "scripts/slurm/cluster.env";

/// A job: a command of several artifacts, or an array of such commands.
struct Job<'a> {
    name: &'a str,
    /// Elements of the array, or one without a name, and their artifacts.
    elements: Vec<(Option<&'a str>, Vec<&'a Artifact>)>,
}

/// Submits what is neither up to date nor queued.
///
/// # Errors
/// [`cpift_core::error::Usage`] for missing inputs, wrong settings of the cluster, and jobs in the
/// queue that have other settings; if a command of Slurm fails.
pub(crate) fn submit(settings: &Settings) -> Result<()> {
    if !settings.have_inputs() {
        return Err(usage("name the inputs: make slurm RUN=DIR BASE=DIR TASKS=FILE"));
    }
    let run = &settings.run;
    let dry_run = settings.get("DRY_RUN").is_some();
    let cluster = Cluster::read(settings)?;
    let all = artifacts::read(settings)?;
    let queued = artifacts::queued_jobs(run).context("the queue cannot be read")?;
    if !dry_run {
        keep_settings(settings, &queued)?;
    }
    let job_of = |name: &String| all.iter().find(|artifact| artifact.name == *name).map(|found| found.job.as_str());
    // Of each job: what those after it wait for.
    let mut ids: HashMap<&str, Vec<String>> = HashMap::new();
    for job in jobs_of(&all) {
        let own = || job.elements.iter().flat_map(|(_, artifacts)| artifacts);
        let reads =
            unique(own().flat_map(|artifact| artifact.reads.iter().chain(&artifact.surveys)).filter_map(job_of));
        let needs: Vec<(&str, Vec<String>)> = reads
            .into_iter()
            .filter(|need| *need != job.name && !ids[need].is_empty())
            .map(|need| (need, ids[need].clone()))
            .collect();
        let own_ids = unique(own().filter_map(|artifact| queued.get(&artifact.name)).map(|job| job.id.clone()));
        let is_due = |artifacts: &Vec<&Artifact>| {
            artifacts.iter().any(|a| a.is_due()) && !artifacts.iter().any(|a| queued.contains_key(&a.name))
        };
        let due: Vec<usize> = (0..job.elements.len()).filter(|i| is_due(&job.elements[*i].1)).collect();
        if due.is_empty() {
            let state = match numbers(&own_ids) {
                queued if queued.is_empty() => "complete".to_owned(),
                queued => format!("queued already: {queued}"),
            };
            print(&format!("{:<16}{state}\n", job.name));
            ids.insert(job.name, own_ids);
            continue;
        }
        let after: Vec<String> = needs.iter().flat_map(|(_, ids)| ids.clone()).collect();
        let words = cluster.sbatch(run, &job, &due, &after)?;
        let id = if dry_run {
            print(&format!("sbatch {}\n", words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")));
            format!("JOB_{}", job.name)
        } else {
            let said = output_of(settings.command("sbatch").env("CLUSTER", &cluster.file).args(&words))?;
            let id = said.trim().split(';').next().unwrap_or_default().to_owned();
            record(run, &job, &due, &id)?;
            let after: Vec<String> = needs.iter().map(|(need, ids)| format!("{need} {}", numbers(ids))).collect();
            let after = if after.is_empty() { String::new() } else { format!(" after {}", after.join(", ")) };
            print(&format!("{:<16}job {id}{}{after}\n", job.name, job.shown(&due)));
            id
        };
        ids.insert(job.name, own_ids.into_iter().chain([id]).collect());
    }
    if !dry_run {
        print(&format!("make status RUN={} shows how far it is.\n", run.display()));
    }
    Ok(())
}

/// All jobs; each comes after those whose artifacts it reads.
fn jobs_of(all: &[Artifact]) -> Vec<Job<'_>> {
    let mut jobs: Vec<Job<'_>> = Vec::new();
    for artifact in all {
        // To the end: all that its last artifact reads has been made by the jobs before it.
        let mut job = match jobs.iter().position(|job| job.name == artifact.job) {
            Some(at) => jobs.remove(at),
            None => Job { name: &artifact.job, elements: Vec::new() },
        };
        let element = artifact.element.as_deref();
        match job.elements.iter_mut().find(|(name, _)| *name == element) {
            Some((_, artifacts)) => artifacts.push(artifact),
            None => job.elements.push((element, vec![artifact])),
        }
        jobs.push(job);
    }
    jobs
}

impl Job<'_> {
    fn is_array(&self) -> bool {
        self.elements.iter().any(|(name, _)| name.is_some())
    }

    /// The elements of the array that are submitted, in words.
    fn shown(&self, due: &[usize]) -> String {
        let names: Vec<&str> = due.iter().filter_map(|i| self.elements[*i].0).collect();
        match names[..] {
            [] => String::new(),
            [first, .., last] if names.len() > 8 => format!(" ({}: {first} … {last})", names.len()),
            _ => format!(" ({})", names.join(" ")),
        }
    }
}

/// Requests of the jobs: the variables that the file CLUSTER, which is Bash, sets.
struct Cluster {
    file: String,
    variables: BTreeMap<String, String>,
}

impl Cluster {
    fn read(settings: &Settings) -> Result<Self> {
        let file = settings.get("CLUSTER").unwrap_or_else(|| CLUSTER.to_owned());
        let script = r#"set -ea; source "$1"; env -0"#;
        let text = output_of(settings.command("bash").env("CLUSTER", &file).args(["-c", script, "-", &file]))?;
        let pair = |entry: &str| entry.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        Ok(Self { file, variables: text.split('\0').filter_map(pair).collect() })
    }

    /// A setting of one job (GPUS_probe), or of all (GPUS); empty if there is none.
    fn get(&self, key: &str, job: &str) -> &str {
        let own = format!("{key}_{}", job.replace('-', "_"));
        self.variables.get(&own).or_else(|| self.variables.get(key)).map_or("", String::as_str)
    }

    /// As [`Cluster::get`], a number from 1.
    fn count(&self, key: &str, job: &str, default: &str) -> Result<usize> {
        let value = Some(self.get(key, job)).filter(|value| !value.is_empty()).unwrap_or(default);
        let wrong = || usage(format!("{}: {key} of {job} is not a number from 1: {value}", self.file));
        value.parse().ok().filter(|count| *count > 0).ok_or_else(wrong)
    }

    /// Arguments of sbatch for the elements `due` of a job, which waits for the jobs `after`.
    fn sbatch(&self, run: &Path, job: &Job<'_>, due: &[usize], after: &[String]) -> Result<Vec<String>> {
        let name = job.name;
        let setting = |key: &str| self.get(key, name).to_owned();
        let gpus = Some(setting("GPUS")).filter(|gpus| gpus != "0").unwrap_or_default();
        let (mut nodes, mut ranks) = (1, 1);
        if !ONE_RANK_JOBS.contains(&name) {
            // The number of GPUS may follow their type, as in a100:4.
            let count = gpus.rsplit(':').next().filter(|count| !count.is_empty()).unwrap_or("1");
            (nodes, ranks) = (self.count("NODES", name, "1")?, self.count("RANKS", name, count)?);
        }
        let warn = self.variables.get("WARN").filter(|warn| !warn.is_empty());
        let warn = warn.ok_or_else(|| usage(format!("{}: WARN is not set", self.file)))?;
        let indices = due.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let limit = self.variables.get("ARRAY_LIMIT").filter(|limit| !limit.is_empty());
        let limit = limit.map_or_else(String::new, |limit| format!("%{limit}"));
        let title = run.file_name().unwrap_or_default().to_string_lossy();
        let several = |count: usize| if nodes * ranks > 1 { count.to_string() } else { String::new() };
        let given = |text: String, on: bool| if on { text } else { String::new() };
        let output = if job.is_array() { "%A_%a" } else { "%j" };
        let options = [
            ("job-name", format!("{title}.{name}")),
            ("signal", format!("B:TERM@{warn}")),
            ("open-mode", "append".to_owned()),
            ("output", format!("{}/slurm/{name}-{output}.out", run.display())),
            ("array", given(format!("{indices}{limit}"), job.is_array())),
            ("dependency", given(format!("afterok:{}", after.join(":")), !after.is_empty())),
            ("kill-on-invalid-dep", given("yes".to_owned(), !after.is_empty())),
            ("partition", setting("PARTITION")),
            ("account", setting("ACCOUNT")),
            ("time", setting("TIME")),
            ("nodes", several(nodes)),
            ("ntasks-per-node", several(ranks)),
            ("cpus-per-task", setting("CPUS")),
            ("mem", setting("MEM")),
            ("gres", given(format!("gpu:{gpus}"), !gpus.is_empty())),
        ];
        let mut words = vec!["--parsable".to_owned(), "--requeue".to_owned()];
        words
            .extend(options.iter().filter(|(_, v)| !v.is_empty()).map(|(option, value)| format!("--{option}={value}")));
        let more = setting("OPTIONS");
        let more = shlex::split(&more).ok_or_else(|| usage(format!("{}: OPTIONS: quotes do not match", self.file)))?;
        words.extend(more);
        words.push("scripts/slurm/job.sh".to_owned());
        let names = |artifacts: &[&Artifact]| artifacts.iter().map(|a| a.name.as_str()).collect::<Vec<_>>().join(" ");
        words.extend(job.elements.iter().map(|(_, artifacts)| names(artifacts)));
        Ok(words)
    }
}

/// Writes the settings that the jobs are for, and which of them are queued.
fn keep_settings(settings: &Settings, queued: &HashMap<String, QueuedJob>) -> Result<()> {
    let run = &settings.run;
    let file = run.join("pipeline.env");
    let before = text_of(&file);
    settings.output_of_make(&["settings"])?;
    if !queued.is_empty() && text_of(&file) != before {
        fs::write(&file, before)?;
        let ids: BTreeSet<u64> = queued.values().filter_map(|job| number(&job.id).parse().ok()).collect();
        let ids: Vec<String> = ids.iter().map(u64::to_string).collect();
        let run = run.display();
        return Err(usage(format!(
            "the settings have changed and jobs of {run} with the old ones are queued: scancel {}",
            ids.join(" ")
        )));
    }
    fs::create_dir_all(run.join("slurm"))?;
    let lines: BTreeSet<String> = queued.values().map(|job| format!("{}\n", job.line)).collect();
    Ok(fs::write(run.join("slurm/jobs"), lines.into_iter().collect::<String>())?)
}

/// Adds the artifacts of a submitted job to RUN/slurm/jobs: the artifact, its job's id and title.
fn record(run: &Path, job: &Job<'_>, due: &[usize], id: &str) -> Result<()> {
    let title = run.file_name().unwrap_or_default().to_string_lossy();
    let mut text = String::new();
    for i in due {
        let (element, artifacts) = &job.elements[*i];
        let own = if element.is_some() { format!("{id}_{i}") } else { id.to_owned() };
        for artifact in artifacts {
            writeln!(text, "{} {own} {title}.{}", artifact.name, job.name)?;
        }
    }
    let file = run.join("slurm/jobs");
    let mut jobs =
        fs::OpenOptions::new().append(true).open(&file).with_context(|| format!("opening {}", file.display()))?;
    jobs.write_all(text.as_bytes()).with_context(|| format!("writing {}", file.display()))
}

/// The id of a job without the element of its array.
fn number(id: &str) -> &str {
    id.split('_').next().unwrap_or(id)
}

fn numbers(ids: &[String]) -> String {
    unique(ids.iter().map(|id| number(id))).join(" ")
}

/// Each once, in order.
fn unique<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    items.fold(Vec::new(), |mut seen, item| {
        if !seen.contains(&item) {
            seen.push(item);
        }
        seen
    })
}

/// A word as a shell reads it.
fn quoted(word: &str) -> String {
    let plain = !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "@%+=:,./-_".contains(c));
    if plain { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    use cpift_core::record::up_to_date::State;

    fn artifact(name: &str, job: &str, element: Option<&str>) -> Artifact {
        let [name, job] = [name, job].map(str::to_owned);
        let element = element.map(str::to_owned);
        Artifact { name, job, element, state: State::Done, reads: Vec::new(), surveys: Vec::new() }
    }

    fn cluster(variables: &[(&str, &str)]) -> Cluster {
        let pairs = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Cluster { file: "cluster.env".into(), variables: pairs.collect() }
    }

    #[test]
    fn the_elements_of_an_array_make_all_artifacts_of_their_task() {
        let all = [
            artifact("probe-a", "probe", Some("a")),
            artifact("full-sft", "full-sft", None),
            artifact("probe-b", "probe", Some("b")),
            artifact("mask-a", "probe", Some("a")),
        ];
        let jobs = jobs_of(&all);
        assert_eq!(jobs.iter().map(|job| job.name).collect::<Vec<_>>(), ["full-sft", "probe"]);
        let common = [("WARN", "60"), ("GPUS", "a100:4"), ("NODES_probe", "2"), ("ARRAY_LIMIT", "3"), ("TIME", "")];
        let words = cluster(&common).sbatch(Path::new("runs/x"), &jobs[1], &[1], &["7_0".into(), "8".into()]).unwrap();
        assert_eq!(
            words.join(" "),
            "--parsable --requeue --job-name=x.probe --signal=B:TERM@60 --open-mode=append \
             --output=runs/x/slurm/probe-%A_%a.out --array=1%3 --dependency=afterok:7_0:8 --kill-on-invalid-dep=yes \
             --nodes=2 --ntasks-per-node=4 --gres=gpu:a100:4 scripts/slurm/job.sh probe-a mask-a probe-b"
        );
        assert_eq!(words[words.len() - 2..], ["probe-a mask-a", "probe-b"]);
        let one = cluster(&[("WARN", "60"), ("GPUS", "0")]).sbatch(Path::new("x"), &jobs[0], &[0], &[]).unwrap();
        assert!(one.iter().any(|word| word == "--output=x/slurm/full-sft-%j.out"), "{one:?}");
        assert!(
            !one.iter().any(|word| ["--array", "--gres", "--nodes"].iter().any(|o| word.starts_with(o))),
            "{one:?}"
        );
        let wrong = cluster(&[("WARN", "60"), ("RANKS_full_sft", "two")]).sbatch(Path::new("x"), &jobs[0], &[0], &[]);
        assert!(wrong.unwrap_err().to_string().contains("RANKS of full-sft is not a number from 1: two"));
    }

    #[test]
    fn words_are_quoted_only_where_a_shell_needs_it() {
        assert_eq!(quoted("--gres=gpu:a100:4"), "--gres=gpu:a100:4");
        assert_eq!(quoted("probe-a mask-a"), "'probe-a mask-a'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
