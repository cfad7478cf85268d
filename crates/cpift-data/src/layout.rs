//! How the rows of a task become conversations: by a format of fixed fields, or by the task's own templates.

use anyhow::Result;
use cpift_core::BadInput;
use cpift_core::format::tasks::{Format, Task};

use super::files::Fields;
use super::formats::{self, Notes, is_empty_system};
use super::place::Place;
use super::rows::Message;
use crate::row_template::RowTemplate;

/// How rows become conversations.
pub enum Layout {
    /// By the fields of a format, or of whichever fits.
    Format(Format),
    /// By the templates of tasks.toml.
    Templates(Box<Templates>),
}

/// The templates of a task.
pub struct Templates {
    system: Option<RowTemplate>,
    prompt: RowTemplate,
    completion: RowTemplate,
}

impl Layout {
    /// The layout that `task` asks for.
    ///
    /// # Errors
    /// [`BadInput`] naming tasks.toml and the key of a template that does not parse.
    pub fn of(task: &Task) -> Result<Self> {
        let (Some(prompt), Some(completion)) = (&task.prompt, &task.completion) else {
            return Ok(Self::Format(task.format));
        };
        let parse = |key: &'static str, source: &str| {
            RowTemplate::new(key, source).map_err(|e| {
                let message = format!("task {}: {key} does not parse: {e:#}", task.name);
                anyhow::Error::from(BadInput::new(&task.listed_in, message))
            })
        };
        Ok(Self::Templates(Box::new(Templates {
            system: task.system.as_deref().map(|source| parse("system", source)).transpose()?,
            prompt: parse("prompt", prompt)?,
            completion: parse("completion", completion)?,
        })))
    }

    /// Takes the conversation out of a row's fields; returns what the layout is called too. Templates leave all fields.
    pub(super) fn take_conversation(
        &self,
        fields: &mut Fields,
        place: &Place,
        notes: &mut Notes,
    ) -> Result<(&'static str, Vec<Message>)> {
        match self {
            Self::Format(format) => formats::take_conversation(*format, fields, place, notes)
                .map(|(found, messages)| (name(found), messages)),
            Self::Templates(templates) => Ok(("the templates of tasks.toml", templates.conversation(fields, place)?)),
        }
    }
}

impl Templates {
    fn conversation(&self, fields: &Fields, place: &Place) -> Result<Vec<Message>> {
        let turn = |role: &str, template: &RowTemplate| {
            let content = template.render(fields).map_err(|problem| place.bad(problem))?;
            anyhow::Ok(Message::new(role, content))
        };
        let system = self.system.as_ref().map(|template| turn("system", template)).transpose()?;
        let mut messages: Vec<Message> = system.into_iter().filter(|system| !is_empty_system(system)).collect();
        messages.push(turn("user", &self.prompt)?);
        messages.push(turn("assistant", &self.completion)?);
        Ok(messages)
    }
}

fn name(format: Format) -> &'static str {
    match format {
        Format::Auto => "auto",
        Format::Messages => "messages",
        Format::Alpaca => "alpaca (instruction, input, output)",
        Format::Sharegpt => "sharegpt (conversations)",
        Format::PromptCompletion => "prompt-completion",
        Format::Gsm8k => "gsm8k (question, answer)",
        Format::Ultrachat => "ultrachat (data)",
    }
}
