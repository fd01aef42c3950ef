"""Elementwise functions as one CUDA kernel each, by torch.compile. What cannot be compiled, or gives other
numbers than the plain function, is not used: training is slower then, and the log says so."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

Function = Callable[..., Any]


def compiled(
    name: str, function: Function, probe: Sequence[Any], expected: Any, is_close: Function
) -> Function | None:
    """Return the function compiled for any sizes; None if that fails or ``is_close`` does not hold between
    what it makes of the probe and what is expected. ``name`` says in the log what is slower then."""
    try:
        fast: Function = torch.compile(function, dynamic=True)
        found = fast(*probe)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever a compiler raises, the uncompiled path works)
        logger.warning("%s cannot be compiled (%s): training is slower", name, type(error).__name__)
        return None
    if is_close(found, expected):
        return fast
    logger.warning("compiled %s give other numbers and are not used: training is slower", name)
    return None
