"""TRL's SFT pipeline as an oracle: for the same rows its ids and masks are ours."""

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
import trl
from transformers import PreTrainedTokenizerFast

from lora_search.data.rows import Example
from lora_search.data.templates import Renderer
from lora_search.data.tokens import tokenize_rows
from lora_search.model.tiny import CHATML, make_tiny_tokenizer
from lora_search.reading.load import load_rows
from lora_search.settings.schema import DataConfig, TemplateConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of another library's set-up

MARKED = CHATML.replace(
    "{{ message['content'] }}<|im_end|>\n",
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}",
)
ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}
SYSTEM = {"role": "system", "content": "Be brief."}
MORE = [{"role": "user", "content": "And when it rains?"}, {"role": "assistant", "content": "Then too."}]
CHATS = [[ASK, ANSWER], [SYSTEM, ASK, ANSWER, *MORE], [ASK, ANSWER, *MORE, *MORE]]
LONG_ANSWER = {"role": "assistant", "content": "Line one.\n\n  Line two: åäö, 한국어, {}.\n"}
PROMPTS = [
    ([ASK], [ANSWER]), ([SYSTEM, ASK], [LONG_ANSWER]), ([SYSTEM, ASK, ANSWER, MORE[0]], [MORE[1]]),
]  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = MARKED
    return tokenizer


def theirs(rows: Sequence[object], model: Path, folder: Path, **options: object) -> datasets.Dataset:
    """Return the rows as TRL's trainer would train on them."""
    trainer = trl.SFTTrainer(
        model=str(model), train_dataset=datasets.Dataset.from_list(list(rows)),
        processing_class=make_tokenizer(),
        args=trl.SFTConfig(
            output_dir=str(folder), report_to=[], max_length=None, use_cpu=True, bf16=False, **options
        ),
    )  # fmt: skip
    return trainer.train_dataset


def ours(rows: Sequence[object], path: Path, loss_on: str) -> list[Example]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_rows(DataConfig(path=str(path)))
    renderer = Renderer(TemplateConfig(), make_tokenizer())
    return [item.example for item in tokenize_rows(loaded.rows, renderer, loss_on)]


def labels(example: Example) -> list[int]:
    """Return the ids that bear a loss, -100 elsewhere."""
    return [
        token if any(a <= i < b for a, b in example.learnt) else -100
        for i, token in enumerate(example.input_ids)
    ]


def test_chats_have_the_ids_and_the_loss_that_trl_gives_them(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": chat} for chat in CHATS]

    expected = theirs(rows, tiny_llama, tmp_path, assistant_only_loss=True)
    made = ours(rows, tmp_path / "chats.jsonl", "all_assistant_turns")

    assert [list(row.input_ids) for row in made] == list(expected["input_ids"])
    assert [labels(row) for row in made] == list(expected["labels"])


def test_prompts_with_completions_have_the_ids_and_the_loss_that_trl_gives_them(
    tiny_llama: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PROMPTS]

    expected = theirs(rows, tiny_llama, tmp_path)
    made = ours(rows, tmp_path / "prompts.jsonl", "last_turn")

    assert [list(row.input_ids) for row in made] == list(expected["input_ids"])
    assert [labels(row) for row in made] == list(expected["labels"])
