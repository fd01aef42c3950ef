"""The best trial's adapter in a folder of its own, with its settings and how to load and repeat it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_search.trial import TrialRow

LOADING = """\
# Trial {number} of {study}: validation perplexity {perplexity:.4f}

Load it with plain PEFT:

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained("{base}")
    model = PeftModel.from_pretrained(base, "{adapter}")
    tokenizer = AutoTokenizer.from_pretrained("{base}")

Train these settings alone again:

    python -m lora_search.sweep -cn {sweep} study.name={study}-best study.n_trials=1 {overrides}
"""


def export_best(rows: Sequence[TrialRow], attributes: Mapping[str, str], folder: Path) -> Path | None:
    """Copy the best COMPLETE trial's adapter to ``folder``/best; return that folder, or None where there
    is no trial."""
    complete = [row for row in rows if row.state == "COMPLETE" and row.perplexity is not None]
    if not complete:
        return None
    best = min(complete, key=lambda row: (row.perplexity or 0.0, row.number))
    fresh, target = folder / "best.new", folder / "best"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder / "trials" / str(best.number) / "adapter", fresh / "adapter")
    settings = {
        "trial": best.number,
        "perplexity": best.perplexity,
        "rung": best.best_rung,
        "params": best.params,
    }
    (fresh / "settings.json").write_text(json.dumps(settings, indent=2))
    (fresh / "README.md").write_text(_readme(best, attributes, target))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return target


def _readme(best: TrialRow, attributes: Mapping[str, str], target: Path) -> str:
    overrides = " ".join(f"'{key}={value}'" for key, value in sorted(best.params.items()))
    return LOADING.format(
        number=best.number,
        study=attributes.get("study", target.parent.name),
        perplexity=best.perplexity,
        base=attributes.get("base_model", ""),
        adapter=target / "adapter",
        sweep=attributes.get("sweep", ""),
        overrides=overrides,
    )
