"""The default sweep in a process of its own, from when engine and study are set up: prints JSON. Argument:
the pruner.

Knows how much of its time went into passes, optimizer steps and evaluation; all else (study, tracking,
packing, checkpoints, adapters, console) is what it costs to be a sweep.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lora_search.data.preparation import prepare
from lora_search.engine.build import Room, build_engine
from lora_search.engine.engine import Engine
from lora_search.model.loading import load_base, load_tokenizer, resolve_model
from lora_search.output.terminal import Progress
from lora_search.output.tracking import make_tracker
from lora_search.reading.load import load_rows
from lora_search.settings.composition import compose
from lora_search.settings.schema import StudyConfig
from lora_search.settings.space import parse_space
from lora_search.study.study import SweepStudy
from lora_search.trial import RowScores
from lora_search.worker.worker import work

T = TypeVar("T")


class TimedEngine(Engine):
    busy_seconds = 0.0

    def _timed(self, act: Callable[..., T], *arguments: Any) -> T:
        start = time.perf_counter()
        result = act(*arguments)
        self.busy_seconds += time.perf_counter() - start
        return result

    def _forward_backward(self, *arguments: Any) -> bool:
        return self._timed(super()._forward_backward, *arguments)

    def _step(self, *arguments: Any) -> bool:
        return self._timed(super()._step, *arguments)

    def scores(self, *arguments: Any) -> list[RowScores]:
        return self._timed(super().scores, *arguments)


def sweep(pruner: str, folder: Path) -> dict[str, float]:
    name = f"bench-{pruner}"
    config = compose("construction_faq", [f"pruner={pruner}", f"runs_dir={folder}"])
    config.study = StudyConfig(
        name=name, n_trials=config.study.n_trials, storage=f"sqlite:///{folder}/bench.db"
    )
    space, tracker = parse_space(config), make_tracker(config, {})
    source = resolve_model(config.model)
    splits = prepare(config, load_rows(config.data), load_tokenizer(source, config.model))
    base = load_base(source, config.model, config.engine)
    engine, _ = build_engine(config, Room.of_space(config, space), base, splits, {})
    engine.__class__ = TimedEngine
    assert isinstance(engine, TimedEngine)
    study = SweepStudy.open(config, space, {"bench": pruner}, {}, folder / name)
    start = time.perf_counter()
    with Progress() as progress:
        work(study, engine, tracker, progress)
    seconds, rows = time.perf_counter() - start, study.rows()
    train, validation = (
        sum(len(row.input_ids) for row in part) for part in (splits.train, splits.validation)
    )
    rungs = config.train.epochs * config.train.evals_per_epoch
    return {
        "seconds": seconds,
        "busy": engine.busy_seconds,
        "pruned": sum(row.state == "PRUNED" for row in rows),
        "best": min(row.perplexity for row in rows if row.state == "COMPLETE" and row.perplexity),
        "full_train_tokens": len(rows) * config.train.epochs * train,  # what all trials take without pruning
        "full_validation_tokens": len(rows) * rungs * validation,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(sweep(sys.argv[1], Path(folder))))  # noqa: T201 (its result)


if __name__ == "__main__":
    main()
