//! Chat templates that a recipe can name, as mergekit does.

/// Names of the templates.
pub(super) const NAMES: [&str; 5] = ["alpaca", "chatml", "exaone", "llama3", "mistral"];

/// The template `name`.
pub(super) fn named(name: &str) -> Option<&'static str> {
    Some(match name {
        "alpaca" => ALPACA,
        "chatml" => CHATML,
        "exaone" => EXAONE,
        "llama3" => LLAMA3,
        "mistral" => MISTRAL,
        _ => return None,
    })
}

const ALPACA: &str = "{% for message in messages %}\
{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}\
{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}\
{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}";

const CHATML: &str = "{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const EXAONE: &str = "{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\n' }}{% endif %}\
{{ '[|' + message['role'] + '|]' + message['content'] }}\
{% if message['role'] == 'user' %}{{ '\n' }}{% else %}{{ '[|endofturn|]\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}";

const LLAMA3: &str = "{% for message in messages %}\
{% if loop.first %}{{ bos_token }}{% endif %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}\
{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_template_and_braces_are_closed() {
        for name in NAMES {
            let text = named(name).unwrap();
            for (open, close) in [("{%", "%}"), ("{{", "}}")] {
                assert_eq!(text.matches(open).count(), text.matches(close).count(), "{name}");
            }
        }
        assert!(named("other").is_none());
    }
}
