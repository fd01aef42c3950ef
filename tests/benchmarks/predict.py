"""What a training pass should take on an H100, counted without one: `python -m tests.benchmarks.predict`.

A pass of exact Llama shapes runs on the meta device along the CUDA branches. Every kernel is counted with its
floating-point operations and the bytes that it reads and writes, and takes the longest of three: operations
at the device's rate of matmuls, bytes at its bandwidth, one launch. What the host does, caches, and kernels
that run at the same time are not in it: a count compares two versions of the code; only a GPU says how long
a pass takes.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama

from lora_search.data.rows import Example
from lora_search.engine.bank import SlotBank
from lora_search.engine.packed_model import PackedModel, SlotRows
from lora_search.model.targets import target_layers
from lora_search.ops import fused, lora
from lora_search.ops.dropout import Mask
from lora_search.ops.lora import Layer, Plan, Products, parts_of
from lora_search.ops.nll import Head
from lora_search.ops.recompute import recompute_layers
from lora_search.trial import TrialSettings
from tests.benchmarks.gpu.shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B
from tests.engine.test_cuda_paths import OnMeta, varlen_rows

FLOPS, BYTES, LAUNCH = 800e12, 3e12, 2.5e-6  # of an H100 in bfloat16: operations/s, bytes/s, seconds a kernel
PEAK = 989e12  # its data sheet's operations/s
KINDS = ("base matmul", "LoRA matmul", "elementwise", "head", "norms", "attention", "unpacking")
LORA = ("one_kernel_narrow", "one_kernel_widen", "one_kernel_collect")
LEARNT = 0.5  # the share of a row's tokens that its completion is
SETTINGS = TrialSettings(
    r=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",), use_rslora=False, lr=2e-4,
    weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, max_grad_norm=1.0, schedule="cosine",
    warmup_ratio=0.03, batch_size=16, gradient_accumulation_steps=1, epochs=1, evals_per_epoch=4,
    early_stopping_patience=None,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A pass: the model's shape, what carries adapters, slots, and tokens in rows of one length. QLoRA holds
    the base's linear layers in 4 bits, and computes the activations of a layer again in the backward pass."""

    name: str
    shape: dict[str, int]
    targets: tuple[str, ...]
    slots: int
    tokens: int
    row: int = 512
    max_rank: int = 32
    is_qlora: bool = False


CASES = (
    Case("8B all-linear, 8k, 1 slot", LLAMA_8B, ("all-linear",), 1, 8192),
    Case("8B all-linear, 8k, 8 slots", LLAMA_8B, ("all-linear",), 8, 8192),
    Case("8B all-linear, 8k, 16 slots", LLAMA_8B, ("all-linear",), 16, 8192),
    Case("8B q,v, 8k, 8 slots", LLAMA_8B, ("q_proj", "v_proj"), 8, 8192),
    Case("1B q,v, 16k, 32 slots", LLAMA_1B, ("q_proj", "v_proj"), 32, 16384, row=128),
    Case("1B q,v, one trial of 800", LLAMA_1B, ("q_proj", "v_proj"), 1, 800, row=100),
    Case("70B nf4 all-linear, recomputed, 4k", LLAMA_70B, ("all-linear",), 1, 4096, is_qlora=True),
)


@dataclass
class Count:
    """What a pass consists of, by kind of kernel. ``kept_bytes`` wait for the backward pass."""

    seconds: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    kept_bytes: int = 0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_kernels(self) -> int:
        return sum(self.kernels.values())


