#!/usr/bin/env python3
"""Writes fixtures/golden/chat_targets.json: stand-ins for published chat templates, small
tokenizers, and what transformers makes of conversations with them: the rendered text, the token ids
and the mask of the assistant's tokens.

The templates are written in the manner of the published ones: the same structure and special
tokens, none of their text. Templates without {% generation %} blocks give no mask in transformers.
For these a second version, `annotated`, renders the same text and has a block around exactly what
the model must produce: the answer as rendered, from after what the template itself writes (the
header, a leading space, an empty think block) to the special token that ends the turn, inclusive,
but no line break after it. A think block that comes from the row's own reasoning is part of the
answer. A reader is given `plain` and must find the same mask.

Layout of the file:

    transformers    its version
    tokenizers      NAME -> the content of tokenizer.json
    templates       NAME -> plain: the template as a checkpoint has it
                            annotated: the same with generation blocks, or null where `plain` has
                            its own
                            bos_token, eos_token: as in tokenizer_config.json; bos_token may be null
                            tokenizers: names of the tokenizers its cases use
                            prompts: one user turn, [{args, without, with, generation_prompt}];
                            `args` are template arguments, `without` and `with` the renderings
                            without and with add_generation_prompt, `generation_prompt` what the
                            second adds, null where the first is not a prefix of the second
    conversations   NAME -> [{role, content}]
    cases           [{template, tokenizer, conversation, args, text, ids, mask, spans}], or
                    [{template, conversation, error}]; `mask` has a 0 or 1 per id; `spans` are the
                    generation blocks' [start, end) in characters of `text`
    left_out        [{template, tokenizer, conversation, reason}]: cases in which transformers' own
                    mask is faulty

Faults of transformers that leave a case out: a block's first or last character belongs to no token
(white space that trim_offsets takes off a token), after which it masks nothing or everything to the
end; and a last character of several tokens (bytes of an emoji), of which it takes the first only.
"""
import argparse
import json
import re
from pathlib import Path

import jinja2
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# In a template below, ⟦ and ⟧ stand where the annotated version opens and closes a generation
# block: inside an expression at a `+`, or as statements of their own, {%- ⟦ -%} and {%- ⟧ -%}.
IN_EXPRESSION = (
    (re.compile(r"\s*⟦\s*\+\s*"), " }}{% generation %}{{ "),
    (re.compile(r"\s*⟧\s*\+\s*"), " }}{% endgeneration %}{{ "),
    (re.compile(r"\s*⟧\s*(?=-?\}\})"), " }}{% endgeneration %}{{ '' "),
)


def plain(source: str) -> str:
    return re.sub("[⟦⟧]", "", re.sub(r"\{%- [⟦⟧] -%\}", "", source))


def annotated(source: str) -> str:
    source = source.replace("{%- ⟦ -%}", "{%- generation -%}").replace("{%- ⟧ -%}", "{%- endgeneration -%}")
    for pattern, tags in IN_EXPRESSION:
        source = pattern.sub(tags, source)
    return source


CHATML_PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"

QWEN3_HEAD = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_user=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last_user = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set answer = message.content %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in answer %}
            {%- set reasoning = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
"""
QWEN3_ANSWER = """\
        {%- if loop.index0 > ns.last_user and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + answer }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
"""
QWEN3_ANSWER_ANNOTATED = """\
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last_user and reasoning.strip('\\n') %}
            {%- generation -%}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') + '<|im_end|>' }}
            {%- endgeneration -%}
        {%- elif loop.index0 > ns.last_user and (loop.last or reasoning) %}
            {{- '<think>\\n\\n</think>\\n\\n' }}{%- generation -%}{{- answer.lstrip('\\n') + '<|im_end|>' }}{%- endgeneration -%}
        {%- else %}
            {%- generation -%}{{- answer + '<|im_end|>' }}{%- endgeneration -%}
        {%- endif %}
        {{- '\\n' }}
