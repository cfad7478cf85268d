//! groups.json, read, written and read again.

use cpift_core::format::groups::Groups;

use crate::bounds;

pub fn run(data: &[u8]) -> bool {
    let path = bounds::write("groups.json", data);
    bounds::bounded(data.len(), || {
        let Ok(groups) = Groups::read(&path) else { return false };
        assert_eq!(groups.task_order().len(), groups.tasks.len());
        groups.check_names(&path, "--task", groups.tasks.iter()).expect("a file has its own tasks");
        groups.write(&path, true).expect("it can be written");
        assert_eq!(Groups::read(&path).expect("it can be read again"), groups);
        true
    })
}
