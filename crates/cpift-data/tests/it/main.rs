//! Readers of rows, templates and tokenizers, on files as they are published.

mod formats;
mod targets;
mod text;
mod tokenizer;
