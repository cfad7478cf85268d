//! scripts/demo.sh from its first command to its last, under the instruction sets that machines differ by: the order of methods that
//! scripts/check-demo.sh asks for, and that README reads out of the table, holds under each.

use std::path::Path;
use std::process::Command;

use cpift_testkit::chain::programs;

#[test]
fn the_demo_shows_the_same_on_avx2_and_on_what_this_machine_has() {
    let dir = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let avx2 = [("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")];
    for (name, settings) in [("own", &[][..]), ("avx2", &avx2[..])] {
        let output = Command::new(root.join("scripts/demo.sh"))
            .env("BIN", programs())
            .env("RUN", dir.path().join(name))
            .envs(settings.iter().copied())
            .env_remove("MAKEFLAGS")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        // Seen in the log of the tests: what README's block may differ by.
        println!("{name}:\n{said}");
        assert!(output.status.success(), "{name}: {said}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(said.contains("Trained on first: arithmetic."), "{name}: {said}");
    }
}
