//! From messages to token ids: chat templates and Hugging Face tokenizers.

mod chat;
mod template;

pub use chat::{ChatText, Span};
pub use template::{ChatTemplate, SpecialTokens};
