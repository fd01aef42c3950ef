"""How far a long loop is: nothing for two seconds; from then on a bar in a terminal, elsewhere a line now and
then."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora_search.results.formatting import show_count, show_seconds

QUIET_SECONDS = 2.0
BAR_SECONDS = 0.2  # the bar is drawn at most so often
LINE_SECONDS = 30.0  # and a plain line printed at most so often
CHECKED = 64  # items between two looks at the clock


@dataclass
class Bar:
    """One loop's progress. ``say`` prints a line that stays."""

    console: Console
    say: Callable[[str], None]
    clock: Callable[[], float]
    doing: str
    total: int | None
    _live: Live | None = None

    def __post_init__(self) -> None:
        self._began = self.clock()
        self._next = self._began + QUIET_SECONDS

    def show(self, done: int) -> None:
        """Say that so many items are done. Cheap enough for every item."""
        if done % CHECKED or (now := self.clock()) < self._next:
            return
        if not self.console.is_interactive:
            self._next = now + LINE_SECONDS
            self.say(self._text(done, now - self._began))
            return
        self._next = now + BAR_SECONDS
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(self._row(done, now - self._began), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _text(self, done: int, seconds: float) -> str:
        if self.total is None or not done:
            return f"{self.doing}: {show_count(done)}"
        left = show_seconds(seconds * (self.total - done) / done)
        return f"{self.doing}: {show_count(done)} of {show_count(self.total)}, about {left} left"

    def _row(self, done: int, seconds: float) -> Table:
        row = Table.grid(expand=True, padding=(0, 2, 0, 0))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        bar = ProgressBar(total=self.total, completed=done, pulse=self.total is None, complete_style="cyan")
        row.add_row(Text(self._text(done, seconds)), bar)
        return row
