"""A head deep inside a model that calls it with features alone: how mask and labels of the batch reach it.

They stand in the arguments of the model's own forward. That is given a subclass's, which reads them before the model
runs, keeps them while it runs, and takes them off again, whatever happens. So the head finds its own batch, in nested
calls too, and never that of another.
"""

import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from protohead.inputs import Present

__all__ = ["BatchHead", "read_batches"]

Reader = Callable[..., Any]


class _Running(threading.local):
    """What this thread's models are running on, the innermost call last: head, mask and labels."""

    # A context variable would do, too, but torch.compile cannot set one within a graph.
    batches: "tuple[tuple[BatchHead, Present | None, Tensor | None], ...]" = ()


_RUNNING = _Running()


class BatchHead(nn.Module):
    """A head that is called with features alone, and takes the rest from the batch on which its model runs.

    Args:
        head: Called with features, `present` and `labels`.
        present: A function of the arguments of the model's forward, which returns `present`; or None.
        labels: A function of the same, called in training mode only; or None.
    """

    def __init__(self, head: nn.Module, present: Reader | None, labels: Reader | None) -> None:
        super().__init__()
        self.head = head
        self.present, self.labels = present, labels

    def forward(self, features: Tensor) -> Tensor:
        """(B, ΣD_m) features to (B, K) logits.

        Raises:
            RuntimeError: If the model's forward is not running, where nobody knows the mask.
        """
        for owner, present, labels in reversed(_RUNNING.batches):
            if owner is self:
                logits: Tensor = self.head(features, _on(features.device, present), _on(features.device, labels))
                return logits
        raise RuntimeError(
            "Expected this head to be called in the forward of its model, whose arguments hold the mask, but that is "
            "not running. Call the model; or `.head(features, present, labels)` here."
        )

    def read(self, *args: Any, **kwargs: Any) -> tuple[Present | None, Tensor | None]:
        """Mask and labels of the batch that the model is called with."""
        present = None if self.present is None else self.present(*args, **kwargs)
        labels = self.labels(*args, **kwargs) if self.training and self.labels is not None else None
        return present, labels


def _on(device: torch.device, x: Any) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def read_batches(model: Any, path: str) -> None:
    """Let the forward of a model read the batch for the :class:`BatchHead` at a path.

    Raises:
        ValueError: If forward is not a method of the model's class.
    """
    if not hasattr(model, "_batch_heads"):
        if "forward" in vars(model):
            got = "this one has its own: replace the module before anything wraps the model"
            raise ValueError(f"Expected `forward` to be a method of {type(model).__name__}, but {got}.")
        # As torch's own parametrizations do. A function on the instance would stay bound to it in shallow copies.
        cls: Any = type(model)
        model.__class__ = _reading(cls)
    model._batch_heads = tuple(dict.fromkeys((*model._batch_heads, path)))


@cache
def _reading(cls: Any) -> Any:
    """A subclass whose forward reads the batch, for the heads at `_batch_heads`, before it runs."""

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        parts = [self.get_submodule(path) for path in self._batch_heads]
        batches = [(part, *part.read(*args, **kwargs)) for part in parts if isinstance(part, BatchHead)]
        before = _RUNNING.batches
        _RUNNING.batches = (*before, *batches)
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            _RUNNING.batches = before

    def reduce(self: Any, protocol: int) -> Any:
        # Pickle finds the user's class by its name, and not the one that was made of it here.
        make, args, *state = cls.__reduce_ex__(self, protocol)
        return _remake, (make, *(cls if arg is made else arg for arg in args)), *state

    same = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"forward": forward, "__reduce_ex__": reduce, "_batch_heads": ()}
    made = type(cls.__name__, (cls,), {**same, **own})
    return made


def _remake(make: Callable[..., Any], *args: Any) -> Any:
    """What pickle and copy begin with: a model that has no state yet."""
    model = make(*args)
    cls: Any = type(model)
    model.__class__ = _reading(cls)
    return model
