"""The tests the engine stands on: packed equals solo, equals plain PEFT, and a sick trial harms nobody."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from lora_search.data.order import epoch_order
from lora_search.data.rows import Example, Splits
from lora_search.model.tiny import ARCHITECTURES, make_tiny_model
from lora_search.ops.recompute import recompute_layers
from lora_search.trial import Measurement, TrialRun
from tests.conftest import make_run
from tests.harness import build_engine, random_splits, starting_adapter, train_all, with_turns

SPLITS = replace(random_splits(), train=with_turns(random_splits().train))


def mixed_runs(folder: Path) -> list[TrialRun]:
    return [
        make_run(folder, 0, dropout=0.05),
        make_run(folder, 1, r=8, alpha=4.0, batch_size=1, gradient_accumulation_steps=3, dropout=0.3),
        make_run(folder, 2, r=2, target_modules=("all-linear",), lr=1e-3, use_rslora=True),
        make_run(
            folder, 3, r=3, target_modules=("down_proj", "o_proj"), epochs=3, schedule="linear", dropout=0.05
        ),
        make_run(folder, 4, batch_size=5, gradient_accumulation_steps=1, schedule="constant", dropout=0.1),
    ]


def losses(curve: list[Measurement]) -> torch.Tensor:
    return torch.tensor([step.loss for m in curve for step in m.steps], dtype=torch.float64)


def perplexities(curve: list[Measurement]) -> torch.Tensor:
    return torch.tensor([m.perplexity for m in curve], dtype=torch.float64)


Curves = dict[int, list[Measurement]]


def differences(curves: Curves, others: Curves) -> torch.Tensor:
    """Return (loss - other) / other of every optimizer step of every trial."""
    pairs = [(losses(curves[number]), losses(other)) for number, other in others.items()]
    return torch.cat([(curve - other) / other for curve, other in pairs])


@pytest.fixture(scope="module")
def solo_curves(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Measurement]]:
    engine = build_engine(tiny_llama, SPLITS, slots=1)
    return train_all(engine, mixed_runs(tmp_path_factory.mktemp("solo")))


@pytest.mark.parametrize(("slots", "tokens_per_pass"), [(2, 40), (4, 200), (8, 1000)])
def test_packed_equals_solo_with_everything_mixed(
    tiny_llama: Path,
    tmp_path: Path,
    solo_curves: dict[int, list[Measurement]],
    slots: int,
    tokens_per_pass: int,
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=slots, tokens_per_pass=tokens_per_pass)

    packed = train_all(engine, mixed_runs(tmp_path))

    for number, solo in solo_curves.items():
        torch.testing.assert_close(losses(packed[number]), losses(solo), rtol=1e-5, atol=0)
        torch.testing.assert_close(perplexities(packed[number]), perplexities(solo), rtol=1e-5, atol=0)
    assert abs(differences(packed, solo_curves).mean()) < 1e-6, "no drift to one side"


def test_in_bfloat16_packing_changes_as_little_as_rounding_does(
    tiny_llama: Path, tmp_path: Path, solo_curves: dict[int, list[Measurement]]
) -> None:
    solo = train_all(build_engine(tiny_llama, SPLITS, dtype="bfloat16"), mixed_runs(tmp_path / "solo"))
    engine = build_engine(tiny_llama, SPLITS, slots=4, tokens_per_pass=200, dtype="bfloat16")

    packed = train_all(engine, mixed_runs(tmp_path / "packed"))

    packing, rounding = differences(packed, solo), differences(solo, solo_curves)
    assert 0 < packing.abs().mean() <= 2 * rounding.abs().mean()
    assert packing.abs().max() <= 4 * rounding.abs().max()
    assert abs(packing.mean()) <= rounding.abs().mean()


def test_layers_that_are_computed_again_give_the_same_curves(
    tiny_llama: Path, tmp_path: Path, solo_curves: dict[int, list[Measurement]]
) -> None:
    engine = build_engine(tiny_llama, SPLITS, slots=4, tokens_per_pass=200)
    recompute_layers(engine.model.decoder)

    packed = train_all(engine, mixed_runs(tmp_path))

    for number, solo in solo_curves.items():
        torch.testing.assert_close(losses(packed[number]), losses(solo), rtol=1e-5, atol=0)


def test_micro_batches_and_accumulation_are_the_same_step(tiny_llama: Path, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", 0, batch_size=4, gradient_accumulation_steps=1),
        make_run(tmp_path / "b", 0, batch_size=1, gradient_accumulation_steps=4),
    ]

    curves = [
        train_all(build_engine(tiny_llama, SPLITS, tokens_per_pass=t), [r])[0]
        for t, r in zip((400, 8), runs, strict=True)
    ]

    torch.testing.assert_close(losses(curves[0]), losses(curves[1]), rtol=1e-5, atol=0)


def nll_of(logits: torch.Tensor, example: Example) -> torch.Tensor:
    labels = torch.full((len(example.input_ids),), -100)
    for start, stop in example.learnt:
        labels[start:stop] = torch.tensor(example.input_ids[start:stop])
    return F.cross_entropy(logits[0, :-1].float(), labels[1:], reduction="sum")


def plain_perplexity(model: torch.nn.Module, examples: tuple[Example, ...]) -> float:
    with torch.no_grad():
        total = sum(nll_of(model(torch.tensor([e.input_ids]), use_cache=False).logits, e) for e in examples)
    return float(torch.exp(total / sum(b - a for e in examples for a, b in e.learnt)))


def plain_peft_losses(folder: Path, adapter: Path, run: TrialRun, splits: Splits) -> list[float]:
    """The loop anyone would write: PEFT, torch.optim.AdamW, a transformers schedule, one row at a time."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    s = run.settings
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=s.weight_decay
    )
    steps_per_epoch = -(-len(splits.train) // s.examples_per_step)
    total = s.epochs * steps_per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, -(-total // 10), total)
    recorded = []
    for epoch in range(s.epochs):
        order = epoch_order(len(splits.train), 0, epoch)
        for start in range(0, len(order), s.examples_per_step):
            rows = [splits.train[i] for i in order[start : start + s.examples_per_step]]
            loss = sum(nll_of(model(torch.tensor([e.input_ids])).logits, e) for e in rows)
            loss = loss / sum(b - a for e in rows for a, b in e.learnt)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            recorded.append(loss.item())
    return recorded


@pytest.mark.parametrize("use_rslora", [False, True])
def test_trajectory_equals_a_plain_peft_loop(tiny_llama: Path, tmp_path: Path, use_rslora: bool) -> None:
    splits = random_splits(num_train=13)
    splits = replace(splits, train=with_turns(splits.train), validation=with_turns(splits.validation))
    run = make_run(tmp_path, 0, target_modules=("all-linear",), use_rslora=use_rslora, alpha=6.0)
    start = starting_adapter(build_engine(tiny_llama, splits), run, tmp_path / "start")
    expected = plain_peft_losses(tiny_llama, start, run, splits)

    curve = train_all(build_engine(tiny_llama, splits), [run])[0]

    torch.testing.assert_close(losses(curve), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exported_adapter_gives_the_same_perplexity_in_plain_peft(tmp_path: Path, architecture: str) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture)
    run = make_run(tmp_path, 0, target_modules=("all-linear",), alpha=6.0)

    engine = build_engine(folder, SPLITS)
    curve = train_all(engine, [run])[0]

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    plain = PeftModel.from_pretrained(base, str(tmp_path / "0" / "adapter"))
    assert plain_perplexity(plain, SPLITS.validation) == pytest.approx(curve[-1].best_perplexity, rel=1e-5)
    assert engine.num_shared == 3  # of every validation row the harness makes


def test_base_perplexity_equals_the_plain_model(tiny_llama: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")

    perplexity = build_engine(tiny_llama, SPLITS).evaluate_base().perplexity

    assert perplexity == pytest.approx(plain_perplexity(plain, SPLITS.validation), rel=1e-5)


def test_a_diverging_trial_leaves_its_neighbours_untouched(
    tiny_llama: Path, tmp_path: Path, solo_curves: dict[int, list[Measurement]]
) -> None:
    runs = mixed_runs(tmp_path)
    sick = make_run(tmp_path, 9, alpha=1e38, lr=0.9, target_modules=("all-linear",))

    packed = train_all(
        build_engine(tiny_llama, SPLITS, slots=4, tokens_per_pass=200), [runs[0], sick, *runs[1:]]
    )

    assert packed[9][-1].ended == "diverged"
    for number, solo in solo_curves.items():
        torch.testing.assert_close(losses(packed[number]), losses(solo), rtol=1e-5, atol=0)


def test_a_trial_resumed_from_its_checkpoint_goes_on_as_if_nothing_had_happened(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "a", 0, dropout=0.1)
    whole = train_all(build_engine(tiny_llama, SPLITS), [run])[0]
    again = make_run(tmp_path / "b", 0, dropout=0.1)
    first = build_engine(tiny_llama, SPLITS)
    first.admit([again])
    measured: list[Measurement] = []
    while not measured:
        measured = first.advance()

    known = replace(again, perplexities={1: measured[0].perplexity})
    rest = train_all(build_engine(tiny_llama, SPLITS), [known])[0]

    assert [m.rung for m in rest] == [2, 3, 4]
    assert losses(measured + rest).tolist() == losses(whole).tolist()
    assert perplexities(measured + rest).tolist() == perplexities(whole).tolist()


def test_early_stopping_keeps_the_best_rung(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, 0, lr=0.3, epochs=6, early_stopping_patience=2, target_modules=("all-linear",))

    curve = train_all(build_engine(tiny_llama, SPLITS), [run])[0]

    assert curve[-1].ended == "early_stopped"
    assert curve[-1].rung == curve[-1].best_rung + 2
    assert curve[-1].best_perplexity == min(m.perplexity for m in curve)


def test_trials_of_any_batch_size_meet_at_the_same_rungs(tiny_llama: Path, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, i, batch_size=b, gradient_accumulation_steps=1)
        for i, b in enumerate((1, 3, 5, 12))
    ]

    curves = train_all(build_engine(tiny_llama, SPLITS, slots=4), runs)

    assert [[m.rung for m in curve] for curve in curves.values()] == [[1, 2, 3, 4]] * 4
    assert [[m.examples_seen for m in curve] for curve in curves.values()] == [
        [6, 12, 18, 24], [6, 12, 18, 24], [10, 12, 22, 24], [12, 12, 24, 24],
    ]  # fmt: skip
