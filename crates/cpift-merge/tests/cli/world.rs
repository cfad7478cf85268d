//! A directory with small checkpoints, masks and groups, on which the binary runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cpift_core::Dtype;
use cpift_core::format::checkpoint::Checkpoint;
use cpift_core::format::digest::Digest;
use cpift_core::format::groups::{Groups, Order, TauMode};
use cpift_core::format::mask::{MaskHeader, MaskWriter, Metric, Scope, Ties};
use cpift_core::stream::ties::TieSalt;
use cpift_testkit::{Run, Tensor, Tensors, expect_entries, run, write_checkpoint};
use tempfile::TempDir;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_cpift-merge");

/// Core elements by tensor.
pub type Core = BTreeMap<String, Vec<usize>>;

/// A core region of elements of one tensor.
pub fn core(tensor: &str, elements: &[usize]) -> Core {
    Core::from([(tensor.to_owned(), elements.to_vec())])
}

/// One checkpoint of a single F32 tensor `w`.
pub fn w(values: &[f32]) -> Tensors {
    Tensors::from([("w".to_owned(), Tensor::f32(&[values.len()], values))])
}

/// The tensors, cast to `dtype`.
pub fn cast(tensors: &Tensors, dtype: Dtype) -> Tensors {
    tensors.iter().map(|(n, t)| (n.clone(), Tensor::floats(dtype, &t.shape, &t.values()))).collect()
}

pub struct World {
    dir: TempDir,
}

impl World {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Replaces `@name` in `text` by a path in this directory.
    pub fn resolve(&self, text: &str) -> String {
        text.replace('@', &format!("{}/", self.dir.path().display()))
    }

    /// Runs the program with the words of `line` as arguments.
    pub fn run(&self, line: &str) -> Run {
        run(PROGRAM, self.resolve(line).split_whitespace())
    }

