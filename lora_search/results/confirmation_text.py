"""The results of a confirmation in words and as cells of a table, for terminal, report and Markdown. Pure."""

from collections.abc import Sequence

from lora_search.results.confirmation import Confirmation, Duel, Fresh
from lora_search.results.formatting import percent_places, show_difference, show_perplexity
from lora_search.results.ranking import best_of
from lora_search.results.verdict import OUT_OF_REACH, rows_in_words
from lora_search.trial import TrialRow

MANY_SEEDS = 100  # that nobody trains
HEADS = (
    "trial",
    "in the search",
    "fresh seeds, mean",
    "between seeds",
    "lowest to highest",
    "against the first",
)


def confirmed_cells(confirmation: Confirmation, rows: Sequence[TrialRow]) -> list[list[str]]:
    """Return a line of text per trial, the best mean first, under HEADS."""
    searched = {row.number: row.perplexity for row in rows}
    against = {duel.other: duel for duel in confirmation.duels}
    return [
        _cells(fresh, searched.get(fresh.trial), against.get(fresh.trial)) for fresh in confirmation.fresh()
    ]


def _cells(fresh: Fresh, searched: float | None, duel: Duel | None) -> list[str]:
    found = fresh.perplexities
    places = _places(fresh)
    spread = (
        "-" if fresh.spread is None else f"{fresh.spread:.{places or 2}f} ({fresh.spread / fresh.mean:.1%})"
    )
    span = f"{show_perplexity(min(found), places)} to {show_perplexity(max(found), places)}" if found else "-"
    diverged = f", {fresh.num_diverged} diverged" if fresh.num_diverged else ""
    return [
        str(fresh.trial),
        show_perplexity(searched, places),
        f"{show_perplexity(fresh.mean if found else None, places)} ({len(found)}{diverged})",
        spread.replace("%)", " %)"),
        span,
        show_difference(duel.change, duel.change_error) if duel else "",
    ]


def _places(fresh: Fresh) -> int | None:
    """Return how many decimals the spread between seeds supports, one more than its first digit."""
    return None if not fresh.spread else percent_places(fresh.spread / 100) + 1


def verdicts(confirmation: Confirmation, rows: Sequence[TrialRow]) -> list[str]:
    """Return the conclusions, one sentence each; empty without a confirmation."""
    fresh = confirmation.fresh()
    if not fresh:
        return []
    said = [_judge(duel) for duel in confirmation.duels]
    said += [
        f"Trial {one.trial} diverged with {one.num_diverged} of {one.num_seeds} seeds."
        for one in fresh
        if one.num_diverged
    ]
    if not confirmation.confirmed_at:
        said.append("The confirmation is not finished: run the same command to continue.")
    return [*said, *_about_the_best(fresh, confirmation.duels, rows)]


def _judge(duel: Duel) -> str:
    low, high = (100 * (duel.change + sign * duel.critical * duel.change_error) for sign in (-1, 1))
    places = percent_places(duel.change_error)
    if duel.is_sure and round(min(abs(low), abs(high)), places) == 0:
        places += 1  # an end that is not 0 shows that it is not
    amount = f"over {duel.num_seeds} seeds and {duel.num_rows} validation rows"
    higher = show_difference(duel.change, duel.change_error).lstrip("+")
    interval = f"95 % interval {low:+.{places}f} to {high:+.{places}f} %"
    shown = f"{amount}, the perplexity of trial {duel.other} is {higher} higher ({interval})"
    if duel.is_sure:
        return f"Trial {duel.leader} is better than trial {duel.other} beyond doubt: {shown}."
    return f"Trials {duel.leader} and {duel.other} are tied: {shown}; {_more(duel)}."


def _more(duel: Duel) -> str:
    """Return what would separate two tied trials, if the difference is real."""
    seeds, rows = duel.seeds_needed, duel.rows_needed
    ways = [f"about {seeds} seeds"] if seeds is not None and seeds <= MANY_SEEDS else []
    ways += (
        [f"about {rows_in_words(rows)} validation rows"] if rows is not None and rows <= OUT_OF_REACH else []
    )
    if ways:
        return f"{' or '.join(ways)} would separate them"
    return "neither more seeds nor more rows alone would separate them"


def _about_the_best(fresh: Sequence[Fresh], duels: Sequence[Duel], rows: Sequence[TrialRow]) -> list[str]:
    """Return whether the search's winner is still the best."""
    best, leader = best_of(rows), fresh[0].trial
    if best is None or best.number == leader:
        return []
    if best.number not in [one.trial for one in fresh]:
        return [
            f"The best of the search is trial {best.number} by now, which is not among the confirmed ones."
        ]
    is_sure = any(duel.other == best.number and duel.is_sure for duel in duels)
    verb = (
        "The search chose trial {}, which is worse"
        if is_sure
        else "The search chose trial {}, which is as good"
    )
    ending = f": take trial {leader} (trial={leader} in export and final)." if is_sure else "."
    return [verb.format(best.number) + ending]
