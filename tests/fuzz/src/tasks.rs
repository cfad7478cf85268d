//! tasks.toml, whose tasks may name the file a.jsonl. Every listed task can be looked up by name
//! and index.

use cpift_core::format::tasks::Tasks;
use cpift_data::Layout;

use crate::bounds;

/// Memory bound, for templates and their environments.
const BOUND: usize = 8 << 20;

pub fn run(data: &[u8]) -> bool {
    let path = bounds::write("tasks.toml", data);
    bounds::write("a.jsonl", b"{}");
    bounds::bounded_by(BOUND, || {
        let tasks = match Tasks::read(&path) {
            Ok(tasks) => tasks,
            Err(error) => {
                assert!(format!("{error:#}").contains("tasks.toml"), "{error:#}");
                return false;
            }
        };
        for (i, task) in tasks.list.iter().enumerate() {
            assert_eq!(
                tasks.named(&task.name).expect("it is listed").name,
                tasks.indexed(i).expect("its index is in range").name
            );
            let _ = Layout::of(task);
        }
        let _ = tasks.template();
        true
    })
}
