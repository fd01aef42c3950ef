"""How many cores a process has, whatever kind of control group limits it."""

import os
from pathlib import Path

import pytest

from lora_search.ops.cores import notes_on_cores, num_cores, quotas

V2, V1 = "0::{path}\n", "4:memory:/\n1:cpu,cpuacct:{path}\n0::/\n"


def found_in(tmp_path: Path, listed: str, files: dict[str, str]) -> list[float]:
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(listed)
    return list(quotas(tmp_path / "own", tmp_path / "groups"))


@pytest.mark.parametrize(
    ("listed", "files", "found"),
    [
        (V2.format(path="/"), {"cpu.max": "200000 100000\n"}, [2.0]),
        (V2.format(path="/"), {"cpu.max": "max 100000\n"}, []),
        (V2.format(path="/../docker/1"), {"cpu.max": "150000 100000\n"}, [1.5]),  # as seen from inside
        (V2.format(path="/a/b"), {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, [0.5]),
        (V1.format(path="/docker/1"), {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                                       "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, [4.0]),
        (V1.format(path="/"), {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                               "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, []),
        (V2.format(path="/"), {}, []),
        ("junk\n\n0::nowhere\n" + V2.format(path="/"), {"cpu.max": "200000 100000\n"}, [2.0]),
    ],
)  # fmt: skip
def test_a_control_group_limits_the_cores(
    tmp_path: Path, listed: str, files: dict[str, str], found: list[float]
) -> None:
    assert found_in(tmp_path, listed, files) == found


def test_a_system_without_control_groups_limits_nothing(tmp_path: Path) -> None:
    assert list(quotas(tmp_path / "none", tmp_path)) == []


def test_a_process_has_at_least_one_core_and_at_most_those_it_may_run_on() -> None:
    assert 1 <= num_cores() <= len(os.sched_getaffinity(0))


def test_a_busy_machine_is_named_unless_the_threads_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0 * cores, 1.0, 1.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert notes_on_cores() == []
    monkeypatch.delenv("OMP_NUM_THREADS")

    assert f"{7 * cores} programs compete for its {cores} cores" in notes_on_cores()[0]
    monkeypatch.setattr(os, "getloadavg", lambda: (1.9 * cores, 9.0, 9.0))
    assert notes_on_cores() == []
