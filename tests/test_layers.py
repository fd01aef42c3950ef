"""Imports go downwards only, and each library has one home."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lora_search"
LAYERS = [
    {"__init__", "errors", "seeds", "interrupts"},
    {"config", "trial", "files"},
    {"failures", "sealed", "connections"},
    {"composition", "ranking", "templates", "tiny", "dropout", "packing", "optim", "pruning"},
    {"adapters", "fused", "row_attention", "head", "memory", "recompute", "stopwatch"},
    {"attention"},
    {
        "fingerprint",
        "history",
        "space",
        "reading",
        "storage",
        "sources",
        "soundness",
        "tracking",
        "checkpoint",
        "lora",
        "progress",
        "export",
    },
    {"data", "model", "ledger", "outbox"},
    {"passes", "axis", "sampling", "study_view"},
    {"slots", "evaluation", "fitting", "claiming", "pausing", "launcher"},
    {"keeping", "reclaiming"},
    {"charts", "engine", "study", "preflight", "provenance"},
    {"assembly"},
    {"note"},
    {"report"},
    {"worker", "training", "conclusion"},
    {"sweep"},
]
HOMES = {
    "wandb": {"tracking"},
    "optuna_dashboard": {"note"},
    "optuna": {
        "claiming",
        "fingerprint",
        "history",
        "ledger",
        "note",
        "pausing",
        "space",
        "pruning",
        "reclaiming",
        "sampling",
        "storage",
        "study",
        "study_view",
    },
    "sqlalchemy": {"connections", "storage"},
    "hydra": {"composition", "space", "sweep"},
    "omegaconf": {"composition"},
    "datasets": {"reading"},
    "peft": {"lora"},
    "rich": {"progress"},
    "plotly": {"charts", "report"},
    "jinja2": {"report", "templates"},
}


def imports() -> dict[str, set[str]]:
    """Return module -> what it imports, also inside functions."""
    found = {}
    for path in sorted(PACKAGE.glob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
            elif isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
        found[path.stem] = names
    return found


def test_every_module_stands_in_one_layer() -> None:
    listed = [module for layer in LAYERS for module in layer]

    assert sorted(listed) == sorted(imports())
    assert len(listed) > 20


def test_imports_go_downwards_only() -> None:
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    upwards = [
        (module, name)
        for module, names in imports().items()
        for name in names
        if name.startswith("lora_search.") and level[name.split(".")[1]] >= level[module]
    ]

    assert upwards == []


def test_each_library_has_its_home() -> None:
    strays = [
        (module, name)
        for module, names in imports().items()
        for name in names
        if module not in HOMES.get(name.split(".")[0], {module})
    ]

    assert strays == []
