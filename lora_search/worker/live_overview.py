"""The progress of all workers on one screen, read from the database at intervals."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.errors import ConfigError, LoraSearchError
from lora_search.output.terminal import Progress
from lora_search.results.formatting import show_perplexity
from lora_search.settings.schema import StudyConfig

if TYPE_CHECKING:
    from lora_search.study.view import StudyView

ENDS = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}


class Overview:
    """The state of the view. Without ``tells_ends`` the workers' own lines say which trials have ended."""

    def __init__(self, config: StudyConfig, progress: Progress, folder: Path, *, tells_ends: bool) -> None:
        self.config, self.progress, self._folder = config, progress, folder
        self._tells_ends = tells_ends
        self._view: StudyView | None = None
        self._states: dict[int, str] = {}
        self._tokens, self._started = 0, 0.0

    def show(self) -> None:
        """Show the progress of the study and the trials that ended since the last call. If the database does
        not answer, the workers decide what to do; here it only delays the display."""
        try:
            if self._view is None:
                self._open()
            else:
                self._show(self._view)
        except ConfigError:
            self.progress.wait("waiting for the workers to create the study")
        except LoraSearchError as error:
            self.progress.wait(str(error))

    def _open(self) -> None:
        from lora_search.study.view import StudyView  # the sweep's first line does not wait for the database

        view = StudyView(self.config)
        self.progress.log.open(self._folder)
        rows = view.rows()
        self._states = {row.number: row.state for row in rows}
        self._tokens, self._started = sum(row.train_tokens for row in rows), time.monotonic()
        self._view = view

    def _show(self, view: "StudyView") -> None:
        rows = view.rows()
        for row in rows:
            if self._tells_ends and row.state in ENDS and self._states.get(row.number) != row.state:
                text = (
                    f"trial {row.number} {ENDS[row.state]}: best perplexity {show_perplexity(row.perplexity)}"
                )
                self.progress.event(f"{text} {row.reason}".rstrip())
        self._states = {row.number: row.state for row in rows}
        tokens = sum(row.train_tokens for row in rows) - self._tokens
        seconds = max(1e-3, time.monotonic() - self._started)
        summary = view.summary()
        if summary.n_trials and summary.finished >= summary.n_trials and {*self._states.values()} <= {*ENDS}:
            self.progress.wait("all trials have ended; the last worker answers the sample questions")
        self.progress.update(view.slots(), summary, tokens / seconds)
