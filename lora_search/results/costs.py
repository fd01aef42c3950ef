"""The cost of a search, the savings of pruning, and the forecast. Pure, except for the forecast's file."""

import json
from pathlib import Path

from lora_search.results.formatting import show_count, show_seconds
from lora_search.results.record import StudyRecord
from lora_search.settings.recorded import recorded_values
from lora_search.study.provenance import PEAK


def costs(record: StudyRecord) -> dict[str, str]:
    """Return the known costs by name."""
    rows, attributes = record.rows, record.attributes
    trained = sum(row.train_tokens for row in rows)
    found = {
        "wall time at work": _hours(attributes.get("hours over all starts")),
        "device time": _hours(attributes.get("worker hours")),
        "of it training": show_seconds(sum(row.train_seconds for row in rows)),
        "tokens trained": show_count(trained),
        "tokens that pruning saved": _saved(record, trained),
        "peak memory": f"{float(attributes[PEAK]) / 2**30:.1f} GiB" if PEAK in attributes else "",
        "price": attributes.get("cost", ""),
        **compared(record),
    }
    return {name: text for name, text in found.items() if text}


def forecast_file(folder: Path) -> Path:
    """Return the file of `plan`'s forecast, next to the study's folder."""
    return folder.parent / f"{folder.name}.plan.json"


def compared(record: StudyRecord) -> dict[str, str]:
    """Return the forecast with the actual figures; nothing without a forecast for this number of trials."""
    n_trials = recorded_values(record.attributes).get("study.n_trials")
    try:
        kept = json.loads(forecast_file(record.folder).read_text(encoding="utf-8"))
        low, expected, high = (float(value) for value in kept["seconds"])
        tokens = float(kept["tokens"][1])
        hours = float(record.attributes["hours over all starts"])
        is_same = kept["n_trials"] == n_trials
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not is_same or n_trials is None:
        return {}
    trained = sum(row.train_tokens for row in record.rows)
    return {
        "forecast of time": f"{show_seconds(expected)} ({show_seconds(low)} to {show_seconds(high)}); "
        f"took {show_seconds(hours * 3600)}",
        "forecast of tokens": f"{show_count(round(tokens))}; trained {show_count(trained)}",
    }


def tokens_saved(record: StudyRecord) -> int:
    """Return how many tokens the pruned trials would still have trained, at their own pace, to their end."""
    settings = recorded_values(record.attributes)
    saved = 0.0
    for row in record.rows:
        if row.state != "PRUNED" or not row.perplexities:
            continue
        epochs, evals = (
            {**settings, **row.params}.get(f"train.{key}") for key in ("epochs", "evals_per_epoch")
        )
        if isinstance(epochs, int) and isinstance(evals, int):
            rung = max(row.perplexities)
            saved += row.train_tokens / rung * max(0, epochs * evals - rung)
    return round(saved)


def _saved(record: StudyRecord, trained: int) -> str:
    saved = tokens_saved(record)
    share = f"{100 * saved / max(1, saved + trained):.0f} % of what all would have taken"
    return f"{show_count(saved)} ({share})" if saved else ""


def _hours(text: str | None) -> str:
    return show_seconds(float(text) * 3600) if text else ""
