"""In what surroundings the code runs: autocast, graphs that are recorded, functions that are transformed."""

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

__all__ = ["full_precision", "is_eager", "is_readable", "is_recorded", "is_transformed", "widest"]


def is_transformed() -> bool:
    """Whether a function is transformed by torch.func (vmap, grad): then nothing outside of it can be written."""
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed


def is_recorded() -> bool:
    """Whether a graph is recorded, as by torch.compile, torch.export and torch.jit.trace: it cannot follow values."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or torch.compiler.is_compiling()


def is_eager() -> bool:
    """Whether the code runs as it stands."""
    return not (is_recorded() or is_transformed())


def is_readable(x: Tensor) -> bool:
    """Whether values can be read without waiting: on the CPU, in eager mode."""
    return x.is_cpu and is_eager()


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, where it is on."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def widest(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of the tensors, at least float32: cosines reach 1 early in half precision."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
