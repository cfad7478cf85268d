//! From data files to supervised examples: rows, chat templates, tokenizers and loss targets. No libtorch.
//!
//! | step | module |
//! | --- | --- |
//! | a file (.jsonl, .json, .parquet) to its rows' fields | `files` |
//! | fields to a conversation: a known format, or templates of tasks.toml | `formats`, `layout`, `row_template` |
//! | a checked conversation with its place in the file | `rows`, `place` |
//! | a conversation to text by the checkpoint's chat template, and to tokens | `template`, `chat` |
//! | tokens to an example with the loss on the assistant's | `example` |

mod chat;
mod example;
mod files;
mod formats;
mod layout;
mod place;
mod row_template;
mod rows;
mod template;

pub use chat::{ChatText, Span};
pub use example::{Encoded, Example, Overlong, Tokenised, digest, encode_rows, report, tokenise};
pub use files::{Fields, FileKind};
pub use formats::shown;
pub use layout::{Layout, Templates};
pub use place::Place;
pub use row_template::RowTemplate;
pub use rows::{Message, Row, read_rows};
pub use template::{ChatTemplate, SpecialTokens};
