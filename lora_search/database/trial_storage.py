"""Optuna's storage for a study that many workers share: trials are read by plain SQL, and one that is being
drawn is written in one step."""

from collections.abc import Container, Iterator
from contextlib import contextmanager

from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb.models import NOT_FOUND_MSG, StudyModel, TrialParamModel
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import or_, select

from lora_search.database.trial_reader import IDS, TRIALS, distribution_of, read_trials, table_of


class TrialStorage(RDBStorage):
    """Reads trials as RDBStorage does, in fewer statements."""

    def get_trial(self, trial_id: int) -> FrozenTrial:
        # In Optuna's session: it asks for a trial inside a transaction too.
        with _create_scoped_session(self.scoped_session) as session:
            trials = read_trials(session.connection(), [trial_id])
        if not trials:
            raise KeyError(NOT_FOUND_MSG)
        return trials[0]

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        study = table_of(StudyModel)
        trial = TRIALS.c
        wanted = select(trial.trial_id).where(trial.study_id == study_id)
        if states is not None:
            wanted = wanted.where(trial.state.in_([state for state in TrialState if state in states]))
        if trial_id_greater_than > -1:
            is_new, is_included = trial.trial_id > trial_id_greater_than, trial.trial_id.in_(IDS)
            wanted = wanted.where(or_(is_new, is_included))
        with self.engine.connect() as connection:
            if (
                connection.execute(select(study.c.study_id).where(study.c.study_id == study_id)).first()
                is None
            ):
                raise KeyError(NOT_FOUND_MSG)
            ids = connection.execute(wanted, {"ids": list(included_trial_ids)}).scalars().all()
            return read_trials(connection, ids)


class DrawingStorage(_CachedStorage):
    """What a study draws from. Inside ``drawing``, the parameters of the new trial are kept in ``drawn``: its
    worker writes them in one transaction with its signature (``LockedTrial.draw``)."""

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._study_id = -1
        self.drawn: dict[str, tuple[float, BaseDistribution]] = {}
        self._is_drawing = False
        self._first: dict[str, BaseDistribution] = {}  # of each parameter, as the study holds it

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return trials. Of unfinished ones nothing can be kept, so the others are not read for them."""
        self._study_id = study_id
        if states is None or any(state in states for state in TrialState if state.is_finished()):
            return super().get_all_trials(study_id, deepcopy, states)
        return self._backend._get_trials(study_id, states, set(), -1)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Keep the parameters of the one trial that is drawn in this block."""
        self.drawn, self._is_drawing = {}, True
        try:
            yield
        finally:
            self._is_drawing = False

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Raises ValueError, as Optuna does, if the study holds a parameter of another kind."""
        if not self._is_drawing:
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
            return
        if param_name not in self._first and (found := self._stored(param_name)) is not None:
            self._first[param_name] = found
        if param_name in self._first:
            check_distribution_compatibility(self._first[param_name], distribution)
        self.drawn[param_name] = param_value_internal, distribution

    def _stored(self, name: str) -> BaseDistribution | None:
        param = table_of(TrialParamModel)
        found = select(param.c.distribution_json).join(TRIALS).where(TRIALS.c.study_id == self._study_id)
        with self._backend.engine.connect() as connection:
            text = connection.execute(found.where(param.c.param_name == name).limit(1)).scalar()
        return None if text is None else distribution_of(text)
