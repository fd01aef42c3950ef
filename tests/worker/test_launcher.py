"""launcher=local: the parts with small real processes, and the whole with workers that train a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lora_search.errors import ConfigError, InputError, LoraSearchError
from lora_search.ops.cores import num_cores
from lora_search.settings.schema import EngineConfig, LauncherConfig, StudyConfig, SweepConfig
from lora_search.study.view import StudyView
from lora_search.worker.command import Command, Letter, typed_command
from lora_search.worker.launcher import local_team, plan_workers
from lora_search.worker.on_ray import RayTeam
from lora_search.worker.on_slurm import make_executor
from lora_search.worker.seat import make_order, sweep_files
from lora_search.worker.team import Team, Worker, error_file
from tests.servers import postgres_url

ROOT = Path(__file__).parents[2]
TYPED = "python -m lora_search.sweep"
SECRET = "postgresql+psycopg://u:hunter2@h/db"
SQLITE = "sqlite:///runs/a.db"
SMOKE = (
    "-cn",
    "smoke",
    "engine.device=cpu",
    "launcher=local",
    "launcher.workers=2",
    "study.heartbeat_seconds=1",
)
LONG = ("train.epochs=8", "pruner=none", "optim.lr=5e-3")


def make_config(
    device: str = "auto",
    workers: int | None = None,
    storage: str = SECRET,
    devices: int = 1,
    launcher: str = "local",
) -> SweepConfig:
    return SweepConfig(
        engine=EngineConfig(device=device, devices_per_worker=devices),
        launcher=LauncherConfig(name=launcher, workers=workers),
        study=StudyConfig(storage=storage),
    )


def test_each_visible_gpu_gets_one_worker_of_its_own() -> None:
    plans = plan_workers(make_config(), 3, {"PATH": "/bin"})
    chosen = plan_workers(make_config("cuda", 2), 2, {"CUDA_VISIBLE_DEVICES": "5,GPU-ab12"})

    assert [plan["CUDA_VISIBLE_DEVICES"] for plan in plans] == ["0", "1", "2"]
    assert [plan["CUDA_VISIBLE_DEVICES"] for plan in chosen] == ["5", "GPU-ab12"]
    assert {plan["PATH"] for plan in plans} == {"/bin"}


def test_workers_with_several_devices_have_none_in_common() -> None:
    plans = plan_workers(make_config(devices=2), 5, {})
    chosen = plan_workers(make_config(workers=1, devices=2), 4, {"CUDA_VISIBLE_DEVICES": "7,GPU-ab12,3,1"})

    assert [plan["CUDA_VISIBLE_DEVICES"] for plan in plans] == ["0,1", "2,3"]
    assert [plan["CUDA_VISIBLE_DEVICES"] for plan in chosen] == ["7,GPU-ab12"]
    team = local_team(
        make_config(devices=2), Command(sweep="a", config_dir=None, overrides=()), plans, 5, Path()
    )
    assert team.places == "2 on 2 GPUs each"


class FakeRay:
    """A cluster's size, as Ray says it."""

    def __init__(self, *gpus: int) -> None:
        self._nodes = [{"Alive": True, "Resources": {"GPU": float(n), "CPU": 8.0}} for n in gpus]

    def nodes(self) -> list[dict[str, object]]:
        return self._nodes

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": sum(node["Resources"]["GPU"] for node in self._nodes)}


def test_a_seat_on_ray_asks_for_all_devices_of_its_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(4, 2))
    order = make_order(Command(sweep="smoke", config_dir=None, overrides=()), 0, {})

    options = RayTeam(make_config(devices=4, launcher="ray"), order, tmp_path)._placement()

    assert options["num_gpus"] == 4
    with pytest.raises(
        ConfigError, match="devices_per_worker: must be at most 4, the GPUs of the .* largest node, got 5"
    ):
        RayTeam(make_config(devices=5, launcher="ray"), order, tmp_path)._placement()
    monkeypatch.setitem(sys.modules, "ray", FakeRay(0))
    with pytest.raises(ConfigError, match="devices_per_worker: needs GPUs, and the cluster has none, got 2"):
        RayTeam(make_config(devices=2, launcher="ray"), order, tmp_path)._placement()


