//! Helpers for the tests of several crates: running binaries, and small checkpoints to run them on.

pub mod chain;
pub mod ends;
pub mod hub;
pub mod layout;
pub mod masks;
pub mod model;
pub mod ranks;
pub mod spoil;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cpift_core::Dtype;
use cpift_core::format::safetensors::{FileWriter, TensorSpec};

/// Result of a finished process.
pub struct Run {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    shown: String,
}

/// Runs `program` with `args` and waits for it.
///
/// # Panics
/// If it cannot be started or is killed by a signal.
pub fn run<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Run {
    run_with(program, args, &[])
}

/// As [`run`], with environment variables.
pub fn run_with<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>, env: &[(&str, &str)]) -> Run {
    let mut command = Command::new(program);
    command.args(args).envs(env.iter().copied());
    run_command(command)
}

/// As [`run`], for a prepared command.
pub fn run_command(mut command: Command) -> Run {
    let shown = format!("{command:?}");
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|e| panic!("{shown}: {e}"));
    Run {
        code: status.code().unwrap_or_else(|| panic!("{shown}: {status}")),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        shown,
    }
}

impl Run {
    /// Asserts the exit code. On a mismatch the panic message shows the command and both streams.
    ///
    /// # Panics
    /// If the exit code differs.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}\n--- stdout\n{}--- stderr\n{}", self.shown, self.stdout, self.stderr);
        self
    }

    /// Asserts success.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect_code(0)
    }

    /// Asserts exit code 3 and that stderr contains every part.
    ///
    /// # Panics
    /// If the exit code differs or a part is missing.
    #[track_caller]
    pub fn bad_input(self, parts: &[&str]) -> Self {
        self.expect_code(3).says(parts)
    }

    /// Asserts exit code 2 and that stderr contains every part.
    ///
    /// # Panics
    /// If the exit code differs or a part is missing.
    #[track_caller]
    pub fn usage_error(self, parts: &[&str]) -> Self {
        self.expect_code(2).says(parts)
    }

    /// Asserts that stderr contains every part.
    ///
    /// # Panics
    /// If a part is missing.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "{}\nexpected {part:?} in stderr:\n{}", self.shown, self.stderr);
        }
        self
    }
}

/// Asserts that `folder` contains exactly `names`, including hidden files.
///
/// # Panics
/// If it contains other entries.
#[track_caller]
pub fn expect_entries(folder: &Path, names: &[&str]) {
    let mut found: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    found.sort();
    let mut names = names.to_vec();
    names.sort_unstable();
    assert_eq!(found, names, "in {}", folder.display());
}

/// Tensor of a test checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Element type on disk.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Little-endian bytes.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// Creates a tensor of floats, cast to `dtype`.
    pub fn floats(dtype: Dtype, shape: &[usize], values: &[f32]) -> Self {
        use cpift_core::format::dtype::Float;
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let mut bytes = Vec::new();
        f32::write(dtype, values, &mut bytes);
        Self { dtype, shape: shape.to_vec(), bytes }
    }

    /// Creates an F32 tensor.
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        Self::floats(Dtype::F32, shape, values)
    }

    /// Elements as f32.
    pub fn values(&self) -> Vec<f32> {
        use cpift_core::format::dtype::Float;
        let mut out = vec![0.0; self.bytes.len() / self.dtype.size()];
        f32::read(self.dtype, &self.bytes, &mut out);
        out
    }
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// Writes one safetensors file.
///
/// # Panics
/// On I/O errors.
pub fn write_safetensors(path: &Path, tensors: &Tensors) {
    let specs: Vec<TensorSpec> =
        tensors.iter().map(|(n, t)| TensorSpec { name: n.clone(), dtype: t.dtype, shape: t.shape.clone() }).collect();
    let writer = FileWriter::create(path, &specs, &BTreeMap::from([("format".into(), "pt".into())])).unwrap();
    for (name, tensor) in tensors {
        writer.write(name, 0, &tensor.bytes).unwrap();
    }
}

/// Writes a checkpoint directory (config.json and model.safetensors) and returns its path.
///
/// # Panics
/// On I/O errors.
pub fn write_checkpoint(folder: &Path, tensors: &Tensors) -> PathBuf {
    std::fs::create_dir_all(folder).unwrap();
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"}"#;
    std::fs::write(folder.join("config.json"), config).unwrap();
    write_safetensors(&folder.join("model.safetensors"), tensors);
    folder.to_owned()
}

/// Writes a checkpoint directory with shards and an index; tensors are distributed round-robin.
///
/// # Panics
/// On I/O errors.
pub fn write_sharded(folder: &Path, tensors: &Tensors, shards: usize) -> PathBuf {
    write_checkpoint(folder, &Tensors::new());
    std::fs::remove_file(folder.join("model.safetensors")).unwrap();
    let mut map = serde_json::Map::new();
    for i in 0..shards {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
        let part: Tensors = tensors.iter().skip(i).step_by(shards).map(|(n, t)| (n.clone(), t.clone())).collect();
        part.keys().for_each(|k| drop(map.insert(k.clone(), name.clone().into())));
        write_safetensors(&folder.join(name), &part);
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    folder.to_owned()
}

/// Reads all tensors of a checkpoint.
///
/// # Panics
/// If it cannot be opened.
pub fn read_checkpoint(path: &Path) -> Tensors {
    let checkpoint = cpift_core::Checkpoint::open(path).unwrap();
    checkpoint
        .tensors()
        .map(|v| (v.name.to_owned(), Tensor { dtype: v.dtype, shape: v.shape.to_vec(), bytes: v.bytes.to_vec() }))
        .collect()
}

/// Deterministic random numbers for test data (SplitMix64).
pub struct Numbers(pub u64);

impl Numbers {
    /// Returns the next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns the next number in −1 to 1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Returns `n` numbers in −1 to 1.
    pub fn units(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit()).collect()
    }
}

/// Proptest configuration with a fixed seed. PROPTEST_RNG_SEED and PROPTEST_CASES override seed and
/// number of cases.
pub fn cases(cases: u32) -> proptest::test_runner::Config {
    let given = proptest::test_runner::Config::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { given.cases } else { cases };
    let rng_seed = match given.rng_seed {
        proptest::test_runner::RngSeed::Random => proptest::test_runner::RngSeed::Fixed(1),
        fixed => fixed,
    };
    proptest::test_runner::Config { cases, rng_seed, failure_persistence: None, ..given }
}
