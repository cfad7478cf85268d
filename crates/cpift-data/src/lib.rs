//! From data files to supervised examples: rows, chat templates, tokenizers and loss targets,
//! without libtorch.
//!
//! | step | module |
//! | --- | --- |
//! | a file (.jsonl, .json, .parquet) to the columns of its rows | `files`, `parquet` |
//! | columns to a conversation, by a known format or by templates of tasks.toml | `rows` |
//! | turns, their order, and remarks on those that were changed | `conversation`, `notes` |
//! | a checkpoint's tokenizer with the tokens of all its files | `tokenizer` |
//! | a conversation to text by the checkpoint's chat template | `template`, `chat` |
//! | a file's rows to tokens and loss targets, within the context | `example` |

mod chat;
mod conversation;
mod example;
mod files;
mod notes;
mod parquet;
mod rows;
mod template;
mod tokenizer;

pub use chat::{Chat, ChatText, GenerationPrompt, Span};
pub use conversation::Message;
pub use example::{Encoded, Example, MaxLength, Overlong, Tokenised, digest, encode_rows, report, tokenise, unusable};
pub use files::{Fields, FileKind, Place, shown};
pub use rows::{Layout, Row, RowTemplate, read_rows};
pub use template::{ChatTemplate, Refusal, SpecialTokens, TemplateArgs};
pub use tokenizer::FolderTokenizer;
