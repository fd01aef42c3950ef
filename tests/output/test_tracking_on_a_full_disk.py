"""W&B's offline files when the disk refuses them: for real, by a limit on the size of files."""

from pathlib import Path

import pytest

from lora_search.output.tracking import is_whole, make_tracker
from tests.output.test_tracking import BLOCK_BYTES, make_run, measure, run_program, settings, wandb_files


@pytest.mark.parametrize("whose", ["service", "service and our own"])
def test_files_that_the_disk_refuses_are_one_line_at_the_end(tmp_path: Path, whose: str) -> None:
    code = f"""
import logging, resource
logging.basicConfig(format="%(message)s")
tracker = make_tracker(settings(), {{}})
tracker.start(make_run(Path({str(tmp_path)!r}), 0))
for pid in (service(), os.getpid())[: len({whose!r}.split(" and "))]:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (3000, 3000))
for rung in range(1, 50):
    tracker.log(measure(0, rung, 9.5))
tracker.finish(0, "COMPLETE", "")
tracker.start(make_run(Path({str(tmp_path)!r}), 1))
tracker.finish(1, "PRUNED", "")
tracker.close()
print("trained to the end")
"""
    done = run_program(code)

    *before, last = done.stderr.splitlines()
    (path,) = wandb_files(tmp_path, 0)
    assert (done.returncode, done.stdout) == (0, "trained to the end\n")
    assert path.stat().st_size == 3000
    assert f"1 run files are not whole, the first is {path}; the study and the report are complete." in last
    assert len(before) <= 1, done.stderr


def test_a_finished_run_is_whole_and_a_cut_one_is_not(tmp_path: Path) -> None:
    tracker = make_tracker(settings(), {})
    tracker.start(make_run(tmp_path))
    for rung in range(1, 300):  # several blocks
        tracker.log(measure(0, rung, 9.5))
    tracker.close()

    (path,) = wandb_files(tmp_path, 0)
    raw = path.read_bytes()
    cuts = [len(raw) - 1, len(raw) // 2, 2 * BLOCK_BYTES, BLOCK_BYTES, 7, 0]
    assert len(raw) > 3 * BLOCK_BYTES
    assert is_whole(path)
    for cut in cuts:
        path.write_bytes(raw[:cut])
        assert not is_whole(path), cut
