//! From data files to supervised examples: rows, chat templates, tokenizers and loss targets,
//! without libtorch.
//!
//! | step | module |
//! | --- | --- |
//! | a file (.jsonl, .json, .parquet) to the columns of its rows | `files` |
//! | columns to a conversation, by a known format or by templates of tasks.toml | `formats`, `layout` |
//! | a checked conversation with its place in the file | `conversation`, `rows` |
//! | a checkpoint's tokenizer with the tokens of all its files | `tokenizer` |
//! | a conversation to text by the checkpoint's chat template | `jinja`, `template`, `chat` |
//! | text to tokens and loss targets | `targets` |
//! | a file's rows to examples within the context | `example` |

mod chat;
mod conversation;
mod example;
mod files;
mod formats;
mod jinja;
mod layout;
mod rows;
mod targets;
mod template;
mod tokenizer;

pub use chat::{Chat, ChatText, GenerationPrompt, Span};
pub use conversation::Message;
pub use example::{Encoded, Example, MaxLength, Overlong, digest, encode_rows, report, tokenise, unusable};
pub use files::raw::{Fields, FileKind, Place, shown};
pub use layout::{Layout, RowTemplate};
pub use rows::{Row, read_rows};
pub use targets::Tokenised;
pub use template::{ChatTemplate, Refusal, SpecialTokens, TemplateArgs};
pub use tokenizer::FolderTokenizer;
