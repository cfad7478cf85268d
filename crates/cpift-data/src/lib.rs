//! From data files to supervised examples: rows, chat templates, tokenizers and loss targets. No libtorch.
//!
//! | step | module |
//! | --- | --- |
//! | a file (.jsonl, .json, .parquet) to its rows' fields | `files` |
//! | fields to a conversation: a known format, or templates of tasks.toml | `formats`, `layout`, `row_template` |
//! | a checked conversation with its place in the file | `rows`, `place` |
//! | a checkpoint folder's tokenizer with the tokens of all its files | `tokenizer` |
//! | a conversation to text by the checkpoint's chat template | `template`, `chat` |
//! | text to tokens and the targets of the loss | `targets` |
//! | a file's rows to examples within the context | `example` |

mod chat;
mod example;
mod files;
mod formats;
mod layout;
mod place;
mod row_template;
mod rows;
mod targets;
mod template;
mod tokenizer;

pub use chat::{Chat, ChatText, GenerationPrompt, Span};
pub use example::{Encoded, Example, MaxLength, Overlong, digest, encode_rows, report, tokenise, unusable};
pub use files::{Fields, FileKind};
pub use formats::shown;
pub use layout::{Layout, Templates};
pub use place::Place;
pub use row_template::RowTemplate;
pub use rows::{Message, Row, read_rows};
pub use targets::Tokenised;
pub use template::{ChatTemplate, Refusal, SpecialTokens, TemplateArgs};
pub use tokenizer::FolderTokenizer;
