//! Metrics of tasks.toml: the loss, which every task gets, and one metric per task.
//!
//! To add a metric, write a file with an implementation of [`Metric`], add a variant to
//! [`TaskMetric`], and add one line to the registry below. Metrics of generated answers are built
//! with `generated::graded`; metrics of likelihoods run the model themselves, as `choice` does.

mod choice;
mod codebleu;
mod generated;
mod metric;

pub use generated::{flexible_extract, normalise, strict_match};
pub(crate) use metric::{Loss, Metric, Prepared, Settings, TaskView};

use cpift_core::format::tasks::TaskMetric;

macro_rules! registry {
    ($($variant:ident => $metric:expr,)*) => {
        /// The implementation of a metric.
        pub(crate) fn of(metric: TaskMetric) -> &'static dyn Metric {
            match metric {
                $(TaskMetric::$variant => &$metric,)*
            }
        }

        const ALL: &[TaskMetric] = &[$(TaskMetric::$variant,)*];
    };
}

registry! {
    Nll => metric::Nll,
    ExactMatch => generated::ExactMatch,
    Contains => generated::Contains,
    RougeL => generated::RougeL,
    Gsm8k => generated::Gsm8k,
    Choice => choice::Choice,
    Codebleu => codebleu::Codebleu,
    Judge => generated::Judge,
}

/// The metrics as a table for `--help`.
pub(crate) fn table() -> String {
    let row = |metric: &TaskMetric| {
        let metric = of(*metric);
        format!("  {:<12} {:<12} {:<10} {}", metric.key(), metric.name(), metric.unit(), metric.summary())
    };
    let rows: Vec<String> = ALL.iter().map(row).collect();
    format!("Metrics (`metric` of a task in tasks.toml), the figure each writes and its unit:\n{}", rows.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_registered_under_its_name_in_tasks_toml() {
        for metric in ALL {
            let key = of(*metric).key();
            assert_eq!(serde_json::from_value::<TaskMetric>(key.into()).unwrap(), *metric, "{key}");
        }
    }
}
