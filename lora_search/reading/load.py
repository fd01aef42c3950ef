"""Reads all sources that the settings name into rows. Unusable rows are refused, or skipped and counted;
nothing is dropped silently."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice

from lora_search.errors import DataError
from lora_search.reading.layouts import Layout, recognise
from lora_search.reading.rows import Complaint, Loaded, Record, Row
from lora_search.reading.sources import Found, Source, find_sources
from lora_search.settings.data_schema import DataConfig
from lora_search.watching import Watch, unwatched

SHOWN_COMPLAINTS = 3
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1000  # smaller ones vanish in float32
PEEKED = 1000  # records from which to recognise a file's layout


def load_rows(
    config: DataConfig,
    found: Found | None = None,
    is_known: Callable[[DataConfig, str], bool] | None = None,
    watch: Watch = unwatched,
    commits: Mapping[str, str] | None = None,
) -> Loaded:
    """Return the usable rows, with counts of rows read and skipped. DataError: file, line, remedy.

    If ``is_known`` recognises the digest of the files, the rows are read only when needed.
    ``commits``: those at which hub data sets are read, whatever their branches say today.
    """
    found = found or find_sources(config, commits)
    if is_known is not None and is_known(config, found.digest):
        reread = partial(load_rows, config, found, watch=watch)
        return Loaded([], digest=found.digest, revisions=found.revisions, reread=reread)
    counts, rows = found.counts.copy(), list[Row]()
    notes = [f"{path}: read at commit {commit}" for path, commit in found.revisions.items()]
    for source in found.sources:
        layout = _read(source, config, rows, counts, watch)
        notes.append(f"{source.name}{f' ({source.split})' if source.split else ''}: {layout.describe()}")
    for split in ("train", "validation", "test"):
        own = [row for row in rows if row.split == split]
        if own:
            counts[f"rows of the user's own {split} split"] = len(own)
    return Loaded(rows, +counts, tuple(dict.fromkeys(notes)), found.revisions, found.digest)


def _read(source: Source, config: DataConfig, rows: list[Row], counts: Counter[str], watch: Watch) -> Layout:
    """Append a source's rows; return its layout. Counts all complaints and shows a few."""
    records = source.records()
    peeked = list(islice(records, PEEKED))
    if not peeked:
        remedy = "Give a file with one question and answer per line."
        raise DataError(f"{source.key}: {source.name} is empty. {remedy}")
    place = f"{source.key}: {source.name}"
    layout = recognise([record.content for record in peeked], config, place)
    before, num_read, shown = len(rows), 0, list[Complaint]()
    complaints: Counter[str] = Counter()
    for record in watch(chain(peeked, records), f"reading rows of {source.name}"):
        num_read += 1
        row = _row(record, layout, source, config)
        if isinstance(row, Row):
            rows.append(row)
        else:
            complaints[row.reason] += 1
            shown += [row] if len(shown) < SHOWN_COMPLAINTS else []
    del peeked
    num_good = len(rows) - before
    if complaints and (config.on_bad_row == "refuse" or not num_good):
        raise DataError(
            f"{source.key}: {complaints.total()} of {num_read} rows cannot be used:\n  "
            + "\n  ".join(complaint.message for complaint in shown)
            + ("\nFix them, or leave such rows out with data.on_bad_row=skip." if num_good else "")
        )
    layout.check_unused(place, num_read)
    counts["rows read"] += num_read
    counts["rows with a loss weight of their own"] += sum(row.loss_weight != 1.0 for row in rows[before:])
    counts.update({f"bad rows skipped ({reason})": number for reason, number in complaints.items()})
    return layout


def _row(record: Record, layout: Layout, source: Source, config: DataConfig) -> Row | Complaint:
    row = layout.row(record)
    if isinstance(row, Complaint):
        return row
    changes: dict[str, object] = {}
    if config.group_by is not None and not source.split:
        group = record.content.get(config.group_by)
        if group in (None, ""):
            return Complaint("missing field", f'{record.place} has no "{config.group_by}" (data.group_by).')
        changes["group"] = str(group)
    if source.split:
        changes["split"] = source.split
    if source.weight != 1.0:
        changes["weight"] = source.weight
    if config.columns.weight is not None and (
        source.split not in ("validation", "test") or config.columns.weight in record.content
    ):
        number = _loss_weight(record, config.columns.weight)
        if isinstance(number, Complaint):
            return number
        changes["loss_weight"] = number
    return replace(row, **changes) if changes else row  # type: ignore[arg-type]


def _loss_weight(record: Record, column: str) -> float | Complaint:
    """Return the number in a row's column of weights, or what is wrong with it."""
    value = record.content.get(column)
    with suppress(ValueError, OverflowError):
        number = float(value) if isinstance(value, str | int | float) and value is not True else math.nan
        if LEAST_WEIGHT <= number <= MOST_WEIGHT:
            return number
    rule = f"not a number from 0.000001 to {MOST_WEIGHT} (data.columns.weight)"
    return Complaint("wrong weight", f'{record.place}: "{column}" is {value!r:.40}, {rule}.')