    /// Runs `line` and asserts that it is refused as bad input with a message that contains all
    /// `parts`, and that nothing is left behind.
    #[track_caller]
    pub fn refused(&self, line: &str, parts: &[&str]) {
        let before = self.entries();
        let parts: Vec<String> = parts.iter().map(|p| self.resolve(p)).collect();
        self.run(line).bad_input(&parts.iter().map(String::as_str).collect::<Vec<_>>());
        expect_entries(self.dir.path(), &before.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Runs `line` and asserts a usage error that contains all `parts`, with nothing left behind.
    #[track_caller]
    pub fn misused(&self, line: &str, parts: &[&str]) {
        let before = self.entries();
        self.run(line).usage_error(parts);
        expect_entries(self.dir.path(), &before.iter().map(String::as_str).collect::<Vec<_>>());
    }

    fn entries(&self) -> Vec<String> {
        std::fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// The first `k` of these elements of `w`, whose updates in the model `name` are equal, in the
    /// order in which trims keep them.
    pub fn tied_first(&self, name: &str, elements: &[usize], k: usize) -> Vec<usize> {
        let digest = Checkpoint::open(&self.path(name)).unwrap().digest().unwrap();
        let key = TieSalt::new(&digest).key("w");
        let mut order = elements.to_vec();
        order.sort_by_key(|i| (key.hash(*i), *i));
        order.truncate(k);
        order
    }

    /// Writes the checkpoint `name`, replacing an older one.
    pub fn checkpoint(&self, name: &str, tensors: &Tensors) -> PathBuf {
        let _ = std::fs::remove_dir_all(self.path(name));
        write_checkpoint(&self.path(name), tensors)
    }

    /// Writes base, probes, masks and groups (each task a group, in the order given) and returns
    /// the `cpi` command without `--out`.
    pub fn cpi(&self, base: &Tensors, tasks: &[(&str, &Tensors, Core)]) -> String {
        self.checkpoint("base", base);
        let mut line = "cpi --base @base --groups @groups.json".to_owned();
        for (name, tensors, core) in tasks {
            self.checkpoint(name, tensors);
            self.mask(name, core);
            line += &format!(" --task {name}=@{name} --mask {name}=@{name}.mask");
        }
        self.groups(&tasks.iter().map(|t| t.0).collect::<Vec<_>>());
        line
    }

    /// Writes the mask of the task `name` for the checkpoint `base`.
    pub fn mask(&self, name: &str, core: &Core) {
        self.mask_between("@base", &format!("@{name}"), name, core);
    }

    /// Writes the mask `name` for the checkpoints `base` and `tuned`, named as on the command line.
    pub fn mask_between(&self, base: &str, tuned: &str, name: &str, core: &Core) {
        let open = |path: &str| Checkpoint::open(Path::new(&self.resolve(path))).unwrap();
        self.mask_of(name, core, &open(base), &open(tuned));
    }

    /// As [`World::mask`], for a task that has an output embedding of its own, unlike the base.
    pub fn untied_mask(&self, name: &str, core: &Core) {
        let mut base = Checkpoint::open(&self.path("base")).unwrap();
        base.untie();
        self.mask_of(name, core, &base, &Checkpoint::open(&self.path(name)).unwrap());
    }

    fn mask_of(&self, name: &str, core: &Core, base: &Checkpoint, tuned: &Checkpoint) {
        let numel: BTreeMap<String, u64> = base.parameters().map(|v| (v.name.to_owned(), v.numel() as u64)).collect();
        let d: u64 = numel.values().sum();
        let selected = core.values().map(|c| c.len() as u64).sum();
        let header = MaskHeader {
            format_version: cpift_core::format::mask::FORMAT_VERSION,
            percent: 100.0 * selected as f64 / d as f64,
            scope: Scope::Global,
            metric: Metric::Magnitude,
            seed: None,
            rule: None,
            d,
            selected,
            ties: Ties::default(),
            excluded: Vec::new(),
            base: base.digest().unwrap(),
            tuned: tuned.digest().unwrap(),
            numel,
        };
        let path = self.path(&format!("{name}.mask"));
        let _ = std::fs::remove_file(&path);
        let writer = MaskWriter::create(&path, &header).unwrap();
        for (tensor, elements) in core {
            let mut bits = vec![0u8; header.numel[tensor].div_ceil(8) as usize];
            elements.iter().for_each(|j| bits[j / 8] |= 1 << (j % 8));
            writer.write(tensor, 0, &bits).unwrap();
        }
    }

    /// Writes groups.json for existing masks, with one group per task.
    pub fn groups(&self, tasks: &[&str]) {
        self.groups_of("@base", tasks);
    }

    /// As [`World::groups`], for the checkpoint `base`, named as on the command line.
    pub fn groups_of(&self, base: &str, tasks: &[&str]) {
        let n = tasks.len();
        let groups = Groups {
            format_version: cpift_core::format::groups::FORMAT_VERSION,
            tau: 2.0,
            partition: None,
            tau_mode: TauMode::Fixed,
            tasks: tasks.iter().map(|t| (*t).to_owned()).collect(),
            jaccard: vec![vec![0.0; n]; n],
            chance: vec![vec![0.0; n]; n],
            without_ties: None,
            excluded: Vec::new(),
            groups: tasks.iter().map(|t| vec![(*t).to_owned()]).collect(),
            order: Order { method: "random".into(), seed: Some(0), scores: Vec::new() },
            trivial: true,
            base: Checkpoint::open(Path::new(&self.resolve(base))).unwrap().digest().unwrap(),
            masks: tasks
                .iter()
                .map(|t| ((*t).to_owned(), Digest::of_file(&self.path(&format!("{t}.mask"))).unwrap()))
                .collect(),
        };
        groups.write(&self.path("groups.json"), true).unwrap();
    }

    /// Tensors of a checkpoint in this directory.
    pub fn read(&self, name: &str) -> Tensors {
        cpift_testkit::read_checkpoint(&self.path(name))
    }

    /// Elements of the tensor `w` of a checkpoint in this directory.
    pub fn read_w(&self, name: &str) -> Vec<f32> {
        self.read(name)["w"].values()
    }
}

/// The bytes of a file.
pub fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A JSON file.
pub fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&bytes(path)).unwrap()
}

/// Asserts that every element agrees to a relative error of 1e-6, or to 1e-12 absolute.
#[track_caller]
pub fn assert_close(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (j, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= 1e-6 * b.abs() + 1e-12, "{what}: element {j} is {a}, expected {b}");
    }
}
