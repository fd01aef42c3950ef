"""The table of busy slots: the searched settings, as many as fit the width."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora_search.results.formatting import short_names, show_perplexity, show_value
from lora_search.trial import SlotView, TrialSettings

USUAL = ("lora.r", "lora.alpha", "optim.lr", "train.batch_size", "lora.target_modules")
ACCUMULATION = "train.gradient_accumulation_steps"
BAR = 9  # columns, at least


def slot_table(slots: Sequence[SlotView], searched: Sequence[str] = (), width: int = 80) -> RenderableType:
    """Return one row per busy slot, with the searched settings, or the common ones."""
    keys = [key for key in searched or USUAL if _field(key) in TrialSettings.__dataclass_fields__]
    for count in range(len(keys), -1, -1):
        table = _table(slots, keys[:count], [] if count == len(keys) else keys)
        if count == 0 or measured(table).minimum <= width:
            break
    return table


def _table(slots: Sequence[SlotView], keys: Sequence[str], all_keys: Sequence[str]) -> Table:
    caption = f"searched as well: {', '.join(all_keys[len(keys) :])}" if all_keys else None
    table = plain_table(expand=True, caption=caption, caption_justify="left", caption_style="dim")
    for name in ("trial", *short_names(keys), "loss", "perplexity", "rung"):
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    table.add_column("next rung", ratio=1, min_width=BAR, no_wrap=True)
    for slot in slots:
        table.add_row(*_cells(slot, keys))
    return table


SHORT = {"target_modules": "targets", "batch_size": "batch", "gradient_accumulation_steps": "accumulation"}


def _cells(slot: SlotView, keys: Sequence[str]) -> list[RenderableType]:
    part = rungs_trained(slot) - slot.rung
    return [
        str(slot.trial_number),
        *(Text(_shown(slot.settings, key, keys)) for key in keys),
        "-" if slot.loss is None else f"{slot.loss:.3f}",
        show_perplexity(slot.perplexity),
        f"{slot.rung}/{slot.settings.num_rungs}",
        ProgressBar(total=1.0, completed=min(1.0, max(0.0, part)), complete_style="cyan"),
    ]


def _shown(settings: TrialSettings, key: str, keys: Sequence[str]) -> str:
    accumulation = settings.gradient_accumulation_steps
    if key == "train.batch_size" and accumulation > 1 and ACCUMULATION not in keys:
        return f"{settings.batch_size}x{accumulation}"
    text = show_value(getattr(settings, _field(key)))
    return text if len(text) <= 20 else f"{text[:19]}…"


def _field(key: str) -> str:
    """Return the name of a searched key in a trial's settings."""
    return key.rpartition(".")[2]


def measured(table: Table) -> Measurement:
    """Return how wide a table is, whatever the terminal."""
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table)


def plain_table(title: str | None = None, **more: Any) -> Table:
    """Return an empty table without lines."""
    return Table(
        title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="dim", **more
    )


def rungs_trained(slot: SlotView) -> float:
    """Return the rungs measured and the part of the next one."""
    return slot.examples_seen * (slot.rung + 1) / max(1, slot.next_rung_examples)
