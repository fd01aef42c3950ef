"""Files to serve a model as it was trained: the tokenizer with a chat template that gives exactly the prompts
of the training rows, and every token that ends an answer.

The system prompt of the settings is the template's default; template=inst becomes a chat template. A row's
context belongs in the user's message, after the question and an empty line.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_search.data.templates import dated_template, first_token, render
from lora_search.files.atomic import TEMPORARY, explained_writing, write_file
from lora_search.reading.rows import Row
from lora_search.settings.schema import TemplateConfig

# A conversation with its own system message keeps it.
DEFAULT_SYSTEM = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{%- set messages = [{'role': 'system', 'content': SYSTEM}] + messages -%}{%- endif "
)
INST = (
    "{%- set found = namespace(system=SYSTEM) -%}{{- BOS -}}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set found.system = message['content'] -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '[INST] ' + (found.system + '\\n\\n' if found.system else '') + message['content'] + ' [/INST]' -}}"
    "{%- set found.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}{{- ' ' + message['content'] + EOS -}}{%- endif -%}"
    "{%- endfor -%}"
)


def write_serving(
    folder: Path, tokenizer: PreTrainedTokenizerBase, template: TemplateConfig, generation: Mapping[str, Any]
) -> None:
    """Write tokenizer, chat template and generation_config.json to the folder, each file atomically.

    ``generation`` is the base's own generation config. Raises WriteError.
    """
    served = copy.copy(tokenizer)  # with the same backend
    served.chat_template = serving_template(template, tokenizer)
    fresh = folder.with_name(f"{folder.name}.{os.getpid()}{TEMPORARY}")
    with explained_writing(folder):
        try:
            served.save_pretrained(str(fresh))
            for path in (path for path in sorted(fresh.rglob("*")) if path.is_file()):
                write_file(folder / path.relative_to(fresh), path.read_bytes())
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    own = {key: value for key, value in generation.items() if not key.startswith("_")}
    settings = {**own, "eos_token_id": end_tokens(template, tokenizer, generation)}
    write_file(folder / "generation_config.json", json.dumps(settings, indent=2).encode())


def serving_template(template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a chat template that renders prompts as in the training rows."""
    if template.name == "inst":
        texts = {
            "SYSTEM": template.system_prompt or "",
            "BOS": first_token(tokenizer),
            "EOS": tokenizer.eos_token or "",
        }
        return _filled(INST, texts)
    source = dated_template(tokenizer)
    if template.system_prompt is None:
        return source
    end = "%}\n" if source[:1].isspace() else "-%}"  # keeps white space at the start of the template
    return _filled(DEFAULT_SYSTEM, {"SYSTEM": template.system_prompt}) + end + source


def end_tokens(
    template: TemplateConfig, tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, Any]
) -> list[int]:
    """Return every token that ends an answer: the last of the training rows, the tokenizer's end token, and
    those of the base's generation config."""
    answer = render(Row("Why?", "", "Because.", ""), template, tokenizer).completion
    trained: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"][-1:]
    own = generation.get("eos_token_id")
    own = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(i for i in (*trained, tokenizer.eos_token_id, *own) if i is not None))


def _filled(source: str, texts: Mapping[str, str]) -> str:
    """Return the template with names replaced by texts; Jinja understands JSON's escapes."""
    quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    return re.sub("|".join(quoted), lambda name: quoted[name[0]], source)
