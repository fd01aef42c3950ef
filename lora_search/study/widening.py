"""Continues a study with wider ranges, more choices, or its rows in another place."""

from collections.abc import Mapping

import optuna

from lora_search.database.choices import write_choices
from lora_search.database.trial_reader import UNFINISHED
from lora_search.database.trial_table import TrialTable
from lora_search.errors import FingerprintError
from lora_search.settings.schema import StudyConfig
from lora_search.study.claims import reclaim
from lora_search.study.fingerprint import ATTRIBUTE, SPACE, changed_choices
from lora_search.study.identity import Identity


def take_changes(
    config: StudyConfig,
    study: optuna.Study,
    table: TrialTable,
    identity: Identity,
    wanted: Mapping[str, str],
) -> None:
    """Store a changed fingerprint, and with new choices the trials' parameters in the new lists.

    Raises FingerprintError if choices are new while trials run: their workers know only the old ones.
    """
    if identity.fingerprint == wanted:
        return
    choices = changed_choices(identity.fingerprint, wanted)
    if not choices:
        study.set_user_attr(ATTRIBUTE, dict(wanted))
        return
    # Past the caller's study object: what that one reads now it would keep.
    unfinished = table.storage.get_all_trials(table.study_id, deepcopy=False, states=UNFINISHED)
    reclaim(config, unfinished, table, held=())
    running = write_choices(table.storage, table.study_id, {ATTRIBUTE: dict(wanted)}, choices)
    if running:
        keys = ", ".join(f"{SPACE}{key}" for key in choices)
        raise FingerprintError(
            f"{keys}: choices can be added only while no trial runs, and trial {running[0]} does. Stop the "
            "sweep on all machines (Ctrl-C loses nothing), then give this command again."
        )
