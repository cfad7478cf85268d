//! Progress bars, drawn only if stderr is a terminal.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Progress bar over `total` bytes, labeled `what`; hidden if stderr is not a terminal.
pub fn bytes(what: &'static str, total: u64) -> ProgressBar {
    styled(what, total, "{prefix} {bar:32} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}")
}

/// Progress bar over `total` items, labeled `what`, with a message field; hidden if stderr is not a
/// terminal.
pub fn items(what: &'static str, total: u64) -> ProgressBar {
    styled(what, total, "{prefix} {bar:32} {pos}/{len} {msg} {eta}")
}

fn styled(what: &'static str, total: u64, template: &str) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr_with_hz(10)
    } else {
        ProgressDrawTarget::hidden()
    };
    let style = ProgressStyle::with_template(template).expect("the template is a constant that parses");
    let bar = ProgressBar::with_draw_target(Some(total), target).with_style(style).with_prefix(what);
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}
