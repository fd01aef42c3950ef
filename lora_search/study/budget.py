"""The budget of a study over all its starts and workers, and the trials that fit into the rest of it.

Every start of a worker stores one interval of wall time in the study and extends it while it works. Hours
count time covered by any interval, cost sums all intervals, tokens are those trained up to each trial's last
rung. The time that a killed worker spent since it last extended its interval is not counted.
"""

import json
import math
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from lora_search.database.presence import worker_is_dead
from lora_search.database.write_once import write_own
from lora_search.search.trials import best_until, settings_of
from lora_search.settings.schema import StudyConfig, SweepConfig
from lora_search.study.ledger import Ledger
from lora_search.trial import Limit

NOTE_SECONDS = 10.0  # between two extensions of a worker's interval
READ_PER_WORKER = 0.1  # seconds more between two looks at the others': 1,000 of them are read every 110 s
ANSWER_SECONDS = 5.0  # reserved for leaderboard, best adapter and report
PRESENT_SECONDS = 60.0  # a worker that extended its interval within this time counts as running
WORKED = "worked"  # attribute: spans of epoch seconds, as JSON
KEY = "budget/"  # prefix of the study's system attributes, one per start of a worker


@dataclass(frozen=True)
class Interval:
    """The time from a worker's start to its last sign, in epoch seconds; ``is_open`` until it ends."""

    begin: float
    end: float
    is_open: bool = False


@dataclass(frozen=True)
class Need:
    """The tokens that a running trial still has to train."""

    number: int
    to_next_rung: float
    to_end: float


@dataclass(frozen=True)
class Spent:
    """What a study has spent so far. ``worked``: the spans in which any worker was running."""

    hours: float
    worker_hours: float
    tokens: int
    worked: tuple[tuple[float, float], ...] = ()

    def cost(self, price_per_hour: float) -> float:
        return self.worker_hours * price_per_hour


def covered(intervals: Iterable[Interval]) -> list[tuple[float, float]]:
    """Return the spans of time that at least one of the intervals covers, in order."""
    spans: list[tuple[float, float]] = []
    for one in sorted(intervals, key=lambda interval: interval.begin):
        if spans and one.begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], one.end))
        else:
            spans.append((one.begin, one.end))
    return spans


def covered_seconds(intervals: Iterable[Interval]) -> float:
    """Return how much time at least one of the intervals covers."""
    return sum(end - begin for begin, end in covered(intervals))


def spent_of(intervals: Sequence[Interval], tokens: int) -> Spent:
    """Return the sums of these intervals, with the tokens."""
    worker_seconds = sum(one.end - one.begin for one in intervals)
    spans = tuple(covered(intervals))
    return Spent(covered_seconds(intervals) / 3600, worker_seconds / 3600, tokens, spans)


def limits(config: StudyConfig, spent: Spent) -> list[Limit]:
    """Return every limit that is set, except n_trials."""
    found = []
    if config.max_hours is not None:
        found.append(Limit("study.max_hours", spent.hours, config.max_hours, " hours"))
    if config.max_tokens is not None:
        found.append(Limit("study.max_tokens", spent.tokens, config.max_tokens, " tokens"))
    if config.max_cost is not None and config.price_per_hour is not None:
        found.append(Limit("study.max_cost", spent.cost(config.price_per_hour), config.max_cost, ""))
    return found


def described(config: StudyConfig, spent: Spent) -> dict[str, str]:
    """Return what is spent, as text."""
    facts = {f"budget {limit.key}": f"{limit} spent" for limit in limits(config, spent)}
    facts["hours over all starts"] = f"{spent.hours:.3g}"
    facts["worker hours"] = f"{spent.worker_hours:.3g}"
    facts[WORKED] = json.dumps([[round(begin, 1), round(end, 1)] for begin, end in spent.worked])
    if config.price_per_hour is not None:
        facts["cost"] = f"{spent.cost(config.price_per_hour):.3g}"
    return facts


def affordable(needs: Sequence[Need], tokens: float) -> tuple[set[int], float]:
    """Return the trials that reach their next rung within these tokens, and the tokens left over.

    ``needs`` is ordered, most promising first. Each trial gets the tokens to its end if they suffice, else
    those to its next rung, so that the first trials finish.
    """
    fitting: set[int] = set()
    for need in needs:
        given = need.to_end if need.to_end <= tokens else need.to_next_rung
        if given <= tokens:
            fitting.add(need.number)
            tokens -= given
    return fitting, tokens