class Counting(TorchDispatchMode):
    """Counts the kernels of everything inside."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.count, self.vocabulary = Count(), vocabulary

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not launches_nothing(func):
            read, written = list(tensors([args, kwargs])), list(tensors(result))
            if result is None:  # it changes its last argument
                written = list(tensors(args[-1]))
            kind = kind_of(func, [*read, *written], self.vocabulary)
            self.count.kernels[kind] += 1
            self.count.seconds[kind] += max(
                flops(func, args, kwargs or {}, result) / FLOPS, moved(read, written) / BYTES, LAUNCH
            )
        return result


def launches_nothing(func: Any) -> bool:
    """Whether an operation only makes a view or takes memory."""
    name = func.overloadpacket.__name__
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    is_view = bool(aliases) and not any(alias.is_write for alias in aliases)
    return is_view or name in ("empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view")


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Give the tensors in nested lists, tuples and mappings."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from tensors(part)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))


def moved(read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    """Return the bytes of all operands; an expanded one lies in memory once."""
    sizes = (
        math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()
        for x in [*read, *written]
    )
    return sum(sizes)


def flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Return the operations of a matmul or an attention: two a multiplication; 0 for all else."""
    packet = func.overloadpacket
    if packet.__name__ in LORA:
        parts, matrices = args[0], args[2 if "collect" in packet.__name__ else 1]
        return sum(2.0 * len(part) * matrix.numel() for part, matrix in zip(parts, matrices, strict=True))
    if "varlen_attn" in packet.__name__:
        q, length = (
            args[1 if "backward" in packet.__name__ else 0],
            max(x for x in args if isinstance(x, int)),
        )
        return (2.5 if "backward" in packet.__name__ else 1.0) * 2.0 * q.numel() * length
    if packet.__name__ == "addmm_":
        packet, args = torch.ops.aten.addmm, args[:3]
    counted = flop_registry.get(packet)
    return float(counted(*args, **kwargs, out_val=result)) if counted else 0.0


def kind_of(func: Any, operands: Sequence[torch.Tensor], vocabulary: int) -> str:
    name = func.overloadpacket.__name__
    if any(vocabulary in x.shape for x in operands if x.dim() == 2) and "embedding" not in name:
        return "head"
    for part, kind in (
        *((name, "LoRA matmul") for name in LORA), ("mm", "base matmul"), ("varlen_attn", "attention"),
        ("one_kernel_norm", "norms"), ("one_kernel_unpack", "unpacking"),
    ):  # fmt: skip
        if part in name:
            return kind
    return "elementwise"


@torch.library.custom_op("predict::one_kernel_narrow", mutates_args=())
def one_kernel_narrow(parts: list[torch.Tensor], weights: list[torch.Tensor], most: int) -> torch.Tensor:
    """`ops.lora_kernels.narrow` reads tokens and weights of slots with adapters. To hash for dropout, about 8
    integer operations a number, takes less than to read its two bytes: 0.54 against 0.67 ps."""
    return parts[0].new_zeros(sum(map(len, parts)), most)


@torch.library.custom_op("predict::one_kernel_widen", mutates_args=())
def one_kernel_widen(parts: list[torch.Tensor], weights: list[torch.Tensor], tokens: int) -> torch.Tensor:
    """`ops.lora_kernels.widen` writes all tokens."""
    return parts[0].new_zeros(tokens, weights[0].shape[1])


@torch.library.custom_op("predict::one_kernel_collect", mutates_args=("grads",))
def one_kernel_collect(
    parts: list[torch.Tensor], wide: list[torch.Tensor], grads: list[torch.Tensor]
) -> None:
    """`ops.lora_kernels.collect`."""


@one_kernel_narrow.register_fake
def _(parts: list[torch.Tensor], weights: list[torch.Tensor], most: int) -> torch.Tensor:
    return parts[0].new_empty(sum(map(len, parts)), most)


@one_kernel_widen.register_fake
def _(parts: list[torch.Tensor], weights: list[torch.Tensor], tokens: int) -> torch.Tensor:
    return parts[0].new_empty(tokens, weights[0].shape[1])


