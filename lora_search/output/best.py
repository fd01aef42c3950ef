"""The best trial's adapter in a folder of its own, with its settings and how to load it and train it again.

runs/<study>/best is replaced as a whole: it never mixes two trials.
"""

import json
import logging
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_search.files.atomic import write_file
from lora_search.output.ranking import best_of
from lora_search.trial import TrialRow

logger = logging.getLogger(__name__)

REPRODUCE = """\
# Trial {number} of {study}: validation perplexity {perplexity:.4f}

The adapter is in PEFT's own format. Load it on the base model:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base!r}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), {adapter!r})
inputs = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0], skip_special_tokens=True))
```

Train these settings alone again, in a study of their own, from the folder where the sweep was started.
The seed comes from the trial's number, so the curve is another sample of the same settings:

```sh
{command}
```
"""


def export_best(rows: Sequence[TrialRow], attributes: Mapping[str, str], folder: Path) -> Path | None:
    """Copy the best COMPLETE trial's adapter to ``folder``/best and return that folder.

    None where no trial is complete, or where the adapter lies with a worker elsewhere (a warning says so).
    Raises WriteError or OSError.
    """
    best = best_of(rows)
    if best is None:
        return None
    adapter, target = folder / "trials" / str(best.number) / "adapter", folder / "best"
    if not adapter.is_dir():
        logger.warning("%s: the best trial's adapter is not here; it lies where its worker ran.", adapter)
        return None
    fresh = folder / "best.new"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        for file in sorted(adapter.iterdir()):
            write_file(fresh / "adapter" / file.name, file.read_bytes())
        settings = json.dumps(settings_of(best, attributes), indent=2)
        write_file(fresh / "settings.json", settings.encode())
        write_file(fresh / "reproduce.md", reproduce(best, attributes, target).encode())
        replace_folder(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the room
    return target


def replace_folder(fresh: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def settings_of(best: TrialRow, attributes: Mapping[str, str]) -> dict[str, object]:
    """Return the trial's outcome, its parameters, and all settings of the sweep with them laid over."""
    prefix = "setting/sweep."
    sweep = {k.removeprefix(prefix): v for k, v in attributes.items() if k.startswith(prefix)}
    return {
        "study": attributes.get("study", ""),
        "trial": best.number,
        "perplexity": best.perplexity,
        "rung": best.best_rung,
        "params": {key: plain(value) for key, value in best.params.items()},
        "settings": {**sweep, **{key: plain(value) for key, value in best.params.items()}},
    }


def plain(value: object) -> object:
    """Return a list where the study keeps one as JSON."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def reproduce(best: TrialRow, attributes: Mapping[str, str], target: Path) -> str:
    """Return the page that says how to load the adapter and how to train its settings alone."""
    study = attributes.get("study", target.parent.name)
    return REPRODUCE.format(
        number=best.number,
        study=study,
        perplexity=best.perplexity,
        base=attributes.get("base_model", ""),
        adapter=str(target / "adapter"),
        command=retrain_command(best, attributes, study),
    )


def retrain_command(best: TrialRow, attributes: Mapping[str, str], study: str) -> str:
    """Return the sweep's own command with the trial's values after it: for Hydra the last one counts."""
    sweep = shlex.join(["python", "-m", "lora_search.sweep", "-cn", attributes.get("sweep", "NAME")])
    alone = [
        f"study.name={study}-trial-{best.number}",
        "study.n_trials=1",
        "study.first_trial_is_default=true",
    ]
    values = [f"{key}={hydra_value(plain(value))}" for key, value in best.params.items()]
    return f"{attributes.get('command') or sweep} {shlex.join([*alone, *values])}"


def hydra_value(value: object) -> str:
    """Return a value in Hydra's override grammar: [q_proj,v_proj], null, 2.5e-05."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(hydra_value(item) for item in value)}]"
    return str(value)
