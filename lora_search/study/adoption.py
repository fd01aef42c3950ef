"""Whether a study that is there under study.name is one to go on with. Asked before anything is written."""

from lora_search.database.outline import outline_of
from lora_search.errors import ConfigError
from lora_search.settings.schema import StudyConfig

OURS = {"fingerprint", "base_perplexity", "sweep"}  # attributes that a study of any version of ours has
REMEDY = "Choose another study.name, or another study.storage."


def check_adoptable(config: StudyConfig) -> None:
    """Raise ConfigError where the study is one that another program made for another purpose."""
    found = outline_of(config)
    if found is None:
        return
    if found.directions != ("MINIMIZE",):
        goals = ", ".join(direction.lower() for direction in found.directions)
        rule = f"must be a study that minimizes one value, and the one that is there has the goals: {goals}"
        raise ConfigError("study.name", config.name, rule, REMEDY)
    if found.has_trials and not found.attributes & OURS:
        rule = "must be new or a study of lora_search, and the one that is there has another program's trials"
        raise ConfigError("study.name", config.name, rule, REMEDY)
