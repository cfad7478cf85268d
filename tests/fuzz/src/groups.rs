//! groups.json.
#![no_main]

use cpift_core::groups::Groups;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let path = cpift_fuzz::write("groups.json", data);
    cpift_fuzz::bounded(data.len(), || {
        let Ok(groups) = Groups::read(&path) else { return };
        assert_eq!(groups.task_order().len(), groups.tasks.len());
        groups.check_names(&path, "--task", groups.tasks.iter()).expect("a file knows its own tasks");
        // What was read can be written and read again.
        groups.write(&path, true).expect("it can be written");
        assert_eq!(Groups::read(&path).expect("it can be read again"), groups);
    });
});
