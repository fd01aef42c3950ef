"""The findings of a report in words: certainty, possible improvements, facts about the study. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lora_search.errors import LoraSearchError
from lora_search.results.formatting import show_count, show_difference, show_perplexity, show_seconds
from lora_search.results.record import StudyRecord
from lora_search.results.verdict import line_of_final, line_of_test, metric_line, tied_line
from lora_search.settings.overlay import decoded
from lora_search.settings.range_ends import edge_notes
from lora_search.settings.recorded import recorded_config, recorded_values
from lora_search.settings.schema import StudyConfig
from lora_search.settings.space import parse_space
from lora_search.study.budget import WORKED
from lora_search.study.provenance import LENGTHS, PEAK
from lora_search.study.stored_results import read_finals
from lora_search.trial import TrialRow

HIDDEN = (  # the settings say the same; shown elsewhere
    "fingerprint", "command", "settings", "test_score", "confirmation", "final_adapters", "metric",
    "worker hours", WORKED, LENGTHS, PEAK,
)  # fmt: skip


def how_sure(record: StudyRecord) -> list[str]:
    """Return the evidence of the rows for and against the winner, one sentence each."""
    best = record.best
    if best is None:
        return []
    said: list[str] = []
    to_base = record.certainty.against_base.get(best.number)
    if to_base is not None:
        said.append(
            f"Against the base model on the same {to_base.num_rows} validation rows: "
            f"{show_difference(to_base.change, to_base.change_error)} ({to_base.interval}). "
            "The trial was chosen on these rows, so this is a little too good."
        )
    said += over_default(record, best)
    said.append(
        _sentence(line_of_test(record.test, best)) if record.test else "The test split has not been scored."
    )
    if answers := metric_line(record.rows):
        said.append(f"{answers}.")
    said += [_sentence(line_of_final(final)) for final in read_finals(record.attributes)]
    tied = tied_line(record.rows, record.certainty)
    if tied:
        said.append(_sentence(tied))
    elif record.certainty.against_best:
        said.append("No other complete trial is within two standard errors of it.")
    else:
        said.append("This folder has no row scores, so ties are unknown.")
    return said


def _sentence(line: str) -> str:
    return f"{line[0].upper()}{line[1:]}."


def over_default(record: StudyRecord, best: TrialRow) -> list[str]:
    """Return the gain over the given settings, if a trial has trained those."""
    settings = recorded_values(record.attributes, best.params)
    given = [
        row for row in record.rows if all(decoded(v) == settings.get(key) for key, v in row.params.items())
    ]
    default = next((row for row in given if row.perplexity is not None), None)
    if default is None or not default.params or not settings:
        return []
    name = f"the settings as they were given, trial {default.number}"
    if default is best:
        return [f"The best are {name}: the search found none better."]
    until = f", pruned at rung {max(default.perplexities)}" if default.state == "PRUNED" else ""
    shown = show_perplexity(default.perplexity, 2)
    to_best = record.certainty.against_best.get(default.number)
    if to_best is None:
        return [_sentence(f"{name}{until}, came to {shown}")]
    won = replace(to_best, difference=-to_best.difference)
    return [f"Against {name}{until}, which came to {shown}: {show_difference(won.change, won.change_error)}."]


def hints(record: StudyRecord) -> list[tuple[str, str]]:
    """Return what might help further, each with the override to type."""
    best = record.best
    if best is None:
        return []
    found, settings = edges(record.attributes, best), recorded_values(record.attributes)
    if best.perplexities and best.best_rung == max(best.perplexities):
        epochs = best.params.get("train.epochs", settings.get("train.epochs"))
        more = 2 * epochs if isinstance(epochs, int) else "N"
        text = (
            "The best trial was still improving at its end: more epochs may help, in a study of another name."
        )
        found.insert(0, (text, f"train.epochs={more} study.name={record.name}-longer"))
    return found


def edges(attributes: Mapping[str, str], best: TrialRow) -> list[tuple[str, str]]:
    """Return what `edge_notes` says of the best trial, each with its override; nothing where the study has no
    record of its space."""
    space = recorded_values(attributes, ["space"]).get("space")
    try:
        config = recorded_config(attributes, StudyConfig(name="any"))
        config.space = space if isinstance(space, dict) else {}
        notes = edge_notes(config, parse_space(config), best.params)
    except LoraSearchError:
        return []
    return [(f"{text}:", override) for text, override in notes]


def tiles(rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    """Return the figures of the headline, and what each one is."""
    states = [row.state for row in rows]
    shown = [
        ("trials complete", str(states.count("COMPLETE"))),
        ("pruned", str(states.count("PRUNED"))),
        ("failed", str(states.count("FAIL"))),
        ("tokens trained", show_count(sum(row.train_tokens for row in rows))),
        ("training time", show_seconds(sum(row.train_seconds for row in rows))),
    ]
    running = states.count("RUNNING") + states.count("WAITING")
    return [*shown, ("still to end", str(running))] if running else shown


def share_saved(rows: Sequence[TrialRow]) -> tuple[int, int] | None:
    """Return (rungs trained by the pruned trials, rungs had they all run as long as the longest trial)."""
    pruned = [len(row.perplexities) for row in rows if row.state == "PRUNED"]
    longest = max((len(row.perplexities) for row in rows if row.state == "COMPLETE"), default=0)
    return (sum(pruned), longest * len(pruned)) if pruned and longest else None


def facts(attributes: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the study's attributes in groups: title -> name -> value."""
    groups: dict[str, dict[str, str]] = {"Run": {}, "Data": {}, "Versions": {}, "Settings": {}}
    prefixes = {"version/": "Versions", "setting/sweep.": "Settings", "data.": "Data", "data/": "Data"}
    for key, value in sorted(attributes.items()):
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if key not in HIDDEN:
            groups[prefixes[prefix] if prefix else "Run"][key.removeprefix(prefix or "")] = value
    return {title: group for title, group in groups.items() if group}
