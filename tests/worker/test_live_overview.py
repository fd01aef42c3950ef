"""What the parent of many workers shows."""

import io
from pathlib import Path

from rich.console import Console

from lora_search.output import terminal
from lora_search.output.terminal import Progress
from lora_search.worker.live_overview import Overview
from tests.study.test_study import make_config, open_study, simulate


def test_it_says_what_the_workers_do_once_all_trials_have_ended(tmp_path: Path) -> None:
    config, lines, now = make_config(tmp_path, n_trials=4), io.StringIO(), [0.0]
    study = open_study(config, tmp_path)
    progress = Progress(Console(file=lines, width=200), clock=lambda: now[0])
    overview = Overview(config.study, progress, tmp_path, tells_ends=True)
    for end in (lambda: None, lambda: simulate(study), lambda: None):
        end()
        now[0] += terminal.LINE_SECONDS
        overview.show()

    assert "all trials have ended; the last worker answers" in lines.getvalue()
    assert lines.getvalue().count("4/4 trials") == 0
