"""The Triton kernels without a GPU: compiled for four architectures; interpreted, beside the plain products.
They need `pip install triton`, a gigabyte that only PyTorch for CUDA brings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which comes with PyTorch for CUDA")
pytestmark = pytest.mark.slow

KINDS = {
    "table": "*i64", "scales": "*fp32", "tiles": "*i32", "parts": "*i32", "keys": "*i32", "pairs": "*i32",
    "thresholds": "*i16", "width": "i32", "most": "i32", "x": "*bf16", "y": "*bf16", "hidden": "*bf16",
}  # fmt: skip
SHARED = 99 * 1024  # bytes that a program may have on capability 8.9


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[torch.Tensor], ...]]:
    file = tmp_path_factory.mktemp("interpreted") / "numbers.pt"
    command = [sys.executable, "-m", "tests.ops.interpreted", str(file)]
    subprocess.run(
        command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2]
    )
    found: dict[str, tuple[list[torch.Tensor], ...]] = torch.load(file)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("drops", [False, True])
def test_kernels_give_the_plain_numbers_but_for_rounding(
    interpreted: dict[str, tuple[list[torch.Tensor], ...]], dtype: torch.dtype, drops: bool
) -> None:
    found, plain = interpreted[f"{dtype} {drops}"]
    # In float16 one rounding against two; in float32 up to 140 terms in another order.
    tolerance = {torch.float16: 2, torch.float32: 140**0.5}[dtype] * torch.finfo(dtype).eps

    assert len(found) == 4
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))
    assert torch.equal(found[1] == 0, plain[1] == 0), "the same elements are dropped"


def test_a_pass_of_mixed_slots_has_the_same_losses_and_gradients(
    interpreted: dict[str, tuple[list[torch.Tensor], ...]],
) -> None:
    found, plain = interpreted["a pass"]

    torch.testing.assert_close(found[0], plain[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(found[1:], plain[1:], strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.parametrize("drops", [0, 1])
@pytest.mark.parametrize("name", ["narrow_kernel", "widen_kernel", "collect_kernel"])
def test_kernels_compile_for_devices_that_are_not_there(
    name: str, drops: int, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lora_search.ops import lora_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # or 3.9 warns that its default will change
    function = getattr(lora_kernels, name)
    constants = {
        "SIDE": 0, "DROP": drops, "ALIGNED": 1, "TOKENS": lora_kernels.TILE, "RANKS": 64, "WIDTHS": 64
    }  # fmt: skip
    signature = {a: KINDS.get(a, "constexpr") for a in function.arg_names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(function.arg_names) if a in KINDS}

    compiled = triton.compile(
        ASTSource(function, signature, constants, divisible), GPUTarget("cuda", capability, 32)
    )

    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED
    assert re.search(r"mma\S*bf16|tcgen05\.mma", compiled.asm["ptx"]), "on tensor cores"
    assert "cp.async" in compiled.asm["ptx"], "memory is read while a tile is multiplied"
