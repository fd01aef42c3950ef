"""What a slot takes, and what engine=gpu would choose on cards that are not here:
`python -m tests.benchmarks.sizes`.

The choice of `engine.autosize` over what `tests.benchmarks.predict` counts: bytes a token (with gradient
checkpointing where a row would not fit without), bytes a slot at rank 32. Speeds rise as x / (x + half).
Predicted: nothing here was measured on these cards.
"""

from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_search.engine.autosize import (
    MARGIN,
    MOST_SLOTS,
    MOST_TOKENS,
    Demand,
    Limits,
    PassCost,
    _fitting,
    choose,
)
from lora_search.engine.bank import SlotBank
from lora_search.errors import LoraSearchError
from lora_search.model.targets import target_layers
from lora_search.settings.schema import EngineConfig
from tests.benchmarks.predict import LLAMA_8B
from tests.conftest import SETTINGS

GIB, MIB = 2**30, 2**20
CARDS = {"T4": 16, "RTX 4090": 24, "A100 40": 40, "L40S": 48, "H100": 80, "H200": 141, "B200": 180}  # GB
TAKEN = 1.0  # GiB of a card that its driver and PyTorch take
AUTO = EngineConfig(slots="auto", tokens_per_pass="auto")


@dataclass(frozen=True)
class Model:
    """A base with its adapters: GiB of weights and of a slot, MiB a token without and with checkpointing, the
    size of a pass in tokens that is half as fast as the largest, tokens/s of the largest."""

    weights: float
    slot: float
    token: float
    token_again: float
    half: float
    rate: float


MODELS = {
    "1B, q and v": Model(2.3, 0.06, 0.85, 0.12, 900, 130e3),
    "8B, q and v": Model(15.0, 0.23, 3.14, 0.35, 250, 23e3),
    "8B, all linear": Model(15.0, 1.41, 3.39, 0.36, 250, 20.7e3),
    "70B nf4, all linear": Model(36.8, 6.9, 20.3, 1.52, 60, 1.5e3),
}


@dataclass(frozen=True)
class SearchSpace:
    """The smallest effective batch in rows, mean and longest row in tokens, trials, and what a trial takes in
    a slot on average, as a share of the largest."""

    batch: int
    mean: int
    longest: int
    trials: int
    share: float = 1.0

    @property
    def limits(self) -> Limits:
        most = min(self.trials, MOST_SLOTS["cuda"])
        return Limits(self.longest, float(self.batch * self.mean), most, MOST_TOKENS["cuda"])


SPACES = {
    "batch 4, rows of 100": SearchSpace(4, 100, 256, 64),
    "batch 4, rows of 100, r = choice(8, 16, 32)": SearchSpace(4, 100, 256, 64, (8 + 16 + 32) / 3 / 32),
    "batch 8, rows of 250": SearchSpace(8, 250, 1024, 12),
    "batch 16 x 4, rows of 400": SearchSpace(64, 400, 1024, 24),
    "batch 1, rows of 2000, 3 trials": SearchSpace(1, 2000, 4096, 3),
}


def cost_of(model: Model, room: float, longest: int) -> PassCost:
    """Return the cost of passes; with checkpointing where the longest row needs it, as in `autosize.fit`."""
    sizes = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    speeds = {size: model.rate * size / (size + model.half) for size in sizes}
    cost = PassCost(0.8 * GIB, model.token * MIB, speeds)
    if _fitting(cost, room - model.slot * GIB) >= longest:
        return cost
    slower = {size: 0.75 * speed for size, speed in speeds.items()}  # a third forward pass for two
    return replace(cost, bytes_per_token=model.token_again * MIB, speeds=slower)


def model_on(card: str, name: str) -> Model:
    """Return the model as it is on that card: a T4 has no bfloat16, so everything takes twice the memory."""
    model = MODELS[name]
    if card != "T4":
        return model
    return replace(model, weights=2 * model.weights, token=2 * model.token, token_again=2 * model.token_again)


def room_on(card: str, model: Model) -> float:
    """Return the bytes to plan with beside the base."""
    return MARGIN["cuda"] * (CARDS[card] * 1e9 - (model.weights + TAKEN) * GIB)


def demand_of(model: Model, space: SearchSpace) -> Demand:
    return Demand(int(model.slot * GIB), space.share * model.slot * GIB)


def chosen_text(card: str, model: Model, space: SearchSpace) -> str:
    room, demand = room_on(card, model), demand_of(model, space)
    try:
        cost = cost_of(model, room, space.longest)
        slots, tokens = choose(AUTO, cost, room, demand, space.limits)
    except LoraSearchError:
        return "does not fit"
    again = "" if cost.bytes_per_token == model.token * MIB else ", recomputed"
    gib = cost.bytes(slots, tokens, demand) / GIB + model.weights
    return f"{slots} x {tokens:,}, {gib:.0f} GiB{again}"


def gib_of_slots(ranks: tuple[int, ...]) -> list[float]:
    """Return what a trial on all linear layers of an 8B in bfloat16 takes in a slot, in GiB."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16)
        bank = SlotBank(model, target_layers(model, ("all-linear",)), 1, max(ranks), torch.bfloat16)
    return [bank.bytes_of(replace(SETTINGS, r=rank), bank.names) / GIB for rank in ranks]


def main() -> None:
    ranks = (8, 16, 32, 64)
    table = Table("8B, all linear layers", *(f"r = {rank}" for rank in ranks))
    table.add_row("GiB of a slot", *(f"{gib:.2f}" for gib in gib_of_slots(ranks)))
    Console(width=160).print(table)
    for name, space in SPACES.items():
        table = Table(f"{name}, {space.trials} trials: slots x tokens", *MODELS)
        for card in CARDS:
            table.add_row(card, *(chosen_text(card, model_on(card, model), space) for model in MODELS))
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
