"""What users may see instead of a traceback: one message that names the key, the value, the rule and the
remedy."""


class LoraSearchError(Exception):
    """The sweep cannot go on; the message says why and what to do. Exit code 1."""

    exit_code = 1


class InputError(LoraSearchError):
    """Something the user gave is wrong: a setting, a path, a row of data. Exit code 2."""

    exit_code = 2


class ConfigError(InputError):
    """A setting breaks a rule, e.g. ``ConfigError("optim.lr", -1, "must be > 0", "Try 2e-4")``."""

    def __init__(self, key: str, value: object, rule: str, remedy: str = "") -> None:
        self.key, self.value, self.rule, self.remedy = key, value, rule, remedy
        message = f"{key}: {rule}, got {value!r}."
        super().__init__(f"{message} {remedy}" if remedy else message)


class DataError(InputError):
    """A data file cannot be used as it is."""


class ModelError(InputError):
    """The base model cannot be loaded, or cannot carry the adapters asked for."""


class StudyError(LoraSearchError):
    """The study refuses: other settings under the same name, or too many failed trials in a row."""


class DatabaseError(StudyError):
    """The database behind the study does not answer, or answers with an error."""


class DoesNotFitError(LoraSearchError):
    """Memory ran out with the smallest piece of work there is."""


class WriteError(LoraSearchError):
    """The disk takes no more: full, over quota, read-only."""

    def __init__(self, path: object, cause: str) -> None:
        super().__init__(
            f"runs_dir: {path} cannot be written: {cause}. Nothing that was there is lost: make room, "
            "then the same command goes on."
        )


class FingerprintError(StudyError):
    """The same study name was used with other settings; wrong input, hence exit code 2."""

    exit_code = 2