@pytest.mark.parametrize(
    ("free", "devices", "share", "seats"),
    [
        ([{"GPU": 3.0, "CPU": 8.0}, {"GPU": 3.0, "CPU": 8.0}], 2, None, 2),
        ([{"GPU": 4.0, "CPU": 8.0}, {"CPU": 64.0}, {"GPU": 1.0, "CPU": 8.0}], 2, None, 2),
        ([{"GPU": 4.0, "CPU": 1.0}, {"GPU": 1.0, "CPU": 9.0}], 1, None, 2),  # no cores for the other three
        ([{"GPU": 2.0, "CPU": 8.0}], 1, 0.6, 2),  # Ray has a share of one GPU, never of two
        ([{"GPU": 1.0, "CPU": 64.0}], 1, 0.1, 10),
    ],
)
def test_ray_is_asked_for_the_seats_that_its_nodes_hold(
    free: list[dict[str, float]], devices: int, share: float | None, seats: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    state = SimpleNamespace(available_resources_per_node=lambda: dict(enumerate(free)))
    monkeypatch.setitem(sys.modules, "ray", FakeRay(4))
    monkeypatch.setitem(sys.modules, "ray._private.state", state)
    order = make_order(Command(sweep="smoke", config_dir=None, overrides=()), 0, {})
    config = make_config(devices=devices, launcher="ray")
    config.launcher.gpus_per_worker = share

    assert RayTeam(config, order, tmp_path)._room() == seats


class FakeSubmitit:
    """Keeps what jobs are asked for."""

    def __init__(self) -> None:
        self.asked: dict[str, object] = {}

    def AutoExecutor(self, **_: object) -> "FakeSubmitit":  # noqa: N802 (submitit's name)
        return self

    def update_parameters(self, **asked: object) -> None:
        self.asked = asked


def test_a_slurm_job_asks_for_all_devices_of_its_worker(tmp_path: Path) -> None:
    executors = [
        make_executor(FakeSubmitit(), make_config(devices=count, launcher="slurm"), tmp_path)
        for count in (1, 4)
    ]

    assert [executor.asked["gpus_per_node"] for executor in executors] == [1, 4]


@pytest.mark.wrong_input
def test_devices_that_a_worker_cannot_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="devices_per_worker: must be at most 3, the visible GPUs, got 4"):
        plan_workers(make_config(devices=4), 3, {})
    with pytest.raises(
        ConfigError, match="devices_per_worker: needs GPUs, and torch sees none, got 2. Lower"
    ):
        plan_workers(make_config(devices=2), 0, {})
    with pytest.raises(ConfigError, match=r"workers: must be at most 2, .* by 2, got 3. Lower it$"):
        plan_workers(make_config(workers=3, devices=2), 5, {})
    with pytest.raises(ConfigError, match="devices_per_worker: must be 1 with engine.device=cpu"):
        EngineConfig(device="cpu", devices_per_worker=2)
    with pytest.raises(ConfigError, match="devices_per_worker: must be 1 with engine.device=cuda:1"):
        EngineConfig(device="cuda:1", devices_per_worker=2)
    engine, launcher = EngineConfig(devices_per_worker=2), LauncherConfig(name="ray", gpus_per_worker=1)
    with pytest.raises(ConfigError, match="gpus_per_worker: must be engine.devices_per_worker=2, got 1"):
        SweepConfig(engine=engine, launcher=launcher)


