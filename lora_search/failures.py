"""An exception as text for the study. docs/failures.md has the table of failures and their consequences."""

import traceback
from pathlib import Path

from lora_search.settings.secrets import redact

PACKAGE = Path(__file__).parent
MAX_MESSAGE = 300  # characters of an exception's message to store


def failure_reason(error: BaseException) -> str:
    """Return exception type, message and place: the last line of our code in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    message = " ".join(redact(str(error)).split())[:MAX_MESSAGE]
    place = (ours or frames)[-1:]
    where = "".join(f" (in {Path(f.filename).name}, {f.name}, line {f.lineno})" for f in place)
    return f"{type(error).__name__}: {message}{where}"


def first_line(error: BaseException) -> str:
    """Return the first line of the exception's message, or its type."""
    return redact((str(error).strip().splitlines() or [type(error).__name__])[0])
