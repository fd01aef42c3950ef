"""Imports between rooms go downwards only, no two modules import each other, each library has one home, and
the README draws the tree as it is."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_search"
FLOORS = [  # from the ground up; a room, or a module that stands in no room
    {"__init__", "trial", "errors", "watching"},
    {"settings"},
    {"ops", "files", "failures", "reading"},
    {"model", "data", "database", "search"},
    {"study"},
    {"engine", "results"},
    {"page"},
    {"output"},
    {"worker"},
    {"prepare", "inspection"},
    {"training"},
    {"service"},
    {"command_line"},
    {
        "sweep",
        "plan",
        "inspect",
        "score",
        "confirm",
        "export",
        "final",
        "generate",
        "status",
        "delete",
        "report",
    },
    {"list"},
    {"cli"},
]
LARGEST_ROOM, MOST_LINES = 15, 350
HOMES = {  # library -> the rooms or modules that may import it
    "wandb": {"output.tracking", "output.tracking_study"},
    "optuna_dashboard": {"output.dashboard_note"},
    "optuna": {
        "settings.grammar",
        "settings.space",
        "settings.range_ends",
        "search",
        "study",
        "database",
        "output.dashboard_note",
    },
    "sqlalchemy": {"database"},
    "alembic": {"database.tables"},
    "hydra": {"settings.composition", "settings.explanations", "settings.grammar", "sweep"},
    "omegaconf": {"settings.composition", "settings.explanations", "settings.sweep_file"},
    "yaml": {"settings.composition", "settings.sweep_file"},
    "datasets": {"reading.hub", "data.store"},
    "charset_normalizer": {"reading.encodings"},
    "openpyxl": {"reading.files"},
    "pyarrow": {"reading.files", "data.store"},
    "peft": {"files.peft"},
    "fsspec": {"files.place"},
    "filelock": {"files.lock"},
    "scipy": {"service.comparisons"},
    "rouge_score": {"service.answer_metrics"},
    "sacrebleu": {"service.answer_metrics"},
    "rich": {
        "inspection",
        "output.progress_bar",
        "output.terminal",
        "output.leaderboard",
        "output.status_text",
        "output.slot_table",
    },
    "gguf": {"model.checks"},
    "triton": {"ops.lora_kernels"},
    "accelerate": {"model.placement"},
    "jinja2": {"page.report", "data.templates"},
    "torch": {
        "ops",
        "files.checkpoint",
        "files.peft",
        "files.tensors",
        "model",
        "engine",
        "search.freeze_thaw",  # a Gaussian process is fitted by gradients; see the test of its imports
        "service.export_check",
        "service.plain_peft",
    },
}


def modules() -> dict[str, Path]:
    """Return dotted name below the package -> file."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}
    return {name: path for name, path in names.items() if not name.endswith(".__init__")}


def imports() -> dict[str, set[str]]:
    """Return module -> what it imports, also inside functions."""
    found = {}
    for name, path in modules().items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module)
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
        found[name] = imported
    return found


def own_imports() -> dict[str, set[str]]:
    """Return module -> the modules of this package that it imports."""
    prefix = "lora_search."
    return {
        name: {other.removeprefix(prefix) for other in imported if other.startswith(prefix)}
        for name, imported in imports().items()
    }


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_floor_and_every_floor_its_modules() -> None:
    listed = [name for floor in FLOORS for name in floor]

    assert sorted(listed) == sorted({room(module) for module in modules()})
    assert len(modules()) > 70


def test_no_module_is_too_long_to_read_in_one_sitting() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in modules().items()}

    assert {module: count for module, count in lines.items() if count > MOST_LINES} == {}


def test_no_room_is_too_full_to_find_anything() -> None:
    sizes = {folder: len(list(folder.glob("*.py"))) - 1 for folder in PACKAGE.iterdir() if folder.is_dir()}

    assert max(sizes.values()) <= LARGEST_ROOM
    assert sum(size > 0 for size in sizes.values()) > 8


def test_imports_between_rooms_go_downwards_only() -> None:
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    arrows = [
        (module, other)
        for module, others in own_imports().items()
        for other in others
        if room(module) != room(other)
    ]

    assert [a for a in arrows if level[room(a[1])] >= level[room(a[0])]] == []
    assert len(arrows) > 150


def test_no_two_modules_import_each_other() -> None:
    assert len(list(TopologicalSorter(own_imports()).static_order())) >= len(modules())


def test_each_library_has_its_home() -> None:
    strays = [
        (module, name)
        for module, names in imports().items()
        for name in (imported.partition(".")[0] for imported in names)
        if name in HOMES and not {module, room(module)} & HOMES[name]
    ]

    assert strays == []


def test_the_one_module_of_search_with_torch_is_imported_within_functions_only() -> None:
    """So that --help, a sweep's parent and commands that only read a study import no torch."""
    lazy = "lora_search.search.freeze_thaw"
    early = [
        name
        for name, path in modules().items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module == lazy
    ]

    assert early == []
    assert PACKAGE / "search" / "freeze_thaw.py" in modules().values()


def test_the_tree_in_the_readme_is_the_tree_of_the_package() -> None:
    section = (ROOT / "README.md").read_text().partition("## Where things live")[2]
    drawn: dict[str, set[str]] = {}
    folder = ""
    for line in section.split("```")[1].splitlines()[2:]:
        label, has_purpose, _ = line.partition("#")
        if has_purpose:
            folder = label.strip().removesuffix("/").replace("*.py", "")
            drawn.setdefault(folder, set())
        else:
            drawn[folder].update(line.split())

    there: dict[str, set[str]] = {"": set()}
    for module in modules():
        folder, _, name = module.rpartition(".")
        there.setdefault(folder, set()).update({name} - {"__init__"})
    assert drawn == there
