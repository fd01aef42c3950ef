"""Several devices on a machine that has none: tensors that say `cpu:0` or `cpu:1` and hold an ordinary one.

Every operation checks, as CUDA does, that its operands are on one device, computes with the ordinary tensors,
and puts the result on that device. Only copies cross from one to another. A tensor that was left on the host,
or on another device, is an error; numbers on the host (without dimensions) may meet any device, and indices
on the host select from any.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICES, WITHOUT_VALUES = ([torch.device("cpu", index) for index in pair] for pair in ((0, 1), (2, 3)))
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class WrongDeviceError(RuntimeError):
    """Operands of one operation are on different devices."""


class Placed(torch.Tensor):
    """A tensor on one of the devices. Its values are those of ``inner``; on `meta` it has none."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "Placed":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        placed: Placed = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=device, **layout
        )
        placed.inner = inner
        return placed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()


class Devices(TorchDispatchMode):
    """Inside, what is made for a device is there."""

    def __init__(self, memory: str) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.memory)


class Made(TorchFunctionMode):
    """Inside, `torch.tensor` makes tensors where it is asked to; no dispatch mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, device = func(*args, **(kwargs or {})), (kwargs or {}).get("device")
        is_placed = func is torch.tensor and device is not None and torch.device(device).index is not None
        return Placed(result, torch.device(device)) if is_placed else result


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], memory: str = "cpu") -> Any:
    """Compute with the ordinary tensors; the result is where the operands are, or where it is asked for."""
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    device = kwargs.get("device") or place_of(func, operands)
    known = {id(x.inner): x for x in operands if isinstance(x, Placed)}
    plain_args, plain_kwargs = tree_map_only(Placed, lambda x: x.inner, (list(args), dict(kwargs)))
    is_placed = device is not None and device.index is not None
    if "device" in kwargs:
        plain_kwargs["device"] = memory if is_placed else kwargs["device"]
    results = func(*plain_args, **plain_kwargs)
    if not is_placed:
        return results
    return tree_map_only(
        torch.Tensor, lambda x: known[id(x)] if id(x) in known else Placed(x, device), results
    )


def place_of(func: Any, operands: Sequence[torch.Tensor]) -> torch.device | None:
    """Return the device of an operation; None is the host. Raises WrongDeviceError."""
    if func in COPIES:
        return operands[0].device if isinstance(operands[0], Placed) else None
    devices = {x.device for x in operands if isinstance(x, Placed)}
    hosts = operands[:1] if func is torch.ops.aten.index.Tensor else operands
    strays = [x for x in hosts if not isinstance(x, Placed) and x.dim() > 0]
    if len(devices) > 1 or (devices and strays):
        found = [f"{list(x.shape)} on {x.device}" for x in operands]
        raise WrongDeviceError(f"{func}: {', '.join(found)}")
    return devices.pop() if devices else None


@contextmanager
def spread(model: nn.Module, places: Mapping[str, torch.device], memory: str = "cpu") -> Iterator[None]:
    """Move a model's modules to their devices; inside, what is made for a device is there."""
    for name, device in places.items():
        for module in model.get_submodule(name).modules():
            for key, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[key] = nn.Parameter(Placed(weight.data, device), requires_grad=False)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = Placed(buffer, device)
    with Devices(memory), Made():
        yield
