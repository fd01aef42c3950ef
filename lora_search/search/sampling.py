"""Optuna's samplers, with every draw seeded by the sweep's seed and the trial's number.

An interrupted sweep draws what it would have drawn without the interruption; workers that share a study draw
different points.
"""

import importlib.util
import math
from bisect import insort
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from optuna import Study, create_study, samplers
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from lora_search.errors import ConfigError
from lora_search.search.extrapolation import as_complete
from lora_search.search.trials import Cursor, settled
from lora_search.settings.schema import SamplerConfig
from lora_search.settings.space import Space
from lora_search.trial import draw_seed

# Optuna's optional dependencies.
NEEDS = {"cmaes": ("cmaes",), "gp": ("scipy", "torch"), "qmc": ("scipy",)}
NUM_SPREAD = 500  # trials that TPE reads: its time grows with their number, the use of one more shrinks
NUM_OPEN = 500  # unfinished trials, of which it reads the newest: it keeps away from where others are
NUM_BEST = 25  # the best trials, in addition: TPE never counts more as good


class PerTrialSampler(samplers.BaseSampler):
    """Makes a new sampler for each trial. It is stateless: earlier trials are read from the study.

    If a worker is killed while it draws, the trial later gets the same missing parameters that it would have
    got: all are drawn at once, in the order of the space.
    """

    def __init__(
        self, make: Callable[[int], samplers.BaseSampler], space: Mapping[str, BaseDistribution]
    ) -> None:
        self._make, self._current = make, make(0)
        self._space = {key: d for key, d in space.items() if not d.single()}
        self._relative: dict[str, Any] = {}
        self._independent: dict[str, Any] = {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._current, self._relative, self._independent = self._make(trial.number), {}, {}
        self._current.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._current.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        self._relative = self._current.sample_relative(study, trial, search_space)
        return self._relative

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        if not self._independent:
            others = {key: d for key, d in self._space.items() if key not in self._relative}
            self._independent = {
                key: self._current.sample_independent(study, trial, key, d) for key, d in others.items()
            }
        if param_name in self._independent:
            return self._independent[param_name]
        return self._current.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._current.after_trial(study, trial, state, values)


class Chosen(samplers.BaseSampler):
    """Draws what a rule chooses; at random what that leaves open. ``choose`` gets the trial's number."""

    def __init__(self, seed: int) -> None:
        self.choose: Callable[[int], Mapping[str, object]] = lambda number: {}
        self._seed, self._last = seed, (-1, dict[str, object]())

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        if self._last[0] != trial.number:
            self._last = trial.number, dict(self.choose(trial.number))
        if param_name in self._last[1]:
            return self._last[1][param_name]
        random = samplers.RandomSampler(seed=draw_seed(self._seed, trial.number))
        return random.sample_independent(study, trial, param_name, param_distribution)


class Outlook(samplers.BaseSampler):
    """Shows a sampler a limited view of one study: all trials up to NUM_SPREAD, beyond that the best and an
    even share of the others, and the newest NUM_OPEN of the unfinished, so that a draw costs the same at any
    size. Paused trials appear as pruned, and the space is the sweep's own, so that a widened range stays part
    of it.

    A key that depends on another one is drawn by the trials in which that one is the same.

    With ``completes``, for samplers that learn only from COMPLETE trials, pruned ones appear as COMPLETE.
    With ``keeps_state``, for CMA-ES, the trial stores what the sampler notes at it; choices are left out.
    """

    def __init__(
        self,
        sampler: samplers.BaseSampler,
        space: Mapping[str, BaseDistribution],
        parents: Mapping[str, str] | None = None,
        *,
        completes: bool = False,
        keeps_state: bool = False,
    ) -> None:
        self._completes, self._keeps_state = completes, keeps_state
        self._parents = parents or {}
        self._sampler, self._view = sampler, create_study()
        choices = CategoricalDistribution if keeps_state else ()
        self._space = {k: d for k, d in space.items() if not d.single() and not isinstance(d, choices)}
        self._cursor: Cursor | None = None
        self._remembered = Remembered()
        self._unfinished: Callable[[], Sequence[FrozenTrial]] | None = None

    def follow(self, unfinished: Callable[[], Sequence[FrozenTrial]]) -> Callable[[FrozenTrial], None]:
        """Read no trials: take the unfinished ones, by number, from this function. Return the function to
        call with each trial that has finished."""
        self._unfinished = unfinished
        return self._remembered.add

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        others = [settled(t) for t in self._open_trials(study) if t.number != trial.number]
        seen = [*self._remembered.trials(), *others[-NUM_OPEN:]]
        note = study._storage.set_trial_system_attr if self._keeps_state else None
        self._view = create_study(storage=_Shown(as_complete(seen) if self._completes else seen, note))
        self._sampler.before_trial(self._view, trial)

    def _open_trials(self, study: Study) -> Sequence[FrozenTrial]:
        if self._unfinished is not None:
            return self._unfinished()
        # Hyperband's own view of the study holds one bracket, for each trial another.
        self._cursor = self._cursor or Cursor(Study(study.study_name, study._storage))
        finished, unfinished = self._cursor.read(everything=False)
        for one in finished:
            self._remembered.add(one)
        return unfinished

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        return self._sampler.sample_relative(self._view, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        view, parent = self._view, self._parents.get(param_name)
        if parent is not None:
            shown = self._view.get_trials(deepcopy=False)
            alike = [t for t in shown if t.params.get(parent) == trial.params[parent]]
            view = create_study(storage=_Shown(alike))
        return self._sampler.sample_independent(view, trial, param_name, param_distribution)


class _Shown(InMemoryStorage):
    """The trials that a sampler sees."""

    def __init__(
        self, trials: Sequence[FrozenTrial], note: Callable[[int, str, Any], None] | None = None
    ) -> None:
        super().__init__()
        self._shown, self._note = sorted(trials, key=lambda t: t.number), note

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [t for t in self._shown if states is None or t.state in states]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """CMA-ES keeps its state at the trial. Ignored of TPE: it stores its draw for other workers, which
        soon see the drawn trial itself."""
        if self._note is not None:
            self._note(trial_id, key, value)


class Remembered:
    """The finished trials that a sampler sees: the best, and every n-th by number. The choice depends on the
    finished trials, not on their order."""

    def __init__(self) -> None:
        self._best: list[tuple[tuple[bool, int, float, int], FrozenTrial]] = []
        self._spread: list[FrozenTrial] = []
        self._stride = 1

    def add(self, trial: FrozenTrial) -> None:
        if trial.state == TrialState.FAIL:
            return
        insort(self._best, (_rank(trial), trial))
        del self._best[NUM_BEST:]
        if trial.number % self._stride == 0:
            self._spread.append(trial)
        if len(self._spread) > NUM_SPREAD:
            self._stride *= 2
            self._spread = [t for t in self._spread if t.number % self._stride == 0]

    def trials(self) -> list[FrozenTrial]:
        """Return the trials in no particular order."""
        best = [trial for _, trial in self._best]
        seen = {trial.number for trial in best}
        return best + [t for t in self._spread if t.number not in seen]


def _rank(trial: FrozenTrial) -> tuple[bool, int, float, int]:
    """Order trials as TPE does: COMPLETE by value, then PRUNED by last rung and the value there."""
    if trial.state == TrialState.COMPLETE:
        return False, 0, trial.value or 0.0, trial.number
    step = trial.last_step
    value = math.inf if step is None else trial.intermediate_values[step]
    return True, -(step or 0), value, trial.number


def suggest(trial: Trial, space: Space) -> None:
    """Draw all parameters of a new trial: first those that every trial has."""
    for key, distribution in space.distributions.items():
        trial._suggest(key, distribution)
    for key, distribution in space.of(trial.params).items():
        trial._suggest(key, distribution)


def make_sampler(
    config: SamplerConfig,
    distributions: Mapping[str, BaseDistribution],
    seed: int,
    parents: Mapping[str, str] | None = None,
) -> samplers.BaseSampler:
    """Return the sampler of a sweep. Raises ConfigError if it cannot search this space.

    grid needs no sampler here: the study itself hands out the untried points of the space, in seeded order.
    cmaes optimizes numbers only and draws choices at random. ``parents``: of keys that some trials have, the
    key that each depends on.
    """
    missing = [name for name in NEEDS.get(config.name, ()) if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f"Run: pip install {' '.join(missing)}"
        raise ConfigError("sampler.name", config.name, f"needs {' and '.join(missing)}", remedy)
    if parents and config.name in ("gp", "cmaes", "qmc"):
        rule = f"cannot search keys that depend on others ({', '.join(parents)})"
        raise ConfigError("sampler.name", config.name, rule, "Use sampler=tpe, random or grid")
    if config.name == "cmaes" and not any(hasattr(d, "high") for d in distributions.values()):
        remedy = "Use sampler=tpe, or search numbers by interval(...)"
        raise ConfigError("sampler.name", "cmaes", "cannot search a space of choices only", remedy)
    sampler = PerTrialSampler(lambda number: _make(config, seed, draw_seed(seed, number)), distributions)
    if config.name not in ("tpe", "gp", "cmaes"):
        return sampler
    keeps_state = config.name == "cmaes"
    return Outlook(sampler, distributions, parents, completes=config.name != "tpe", keeps_state=keeps_state)


def _make(config: SamplerConfig, sweep_seed: int, trial_seed: int) -> samplers.BaseSampler:
    startup = config.n_startup_trials
    match config.name:
        case "tpe":
            return samplers.TPESampler(
                seed=trial_seed, n_startup_trials=startup, multivariate=True, constant_liar=True
            )
        case "gp":
            return samplers.GPSampler(seed=trial_seed, n_startup_trials=startup)
        case "qmc":  # one sequence for the whole sweep; Optuna keeps its position in the study
            return samplers.QMCSampler(seed=sweep_seed, scramble=True, warn_independent_sampling=False)
        case "cmaes":
            return samplers.CmaEsSampler(
                seed=trial_seed, n_startup_trials=max(1, startup), warn_independent_sampling=False
            )
    return samplers.RandomSampler(seed=trial_seed)