"""
QWEN3_TAIL = """\
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# NAME: (tokenizers, bos_token, eos_token, template with ⟦ and ⟧)
MARKED = {
    "qwen2_5": (("bytes", "bytes_trim"), None, "<|im_end|>", """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a calm helper.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' ⟦+ message.content + '<|im_end|>'⟧ + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""),
    "qwen3_instruct_2507": (("bytes",), None, "<|im_end|>", """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- ⟦ -%}
        {{- content }}
        {%- if message.tool_calls %}
            {{- message.tool_calls | tojson }}
        {%- endif %}
        {{- '<|im_end|>' }}
        {%- ⟧ -%}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""),
    "qwq": (("bytes",), None, "<|im_end|>", """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = (message.content.split('</think>') | last).lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' ⟦+ content + '<|im_end|>'⟧ + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""),
    "deepseek_r1_distill": (("bytes_trim", "bytes"), "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(system='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}\
{{ bos_token }}{{ ns.system }}\
{%- for message in messages %}\
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}\
{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ '<｜Assistant｜>' ⟦+ content + '<｜end▁of▁sentence｜>'⟧ }}\
{%- endif %}\
{%- endfor -%}\
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""),
    "deepseek_coder": (("bytes",), "<｜begin▁of▁sentence｜>", "<|EOT|>", """\
{%- set ns = namespace(found=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.found = true -%}
    {%- endif -%}
{%- endfor -%}
{{ bos_token }}{%- if not ns.found -%}
{{ 'You write programs.\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
{{ message['content'] }}
    {%- elif message['role'] == 'user' %}
{{ '### Instruction:\\n' + message['content'] + '\\n' }}
    {%- else %}
{{ '### Response:\\n' ⟦+ message['content'] + '\\n<|EOT|>'⟧ + '\\n' }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}
{{ '### Response:' }}
{% endif %}"""),
    "mistral_v01": (("sp_legacy",), "<s>", "</s>", """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Turns must alternate: user, assistant, user, ...') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ '' ⟦+ message['content'] + eos_token⟧ + ' ' }}\
{% else %}{{ raise_exception('Only user and assistant turns are known') }}{% endif %}{% endfor %}"""),
    "mistral_v02": (("sp_legacy", "sp_first"), "<s>", "</s>", """\
{%- if messages[0]['role'] == 'system' %}
    {%- set preface = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set preface = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After a system turn, user and assistant must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + (preface if loop.first else '') + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' ⟦+ message['content'] + eos_token⟧ }}
    {%- else %}
        {{- raise_exception('Role ' + message['role'] + ' is not known') }}
    {%- endif %}
{%- endfor %}
"""),
    "mistral_v03": (("sp_first",), "<s>", "</s>", """\
{%- if messages[0]['role'] == 'system' %}
    {%- set preface = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('User and assistant must alternate after the system turn') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and preface is defined %}
            {{- '[INST] ' + preface + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' ⟦+ message['content'] | trim + eos_token⟧ }}
    {%- endif %}
{%- endfor %}
"""),
    "mistral_v03_last_user": (("sp_first", "sp_legacy"), "<s>", "</s>", """\
{%- set ns = namespace(preface='', last=-1) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.preface = message['content'] %}
    {%- elif message['role'] == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' }}
        {%- if loop.index0 == ns.last and ns.preface %}
            {{- ns.preface + '\\n\\n' }}
        {%- endif %}
        {{- message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' ⟦+ message['content'] + eos_token⟧ }}
    {%- endif %}
{%- endfor %}
"""),
    "mistral_v7": (("sp_first",), "<s>", "</s>", """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' + message['content'] + '[/INST]' -}}
    {%- elif message['role'] == 'system' -%}
        {{- '[SYSTEM_PROMPT] ' + message['content'] + '[/SYSTEM_PROMPT]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' ⟦+ message['content'] + eos_token⟧ -}}
    {%- else -%}
        {{- raise_exception('Only user, system and assistant turns are supported!') -}}
    {%- endif -%}
{%- endfor -%}
"""),
    "mistral_nemo": (("bytes",), "<s>", "</s>", """\
{%- if messages[0]['role'] == 'system' %}
    {%- set preface = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {%- if message == users[-1] and preface is defined %}
            {{- '[INST]' + preface + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST]' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- '' ⟦+ message['content'] + eos_token⟧ }}
    {%- endif %}
{%- endfor %}
"""),
    "magistral": (("bytes",), "<s>", "</s>", """\
{%- set default_system = 'Think first, as a draft.\\n\\nWrite so:[THINK]your draft[/THINK]Then the answer.' %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set preface = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set preface = default_system %}
    {%- set turns = messages %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + preface + '[/SYSTEM_PROMPT]' }}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {%- ⟦ -%}
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- else %}
            {%- for part in message['content'] %}
                {%- if part['type'] == 'thinking' %}
                    {{- '[THINK]' + part['thinking'] + '[/THINK]' }}
                {%- else %}
                    {{- part['text'] }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- eos_token }}
        {%- ⟧ -%}
    {%- else %}
        {{- raise_exception('A turn of role ' + message['role'] + ' cannot be written') }}
    {%- endif %}
{%- endfor %}
"""),
    "gemma2": (("sp_never",), "<bos>", "<eos>", """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('There is no system role') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate: user, model, user, model') }}{% endif %}\
{% if message['role'] == 'assistant' %}{% set role = 'model' %}\
{{ '<start_of_turn>' + role + '\\n' ⟦+ message['content'] | trim + '<end_of_turn>'⟧ + '\\n' }}\
{% else %}{% set role = message['role'] %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""),
    "gemma3": (("sp_never",), "<bos>", "<eos>", """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set preface = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set preface = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set preface = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate: user, model, user, model') }}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set role = 'model' -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (preface if loop.first else '') }}
    {%- if role == 'model' -%}
        {%- ⟦ -%}{{ message['content'] | trim + '<end_of_turn>' }}{%- ⟧ -%}
    {%- else -%}
        {{ message['content'] | trim }}{{ '<end_of_turn>' }}
    {%- endif -%}
    {{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""),
    "llama2": (("sp_legacy",), "<s>", "</s>", """\
{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set preface = messages[0]['content'] %}\
{% else %}{% set turns = messages %}{% set preface = false %}{% endif %}\
{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Turns must go user, assistant, user, ...') }}{% endif %}\
{% if loop.index0 == 0 and preface != false %}\
{% set content = '<<SYS>>\\n' + preface + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' ⟦+ content.strip() + ' ' + eos_token⟧ }}{% endif %}{% endfor %}"""),
    "llama3": (("bytes_trim",), "<|begin_of_text|>", "<|eot_id|>", """\
{% set turns = messages %}{% for message in turns %}\
{% set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}\
{% if loop.index0 == 0 %}{% set header = bos_token + header %}{% endif %}\
{% if message['role'] == 'assistant' %}{{ header ⟦+ message['content'] | trim + '<|eot_id|>'⟧ }}\
{% else %}{{ header + message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""),
    "llama3_1": (("bytes_trim", "bytes"), "<|begin_of_text|>", "<|eot_id|>", """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {#- The date itself would change from day to day; its length does not. -#}
        {%- set date_string = strftime_now('%d %b %Y') | length ~ ' letters' %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Knowledge to: December\\n' }}
{{- 'Date: ' + date_string + '\\n\\n' }}
{{- system_message }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' ⟦+ message['content'] | trim + '<|eot_id|>'⟧ }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""),
    "phi3": (("sp_never", "bytes"), "<s>", "<|endoftext|>", """\
{% for message in messages %}\
{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}\
{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}\
{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' ⟦+ message['content'] + '<|end|>'⟧ + '\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""),
    "phi4": (("bytes_trim", "bytes"), "<|endoftext|>", "<|im_end|>", """\
{% for message in messages %}\
{% if message['role'] == 'system' %}{{ '<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>' }}\
{% elif message['role'] == 'user' %}{{ '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}\
{% elif message['role'] == 'assistant' %}{{ '<|im_start|>assistant<|im_sep|>' ⟦+ message['content'] + '<|im_end|>'⟧ }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""),
    "smollm2": (("bytes_trim",), "<|im_start|>", "<|im_end|>", """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a small helper<|im_end|>\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% if message['role'] == 'assistant' %}{{ '' ⟦+ message['content'] + '<|im_end|>'⟧ + '\\n' }}\
{% else %}{{ message['content'] + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""),
    "zephyr": (("sp_legacy", "sp_first"), "<s>", "</s>", """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' ⟦+ message['content'] + eos_token⟧ }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""),
    "chatml_no_prompt": (("bytes", "sp_never"), None, "<|im_end|>", """\
{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' ⟦+ message['content'] + '<|im_end|>'⟧ + '\\n' }}\
{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"""),
    "vicuna": (("sp_legacy", "bytes_trim"), "<s>", "</s>", """\
{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set preface = messages[0]['content'] %}\
{% else %}{% set turns = messages %}{% set preface = 'A person asks and a helper answers.' %}{% endif %}\
{{ bos_token + preface }}{% for message in turns %}\
{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] }}\
{% else %}{{ ' ASSISTANT: ' ⟦+ message['content'] + eos_token⟧ }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""),
    "alpaca_no_end": (("bytes", "sp_first"), None, "</s>", """\
{%- if messages[0]['role'] == 'system' -%}{{ messages[0]['content'] }}{{ '\\n\\n' }}{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'assistant' -%}
        {{ '### Response:\\n' ⟦+ message['content']⟧ + '\\n\\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""),
    "openchat": (("sp_legacy", "bytes"), "<s>", "<|end_of_turn|>", """\
{{ bos_token }}{% for message in messages %}\
{% set who = 'Correct ' + message['role'].title() + ': ' %}\
{% if message['role'] == 'assistant' %}{{ who ⟦+ message['content'] + '<|end_of_turn|>'⟧ }}\
{% else %}{{ who + message['content'] + '<|end_of_turn|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'Correct Assistant:' }}{% endif %}"""),
    "granite": (("bytes_trim",), "<|end_of_text|>", "<|end_of_text|>", """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system_message = 'Knowledge to: April.\\nYou are a stone.' %}
    {%- if documents %}{%- set system_message = system_message + ' Read first.' %}{%- endif %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {{- '<|start_of_role|>user<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' ⟦+ message['content'] + '<|end_of_text|>'⟧ + '\\n' }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
            {%- if controls %}{{- ' ' + controls | tojson }}{%- endif %}
        {{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}"""),
    "olmo2": (("bytes",), "<|endoftext|>", "<|endoftext|>", """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '\\n' }}\
{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}\
{% elif message['role'] == 'assistant' %}{% if not loop.last %}\
{{ '<|assistant|>\\n' ⟦+ message['content'] + eos_token⟧ + '\\n' }}\
{% else %}{{ '<|assistant|>\\n' ⟦+ message['content'] + eos_token⟧ }}{% endif %}{% endif %}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""),
    "command_r": (("bytes",), "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set preface = messages[0]['content'] %}\
{% else %}{% set turns = messages %}{% set preface = false %}{% endif %}\
{% if preface != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + preface + '<|END_OF_TURN_TOKEN|>' }}{% endif %}\
{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('user and assistant take turns') }}{% endif %}\
{% set content = message['content'] %}\
{% if message['role'] == 'user' %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}\
{% elif message['role'] == 'assistant' %}\
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' ⟦+ content.strip() + '<|END_OF_TURN_TOKEN|>'⟧ }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""),
    "falcon3": (("bytes",), None, "<|endoftext|>", """\
{%- for message in messages %}\
{%- if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '\\n' }}\
{%- elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}\
{%- elif message['role'] == 'assistant' %}\
{%- if not loop.last %}{{ '<|assistant|>\\n' ⟦+ message['content'] + eos_token⟧ + '\\n' }}\
{%- else %}{{ '<|assistant|>\\n' ⟦+ message['content'] + eos_token⟧ }}{%- endif %}{%- endif %}\
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- endif %}{%- endfor %}"""),
    "yi": (("sp_never",), "<|startoftext|>", "<|im_end|>", """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% if messages[0]['role'] == 'system' %}{% set preface = messages[0]['content'] %}{% endif %}\
{% if preface is defined %}{{ '<|im_start|>system\\n' + preface + '<|im_end|>\\n' }}{% endif %}\
{% for message in messages %}{% set content = message['content'] %}\
{% if message['role'] == 'user' %}\
{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n<|im_start|>assistant\\n' }}\
{% elif message['role'] == 'assistant' %}{{ '' ⟦+ content + '<|im_end|>'⟧ + '\\n' }}{% endif %}{% endfor %}"""),
}

# NAME: (tokenizers, bos_token, eos_token, plain, annotated); `annotated` is None where the template
# has blocks of its own.
WRITTEN_OUT = {
    "qwen3": (("bytes",), None, "<|im_end|>", QWEN3_HEAD + QWEN3_ANSWER + QWEN3_TAIL,
              QWEN3_HEAD + QWEN3_ANSWER_ANNOTATED + QWEN3_TAIL),
    "qwen3_training": (("bytes", "bytes_trim"), None, "<|im_end|>", """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set answer = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in answer %}
            {%- set reasoning = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- generation %}
        {%- if loop.last or reasoning %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
        {%- else %}
            {{- answer }}
        {%- endif %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""", None),
    "smollm3": (("bytes",), None, "<|im_end|>", """\
{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}
{%- set mode = '/think' if enable_thinking else '/no_think' %}
{%- set ns = namespace(instructions='') %}
{%- if messages[0].role == 'system' %}
    {%- set text = messages[0].content %}
    {%- if '/no_think' in text %}
        {%- set mode = '/no_think' %}
    {%- elif '/think' in text %}
        {%- set mode = '/think' %}
    {%- endif %}
    {%- set ns.instructions = text.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\n## About\\n\\nDate: ' ~ (strftime_now('%d %b %Y') | length) ~ ' letters\\nMode: ' ~ mode ~ '\\n\\n' }}
{%- if ns.instructions %}
    {{- ns.instructions + '\\n\\n' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {%- if mode == '/think' %}
            {{- '<|im_start|>assistant\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endif %}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- if mode == '/think' %}
        {{- '<|im_start|>assistant\\n' }}
    {%- else %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}
    {%- endif %}
{%- endif %}
""", None),
}

# Template arguments whose renderings are golden too.
ARGUMENTS = {"qwen3": {"enable_thinking": False}, "qwen3_training": {"enable_thinking": False}, "smollm3": {"enable_thinking": False}}

CONVERSATIONS = {
    "one": [("user", "Hello there"), ("assistant", "Hello! How can I help?")],
    "two": [("user", "Is the sea salt?"), ("assistant", "yes"), ("user", "And the lake?"), ("assistant", "no, it is not.")],
    "three": [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "five"), ("assistant", "six")],
    "system": [("system", "You answer in verse."), ("user", "What is the answer?"), ("assistant", "the sea, the sea")],
    "system_two": [("system", "Be kind."), ("user", "yes?"), ("assistant", "yes."), ("user", "no?"), ("assistant", "no.")],
    "system_no_think": [("system", "Be brief. /no_think"), ("user", "Is it far?"), ("assistant", "no")],
    "padded": [("user", "  Hello there \n"), ("assistant", " \n yes, the sea \n\n"), ("user", "\n\nAnd? "), ("assistant", "\tno \n")],
    "thinks": [("user", "What is 2 + 3?"), ("assistant", "<think>\nTwo and three is five.\n</think>\n\nThe answer is 5.")],
    "thinks_last": [("user", "Hello"), ("assistant", "Hello!"), ("user", "What is 2 + 3?"),
                    ("assistant", "<think>\nIt is five, yes.\n</think>\n\n5")],
    "thinks_first": [("user", "What is 2 + 3?"), ("assistant", "<think>\nfive\n</think>\n\n5"), ("user", "yes?"), ("assistant", "yes")],
    "thinks_both": [("user", "2?"), ("assistant", "<think>two</think>2"), ("user", "3?"),
                    ("assistant", "<think>\n\nthree\n\n</think>\n\n\n3")],
    "thinks_in_brackets": [("user", "2?"), ("assistant", "[THINK]two, yes[/THINK]2")],
    "space": [("user", "yes or no?"), ("assistant", " yes")],
    "line_break": [("user", "yes or no?"), ("assistant", "\n\nyes"), ("user", "yes?"), ("assistant", "\nno")],
    "multi_byte": [("user", "naïve café 東京 🌊?"), ("assistant", "🌊 東京 is far, café \U000e0001\ue000 is not 👩‍🚀"),
                   ("user", "é"), ("assistant", "é")],
    "repeats_prompt": [("user", "the sea, the sea"), ("assistant", "the sea, the sea"), ("user", "the sea, the sea"),
                       ("assistant", "the sea, the sea")],
    "repeats_header": [("user", "user"), ("assistant", "assistant\nmodel\n[/INST] ### Response:\n ASSISTANT: <|assistant|>\n yes"),
                       ("user", "yes"), ("assistant", "<|im_start|>assistant\n{{ yes }} {% no %}")],
    "one_letter": [("user", "s, t or a?"), ("assistant", "s"), ("user", "s"), ("assistant", "a")],
    "ends_in_end": [("user", "How does it end?"), ("assistant", "with <|im_end|> or </s>, <|eot_id|>"), ("user", "yes?"),
                    ("assistant", "yes<|im_end|>")],
}

CHAT_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    "<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>",
    "<|end_of_turn|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
]
BRACKETS = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"]
# Longest runs that may become one token; each prefix is one too. Those with a space come first,
# else " yes" would be " " and "yes".
WORDS = ["Hello", " there", " help", "yes", " yes", "no", " no", "the", " the", " sea", " lake", " is", " not", " it", "answer", " answer",
         "assistant", "system", "user", "model", "Response", " five", "two", " and", " or", "...", "##", " How", " can", " you",
         "ASSISTANT", " ASSISTANT", "USER", "[/INST]", "[INST]", " [/INST]", "think", "Is", "Be", " be"]
JOINED = ["\n\n", "\n\n\n", ".\n\n", ".\n", "?\n", ":\n", ": ", ">\n", "  ", " \n", "no.\n\n"]


def words_in_order() -> list[str]:
    return sorted(WORDS, key=lambda word: not word.startswith(" ")) + JOINED


def chain(words: list[str]) -> list[tuple[str, str]]:
    """Merges that build each word from its first letter on."""
    merges = []
    for word in words:
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
    return merges


def vocabulary(first: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys([*first, *(a + b for a, b in merges)]))}


def byte_level(trim: bool) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = chain([encode.pre_tokenize_str(word)[0][0] for word in words_in_order()])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(alphabet, merges), merges=merges))
    if trim:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        # Punctuation takes the line breaks after it along.
        split = Regex(r"[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\p{N}|\s*[\r\n]+|\s+(?!\S)|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), encode])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ["<s>", "</s>", *CHAT_TOKENS, *BRACKETS]])
    if not trim:
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return tokenizer


def sentence_piece(kind: str) -> Tokenizer:
    """As LLaMA-2 has it (`legacy`: ▁ before every piece of text), with ▁ before the first only
    (`first`), and as Gemma (`never`)."""
    letters = "".join(WORDS + JOINED).replace(" ", "▁") + "abcdefghijklmnopqrstuvwxyzHITWRA0123456789.,?!:#<>|/[]_+é"
    merges = chain([word.replace(" ", "▁") for word in words_in_order()])
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(letters))]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(first, merges), merges=merges, unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    added = {"legacy": ["<|end_of_turn|>"], "first": BRACKETS,
             "never": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|startoftext|>", "<|im_start|>", "<|im_end|>",
                       "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]}[kind]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ["<unk>", "<s>", "</s>", *added]])
    return tokenizer


def fault(encoding, spans: list[tuple[int, int]]) -> str | None:
    """Says why transformers' mask of these spans is not to be taken."""
    for start, end in spans:
        if start == end:
            return "an empty answer"
        first, last = encoding.char_to_token(0, start), encoding.char_to_token(0, end - 1)
        if first is None:
            return "the answer's first character belongs to no token"
        if last is None:
            return "the answer's last character belongs to no token"
        offsets = encoding.encodings[0].offsets
        if any(begin < end <= stop for begin, stop in offsets[last + 1:]):
            return "the answer's last character has several tokens"
    return None


def case(tokenizer: PreTrainedTokenizerFast, template: dict, messages: list[dict], args: dict) -> dict:
    marked = template["annotated"] or template["plain"]
    text = tokenizer.apply_chat_template(messages, chat_template=template["plain"], tokenize=False, **args)
    again = tokenizer.apply_chat_template(messages, chat_template=marked, tokenize=False, **args)
    assert text == again, f"the annotated template renders\n{again!r}, not\n{text!r}"
    _, spans = transformers.utils.chat_template_utils.render_jinja_template(
        conversations=[messages], chat_template=marked, return_assistant_tokens_mask=True, **{**tokenizer.special_tokens_map, **args})
    spans = [tuple(span) for span in spans[0]]
    assert len(spans) == sum(m["role"] == "assistant" for m in messages), "as many blocks as answers"
    output = tokenizer.apply_chat_template(messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True, **args)
    reason = fault(output, spans)
    if reason:
        return {"reason": reason}
    ids, mask = output["input_ids"], output["assistant_masks"]
    check_mask(tokenizer, text, spans, ids, mask)
    return {"text": text, "ids": ids, "mask": "".join(map(str, mask)), "spans": spans}


def check_mask(tokenizer: PreTrainedTokenizerFast, text: str, spans: list[tuple[int, int]], ids: list[int], mask: list[int]) -> None:
    """The masked tokens of all answers, decoded, hold the answers; white space apart, since
    decoders differ in it."""
    def squeeze(part: str) -> str:
        return re.sub(r"\s+|�", "", part)

    runs, run = [], []
    for token, on in zip([*ids, 0], [*mask, 0]):
        if on:
            run.append(token)
        elif run:
            runs.append(squeeze(tokenizer.decode(run)))
            run = []
    answers = [squeeze(text[start:end]) for start, end in spans]
    assert len(runs) == len(answers), (runs, answers)
    assert all(answer in run for run, answer in zip(runs, answers)), (runs, answers)


def prompts(tokenizer: PreTrainedTokenizerFast, template: str, args: dict) -> dict:
    messages = [{"role": "user", "content": "Hello there"}]
    without, with_prompt = (tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                                          add_generation_prompt=prompt, **args) for prompt in (False, True))
    added = with_prompt.removeprefix(without) if with_prompt.startswith(without) else None
    return {"args": args, "without": without, "with": with_prompt, "generation_prompt": added}


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=root / "fixtures/golden/chat_targets.json")
    out = parser.parse_args().out
    backends = {"bytes": byte_level(False), "bytes_trim": byte_level(True), "sp_legacy": sentence_piece("legacy"),
                "sp_first": sentence_piece("first"), "sp_never": sentence_piece("never")}
    written = {name: (*head, plain(source), annotated(source)) for name, (*head, source) in MARKED.items()} | WRITTEN_OUT
    conversations = {name: [{"role": role, "content": content} for role, content in turns] for name, turns in CONVERSATIONS.items()}
    templates, cases, left_out = {}, [], []
    for name, (tokenizers, bos, eos, source, marked) in sorted(written.items()):
        template = {"plain": source, "annotated": marked, "bos_token": bos, "eos_token": eos, "tokenizers": tokenizers}
        every_args = [{}, *([ARGUMENTS[name]] if name in ARGUMENTS else [])]
        templates[name] = template
        for kind in tokenizers:
            special = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
            size = backends[kind].get_vocab_size()
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backends[kind], **special)
            assert len(tokenizer) == size, f"{name}: {kind} lacks {special}"
            template["prompts"] = [prompts(tokenizer, source, args) for args in every_args]
            for conversation, messages in conversations.items():
                for args in every_args:
                    here = {"template": name, "tokenizer": kind, "conversation": conversation, "args": args}
                    try:
                        made = case(tokenizer, template, messages, args)
                    except jinja2.TemplateError as error:
                        made = {"error": str(error)}
                    (left_out if "reason" in made else cases).append(here | made)
    golden = {"transformers": transformers.__version__, "templates": templates, "conversations": conversations}
    lines = [json.dumps(key) + ": " + json.dumps(value, ensure_ascii=False, indent=1) for key, value in golden.items()]
    for key, rows in {"left_out": left_out, "cases": cases}.items():
        lines.append(f"{json.dumps(key)}: [\n" + ",\n".join(compact(row) for row in rows) + "\n]")
    named = ",\n".join(f"{json.dumps(name)}: {compact(json.loads(backend.to_str()))}" for name, backend in backends.items())
    lines.append('"tokenizers": {\n' + named + "\n}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    refused = sum("error" in row for row in cases)
    print(f"{out}: {len(templates)} templates, {len(cases)} cases, {refused} of them refusals; {len(left_out)} left out")


def compact(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


if __name__ == "__main__":
    main()
