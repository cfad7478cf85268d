//! tokenizer.json, tokenizer_config.json and the text of a conversation, separated by zero bytes. A
//! tokenizer that opens must render the conversation and encode the text.

use cpift_data::{ChatText, Message, TemplateArgs};

use crate::bounds;

/// Memory bound, for tables over all bytes and the fuel of a template.
const BOUND: usize = 64 << 20;

pub fn run(data: &[u8]) -> bool {
    let [tokenizer, config, words] = bounds::pieces(data);
    let _ = std::fs::remove_file(bounds::folder().join("config.json"));
    bounds::write("tokenizer.json", tokenizer);
    bounds::write("tokenizer_config.json", config);
    bounds::bounded_by(BOUND, || {
        let Ok(text) = ChatText::open(bounds::folder(), Some("chatml")) else { return false };
        let content = String::from_utf8_lossy(words).into_owned();
        let turn = |role: &str| Message::new(role, content.as_str());
        if let Ok(tokens) = text.with(&TemplateArgs::new()).tokenise(&[turn("user"), turn("assistant")]) {
            assert!(tokens.ids.len() == tokens.target.len() && tokens.ids.len() == tokens.spans.len());
        }
        let Ok(ids) = text.encode(&content) else { return false };
        assert!(ids.iter().all(|id| (0..text.vocab_size() as i64).contains(id)), "an id outside the vocabulary");
        let _ = text.decode(&ids);
        true
    })
}