@one_kernel_collect.register_fake
def _(parts: list[torch.Tensor], wide: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    return None


def _narrow(layer: Layer, side: int, x_TW: torch.Tensor, plan: Plan, mask: Mask | None) -> torch.Tensor:
    parts = [(x_TW[rows], adapter.weights[side]) for adapter, rows in parts_of(layer.adapters, plan)]
    one_kernel_narrow(*map(list, zip(*parts, strict=True)), layer.rank)
    return x_TW.new_empty(len(x_TW), layer.rank)


def _widen(
    layer: Layer, side: int, hidden_TR: torch.Tensor, width: int, plan: Plan, mask: Mask | None
) -> torch.Tensor:
    parts = [(hidden_TR[rows], adapter.weights[side]) for adapter, rows in parts_of(layer.adapters, plan)]
    found: torch.Tensor = one_kernel_widen(*map(list, zip(*parts, strict=True)), len(hidden_TR))
    return found


def _collect(
    layer: Layer, side: int, hidden_TR: torch.Tensor, x_TW: torch.Tensor, plan: Plan, mask: Mask | None
) -> None:
    parts = [(hidden_TR[r], x_TW[r], adapter.grads[side]) for adapter, r in parts_of(layer.adapters, plan)]
    one_kernel_collect(*map(list, zip(*parts, strict=True)))


KERNELS = Products(_narrow, _widen, _collect)


@torch.library.custom_op("predict::one_kernel_norm", mutates_args=())
def one_kernel_norm(x: torch.Tensor) -> torch.Tensor:
    """What F.rms_norm runs on CUDA: one kernel forward, one backward; it keeps x. The weight is small."""
    return x.clone()


@torch.library.custom_op("predict::one_kernel_norm_backward", mutates_args=())
def one_kernel_norm_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@one_kernel_norm.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@one_kernel_norm_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


one_kernel_norm.register_autograd(
    lambda ctx, grad: one_kernel_norm_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("predict::one_kernel_gate", mutates_args=())
def one_kernel_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The kernel that `ops.fused.gated` compiles into."""
    return gate.clone()


@torch.library.custom_op("predict::one_kernel_gate_backward", mutates_args=())
def one_kernel_gate_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel that `ops.fused.gated_backward` compiles into."""
    return grad.clone(), grad.clone()


@one_kernel_gate.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate)


@one_kernel_gate_backward.register_fake
def _(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(grad), torch.empty_like(grad)


@torch.library.custom_op("predict::one_kernel_gate_again", mutates_args=())
def one_kernel_gate_again(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel that `ops.fused.gated_again` compiles into."""
    return grad.clone(), grad.clone(), grad.clone()


@one_kernel_gate_again.register_fake
def _(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(grad), torch.empty_like(grad), torch.empty_like(grad)


GATE = fused.Gate(one_kernel_gate, one_kernel_gate_backward, one_kernel_gate_again)


@torch.library.custom_op("predict::one_kernel_rotary", mutates_args=())
def one_kernel_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The kernel that `ops.fused.rotated` compiles into."""
    return x.clone()


@one_kernel_rotary.register_fake
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("predict::one_kernel_unpack", mutates_args=())
def one_kernel_unpack(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """bitsandbytes' kernel that unpacks a weight: it reads 4 bits a number and writes bfloat16."""
    return packed.new_zeros(rows, columns, dtype=torch.bfloat16)


@one_kernel_unpack.register_fake
def _(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return packed.new_empty(rows, columns, dtype=torch.bfloat16)


class MatMul4Bit(torch.autograd.Function):
    """As in bitsandbytes: the weight is unpacked for the matmul of each direction and not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "Linear4Bit") -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.unpacked())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.layer.unpacked(), None


class Linear4Bit(nn.Linear):
    """A linear layer in 4 bits, on the meta device."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(
            torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False
        )

    def unpacked(self) -> torch.Tensor:
        return one_kernel_unpack(self.weight, self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = MatMul4Bit.apply(x, self)
        return product


def quantize(model: nn.Module, names: Sequence[str]) -> None:
    """Put these layers into 4 bits."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Linear4Bit(model.get_submodule(name)))


@torch.library.custom_op("predict::one_kernel_logsumexp", mutates_args=())
def one_kernel_logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """The first kernel that `ops.nll.nll_and_gradient` compiles into."""
    return logits.float().logsumexp(1)


@torch.library.custom_op("predict::one_kernel_softmax", mutates_args=())
def one_kernel_softmax(logits: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The second: softmax minus one-hot, in the dtype of the logits."""
    return logits.clone()


@one_kernel_logsumexp.register_fake
def _(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


@one_kernel_softmax.register_fake
def _(logits: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(logits)


def two_kernel_nll(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = one_kernel_logsumexp(logits)
    return total, one_kernel_softmax(logits, total)


@contextmanager
def cuda_branches() -> Iterator[None]:
    """Inside, go the ways of CUDA: compiled gates, a fused rotary embedding."""
    with (
        patch.object(fused, "gate_functions", lambda _: GATE),
        patch.object(lora, "gate_functions", lambda _: GATE),
        patch.object(fused, "_rotary_functions", lambda _: (one_kernel_rotary, one_kernel_rotary)),
        patch.object(modeling_llama, "apply_rotary_pos_emb", fused.rotary),
    ):
        yield


def packed_model(case: Case) -> PackedModel:
    """Return the case's model on the meta device with a trial in every slot, its modules fused as on CUDA."""
    config = LlamaConfig(**case.shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=varlen_rows.__name__
        )
        model.requires_grad_(False).eval()
        if case.is_qlora:
            quantize(model, list(target_layers(model, ("all-linear",))))
            recompute_layers(model)
        layers = target_layers(model, case.targets)
        bank = SlotBank(model, layers, case.slots, case.max_rank, torch.bfloat16, KERNELS)
        for slot in range(case.slots):
            bank.admit(slot, SETTINGS, bank.names, seed=slot)
        packed = OnMeta(model, bank)
        packed.head = CudaHead(model.get_output_embeddings())
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = one_kernel_norm
        elif hasattr(module, "gate_proj"):
            module.forward = partial(fused._apply_gated_mlp, module)
    return packed


class CudaHead(Head):
    """The head with the buffers that it has on CUDA."""

    def __init__(self, output: nn.Linear) -> None:
        super().__init__(output)
        from lora_search.ops.nll import CUDA_ROWS

        rows, block_rows = CUDA_ROWS
        self.logits_NV = self.logits_NV.new_empty(rows, self.logits_NV.shape[1])
        self.block_NV = self.block_NV.new_empty(block_rows, self.block_NV.shape[1])
        self.fast = two_kernel_nll


def packs(case: Case) -> list[SlotRows]:
    """Return the rows of a pass, shared evenly among the slots."""
    num_rows = max(1, case.tokens // case.row)
    row = Example(tuple(range(3, 3 + case.row)), round(case.row * (1 - LEARNT)))
    counts = [num_rows // case.slots + (slot < num_rows % case.slots) for slot in range(case.slots)]
    return [
        SlotRows(slot, [row] * n, slot, tuple(range(n)), SETTINGS.dropout)
        for slot, n in enumerate(counts)
        if n
    ]


def count(case: Case) -> Count:
    """Return what one training pass of the case consists of, forward and backward."""
    with cuda_branches():
        model = packed_model(case)
        kept: dict[int, int] = {}
        frozen = {p.untyped_storage()._cdata for p in model.decoder.parameters()}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in frozen:
                kept[storage._cdata] = storage.nbytes()
            return x

        with Counting(case.shape["vocab_size"]) as counting:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                nll = torch.cat(model.nll(packs(case)))
            nll.sum().backward()
    counting.count.kept_bytes = sum(kept.values())
    return counting.count


def parameters(case: Case) -> float:
    """Return the parameters of the layers that every token goes through."""
    shape = case.shape
    width, head = shape["hidden_size"], shape["head_dim"]
    attention = width * head * (2 * shape["num_attention_heads"] + 2 * shape["num_key_value_heads"])
    layer = attention + 3 * width * shape["intermediate_size"]
    return float(shape["num_hidden_layers"] * layer + width * shape["vocab_size"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="only those whose name holds one of these texts")
    chosen = parser.parse_args().cases
    table = Table("predicted, one H100", "ms", *KINDS, "kernels", "MiB/token", "tokens/s", "of 989 TFLOP/s")
    for case in CASES:
        if chosen and not any(text in case.name for text in chosen):
            continue
        found = count(case)
        rate = case.tokens / found.total_seconds
        table.add_row(
            case.name,
            f"{1e3 * found.total_seconds:.0f}",
            *(f"{1e3 * found.seconds[kind]:.0f}" for kind in KINDS),
            f"{found.total_kernels:,}",
            f"{found.kept_bytes / 2**20 / case.tokens:.2f}",
            f"{rate:,.0f}",
            f"{4 * parameters(case) * rate / PEAK:.0%}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
