"""`python -m tests.benchmarks.ops [ROUNDS]`: what each operation of our own saves, in time and in memory.

One training pass of SmolLM2-135M on FAQ rows (four slots, about 1,000 tokens, forward and backward), once as
it is and once with each part as PyTorch or transformers has it, in turn within one process: medians of the
ratios. Memory is what autograd keeps for the way back. With OMP_NUM_THREADS=1 CPU seconds are counted, which
a busy machine changes little. Five rounds of both dtypes take 10 minutes on one core.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from lora_search.data.preparation import prepare
from lora_search.engine.build import Room, build_engine
from lora_search.engine.packed_model import PackedModel, SlotRows
from lora_search.model.loading import load_base, load_tokenizer, resolve_model
from lora_search.ops import attention
from lora_search.output.terminal import Progress
from lora_search.reading.load import load_rows
from lora_search.settings.composition import compose
from lora_search.settings.overlay import trial_settings
from lora_search.trial import TrialRun

ROUNDS, SLOTS, TOKENS = 5, 4, 1024


@dataclass(frozen=True)
class PlainHead:
    """All logits at once, in float32."""

    output: nn.Linear

    def nll(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.output(hidden_ND).float(), target_N, reduction="none")


def make_model(dtype: str, folder: str) -> tuple[PackedModel, nn.Module, list[SlotRows]]:
    """Return the packed model, its base, and the rows of one pass."""
    overrides = [f"engine.dtype={dtype}", f"engine.slots={SLOTS}", f"engine.tokens_per_pass={TOKENS}"]
    config = compose("construction_faq", [*overrides, "data.max_train_examples=64", "train.batch_size=8"])
    source = resolve_model(config.model)
    splits = prepare(config, load_rows(config.data), load_tokenizer(source, config.model))
    base = load_base(source, config.model, config.engine)
    settings = [trial_settings(config, {})] * SLOTS
    engine, _ = build_engine(config, Room.of(settings), base, splits, {})
    engine.admit(
        [TrialRun(number=i, seed=i, settings=s, folder=f"{folder}/{i}") for i, s in enumerate(settings)]
    )
    rows: list[list[object]] = [[] for _ in range(SLOTS)]
    room = TOKENS
    for i, row in enumerate(splits.train):
        room -= len(row.input_ids)
        if room < 0:
            break
        rows[i % SLOTS].append(row)
    packs = [SlotRows(s, part, s, range(len(part)), 0.05) for s, part in enumerate(rows)]  # type: ignore
    return engine.model, base.model, packs


def variants(model: PackedModel, base: nn.Module) -> dict[str, Callable[[], None]]:
    """Return what puts each variant in place; "as it is" first, which undoes the others."""
    head, longest, rotary = model.head, attention.LONGEST_ROW, modeling_llama.apply_rotary_pos_emb
    replaced = {
        m: m.forward for m in base.modules() if "forward" in vars(m) and "Linear" not in type(m).__name__
    }

    def as_it_is() -> None:
        model.head, attention.LONGEST_ROW = head, longest
        modeling_llama.apply_rotary_pos_emb = rotary
        for module, forward in replaced.items():
            module.forward = forward

    def plain(kind: str) -> Callable[[], None]:
        def put() -> None:
            as_it_is()
            for module in replaced:
                if type(module).__name__.endswith(kind):
                    vars(module).pop("forward")

        return put

    def plain_rotary() -> None:
        as_it_is()
        modeling_llama.apply_rotary_pos_emb = rotary.args[0]  # the original

    def row_by_row() -> None:
        as_it_is()
        attention.LONGEST_ROW = 0

    def plain_head() -> None:
        as_it_is()
        model.head = PlainHead(base.get_output_embeddings())  # type: ignore

    return {
        "as it is": as_it_is, "attention row by row": row_by_row, "transformers' RMSNorm": plain("RMSNorm"),
        "transformers' MLP": plain("MLP"), "transformers' rotary": plain_rotary,
        "F.cross_entropy on all logits": plain_head,
    }  # fmt: skip


def seconds(model: PackedModel, packs: list[SlotRows]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    torch.stack([nll.mean() for nll in model.nll(packs)]).sum().backward()
    return clock() - start


def kept_bytes(model: PackedModel, packs: list[SlotRows]) -> int:
    """Return the bytes that the way forward keeps, each storage once, weights left out."""
    storages: dict[int, torch.UntypedStorage] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.decoder.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        nlls = model.nll(packs)
    assert len(nlls) == SLOTS
    return sum(s.nbytes() for place, s in storages.items() if place not in weights)


def main() -> None:
    rounds, progress = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS, Progress()
    draw = random.Random(0)
    for dtype in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            model, base, packs = make_model(dtype, folder)
            choices = variants(model, base)
            times: dict[str, list[float]] = {name: [] for name in choices}
            kept = {}
            for name, put in choices.items():
                put()
                kept[name] = kept_bytes(model, packs)
            for _ in range(rounds):
                for name in draw.sample([*choices], len(choices)):  # a pass pays for what came before it
                    choices[name]()
                    times[name].append(seconds(model, packs))
        for name, measured in times.items():
            ratio = statistics.median(b / a for a, b in zip(times["as it is"], measured, strict=True))
            memory = f"{kept[name] / 2**20:.0f} MiB, {kept[name] / kept['as it is']:.2f}x"
            progress.console.print(f"{dtype}, {name}: {ratio:.2f}x the time, {memory}")


if __name__ == "__main__":
    main()
