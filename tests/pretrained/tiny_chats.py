"""Chat templates as models have them, and the tokenizer of a small model's folder."""

from __future__ import annotations

from pathlib import Path

from data.pretrained_tokenizer import PretrainedTokenizer, pretrained_tokenizer
from runtime.storage.folders import read_content

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<s>system\nBe kind.</s>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' }}"
    "{{ message['content'] | trim + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
LOOPS = (
    "{{ bos_token }}{%- for message in messages -%}\n"
    "    {%- if message.role not in ['user', 'assistant'] -%}{{ raise_exception('only two roles') }}{%- endif -%}\n"
    "    {%- if loop.index0 > 9 -%}{%- break -%}{%- endif -%}\n"
    "    {%- if message.role == 'user' -%}[INST] {{ message.content | tojson }} [/INST]\n"
    "    {%- else -%}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{%- endif -%}\n"
    "{%- endfor -%}"
)


def opened(folder: Path) -> PretrainedTokenizer:
    files = {path.name: read_content(path) for path in folder.iterdir() if path.suffix != ".safetensors"}
    return pretrained_tokenizer(files, str(folder))
