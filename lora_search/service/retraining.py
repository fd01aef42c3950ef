"""Retrains the best trials with fresh seeds, packed over the one base, and compares them.

A seed decides adapter init, dropout and the order of the rows; the same fresh seed gives all trials the same
order. Splits, schedule and rungs are the search's. After a kill at any moment, the next start resumes each
run at its last rung. Imports torch.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from lora_search.engine.engine import Engine
from lora_search.errors import StudyError
from lora_search.files.artifacts import Artifacts
from lora_search.files.lock import alone
from lora_search.files.row_scores import VALIDATION, read_scores
from lora_search.output.shared_files import copies_of, told
from lora_search.output.terminal import Progress
from lora_search.results.confirmation import Confirmation, Repeat, read_confirmation, store_confirmation
from lora_search.service.comparisons import duels_of
from lora_search.service.reopen import identity_of, reopen
from lora_search.settings.schema import SweepConfig
from lora_search.study.view import StudyView
from lora_search.training import train_all
from lora_search.trial import Measurement, RowScores, TrialRun, TrialSettings, draw_seed

FOLDER = "confirm"
ORDERS = 2**32 - 1  # in place of a trial's number, for the order of the rows
SAME_VALUE = 1e-6  # relative: the value stored, and the sum of its rows


@dataclass(frozen=True)
class Plan:
    """One requested run: a trial's settings and a fresh seed."""

    trial: int
    seed: int
    settings: TrialSettings
    folder: Path  # absolute

    def run(self, number: int, config: SweepConfig, study_id: str) -> TrialRun:
        """Return the run for the engine, with its own number."""
        return TrialRun(
            number=number,
            seed=draw_seed(config.seed, self.trial, self.seed),
            order_seed=draw_seed(config.seed, ORDERS, self.seed),
            settings=self.settings,
            folder=str(self.folder),
            study_id=study_id,
        )


def confirm(
    config: SweepConfig,
    view: StudyView,
    folder: Path,
    trials: Sequence[int],
    num_seeds: int,
    progress: Progress,
) -> Confirmation:
    """Train the missing runs, store each as it ends, compare all; return the confirmation.

    Raises StudyError if another process confirms in this folder, or if a run failed.
    """
    place = folder.resolve() / FOLDER
    plans = plans_for(view, place, trials, num_seeds)
    with alone(place, "confirm"):
        held = Holder(view, folder, copies_of(config, view.attributes()), progress)
        held.bring()
        lacking = [plan for plan in plans if held.find(plan) is None]
        progress.event(f"{len(plans)} runs, {len(plans) - len(lacking)} of them trained before")
        if lacking:
            train(config, view, lacking, held, progress)
        held.compare()
    return held.confirmation


def plans_for(view: StudyView, place: Path, trials: Sequence[int], num_seeds: int) -> list[Plan]:
    """Return the runs, seed by seed, so that an interrupted confirmation can compare all trials."""
    settings = {number: view.settings_of(number) for number in trials}
    return [
        Plan(number, seed, settings[number], place / f"{number}-{seed}")
        for seed in range(1, num_seeds + 1)
        for number in trials
    ]


