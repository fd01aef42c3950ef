"""The errors that users see instead of a traceback: one message with the key, the value, the rule and the
remedy."""


class LoraSearchError(Exception):
    """The sweep cannot continue; the message says why and what to do. Exit code 1."""

    exit_code = 1


class InputError(LoraSearchError):
    """The user's input is wrong: a setting, a path, a row of data. Exit code 2."""

    exit_code = 2


class ConfigError(InputError):
    """A setting breaks a rule, e.g. ``ConfigError("optim.lr", -1, "must be > 0", "Try 2e-4")``."""

    def __init__(self, key: str, value: object, rule: str, remedy: str = "") -> None:
        self.key, self.value, self.rule, self.remedy = key, value, rule, remedy
        message = f"{key}: {rule}, got {value!r}."
        super().__init__(f"{message} {remedy}" if remedy else message)


class DataError(InputError):
    """A data file cannot be used as is."""


class ModelError(InputError):
    """The base model cannot be loaded, or cannot carry the adapters asked for."""


class StudyError(LoraSearchError):
    """The study cannot be used or continued, e.g. after too many failed trials in a row."""


class DatabaseError(StudyError):
    """The study's database does not answer, or answers with an error."""


class MetricError(StudyError):
    """The user's metric fails on an answer, or its score is not a number."""


class DoesNotFitError(LoraSearchError):
    """Memory ran out with the smallest possible pass."""


class WriteError(LoraSearchError):
    """The disk cannot be written: full, over quota, read-only."""

    def __init__(self, path: object, cause: str) -> None:
        super().__init__(
            f"runs_dir: {path} cannot be written: {cause}. Existing files are unchanged: make room, then run "
            "the same command again."
        )


class FingerprintError(StudyError):
    """The study was made with other settings. This is wrong input, hence exit code 2."""

    exit_code = 2
