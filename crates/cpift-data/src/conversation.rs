//! A conversation: its turns and the rules for their order.

use serde::{Deserialize, Serialize};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text of the turn.
    pub content: String,
    /// False for an assistant turn that is in the context but not trained on.
    #[serde(skip_serializing, default = "trained")]
    pub train: bool,
}

fn trained() -> bool {
    true
}

impl Message {
    /// A turn with `train` set.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), train: true }
    }
}

/// Returns true for a system turn without text, which is treated as absent.
pub fn is_empty_system(turn: &Message) -> bool {
    turn.role == "system" && turn.content.trim().is_empty()
}

/// Checks the order of roles and that no turn is empty. The error is a message and the text
/// expected.
pub fn check_turns(messages: &[Message]) -> Result<(), (String, &'static str)> {
    if messages.is_empty() {
        return Err(("the conversation is empty".into(), "at least a user turn and an assistant turn"));
    }
    let turns = &messages[usize::from(messages[0].role == "system")..];
    for (i, message) in turns.iter().enumerate() {
        let expected = ["user", "assistant"][i % 2];
        if message.role != expected {
            let found = format!("turn {} has the role {:?} where {expected:?} is due", i + 1, message.role);
            return Err((found, "an optional system turn, then user and assistant in turn"));
        }
    }
    if turns.len() < 2 || turns.len() % 2 == 1 {
        return Err(("the conversation does not end with the assistant".into(), "the assistant's answer last"));
    }
    match messages.iter().position(|m| m.content.is_empty()) {
        Some(i) => {
            Err((format!("turn {}, of the {}, has empty content", i + 1, messages[i].role), "text in every turn"))
        }
        None => Ok(()),
    }
}
