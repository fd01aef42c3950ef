"""Each fused region against what transformers computes, and its gradient against the numerical one."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from lora_search.model.tiny import ARCHITECTURES, make_tiny_model
from lora_search.ops.fused import GatedSilu, RmsNorm, Rotary, fuse, rotary


def their_rotary() -> Any:
    """Return transformers' own function, also where a model loaded before has replaced it."""
    function = modeling_llama.apply_rotary_pos_emb
    return function.args[0] if isinstance(function, partial) else function


THEIR_ROTARY = their_rotary()
UNFUSED = ("gpt_neox", "opt", "starcoder2")  # layer norms and plain MLPs


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_gradients_are_the_numerical_ones() -> None:
    x, y, weight = double(2, 3, 8).requires_grad_(), double(2, 3, 8).requires_grad_(), double(8)

    assert gradcheck(lambda x: RmsNorm.apply(x, weight, 1e-6), (x,))
    assert gradcheck(lambda x: Rotary.apply(x, double(3, 8), double(8, 3).T), (x,))
    assert gradcheck(lambda gate, up: GatedSilu.apply(gate, up), (x, y))


def test_rotary_equals_that_of_transformers() -> None:
    q, k, (cos, sin) = double(1, 4, 5, 8), double(1, 2, 5, 8), double(2, 1, 5, 8)
    rotated = [(x * cos.unsqueeze(1)) + (modeling_llama.rotate_half(x) * sin.unsqueeze(1)) for x in (q, k)]

    torch.testing.assert_close(rotary(q, k, cos, sin), tuple(rotated))


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something: on a GPU a kernel each."""

    VIEWS = ("slice", "view", "unsqueeze", "expand", "transpose", "detach", "alias")
    count = 0

    def __torch_dispatch__(self, function: Any, _types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.count += not function._schema.name.removeprefix("aten::").startswith(self.VIEWS)
        return function(*arguments, **(named or {}))


def test_rotary_takes_two_thirds_of_the_kernels_of_transformers() -> None:
    q, k, (cos, sin) = double(1, 4, 5, 8), double(1, 2, 5, 8), double(2, 1, 5, 8)
    counts = []
    for rotate in (rotary, THEIR_ROTARY):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        with Kernels() as kernels:
            torch.autograd.backward(rotate(q, k, cos, sin), (q.detach(), k.detach()))
        counts.append(kernels.count)

    assert counts[0] <= counts[1] * 2 / 3, counts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fused_model_gives_the_same_states_and_gradients(tmp_path: Path, architecture: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, architecture)).eval()
    fused = copy.deepcopy(model)
    states = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = model.base_model(inputs_embeds=states).last_hidden_state
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), states)

    count = fuse(fused)

    output = fused.base_model(inputs_embeds=states).last_hidden_state
    (grad,) = torch.autograd.grad(output.square().sum(), states)
    assert count >= 5 or architecture in UNFUSED  # two norms a layer and the last one
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_a_module_that_computes_something_else_stays_as_it_is(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    model.model.norm.weight.data.fill_(0.5)
    model.model.norm.register_forward_hook(lambda module, args, output: output + 1.0)

    fuse(model)

    assert "forward" not in vars(model.model.layers[0].mlp)
    assert "forward" not in vars(model.model.norm)
    assert "forward" in vars(model.model.layers[1].mlp)
