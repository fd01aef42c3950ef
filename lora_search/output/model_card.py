"""The model card of an exported adapter or merged model: what it is, how good, how to load it. Pure."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from lora_search.results.formatting import show_difference, show_value
from lora_search.results.record import StudyRecord
from lora_search.results.verdict import line_of_test, listed
from lora_search.settings.recorded import trial_values
from lora_search.settings.train_schema import PATTERNS
from lora_search.study.stored_results import FinalAdapter
from lora_search.trial import STARTS, TrialRow

CARD = """\
---
base_model: {hub_name}
library_name: {library}
pipeline_tag: text-generation
tags: [lora, lora_search]
---

# {title}

{kind} of `{base}`, found by a LoRA hyperparameter search (study `{study}`, trial {number}, rung {rung}).

## Scores

{scores}

## How to load it

```python
{load}
```
{serve}
## Settings

| setting | value |
|---|---|
{settings}

## Data

{data}

## Licence

The licence of the base model, `{base}`, applies to this {kind_lower}: read it before you pass it on.
"""
ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), folder)"""
MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)"""
VLLM = """
With vLLM: `vllm serve {base} --enable-lora{rank} --lora-modules {study}=FOLDER
--chat-template FOLDER/chat_template.jinja` (without it, vLLM takes the base's own template)
"""
Merged = tuple[float, str]  # perplexity and dtype
SHOWN = ("lora", "optim", "train", "template")  # sections of the settings
UNUSED: tuple[object, ...] = (None, False, "none", [], {})
VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # that vLLM takes for --max-lora-rank; the first is its default


def model_card(
    row: TrialRow, record: StudyRecord, merged: Merged | None = None, final: FinalAdapter | None = None
) -> str:
    """Return the card. ``merged``: the perplexity of the merged weights in plain transformers, and their
    dtype; ``final``: where it is not the trial's own adapter but its settings, trained once more."""
    attributes = record.attributes
    settings = trial_values(attributes, row.params)
    shown = {k: v for k, v in settings.items() if k.partition(".")[0] in SHOWN}
    base, study = attributes.get("base_model", ""), attributes.get("study", "")
    serve = VLLM.format(base=base, study=study, rank=rank_option(settings))
    if needs_merging(settings):
        serve = f"\n{MERGE_FIRST}.\n"
    kind = "Merged model" if merged else "LoRA adapter"
    facts = {k.removeprefix("data."): v for k, v in attributes.items() if k.startswith("data.")}
    lines = final_lines(row, record, merged, final) if final else score_lines(row, record, merged)
    return CARD.format(
        hub_name=json.dumps(attributes.get("base_model_name", base)),
        library="transformers" if merged else "peft",
        title=f"{study}, final" if final else f"{study}, trial {row.number}",
        kind=kind,
        kind_lower=kind.lower(),
        base=base,
        study=study,
        number=row.number,
        rung=row.best_rung,
        scores="\n".join(f"- {line}" for line in lines),
        load=(MERGED if merged else ADAPTER).format(base=base),
        serve="" if merged else serve,
        settings="\n".join(f"| `{key}` | {show_value(value)} |" for key, value in shown.items()),
        data="\n".join(f"- {key}: {value}" for key, value in facts.items()) or "- not recorded",
    )


def needs_merging(settings: Mapping[str, object]) -> bool:
    """Return whether vLLM and llama.cpp cannot serve the adapter: it has DoRA, or trains more than A
    and B, or layers differ in rank or alpha."""
    keys = (*PATTERNS, "lora.use_dora", "lora.trainable_token_indices", "lora.modules_to_save", "lora.bias")
    return any(key.startswith(keys) and value not in UNUSED for key, value in settings.items())


def rank_option(settings: Mapping[str, object]) -> str:
    """Return vLLM's option for adapters of a rank above its default; PiSSA's and OLoRA's have twice
    lora.r."""
    rank, init = settings.get("lora.r"), str(settings.get("lora.init"))
    rank = 2 * rank if isinstance(rank, int) and init.startswith(STARTS) else rank
    needed = [known for known in VLLM_RANKS if isinstance(rank, int) and known >= rank]
    return f" --max-lora-rank {needed[0]}" if needed and needed[0] > VLLM_RANKS[0] else ""


MERGE_FIRST = (
    "vLLM and llama.cpp ignore rank_pattern and alpha_pattern and have no DoRA, nor tokens, modules or "
    "biases of an adapter's own: serve the weights of `lora-search export merge=true`"
)


def serving_lines(
    row: TrialRow, attributes: Mapping[str, str], folder: Path, *, is_merged: bool
) -> list[str]:
    """Return the commands that serve an exported folder."""
    place, name = shlex.quote(str(folder)), shlex.quote(attributes.get("study", "adapter"))
    if is_merged:
        served = [
            f"vllm serve {place}",
            f"python convert_hf_to_gguf.py {place} --outtype f16 --outfile {name}.gguf",
        ]
    else:
        settings = trial_values(attributes, row.params)
        if needs_merging(settings):
            return [f"# {MERGE_FIRST}", f"hf upload ME/{name} {place}"]
        rank = rank_option(settings)
        base = shlex.quote(attributes.get("base_model", "BASE"))
        template = shlex.quote(str(folder / "chat_template.jinja"))  # vLLM takes the base's own by itself
        lora = f"--enable-lora{rank} --lora-modules {name}={place}"
        served = [f"vllm serve {base} {lora} --chat-template {template}"]
    return [*served, f"hf upload ME/{name} {place}"]


def final_lines(row: TrialRow, record: StudyRecord, merged: Merged | None, final: FinalAdapter) -> list[str]:
    """Return that nothing is known of its own quality, and how good the trial was that it repeats."""
    test = record.test
    lines = [
        f"no score of its own: it was trained on {final.num_rows:,} rows ({listed(final.splits)}), those by "
        "which trials are scored among them",
        f"it repeats trial {row.number} (seed {final.seed}) up to rung {final.rung} of its schedule: epochs "
        f"{final.epochs:g}",
        f"that trial, trained on the training rows only: validation perplexity {row.perplexity:.4f}, "
        f"base {record.base:.4f}",
    ]
    if test is not None and test.trial == row.number:
        lines.append(f"that trial on the {line_of_test(test)}")
    if merged is not None:
        lines.append(f"these are merged weights in {merged[1]}, compared with the adapter after writing")
    return lines


def score_lines(row: TrialRow, record: StudyRecord, merged: Merged | None) -> list[str]:
    """Return its quality, with intervals."""
    to_base, test = record.certainty.against_base.get(row.number), record.test
    lines = [f"validation perplexity {row.perplexity:.4f}; base {record.base:.4f}"]
    if to_base is not None:
        lines.append(
            f"change against the base {show_difference(to_base.change, to_base.change_error)} "
            f"({to_base.interval}, {to_base.num_rows} validation rows; chosen on these rows, so a little "
            "too good)"
        )
    if test is not None and test.trial == row.number:
        lines.append(line_of_test(test))
    elif test is None:
        lines.append("no test score: the test split was not scored")
    else:
        lines.append(f"no test score: the test split was scored with trial {test.trial}")
    if merged is not None:
        lines.append(f"validation perplexity of these merged weights in plain transformers, {merged[1]}: "
                     f"{merged[0]:.4f}")  # fmt: skip
    return lines
