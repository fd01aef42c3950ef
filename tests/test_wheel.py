"""The package as it is installed: a wheel, in an environment of its own, far from the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_CHECKOUT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_carries_every_sweep_config_group_and_the_page(wheel: Path) -> None:
    settings = [path for folder in ("conf", "sweeps") for path in (ROOT / folder).rglob("*.yaml")]

    packed = set(ZipFile(wheel).namelist())

    assert len(settings) > 20
    assert {f"lora_search/{path.relative_to(ROOT)}" for path in settings} <= packed
    assert "lora_search/page/page.html.j2" in packed


@pytest.mark.slow
def test_an_installed_wheel_runs_the_smoke_sweep_outside_the_checkout(tmp_path: Path, wheel: Path) -> None:
    venv.create(tmp_path / "venv")
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(packages)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    # The libraries of this environment; an editable install in it stays out, since its own .pth is not read.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    python, where = str(tmp_path / "venv/bin/python"), "import lora_search; print(lora_search.__path__[0])"

    place = subprocess.run(
        [python, "-c", where], cwd=tmp_path, env=WITHOUT_CHECKOUT, capture_output=True, text=True, check=True
    )
    done = subprocess.run(
        [python, "-m", "lora_search.sweep", "-cn", "smoke", "engine.device=cpu", "study.n_trials=2"],
        cwd=tmp_path, env=WITHOUT_CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert place.stdout.strip() == str(packages / "lora_search")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Leaderboard" in (tmp_path / "runs/smoke/report.html").read_text()