def read_intervals(storage: RDBStorage, study_id: int) -> dict[str, Interval]:
    """Return the interval of every start of a worker."""
    attributes: Mapping[str, tuple[float, float, bool]] = storage.get_study_system_attrs(study_id)
    return {key: Interval(*value) for key, value in attributes.items() if key.startswith(KEY)}


def is_at_work(key: str, one: Interval, now: float) -> bool:
    """Return whether the worker of an interval, by its key, still ran at this time as far as is known."""
    worker = key.removeprefix(KEY).partition("@")[0]
    return one.is_open and now - one.end < PRESENT_SECONDS and not worker_is_dead(worker)


class Speed:
    """How fast this worker trains, with evaluations and waiting, from the last rungs of its trials. Assumes
    the same speed with fewer trials."""

    RUNGS = 16

    def __init__(self) -> None:
        self._since: dict[int, float] = {}  # held trial -> start time of its current rung
        self._rungs: list[tuple[float, float]] = []  # tokens of all trials, and seconds

    def begin(self, number: int, now: float) -> None:
        """Record that a trial starts its next rung."""
        self._since[number] = now

    def reach(self, number: int, tokens: float, num_trials: int, now: float) -> None:
        """Record the tokens that a trial, one of ``num_trials``, has trained since its last rung."""
        if number in self._since and tokens > 0:
            self._rungs.append((tokens * num_trials, max(1e-6, now - self._since[number])))
            del self._rungs[: -self.RUNGS]
        self._since[number] = now

    @property
    def tokens_per_second(self) -> float | None:
        """Return the tokens per second of all trials; None before the first rung."""
        seconds = sum(seconds for _, seconds in self._rungs)
        return sum(tokens for tokens, _ in self._rungs) / seconds if seconds else None

    def since_rung(self, number: int, num_trials: int, now: float) -> float:
        """Estimate the tokens that a trial, one of ``num_trials``, has trained since its last rung."""
        return (now - self._since.get(number, now)) * (self.tokens_per_second or 0.0) / num_trials


