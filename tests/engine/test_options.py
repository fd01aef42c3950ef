"""What people set in PEFT, TRL and transformers beside rank, rate and batch, against the plain libraries."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from lora_search.data.order import epoch_order
from lora_search.data.rows import Example, Splits
from lora_search.engine.optim import learning_rate
from lora_search.engine.starts import factors
from lora_search.ops.dropout import token_keys, uniform
from lora_search.trial import Measurement, TrialRun, TrialSettings
from tests.conftest import SETTINGS, make_run
from tests.harness import build_engine, random_splits, starting_adapter, train_all

SPLITS = random_splits(num_train=9)
OPTIONS: dict[str, dict[str, object]] = {
    "rank and alpha patterns": {
        "rank_pattern": (("q_proj", 8), ("layers.1.mlp.up_proj", 2)),
        "alpha_pattern": (("q_proj", 24.0), ("down_proj", 4.0)),
        "target_modules": ("all-linear",),
    },
    "overlapping patterns": {
        "rank_pattern": (("model.layers.0.self_attn.q_proj", 8), ("q_proj", 2)),
        "alpha_pattern": (("self_attn.v_proj", 3.0), ("model.layers.1.self_attn.v_proj", 30.0)),
    },
    "patterns with rslora": {"rank_pattern": (("v_proj", 8),), "use_rslora": True},
    "an MLP without its gate": {"target_modules": ("up_proj", "down_proj")},
    "some layers": {"target_modules": ("q_proj", "up_proj", "layers:1")},
    "regular expression": {"target_modules": (r"re:.*\.(0|1)\.self_attn\.[kv]_proj",)},
    "LoRA+": {"lora_plus_ratio": 8.0, "weight_decay": 0.1},
    "DoRA": {"use_dora": True, "target_modules": ("all-linear",), "weight_decay": 0.1},
    "DoRA with LoRA+ and patterns": {
        "use_dora": True, "lora_plus_ratio": 4.0, "rank_pattern": (("v_proj", 8),), "use_rslora": True,
    },
    "trained tokens": {"trainable_token_indices": (7, 40, 5), "weight_decay": 0.1, "lora_plus_ratio": 4.0},
    "tokens of embedding and head": {
        "trainable_token_indices": (7, 40, 5), "trainable_token_head": True, "label_smoothing": 0.1,
    },
    "label smoothing": {"label_smoothing": 0.2},
    "all at once": {
        "lora_plus_ratio": 4.0, "label_smoothing": 0.1, "rank_pattern": (("q_proj", 6),), "schedule": "wsd",
        "decay_ratio": 0.5, "min_lr_ratio": 0.1, "warmup_steps": 1,
        "target_modules": ("all-linear", "layers:0"), "trainable_token_indices": (11,), "use_dora": True,
    },
}  # fmt: skip


def losses(curve: list[Measurement]) -> torch.Tensor:
    return torch.tensor([step.loss for m in curve for step in m.steps], dtype=torch.float64)


def plain_loss(model: torch.nn.Module, rows: list[Example], smoothing: float) -> torch.Tensor:
    """The mean over all completion tokens of the batch, weighted as its rows are, by torch itself."""
    logits, targets, weights = [], [], []
    for row in rows:
        own = model(torch.tensor([row.input_ids])).logits[0, :-1].float()
        places = [place - 1 for start, stop in row.learnt for place in range(start, stop)]
        logits.append(own[places])
        targets.append(torch.tensor(row.input_ids)[1:][places])
        weights.append(torch.full((len(places),), row.weight))
    smoothed = {"label_smoothing": smoothing, "reduction": "none"}
    nll, weight = F.cross_entropy(torch.cat(logits), torch.cat(targets), **smoothed), torch.cat(weights)
    return (nll * weight).sum() / weight.sum()


def plain_base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def plain_losses(model: torch.nn.Module, run: TrialRun, splits: Splits) -> list[float]:
    """PEFT's model and LoRA+ optimizer, one row at a time."""
    s = run.settings
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=s.lr, loraplus_lr_ratio=s.lora_plus_ratio, betas=(s.beta1, s.beta2),
        eps=s.eps, weight_decay=s.weight_decay, loraplus_weight_decay=s.weight_decay,
    )  # fmt: skip
    per_epoch = -(-len(splits.train) // s.examples_per_step)
    recorded: list[float] = []
    for epoch in range(s.epochs):
        order = epoch_order(len(splits.train), 0, epoch)
        for start in range(0, len(order), s.examples_per_step):
            lr = learning_rate(s, len(recorded), s.epochs * per_epoch)
            for group, ratio in zip(
                optimizer.param_groups, (1.0, 1.0, s.lora_plus_ratio, s.lora_plus_ratio), strict=True
            ):
                group["lr"] = lr * ratio
            rows = [splits.train[i] for i in order[start : start + s.examples_per_step]]
            loss = plain_loss(model, rows, s.label_smoothing)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(
                [p for p in model.parameters() if p.requires_grad], s.max_grad_norm
            )
            optimizer.step()
            optimizer.zero_grad()
            recorded.append(loss.item())
    return recorded


@pytest.mark.parametrize("name", OPTIONS)
def test_a_trajectory_equals_plain_peft_and_torch(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, 0, alpha=6.0, **OPTIONS[name])
    start = starting_adapter(build_engine(tiny_llama, SPLITS), run, tmp_path / "start")
    model = PeftModel.from_pretrained(plain_base(tiny_llama), str(start), is_trainable=True)
    expected = plain_losses(model, run, SPLITS)

    curve = train_all(build_engine(tiny_llama, SPLITS), [run])[0]

    torch.testing.assert_close(losses(curve), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert exported_perplexity(tiny_llama, tmp_path) == pytest.approx(curve[-1].best_perplexity, rel=1e-5)


def exported_perplexity(folder: Path, runs: Path) -> float:
    plain = PeftModel.from_pretrained(plain_base(folder), str(runs / "0" / "adapter"))
    with torch.no_grad():
        return math.exp(plain_loss(plain, list(SPLITS.validation), 0.0).item())


STARTS: dict[str, dict[str, object]] = {
    "PiSSA": {"init": "pissa", "target_modules": ("all-linear",)},
    "PiSSA wider than a layer": {"init": "pissa", "r": 8, "target_modules": ("k_proj", "down_proj")},
    "OLoRA": {"init": "olora", "weight_decay": 0.1, "target_modules": ("all-linear",)},
    "PiSSA with patterns and LoRA+": {
        "init": "pissa", "rank_pattern": (("v_proj", 8),), "alpha_pattern": (("q_proj", 3.0),),
        "lora_plus_ratio": 4.0,
    },
    "OLoRA with patterns and rslora": {
        "init": "olora", "rank_pattern": (("v_proj", 2),), "use_rslora": True,
    },
    "PiSSA with trained tokens": {"init": "pissa", "trainable_token_indices": (7, 40, 5)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA:UserWarning")  # of PEFT's own conversion
@pytest.mark.parametrize("name", STARTS)
def test_a_start_taken_from_the_base_trains_as_peft_trains_it(
    tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    """PEFT factors and changes the base itself; the adapter exported here goes on the unchanged one."""
    run = make_run(tmp_path, 0, alpha=6.0, **STARTS[name])
    s, targets = run.settings, run.settings.target_modules
    config = PeftLoraConfig(
        r=s.r, lora_alpha=s.alpha, init_lora_weights=s.init, use_rslora=s.use_rslora,
        rank_pattern=dict(s.rank_pattern), alpha_pattern=dict(s.alpha_pattern), task_type="CAUSAL_LM",
        trainable_token_indices=list(s.trainable_token_indices) or None,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
    )  # fmt: skip
    expected = plain_losses(get_peft_model(plain_base(tiny_llama), config), run, SPLITS)

    curve = train_all(build_engine(tiny_llama, SPLITS), [run])[0]

    torch.testing.assert_close(losses(curve), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert exported_perplexity(tiny_llama, tmp_path) == pytest.approx(curve[-1].best_perplexity, rel=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_a_start_leaves_the_base_as_it_is(tiny_llama: Path, tmp_path: Path, init: str) -> None:
    run = make_run(tmp_path, 0, init=init, target_modules=("all-linear",))
    engine = build_engine(tiny_llama, SPLITS)

    engine.admit([run])

    (nll,) = engine.scores([0], SPLITS.validation)
    assert nll.perplexity == pytest.approx(engine.evaluate_base().perplexity, rel=1e-6)
    assert all(starts[0].a_RD.any() for starts in engine.bank.starts)


def test_the_approximate_factors_are_nearly_the_best_of_their_rank() -> None:
    weight_OD = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    exact, near = (b.T @ a for a, b in (factors(weight_OD, init, 4) for init in ("pissa", "pissa_niter_16")))

    errors = [(weight_OD - found).norm().item() for found in (exact, near)]

    torch.testing.assert_close(
        near, factors(weight_OD, "pissa_niter_16", 4)[1].T @ factors(weight_OD, "pissa_niter_16", 4)[0]
    )
    assert errors[0] <= errors[1] < 1.005 * errors[0]


@pytest.mark.parametrize("slots", [1, 2])
def test_rows_count_as_their_weights_say(tiny_llama: Path, tmp_path: Path, slots: int) -> None:
    """A batch's loss is sum(weight * NLL) / sum(weight) over its tokens; validation is the plain mean."""
    weighted = tuple(replace(row, weight=0.25 * (i + 1)) for i, row in enumerate(SPLITS.train))
    splits = replace(SPLITS, train=weighted)
    runs = [make_run(tmp_path, i, target_modules=("all-linear",)) for i in range(slots)]
    start = starting_adapter(build_engine(tiny_llama, splits), runs[0], tmp_path / "start")
    model = PeftModel.from_pretrained(plain_base(tiny_llama), str(start), is_trainable=True)
    expected = plain_losses(model, runs[0], splits)

    curves = train_all(build_engine(tiny_llama, splits, slots=slots, tokens_per_pass=200), runs)
    unweighted = train_all(build_engine(tiny_llama, SPLITS), [make_run(tmp_path / "other", 0)])

    torch.testing.assert_close(
        losses(curves[0]), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert not torch.allclose(losses(curves[0]), losses(unweighted[0]), rtol=1e-3)


def runs_with_options(folder: Path) -> list[TrialRun]:
    starts = [*STARTS.values(), {"init": "pissa_niter_4", "dropout": 0.1}]
    chosen = [*OPTIONS.values(), *starts, {"neftune_alpha": 5.0}, {"init": "gaussian", "dropout": 0.1}, {}]
    return [make_run(folder, i, **options) for i, options in enumerate(chosen)]


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Measurement]]:
    runs = runs_with_options(tmp_path_factory.mktemp("alone"))
    return {run.number: train_all(build_engine(tiny_llama, SPLITS), [run])[run.number] for run in runs}


def test_trials_with_options_do_not_change_their_neighbours(
    tiny_llama: Path, tmp_path: Path, alone: dict[int, list[Measurement]]
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=4, tokens_per_pass=200)

    packed = train_all(engine, runs_with_options(tmp_path))

    assert len(packed) == len(alone) > 10
    for number, solo in alone.items():
        torch.testing.assert_close(losses(packed[number]), losses(solo), rtol=1e-5, atol=0)


def test_neftune_changes_training_and_not_the_first_validation(tiny_llama: Path, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(a), 0, neftune_alpha=a, lr=1e-9) for a in (0.0, 20.0)]

    plain, noisy = (train_all(build_engine(tiny_llama, SPLITS), [run])[0] for run in runs)

    assert noisy[0].perplexity == pytest.approx(plain[0].perplexity, rel=1e-6)
    assert not torch.allclose(losses(noisy), losses(plain), rtol=1e-4)


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = uniform(token_keys(7, list(range(40)), [25] * 40), 576)

    assert noise.min() >= -1.0
    assert noise.max() < 1.0
    assert noise.mean().abs() < 5e-3
    assert noise.std().item() == pytest.approx(1 / math.sqrt(3), rel=5e-3)
    assert (noise[:, :-1] * noise[:, 1:]).mean().abs() < 5e-3
    assert (noise[:-1] * noise[1:]).mean().abs() < 5e-3
    assert (noise[:25] == noise[25:50]).float().mean() < 1e-3


def test_label_smoothing_is_that_of_transformers() -> None:
    logits, labels = torch.randn(1, 12, 50), torch.randint(0, 50, (1, 12))

    theirs = LabelSmoother(0.2)({"logits": logits}, labels)

    ours = F.cross_entropy(logits[0], labels[0], label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs)


def test_gaussian_is_drawn_as_peft_draws_it(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, 0, r=8, init="gaussian", target_modules=("all-linear",))
    engine = build_engine(tiny_llama, SPLITS)
    engine.admit([run])
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    theirs = get_peft_model(
        base, PeftLoraConfig(r=8, target_modules="all-linear", init_lora_weights="gaussian")
    )

    drawn = [a for _, a, _ in engine.bank.rows[0].layout.pairs(engine.bank.rows[0].theta)]
    expected = [p for name, p in theirs.named_parameters() if ".lora_A." in name]

    stds = [torch.cat([a.detach().flatten() for a in part]).std().item() for part in (drawn, expected)]
    assert stds[0] == pytest.approx(stds[1], rel=0.03)


def test_records_without_new_settings_stay_as_they_were() -> None:
    record = SETTINGS.record()

    assert "lora_plus_ratio" not in record
    assert TrialSettings.from_record(record) == SETTINGS
    changed = replace(SETTINGS, rank_pattern=(("q_proj", 8),), warmup_steps=3)
    listed = {**changed.record(), "rank_pattern": [["q_proj", 8]], "target_modules": ["q_proj", "v_proj"]}
    assert TrialSettings.from_record(listed) == changed
