//! Compiles the C++ layer over libtorch (shim/) against the libtorch that torch-sys found.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Names of Gloo that ProcessGroupGloo.hpp needs. The wheel has Gloo itself in libtorch_cpu but not
/// its headers. No member of ProcessGroupGloo has a size that depends on Gloo.
const GLOO: &str = r#"#pragma once
#include <chrono>
#include <memory>
#include <string>
#include <vector>
namespace gloo {
namespace transport {
class Device;
class UnboundBuffer { public: virtual ~UnboundBuffer() = 0; };
}
namespace rendezvous {
struct Store {
  virtual ~Store();
  virtual void set(const std::string &, const std::vector<char> &) = 0;
  virtual std::vector<char> get(const std::string &) = 0;
  virtual void wait(const std::vector<std::string> &) = 0;
  virtual void wait(const std::vector<std::string> &, const std::chrono::milliseconds &) = 0;
};
}
class Context { public: void setTimeout(std::chrono::milliseconds); };
}
"#;

fn main() {
    println!("cargo:rerun-if-changed=shim");
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys says where libtorch is"));
    let include = lib.parent().expect("libtorch/lib has a parent").join("include");
    let stand_ins = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it")).join("stand-ins");
    write_gloo(&stand_ins.join("gloo"));
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .opt_level(1)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .define("USE_C10D_GLOO", None)
        .include(&stand_ins)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .files(sources())
        .compile("cpift_shim");
    println!("cargo:rustc-link-search=native={}", lib.display());
    for library in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib={library}");
    }
}

/// Writes the five headers of Gloo that ProcessGroupGloo.hpp includes.
fn write_gloo(folder: &Path) {
    for header in ["algorithm.h", "common/error.h", "context.h", "rendezvous/store.h", "transport/device.h"] {
        let path = folder.join(header);
        fs::create_dir_all(path.parent().expect("it has one")).expect("a folder in OUT_DIR");
        fs::write(&path, "#pragma once\n#include <gloo/names.h>\n").expect("a file in OUT_DIR");
    }
    fs::write(folder.join("names.h"), GLOO).expect("a file in OUT_DIR");
}

/// The .cpp files of shim/, sorted by name.
fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir("shim").expect("shim/ is beside this file");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("a folder entry").path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "cpp"));
    files.sort();
    files
}