class Account:
    """The time that a study has spent so far. ``began`` is the start of this worker's process."""

    def __init__(
        self,
        config: StudyConfig,
        storage: RDBStorage,
        study_id: int,
        worker: str,
        *,
        began: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config, self.storage, self.study_id, self.clock = config, storage, study_id, clock
        self._began = clock() if began is None else began
        self._key = f"{KEY}{worker}@{self._began:.3f}"
        self._is_timed = config.max_hours is not None or config.max_cost is not None
        self._others: dict[str, Interval] = {}
        self._noted = self._read = -math.inf

    def note(self) -> None:
        """Extend this worker's interval every NOTE_SECONDS, and read the others' if time or cost is limited,
        the more of them the less often: until then those at work are taken to be so still."""
        if self.clock() - self._noted >= NOTE_SECONDS:
            self._write(is_open=True)
        pause = NOTE_SECONDS + READ_PER_WORKER * len(self._others)
        if self._is_timed and self.clock() - self._read >= pause:
            self.read()

    def read(self) -> "Account":
        """Read the intervals of all other workers; return this account."""
        self._others = read_intervals(self.storage, self.study_id)
        self._others.pop(self._key, None)
        self._read = self.clock()
        return self

    def close(self) -> None:
        """Record that this worker ends."""
        self._write(is_open=False)

    def spent(self, tokens: int) -> Spent:
        """Return what is spent by now, with the tokens that all trials have trained."""
        now = self.clock()
        others = [replace(o, end=now) if self._is_at_work(key) else o for key, o in self._others.items()]
        return spent_of([*others, Interval(self._began, now)], tokens)

    def seconds_left(self) -> float:
        """Return how long this worker may still train; infinity if neither time nor cost is limited."""
        config, spent, seconds = self.config, self.spent(0), math.inf
        if config.max_hours is not None:
            seconds = (config.max_hours - spent.hours) * 3600 - ANSWER_SECONDS
        if config.max_cost is not None and config.price_per_hour is not None:
            left = config.max_cost - spent.cost(config.price_per_hour)
            num_workers = 1 + sum(self._is_at_work(key) for key in self._others)
            seconds = min(seconds, left / config.price_per_hour * 3600 / num_workers - ANSWER_SECONDS)
        return seconds

    def _write(self, *, is_open: bool) -> None:
        self._noted = self.clock()
        write_own(self.storage, self.study_id, self._key, [self._began, self._noted, is_open])

    def _is_at_work(self, key: str) -> bool:
        return is_at_work(key, self._others[key], self._read)


class Budget:
    """Decides which trials get the rest of the budget. ``epoch_tokens`` is the size of the training split;
    without it there is no forecast, and training ends once the budget is spent."""

    def __init__(
        self, config: SweepConfig, account: Account, ledger: Ledger, epoch_tokens: float | None = None
    ) -> None:
        self.config, self.account, self.ledger = config.study, account, ledger
        self.rung_tokens = None if epoch_tokens is None else epoch_tokens / config.train.evals_per_epoch
        self.speed = Speed()
        self.is_limited = bool(limits(config.study, Spent(0, 0, 0)))

    @property
    def reached(self) -> Limit | None:
        """A limit that is spent, if there is one."""
        return next((limit for limit in self.limits() if limit.is_reached), None)

    @property
    def is_over(self) -> bool:
        """Whether training must end now, so that the results are ready in time."""
        return self.reached is not None or self.account.seconds_left() <= 0

    def limits(self) -> list[Limit]:
        """Return every limit, with what is spent of it."""
        return limits(self.config, self.account.spent(self.ledger.tokens))

    def begin(self, number: int) -> None:
        """Record that this worker starts a trial."""
        self.speed.begin(number, self.account.clock())

    def reach(self, number: int, tokens: int, num_held: int) -> None:
        """Record the tokens that a trial of this worker has trained since its last rung."""
        self.speed.reach(number, tokens, num_held, self.account.clock())

    def has_room(self, held: Container[int]) -> bool:
        """Return whether one more trial of this worker could reach a rung, next to those that run."""
        if not self.is_limited:
            return True
        if self.is_over:
            return False
        least = self.rung_tokens or 0.0
        running = [t for t in self.ledger.open if t.state == TrialState.RUNNING and t.number in held]
        is_in_time = self._time_in_tokens() / (len(running) + 1) >= least  # each trains at an even pace
        return is_in_time and all(left >= least for _, left in self._plans(held))

    def beyond(self, held: Container[int], at_rung: Sequence[int]) -> list[int]:
        """Return which of the trials that have just reached a rung cannot reach the next one."""
        if not self.is_limited:
            return []
        plans = self._plans(held)
        return [number for number in at_rung if any(number not in fitting for fitting, _ in plans)]

    def _plans(self, held: Container[int]) -> list[tuple[set[int], float]]:
        """Return the trials that fit and the tokens left over: by tokens for all trials, by time for this
        worker's."""
        running = sorted((t for t in self.ledger.open if t.state == TrialState.RUNNING), key=_place)
        mine = [t for t in running if t.number in held]
        tokens = math.inf if self.config.max_tokens is None else self.config.max_tokens - self.ledger.tokens
        others = {t.number for t in running} - {t.number for t in mine}
        by_time, left = affordable([self._need(t, len(mine)) for t in mine], self._time_in_tokens())
        return [affordable([self._need(t) for t in running], tokens), (by_time | others, left)]

    def _need(self, trial: FrozenTrial, num_mine: int | None = None) -> Need:
        """Return what a trial needs from its last rung on, or from now on if ``num_mine`` is given."""
        rung, per_rung = trial.last_step or 0, self.rung_tokens or 0.0
        left = max(0, _num_rungs(trial) - rung)
        trained = 0.0
        if num_mine is not None:
            trained = min(per_rung, self.speed.since_rung(trial.number, num_mine, self.account.clock()))
        return Need(trial.number, per_rung * min(1, left) - trained, per_rung * left - trained)

    def _time_in_tokens(self) -> float:
        """Return the tokens that this worker can train in the time left."""
        seconds, speed = self.account.seconds_left(), self.speed.tokens_per_second
        if speed is None or math.isinf(seconds):
            return math.inf if seconds > 0 else 0.0
        return max(0.0, seconds) * speed


def _place(trial: FrozenTrial) -> tuple[int, float, int]:
    rung = trial.last_step or 0
    return -rung, best_until(trial, rung), trial.number


def _num_rungs(trial: FrozenTrial) -> int:
    settings = json.loads(settings_of(trial) or "{}")
    return int(settings.get("epochs", 1) * settings.get("evals_per_epoch", 1))
