#!/usr/bin/env python3
"""Writes fixtures/golden/chat_templates.json: chat templates in the styles that models ship,
rendered by transformers on several conversations, with the text of every refusal."""
import argparse
import json
from pathlib import Path

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

TEMPLATES = {
    "chatml_default_system": """\
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nBe brief and kind.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    "chatml_plain_blocks": """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
    {% if loop.last and add_generation_prompt %}
<|im_start|>assistant
    {% endif %}
{% endfor %}
end of {{ messages | length }} turns
""",
    "inst_brackets": """\
{% if messages[0]['role'] == 'system' %}{% set chat = messages[1:] %}{% set preface = messages[0]['content'] %}\
{% else %}{% set chat = messages %}{% set preface = false %}{% endif %}\
{% for message in chat %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Turns must go user, assistant, user, assistant, ...') }}{% endif %}\
{% if loop.index0 == 0 and preface != false %}{% set text = '<<SYS>>\\n' + preface + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set text = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}\
{% endfor %}""",
    "header_ids": """\
{%- if not date_string is defined -%}
    {%- if strftime_now is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}
    {%- else -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}
{%- endif -%}
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
    {%- set system_message = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system_message = '' -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{#- The date itself would change from day to day; its length does not. #}
{{- 'Date of ' ~ (date_string | length) ~ ' letters\\n\\n' ~ system_message ~ '<|eot_id|>' -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
""",
    "turns_strict": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('A system turn is not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception("Roles must alternate: turn " ~ loop.index ~ " is '" ~ message['role'] ~ "'") }}{% endif %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
    "inst_namespace": """\
{%- set ns = namespace(users=0, last=-1, system='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}{%- set ns.users = ns.users + 1 -%}{%- set ns.last = loop.index0 -%}
    {%- elif message['role'] == 'system' -%}{%- set ns.system = ns.system + message['content'] -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages if message['role'] != 'system' -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' -}}
        {%- if ns.system and loop.first -%}{{- ns.system + '\\n\\n' -}}{%- endif -%}
        {{- message['content'] + '[/INST]' -}}
    {%- elif message['role'] in ['assistant', 'model'] -%}{{- message['content'] + eos_token -}}
    {%- else -%}{{- raise_exception('Unknown role: ' + message['role']) -}}{%- endif -%}
{%- endfor -%}
{{- '{' ~ ns.users ~ '/' ~ ns.last ~ '}' -}}
""",
    "as_json": """\
{{ messages | tojson }}
{{ messages[0] | tojson(indent=2) }}
{{ [1, 2.5, true, none, {'<a href="x">': "it's & é"}] | tojson }}
{%- if tools is defined and tools %}{{ tools | tojson }}{% else %} no tools{% endif %}
{% if add_generation_prompt %}assistant:{% endif %}
""",
    "generation_blocks": """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
assistant: {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}

{% else %}
{{ message['role'] }}: {{ message['content'] }}
{% endif %}
{% endfor %}
{%- if add_generation_prompt -%}assistant: {% endif -%}
""",
    "generation_blocks_trimmed": """\
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<a>' -}}
        {%- generation -%}
            {{- message['content'] | trim -}}
        {%- endgeneration -%}
        {{- '</a>' -}}
    {%- else -%}
        {{- '<' + message['role'][:1] + '>' + message['content'] -}}
    {%- endif -%}
{%- endfor -%}
""",
    "loop_controls": """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if loop.index > 3 -%}{{- '(cut at ' ~ loop.index ~ ' of ' ~ loop.length ~ ')' -}}{%- break -%}{%- endif -%}
    {{- loop.index0 ~ ':' ~ message['role'] ~ '=' ~ message['content'] ~ (';' if not loop.last else '.') -}}
{%- endfor -%}
""",
    "python_strings": """\
{%- for message in messages -%}
    {%- set text = message['content'] -%}
    {%- if text.startswith(' ') or text.endswith('\\n') -%}{{- '[padded]' -}}{%- endif -%}
    {%- if '</think>' in text -%}{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
    {{- message['role'].upper() + message['role'].title() + '|' + text.strip() + '|' + text.rstrip() + '|' + text.replace('e', 'E') + '|' -}}
    {{- text.strip().split() | join('_') -}}{{- '|' + text.strip()[:4].capitalize() + text.strip()[-3:].lower() + '\\n' -}}
{%- endfor -%}
{%- for key, value in messages[0].items() -%}{{- key ~ '=' ~ value ~ ' ' -}}{%- endfor -%}
{%- for message in messages[::-1] -%}{{- message.get('role', '?') ~ message.get('name', '!') -}}{%- endfor -%}
""",
    "tests_and_filters": """\
{%- macro wrap(message, mark='*') -%}{{ mark }}{{ message['content'] | trim }}{{ mark }}{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.content is string and message.name is not defined -%}{{- wrap(message) -}}{%- endif -%}
    {{- ' ' if loop.nextitem is defined else '' -}}
{%- endfor -%}
{{- '\\n' ~ (messages | map(attribute='role') | unique | join(',')) -}}
{{- '\\n' ~ (messages | selectattr('role', 'equalto', 'user') | list | length) -}}
{{- '\\n' ~ (messages | last)['role'] ~ ' ' ~ (messages | first)['role'] -}}
{{- '\\n' ~ (missing | default('none given')) ~ ' ' ~ (7 // 2) ~ ' ' ~ (7 % 4) -}}
""",
}

CONVERSATIONS = {
    "single": [("user", "Hello there"), ("assistant", "Hi! What can I do?")],
    "prompt": [("user", "What is 2 + 3?")],
    "system": [("system", "You answer in verse."), ("user", "Why is the sea salt?"), ("assistant", "Rivers carry it there."),
               ("user", "And lakes?")],
    "long": [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "five"),
             ("assistant", "six")],
    "odd_text": [("user", "  leading, trailing \n"), ("assistant", "<think>hm\n</think>\n\nThe tree\tis <b>\"green\"</b> & {{ tall }}"),
                 ("user", "naïve café, 東京 🌊 {% raw %}"), ("assistant", "it's 'fine'\\n\n")],
    "user_twice": [("user", "first"), ("user", "second")],
    "other_role": [("user", "roll a die"), ("tool", "4")],
}


def render(tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict], prompt: bool) -> dict[str, str]:
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)
        return {"rendered": text}
    except jinja2.TemplateError as error:
        return {"error": str(error)}


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=root / "fixtures/golden/chat_templates.json")
    out = parser.parse_args().out
    vocabulary = {token: i for i, token in enumerate(SPECIAL.values())}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), **SPECIAL)
    conversations = {name: [{"role": role, "content": content} for role, content in turns]
                     for name, turns in CONVERSATIONS.items()}
    cases = [{"template": template, "conversation": name, "add_generation_prompt": prompt,
              **render(tokenizer, TEMPLATES[template], messages, prompt)}
             for template in TEMPLATES for name, messages in conversations.items() for prompt in (False, True)]
    golden = {"transformers": transformers.__version__, "special_tokens": SPECIAL, "templates": TEMPLATES,
              "conversations": conversations, "cases": cases}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(cases)} cases, {sum('error' in case for case in cases)} of them refusals")


if __name__ == "__main__":
    main()
