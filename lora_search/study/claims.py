"""Which trial is next: one that was interrupted, or a new point of the space; none twice, none beyond the
total."""

import math
import time
from collections.abc import Callable, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.storage import locked_from_the_start
from lora_search.search.trials import DUPLICATE, SURPLUS, params_of
from lora_search.seeds import draw_seed
from lora_search.settings.schema import SweepConfig
from lora_search.settings.space import Space
from lora_search.study.ledger import Ledger

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
MAX_DUPLICATES_IN_A_ROW = 50
SIGNING_SECONDS = 0.02  # between two looks at a trial that another worker is drawing


def has_run_for(trial: FrozenTrial, seconds: int) -> bool:
    """Return whether the trial was drawn longer ago; if nobody has signed it since, its worker has died."""
    age = time.time() - trial.datetime_start.timestamp() if trial.datetime_start else math.inf
    return age > seconds


class Draws:
    """Draws trials for one worker until the total is reached or the space is exhausted."""

    def __init__(self, config: SweepConfig, space: Space, study: optuna.Study, ledger: Ledger) -> None:
        self.config, self.space, self.study, self.ledger = config, space, study, ledger
        self.exhausted = False

    def draw(self, sign: Callable[[optuna.Trial], None]) -> optuna.Trial | None:
        """Return a RUNNING trial, signed by its worker; None when there is none to be had."""
        for _ in range(MAX_DUPLICATES_IN_A_ROW):
            self.ledger.read(everything=True)
            if not self._has_room(self.ledger.trials):
                return None
            with locked_from_the_start():
                trial = self.study.ask(self.space.distributions)
            sign(trial)
            refusal = self._refusal(trial)
            if refusal is None:
                return trial
            self._refuse(trial, refusal)
            if refusal.startswith(SURPLUS):
                return None
        self._exhaust(f"{MAX_DUPLICATES_IN_A_ROW} draws in a row had been tried before")
        return None

    def _has_room(self, trials: Sequence[FrozenTrial]) -> bool:
        """Return whether one more trial may be drawn; steer the draw to an untried point where needed."""
        if self.ledger.count(*FINISHED, TrialState.RUNNING) >= self.config.study.n_trials:
            return False
        if self.ledger.count(TrialState.WAITING):
            return True
        has_drawn_twice = bool(trials) and str(trials[-1].user_attrs.get("reason", "")).startswith(DUPLICATE)
        is_grid = self.config.sampler.name == "grid"
        num_points = self.space.num_points()
        if num_points is None or not (is_grid or has_drawn_twice or len(trials) >= num_points):
            return True
        untried = self.space.untried(params_of(t) for t in trials)
        if not untried:
            self._exhaust(f"all {num_points} combinations of the space have been tried")
            return False
        if is_grid or has_drawn_twice:
            self.study.enqueue_trial(untried[draw_seed(self.config.seed, len(trials)) % len(untried)])
        return True

    def _refusal(self, trial: optuna.Trial) -> str | None:
        """Return why a new trial must not begin. Lower numbers win: two workers never refuse each other."""
        self._wait_for_signatures(before=trial.number)
        if "settings" in self.ledger.find(trial.number).user_attrs:
            return None  # it began before, and goes on
        same = self.ledger.first_with(trial.params, before=trial.number)
        if same is not None:
            return f"{DUPLICATE} trial {same}"
        if self.ledger.num_not_failed(before=trial.number) >= self.config.study.n_trials:
            return f"{SURPLUS} another worker took the last place"
        return None

    def _refuse(self, trial: optuna.Trial, why: str) -> None:
        """End the trial, unless this worker was so slow that another took the trial from it."""
        self.ledger.read(everything=True)
        if self.ledger.find(trial.number).state == TrialState.RUNNING:
            trial.set_user_attr("reason", why)
            self.study.tell(trial, state=TrialState.FAIL)

    def _wait_for_signatures(self, before: int) -> None:
        """Read the study once the trials of lower numbers have their parameters: a worker signs a trial when
        it has drawn them, and may be slower than the one that drew the next."""
        seconds = self.config.study.heartbeat_seconds
        while True:
            self.ledger.read()
            running = [t for t in self.ledger.open if t.state == TrialState.RUNNING and t.number < before]
            if all(t.user_attrs.get("worker") or has_run_for(t, seconds) for t in running):
                return
            time.sleep(SIGNING_SECONDS)

    def _exhaust(self, why: str) -> None:
        self.exhausted = True
        self.study.set_user_attr("exhausted", why)