def test_without_a_gpu_the_workers_share_out_the_cores_unless_told_otherwise() -> None:
    (alone,) = plan_workers(make_config("cpu"), 0, {})
    shared = plan_workers(make_config("cpu", 2), 0, {})
    told = plan_workers(make_config("cpu", 2), 0, {"OMP_NUM_THREADS": "7"})

    assert alone["OMP_NUM_THREADS"] == str(num_cores())
    assert [plan["OMP_NUM_THREADS"] for plan in shared] == [str(max(1, num_cores() // 2))] * 2
    assert [plan["OMP_NUM_THREADS"] for plan in told] == ["7"] * 2
    assert all("CUDA_VISIBLE_DEVICES" not in plan for plan in shared)


def test_more_workers_than_gpus_and_a_device_for_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="launcher.workers: must be at most 2, the visible GPUs, got 3"):
        plan_workers(make_config(workers=3), 2, {})
    with pytest.raises(ConfigError, match="engine.device: must be auto, cpu or cuda with launcher=local"):
        plan_workers(make_config("cuda:1"), 2, {})
    with pytest.raises(
        ConfigError, match="launcher.workers: is for launcher=local or ray or slurm only, got 2"
    ):
        LauncherConfig(workers=2)


def test_more_workers_than_sqlite_can_hold_are_refused_and_a_server_takes_them() -> None:
    many = make_config("cpu", 9, storage=SQLITE)
    with pytest.raises(
        ConfigError, match=r"launcher.workers: must be at most 8 with SQLite, .*, got 9. .*postgres"
    ):
        plan_workers(many, 0, {})
    with pytest.raises(ConfigError, match="launcher.workers: must be at most 8 with SQLite"):
        plan_workers(make_config(storage=SQLITE), 16, {})
    many.study.storage = SECRET

    assert len(plan_workers(many, 0, {})) == 9


def test_a_workers_command_line_holds_no_setting_and_its_letter_holds_all_in_order() -> None:
    own = ("lora.r=8", f"study.storage={SECRET}", "++study.storage='mysql://u:hunter2@h/d'")
    command = Command(sweep="smoke", config_dir="/mine", overrides=own)

    line = command.for_worker(3)

    assert line[3:] == ["-cn", "smoke", "-cd", "/mine", "launcher.worker=3"]
    assert json.loads(command.letter(Path("/e")))["overrides"] == [*own]


def test_what_the_launcher_adds_is_no_part_of_the_command_that_a_study_remembers() -> None:
    typed = typed_command(["sweep.py", "-cn", "smoke", "lora.r=8"])

    assert typed == f"{TYPED} -cn smoke lora.r=8"
    line = ["sweep.py", "-cn", "smoke", "launcher.worker=0"]
    assert typed_command(line, Letter(typed=typed)) == typed


def test_sweeps_and_groups_are_sent_to_workers_elsewhere_and_what_lies_deeper_is_not(tmp_path: Path) -> None:
    for name in ("mine.yaml", "data/faq.yaml", "space/lora/wide.yaml", "runs/a/b/c.yaml", "data/faq.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a: 1")

    assert [*sweep_files(tmp_path)] == ["data/faq.yaml", "mine.yaml", "space/lora/wide.yaml"]

    (tmp_path / "data/large.yaml").write_text("x" * 150_000)
    with pytest.raises(InputError, match=r"-cd .*: has 4 YAML files of 0.2 MB, .*Give the sweeps a folder"):
        sweep_files(tmp_path)


def script(folder: Path, number: int, code: str, restarts: int = 1) -> Worker:
    """A worker that is a small program: `log` names its log file, `start` counts its starts from 1."""
    log = folder / f"{number}.log"
    head = (
        f"import os, pathlib, signal, sys\nlog = pathlib.Path({str(log)!r})\n"
        "starts = log.with_suffix('.starts')\nstarts.open('a').write('x')\nstart = len(starts.read_text())\n"
    )
    return Worker([sys.executable, "-c", head + code], dict(os.environ), log, restarts)


def news_of(team: Team) -> list[str]:
    """Look after the workers until all have ended; return what happened."""
    news = []
    while team.is_at_work:
        news += team.look()
        time.sleep(0.01)
    return news


def test_a_worker_that_a_signal_killed_is_started_again_a_bounded_number_of_times(tmp_path: Path) -> None:
    die = "print('start', start, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    once = "if start == 1: os.kill(os.getpid(), signal.SIGSEGV)"
    with Team([script(tmp_path, 0, die, restarts=2), script(tmp_path, 1, once)]) as team:
        news = news_of(team)

    assert sorted(news) == [
        f"worker 0 killed by SIGKILL: see {tmp_path}/0.log",
        "worker 0 was killed by SIGKILL; restarted (0 more times)",
        "worker 0 was killed by SIGKILL; restarted (1 more times)",
        "worker 1 was killed by SIGSEGV; restarted (0 more times)",
    ]
    assert (tmp_path / "0.log").read_text() == "start 1\nstart 2\nstart 3\n"
    team.check_someone_finished()


def test_wrong_input_of_one_worker_ends_all_with_its_message(tmp_path: Path) -> None:
    wrong = "log.with_suffix('.error').write_text('lora.r: wrong'); sys.exit(2)"
    patient = "signal.pause()"
    workers = [script(tmp_path, 0, patient), script(tmp_path, 1, wrong)]

    with pytest.raises(InputError, match=r"^lora\.r: wrong$"), Team(workers) as team:
        news_of(team)

    assert workers[0].process.returncode == -signal.SIGTERM


def test_a_worker_that_fails_leaves_the_others_at_work_and_all_failing_is_an_error(tmp_path: Path) -> None:
    fail = "log.with_suffix('.error').write_text('out of memory'); sys.exit(1)"
    with Team([script(tmp_path, 0, fail), script(tmp_path, 1, "")]) as team:
        news = news_of(team)
    team.check_someone_finished()
    with Team([script(tmp_path, 0, fail)]) as lonely:
        news_of(lonely)

    assert news == ["worker 0 failed: out of memory"]
    with pytest.raises(LoraSearchError, match="every worker ended early; worker 0 failed: out of memory"):
        lonely.check_someone_finished()


def test_a_message_of_an_earlier_start_is_forgotten(tmp_path: Path) -> None:
    error_file(tmp_path / "0.log").write_text("of yesterday")
    with Team([script(tmp_path, 0, "")]) as team:
        news_of(team)

    assert not error_file(tmp_path / "0.log").exists()


def start_sweep(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}
    command = [sys.executable, "-m", "lora_search.sweep", *SMOKE, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)


def children_of(pid: int) -> dict[int, str]:
    """Return pid -> command line."""
    return {child.pid: " ".join(child.cmdline()) for child in psutil.Process(pid).children()}


def wait_until_trials_run(folder: Path, num_running: int) -> StudyView:
    config = StudyConfig(name="smoke", n_trials=8, storage=f"sqlite:///{folder}/runs/lora_search.db")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (folder / "runs/smoke/trials").is_dir():
            view = StudyView(config)
            if view.summary().running >= num_running:
                return view
        time.sleep(0.1)
    raise AssertionError([log.read_text() for log in folder.glob("runs/smoke/workers/*.log")])


def states(view: StudyView) -> set[str]:
    return {row.state for row in view.rows()}


@pytest.fixture
def postgres() -> Iterator[str]:
    with postgres_url() as url:
        yield url


@pytest.mark.slow
def test_two_workers_share_a_postgresql_and_the_password_stands_on_no_workers_command_line(
    tmp_path: Path, postgres: str
) -> None:
    arguments = (f"study.storage='{postgres}'", "tracker=wandb_offline")
    with start_sweep(tmp_path, *arguments) as process:
        assert process.stdout is not None
        head = next(line for line in process.stdout if "workers:" in line)
        lines = children_of(process.pid)
        output = head + process.stdout.read()

    view = StudyView(StudyConfig(name="smoke", n_trials=8, storage=postgres))
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert process.returncode == 0, output
    assert "workers: 2 on the CPU" in head
    assert sum("launcher.worker=" in line for line in lines.values()) == 2
    assert states(view) <= {"COMPLETE", "PRUNED"}
    assert view.summary().finished == 8
    assert output.count("Leaderboard") == output.count("Next:") == 1
    assert (tmp_path / "runs/smoke/report.html").is_file()
    assert (tmp_path / "runs/smoke/best/adapter/adapter_config.json").is_file()
    assert len(list(tmp_path.glob("runs/smoke/workers/*.log"))) == 2
    attributes = view.attributes()
    assert attributes["command"].endswith("tracker=wandb_offline")
    assert attributes["setting/sweep.launcher.worker"] == "None"
    assert len(written) > 20
    hidden = [
        *(line.encode() for line in lines.values()),
        *written,
        str(attributes).encode(),
        output.encode(),
    ]
    assert not any(b"hunter2" in text for text in hidden)


@pytest.mark.slow
def test_what_is_wrong_for_every_worker_is_said_once(tmp_path: Path) -> None:
    with start_sweep(tmp_path, "lora.target_modules=[query]") as process:
        assert process.stdout is not None
        output = process.stdout.read()

    assert process.returncode == 2
    assert output.count("the model has no layer 'query'") == 1
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []  # nothing was written


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_an_interrupt_reaches_all(tmp_path: Path) -> None:
    with start_sweep(tmp_path, *LONG) as process:
        view = wait_until_trials_run(tmp_path, 8)
        victim, survivor = sorted(children_of(process.pid))
        os.kill(victim, signal.SIGKILL)
        assert process.stdout is not None
        next(line for line in process.stdout if "was killed by SIGKILL; restarted" in line)
        replaced = children_of(process.pid)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()

    assert victim not in replaced
    assert survivor in replaced
    assert process.returncode == 130
    assert "nothing is lost" in rest
    assert states(view) & {"RUNNING", "FAIL"} == set()
    assert not any(Path(f"/proc/{pid}").exists() for pid in replaced)


@pytest.mark.slow
def test_workers_whose_parent_was_killed_hand_back_their_trials_and_one_alone_goes_on(tmp_path: Path) -> None:
    with start_sweep(tmp_path, *LONG) as process:
        view = wait_until_trials_run(tmp_path, 8)
        workers = children_of(process.pid)
        process.kill()
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    between = states(view)
    alone = [sys.executable, "-m", "lora_search.sweep", "-cn", "smoke", "engine.device=cpu", *LONG]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(alone, stdout=subprocess.DEVNULL, cwd=tmp_path, env=environment, check=True)

    assert len(workers) == 2
    assert between & {"RUNNING", "FAIL"} == set()
    assert [row.state for row in view.rows()] == ["COMPLETE"] * 8


def is_alive(pid: int) -> bool:
    """Return whether the process runs; one that nobody has asked for its exit code does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
