"""What can be proved of the CUDA paths without a GPU.

Tensors on the meta device have no values: whatever the host would have to wait for raises. PyTorch's own
checks of shapes, strides and dtypes run for them.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from lora_search.engine.bank import SlotBank
from lora_search.engine.optim import SlotAdamW
from lora_search.engine.packed_model import PackedModel, SlotRows
from lora_search.engine.slot import Watch
from lora_search.model.targets import target_layers
from lora_search.ops.attention import NAME, kernel
from lora_search.ops.nll import Head
from tests.conftest import SETTINGS
from tests.harness import random_splits

ROWS = random_splits(num_train=6).train
TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def varlen_rows(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: object,
    **named: object,
) -> tuple[torch.Tensor, None]:
    """What `attention` does on CUDA in bfloat16; on the meta device it would take its other way."""
    bounds = [named.get(f"cu_seq_lens_{side}", named["cu_seq_lens_q"]) for side in "qk"]
    longest = [named.get(f"max_length_{side}", named["max_length_q"]) for side in "qk"]
    return kernel(query, key, value, tuple(bounds), tuple(longest)), None  # type: ignore[arg-type]


AttentionInterface.register("varlen_rows", varlen_rows)


class OnMeta(PackedModel):
    """A packed model whose device cannot be read from; nothing is fused, since that compares numbers."""

    def __init__(self, model: nn.Module, bank: SlotBank) -> None:
        self.bank, self.device, self.is_row_by_row = bank, torch.device("meta"), False
        self.decoder, self.head = model.base_model, Head(model.get_output_embeddings())

    def _upload(self, x: torch.Tensor) -> torch.Tensor:
        return x.to("meta")


class Calls(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def packed_model(
    kind: type[PackedModel] = PackedModel, dtype: torch.dtype = torch.bfloat16, attention: str = NAME
) -> PackedModel:
    """Return a model of three slots, all of whose linear layers carry adapters; slot 1 is free."""
    config = AutoConfig.for_model("llama", **TINY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False).eval()
    layers = target_layers(model, ("all-linear",))
    bank = SlotBank(model, layers, 3, 8, dtype)
    for slot in (0, 2):
        bank.admit(slot, SETTINGS, bank.names, seed=slot)
    return kind(model, bank)


def packs() -> list[SlotRows]:
    return [SlotRows(0, ROWS[:2], 1, (0, 1), 0.05), SlotRows(2, ROWS[2:5], 2, (0, 1, 2), 0.1)]


def test_a_step_never_waits_for_the_device() -> None:
    with torch.device("meta"):
        model = packed_model(OnMeta, attention="varlen_rows")
    optimizer = SlotAdamW(model.bank.rows)
    for slot in (0, 2):
        optimizer.reset(slot)

    with Calls() as calls:
        torch.cat(model.nll(packs())).sum().backward()
        norms = [optimizer.step(slot, SETTINGS, 1e-3) for slot in (0, 2)]

    assert sum("_varlen_attn_backward" in name for name in calls.names) == 2
    assert all(norm.is_meta for norm in norms)


def test_transformers_does_not_look_for_packed_rows_itself() -> None:
    assert NAME not in AttentionMaskInterface(), (
        "its look at the position ids waits for the device, every pass"
    )


def test_what_would_wait_for_the_device_raises_on_the_meta_device() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((torch.empty(3, device="meta") == 0).all())


def test_tokens_of_the_bare_base_stay_untouched() -> None:
    model = packed_model(dtype=torch.float32)
    model.bank.rows[0].used[0].add_(0.01)
    bare, adapted = SlotRows(None, ROWS[:2]), SlotRows(2, ROWS[2:5])

    together = model.nll([bare, adapted])

    torch.testing.assert_close(together[0], model.nll([bare])[0])
    torch.testing.assert_close(together[1], model.nll([adapted])[0])


class Copy:
    """An event that is over when it is told so."""

    def __init__(self) -> None:
        self.is_over = False

    def query(self) -> bool:
        return self.is_over


def test_a_sick_step_is_seen_when_its_copy_comes_even_if_others_follow() -> None:
    watch, copies = Watch(), [Copy(), Copy(), Copy()]
    values = (1.0, float("nan"), 1.0)
    watch._in_flight.extend((torch.tensor(v), copy) for v, copy in zip(values, copies, strict=True))  # type: ignore[misc]

    assert not watch.has_diverged
    copies[0].is_over = True
    assert not watch.has_diverged
    copies[1].is_over = True
    assert watch.has_diverged
    copies[2].is_over = True
    assert watch.has_diverged
