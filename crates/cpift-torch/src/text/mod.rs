//! From messages to token ids: chat templates and Hugging Face tokenizers; and templates over a row's columns.

mod chat;
mod row_template;
mod template;

pub use chat::{ChatText, Span};
pub use row_template::RowTemplate;
pub use template::{ChatTemplate, SpecialTokens};