class Holder:
    """The confirmation stored in the study, with the row scores in the study's folder and copies of them at
    artifacts.uri. Whatever fails there is a line on the screen."""

    def __init__(self, view: StudyView, folder: Path, copies: Artifacts | None, progress: Progress) -> None:
        self.config, self.folder, self.progress = view.config, folder, progress
        self.copies = copies
        self.confirmation = read_confirmation(view.attributes())

    def bring(self) -> None:
        """Bring the row scores that another machine has measured."""
        known = [repeat for repeat in self.confirmation.repeats if repeat.perplexity is not None]
        lacking = [scores_of(repeat) for repeat in known if self.scores(repeat) is None]
        if self.copies is not None and lacking:
            with told(self.progress):
                self.copies.bring(lacking, self.folder)

    def find(self, plan: Plan) -> Repeat | None:
        """Return the run's result; None if it is unknown, or its row scores are not in this folder."""
        known = (r for r in self.confirmation.repeats if (r.trial, r.seed) == (plan.trial, plan.seed))
        repeat = next(known, None)
        is_whole = repeat is not None and (repeat.perplexity is None or self.scores(repeat) is not None)
        return repeat if is_whole else None

    def add(self, repeat: Repeat) -> None:
        """Store a finished run, replacing an older one."""
        key = (repeat.trial, repeat.seed)
        others = [r for r in self.confirmation.repeats if (r.trial, r.seed) != key]
        repeats = tuple(sorted([*others, repeat], key=lambda r: (r.trial, r.seed)))
        self.confirmation = replace(self.confirmation, repeats=repeats, confirmed_at="")
        if self.copies is not None and repeat.perplexity is not None:
            with told(self.progress):
                self.copies.share(scores_of(repeat), self.folder)
        store_confirmation(self.config, self.confirmation)

    def scores(self, repeat: Repeat) -> RowScores | None:
        """Return the run's scores of the validation rows."""
        found = read_scores((self.folder / scores_of(repeat)).parent)
        if found is None or repeat.perplexity is None or found[1] != repeat.rung:
            return None
        is_same = math.isclose(found[0].perplexity, repeat.perplexity, rel_tol=SAME_VALUE)
        return found[0] if is_same else None

    def compare(self) -> None:
        """Compare all retrained trials, and store the result."""
        leader = self.confirmation.fresh()[0].trial
        found = {(r.trial, r.seed): self.scores(r) for r in self.confirmation.repeats}
        scores = {key: one for key, one in found.items() if one is not None}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        duels = tuple(duels_of(leader, scores))
        self.confirmation = replace(self.confirmation, duels=duels, confirmed_at=now)
        store_confirmation(self.config, self.confirmation)


def scores_of(repeat: Repeat) -> str:
    """Return the file with a run's row scores, in the study's folder."""
    return f"{FOLDER}/{repeat.trial}-{repeat.seed}/{VALIDATION}"


def train(
    config: SweepConfig, view: StudyView, plans: Sequence[Plan], held: Holder, progress: Progress
) -> None:
    """Train the runs packed. Raises StudyError at the end if some failed."""
    slots = config.engine.slots
    num_slots = min(slots, len(plans)) if isinstance(slots, int) else slots
    engine = reopen(config, [plan.settings for plan in plans], num_slots)
    study_id = identity_of(config).id or ""
    runs = [plan.run(number, config, study_id) for number, plan in enumerate(plans)]
    failed: list[str] = []
    for count, (plan, end, seconds) in enumerate(ended(engine, runs, plans, progress), start=1):
        name = f"trial {plan.trial}, seed {plan.seed}"
        if end.ended == "failed":
            failed.append(f"{name}: {end.detail}")
            progress.event(f"{name} failed: {end.detail}")
            continue
        repeat = repeat_of(plan, end, seconds)
        held.add(repeat)
        shutil.rmtree(plan.folder / "checkpoint", ignore_errors=True)
        value = "diverged" if repeat.perplexity is None else f"perplexity {repeat.perplexity:.3f}"
        progress.event(f"{name}: {value} ({count} of {len(plans)})")
    if failed:
        raise StudyError(
            f"confirm: {len(failed)} runs failed, {failed[0]}. The same command tries them again."
        )


def ended(
    engine: Engine, runs: Sequence[TrialRun], plans: Sequence[Plan], progress: Progress
) -> Iterator[tuple[Plan, Measurement, float]]:
    """Train all; yield each run that ends, with its training seconds."""
    seconds = dict.fromkeys(range(len(runs)), 0.0)
    for m in train_all(engine, runs):
        seconds[m.trial_number] += m.train_seconds
        if m.ended:
            yield plans[m.trial_number], m, seconds[m.trial_number]
        else:
            plan = plans[m.trial_number]
            rung = f"rung {m.rung}/{plan.settings.num_rungs}: perplexity {m.perplexity:.3f}"
            speed = f"{engine.tokens_per_second:,.0f} tokens/s"
            progress.wait(f"trial {plan.trial}, seed {plan.seed}, {rung}; {speed}")


def repeat_of(plan: Plan, end: Measurement, seconds: float) -> Repeat:
    """Return the run's result for the study."""
    diverged = end.ended == "diverged" or not math.isfinite(end.best_perplexity)
    return Repeat(
        trial=plan.trial,
        seed=plan.seed,
        perplexity=None if diverged else end.best_perplexity,
        rung=end.best_rung,
        train_tokens=end.train_tokens,
        train_seconds=round(seconds, 3),
        reason=end.detail,
    )
