"""What goes wrong in a sweep, and what then happens. `engine` finds out whose fault it was, `worker` decides.

| cause | trial | stored reason | the sweep |
|---|---|---|---|
| exception in one trial: admission, pass, step, evaluation, export | FAIL | exception, message, place | goes on; another trial takes the slot |
| exception in a shared pass | whoever fails alone: FAIL | the same | gradients discarded, the same rows again slot by slot |
| out of memory in a pass | goes on | none: a log line | halves the passes, the same rows again |
| out of memory with one row alone | FAIL | key, longest row, remedy | goes on where other trials fit |
| loss or gradient not finite | PRUNED | diverged, at which step | goes on; counts as a failure in a row |
| checkpoint damaged | goes on from the one before, or anew | attribute `recovery` | goes on |
| worker killed, hung or gone | WAITING, at most 3 times, then FAIL | its worker died | whoever claims it resumes its checkpoint |
| a point put in line that the space does not hold | FAIL | outside the space: key, value, range | goes on |
| parameters of a trial changed by another program | FAIL | the same in words | goes on |
| trials or the study deleted in the database | as they are | none | ends with one message, exit 1 |
| SQLite file deleted or replaced | as they are | none | saves what it held beside it; ends with one message, exit 1 |
| trial taken over after a silence | stays the other worker's | none | this worker lets it go, unreported |
| failures in a row >= study.max_failures_in_a_row | as above | as above | ends with the last reason, exit 1 |
| device lost (CUDA error) | WAITING | interrupted | ends with one message, exit 1 |
| disk full | WAITING | interrupted | ends with one message, exit 1; no good file is replaced |
| database gone for a while, or silent for 10 s | goes on | none | trains on; measurements wait in the outbox, in order |
| database gone for study.patience_seconds | WAITING once it is back | its worker died | ends with one message, exit 1 |
| report or best adapter cannot be written | is done | none | shows the leaderboard, one message, exit 1; the same command writes them |
| W&B fails, after its first run was opened | goes on | none: a log line | goes on, with the number of failed calls at its end |
| W&B's offline files cannot be written | goes on | none: a log line | goes on, with the number of files that are not whole at its end |
| SIGINT, SIGTERM | WAITING | interrupted | ends after the pass, exit 130; the second one at once |

A trial that is WAITING keeps number, parameters, reports and checkpoint; the same command goes on with it.
"""  # noqa: E501 (a table has long rows)

import traceback
from pathlib import Path

from lora_search.settings.secrets import redact

PACKAGE = Path(__file__).parent
MAX_MESSAGE = 300  # characters of an exception's message that are stored


def failure_reason(error: BaseException) -> str:
    """Return exception type, message and place: the last line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    message = " ".join(redact(str(error)).split())[:MAX_MESSAGE]
    place = (ours or frames)[-1:]
    where = "".join(f" (in {Path(f.filename).name}, {f.name}, line {f.lineno})" for f in place)
    return f"{type(error).__name__}: {message}{where}"


def first_line(error: BaseException) -> str:
    """Return what the exception says first, or else its type."""
    return redact((str(error).strip().splitlines() or [type(error).__name__])[0])
