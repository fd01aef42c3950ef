"""Sizes chosen by the probe: they fit the memory that is there, and what cannot fit is said at once."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest

from lora_search.engine import autosize as fitting
from lora_search.engine.autosize import Demand, Limits, PassCost, choose, fit, measure
from lora_search.errors import LoraSearchError
from lora_search.settings.schema import EngineConfig
from lora_search.trial import TrialRun
from tests.benchmarks.sizes import (
    AUTO,
    CARDS,
    GIB,
    MODELS,
    SPACES,
    cost_of,
    demand_of,
    gib_of_slots,
    model_on,
    room_on,
)
from tests.conftest import make_run
from tests.harness import build_engine, random_splits, train_all

MIB = 2**20
SPLITS = random_splits(num_train=40)


def same(num_bytes: int) -> Demand:
    return Demand(num_bytes, num_bytes)


def probe(
    folder: Path, run: TrialRun, config: EngineConfig, most_slots: int = 99, free_bytes: int = 64 * MIB
) -> fitting.Fit:
    engine = build_engine(folder, SPLITS, max_rank=8)
    settings, names = dataclasses.replace(run.settings, r=8), engine.bank.names
    engine.bank.admit(0, settings, names, seed=0)
    demand = same(engine.bank.bytes_of(settings, names))
    return fit(config, engine.model, SPLITS.train, 2, demand, most_slots, free_bytes)


def test_auto_fills_what_memory_holds_and_no_more(tiny_llama: Path, tmp_path: Path) -> None:
    config = EngineConfig(slots="auto", tokens_per_pass="auto")

    chosen = probe(tiny_llama, make_run(tmp_path), config, free_bytes=16 * MIB)

    assert chosen.predicted_bytes is not None
    assert 0 < chosen.predicted_bytes <= 0.5 * 16 * MIB
    assert 24 <= chosen.tokens_per_pass < 2048
    assert f"{chosen.slots} slots, {chosen.tokens_per_pass} tokens per pass" in chosen.note


def test_what_is_set_stays_and_slots_keep_to_the_trials(tiny_llama: Path, tmp_path: Path) -> None:
    tokens_set = probe(tiny_llama, make_run(tmp_path), EngineConfig(slots="auto", tokens_per_pass=64), 2)
    slots_set = probe(tiny_llama, make_run(tmp_path), EngineConfig(slots=3, tokens_per_pass="auto"))

    assert tokens_set.tokens_per_pass == 64
    assert tokens_set.slots <= 2
    assert slots_set.slots == 3


def test_a_row_that_cannot_fit_is_one_message_with_what_would(tiny_llama: Path, tmp_path: Path) -> None:
    config = EngineConfig(slots=1, tokens_per_pass="auto")

    with pytest.raises(
        LoraSearchError, match=r"a row of \d+ tokens needs .* Lower data.max_length \(at most"
    ):
        probe(tiny_llama, make_run(tmp_path), config, free_bytes=MIB // 8)


def test_a_row_that_fits_only_with_its_layers_computed_again_gets_them_so(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run, config = make_run(tmp_path), EngineConfig(slots=1, tokens_per_pass="auto")
    engine = build_engine(tiny_llama, SPLITS, max_rank=8)
    settings, names = dataclasses.replace(run.settings, r=8), engine.bank.names
    engine.bank.admit(0, settings, names, seed=0)
    per_slot = engine.bank.bytes_of(settings, names)
    cost = measure(engine.model, SPLITS.train, (100, 200))
    longest = max(len(row.input_ids) for row in SPLITS.train)
    short_of = int(2 * (cost.fixed_bytes + per_slot + 0.9 * longest * cost.bytes_per_token))

    chosen = fit(config, engine.model, SPLITS.train, 2, same(per_slot), 1, short_of)

    assert chosen.tokens_per_pass >= longest
    assert all(isinstance(layer.forward, partial) for layer in engine.model.decoder.layers)


def test_a_pass_takes_memory_in_proportion_to_its_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    engine = build_engine(tiny_llama, SPLITS, max_rank=8)
    engine.bank.admit(0, make_run(tmp_path).settings, engine.bank.names, seed=0)

    small, large = (measure(engine.model, SPLITS.train, (100, size)) for size in (200, 400))

    assert small.bytes_per_token == pytest.approx(large.bytes_per_token, rel=0.1)


def test_the_fewest_slots_that_are_about_as_fast_as_the_most() -> None:
    cost = PassCost(0.0, 1.0, {200: 500.0, 400: 800.0, 800: 980.0, 1600: 1000.0})
    limits = Limits(longest=100, batch_tokens=200.0, most_slots=32, most_tokens=2048)

    assert choose(AUTO, cost, 1e6, same(1), limits) == (4, 2048)
    assert choose(AUTO, cost, 1e6, same(1), dataclasses.replace(limits, most_slots=3)) == (3, 2048)
    assert choose(EngineConfig(slots=2, tokens_per_pass="auto"), cost, 1000.0, same(1), limits) == (2, 998)
    assert choose(EngineConfig(slots="auto", tokens_per_pass=500), cost, 503.0, same(1), limits) == (3, 500)


def fastest(cost: PassCost, room: float, demand: Demand, limits: Limits) -> float:
    """Try every number of slots with every size of a pass; 0 if none fits."""
    return max(
        (
            cost.speed(min(tokens, slots * limits.batch_tokens))
            for slots in range(1, limits.most_slots + 1)
            for tokens in range(limits.longest, limits.most_tokens + 1, 128)
            if cost.bytes(slots, tokens, demand) <= room
        ),
        default=0.0,
    )


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", MODELS)
def test_slots_and_tokens_are_about_the_fastest_that_fit(name: str, card: str, space: str) -> None:
    model, limits = model_on(card, name), SPACES[space].limits
    room = room_on(card, model)
    cost = cost_of(model, room, limits.longest)
    demand = demand_of(model, SPACES[space])
    best = fastest(cost, room, demand, limits)

    if not best:
        with pytest.raises(LoraSearchError, match="a row of .* tokens needs"):
            choose(AUTO, cost, room, demand, limits)
        return
    slots, tokens = choose(AUTO, cost, room, demand, limits)

    assert cost.speed(min(tokens, slots * limits.batch_tokens)) >= 0.94 * best
    assert 1 <= slots <= SPACES[space].trials
    assert limits.longest <= tokens <= limits.most_tokens
    assert cost.bytes(slots, tokens, demand) <= room < CARDS[card] * 1e9 - model.weights * GIB


def test_a_slot_of_rank_8_takes_a_quarter_of_one_of_rank_32() -> None:
    small, large = gib_of_slots((8, 32))

    assert large == pytest.approx(MODELS["8B, all linear"].slot, abs=0.005)
    assert 4 * small == large


def test_slots_are_counted_by_the_mean_trial_and_the_largest_always_fits() -> None:
    cost = PassCost(0.0, 1.0, {200: 500.0, 400: 1000.0, 800: 2000.0})
    limits = Limits(longest=100, batch_tokens=200.0, most_slots=4, most_tokens=800)

    assert choose(AUTO, cost, 1200.0, Demand(300, 100.0), limits) == (4, 800)
    assert choose(AUTO, cost, 1200.0, same(300), limits) == (2, 600)
    assert [Demand(300, 100.5).of(slots) for slots in (1, 2, 3, 4)] == [300, 300, 302, 402]


def test_slots_that_are_set_can_all_hold_the_largest_trial(tiny_llama: Path, tmp_path: Path) -> None:
    engine = build_engine(tiny_llama, SPLITS)
    engine.bank.admit(0, make_run(tmp_path).settings, engine.bank.names, seed=0)
    demand = Demand(MIB, MIB / 4)

    found = [
        fit(
            EngineConfig(slots=slots, tokens_per_pass="auto"),
            engine.model,
            SPLITS.train,
            2,
            demand,
            4,
            64 * MIB,
        )
        for slots in (4, "auto")
    ]

    assert found[0].bank_bytes == 4 * MIB
    assert found[1].bank_bytes == max(MIB, found[1].slots * MIB // 4)
    assert "of the largest trials" not in found[0].note
    assert ("of the largest trials 1 at once" in found[1].note) == (found[1].slots > 1)


def test_small_batches_get_slots_where_memory_would_only_do_for_tokens() -> None:
    """Until slots and tokens were chosen together, tokens took it all and left one slot."""
    model = MODELS["8B, all linear"]
    room = room_on("H100", model)
    cost = cost_of(model, room, 256)

    slots, tokens = choose(
        AUTO, cost, room, same(int(model.slot * GIB)), SPACES["batch 4, rows of 100"].limits
    )

    assert slots > 1
    assert tokens >= slots * 400
    assert cost.speed(slots * 400) > 1.5 * cost.speed(400)


def test_the_probe_leaves_the_model_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    expected = train_all(build_engine(tiny_llama, SPLITS), [run])[0]
    engine = build_engine(tiny_llama, SPLITS, max_rank=8)
    engine.bank.admit(0, run.settings, engine.bank.names, seed=0)
    measure(engine.model, SPLITS.train, (50, 100))
    engine.bank.release(0)

    curve = train_all(engine, [make_run(tmp_path / "b")])[0]

    assert [m.perplexity for m in curve] == [m.perplexity for m in expected]
