"""The head in the place of one module of any model: :func:`replace_module`."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from protohead.adapters.batch import BatchHead, read_batches
from protohead.adapters.watch import MaskWatch
from protohead.head import DecoupledPrototypeHead

__all__ = ["replace_module"]


def replace_module(
    model: nn.Module,
    path: str,
    head: nn.Module,
    *,
    present: Callable[..., Any] | None = None,
    labels: Callable[..., Any] | None = None,
) -> nn.Module:
    """Put `head` in the place of the module at a dotted path, and return the module that stood there.

    What calls it gives it features alone: see that they are concatenated in the order of ``head.modalities``. Which
    modalities are there it reads from zeros, or with `present` from the model's batch; margins it adds with `labels`.
    A module that stands at several paths is replaced at this one.

    With `present` or `labels` the head stands at ``path + ".head"``, in checkpoints too; copies and pickles of the
    model have their own (to be pickled, the functions must have names). It can then be called in the model's forward
    only.

    Args:
        model: Any model; changed in place.
        path: As in ``model.get_submodule``, for instance ``"classifier"`` or ``"blocks.3.mlp"``.
        head: The new module. It is moved to the device of the old one's parameters, if that had any.
        present: A function of the arguments of the model's own forward, just as they are given to that, which returns
            `present` for the head, as in ``lambda batch: present_from_missing_type(batch["missing_types"],
            head.modalities)``. It is called before the model runs; its tensors are moved to the features' device.
        labels: Such a function, for the labels; called in training mode only. It may return None.

    Raises:
        ValueError: If there is no module at the path, with the nearest names; if the old module is an ``nn.Linear`` of
            another width than the head; or if the functions cannot be called, since something has replaced the model's
            forward. The model is then unchanged.
        TypeError: If `head` is not a module or `path` not a string, or `present` or `labels` cannot be called.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(7, 5))
        >>> replace_module(model, "1", DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=5))
        Linear(in_features=7, out_features=5, bias=True)
        >>> model(torch.randn(2, 7)).shape
        torch.Size([2, 5])
    """
    _check(model, path, head, present=present, labels=labels)
    new, old = head, model.get_submodule(path)
    if present is not None or labels is not None:
        new = BatchHead(head, present, labels)
        read_batches(model, path)
    elif isinstance(head, DecoupledPrototypeHead):
        watch = MaskWatch()
        model.register_forward_pre_hook(watch.read_batch, with_kwargs=True)
        head.register_forward_pre_hook(watch.read_features)
    parameter = next(old.parameters(), None)
    if parameter is not None:
        new.to(parameter.device)
    new.train(old.training)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
    return old


def _check(model: nn.Module, path: Any, head: Any, **functions: Any) -> None:
    if not isinstance(head, nn.Module) or not isinstance(path, str):
        got = f"{type(head).__name__} and {type(path).__name__}"
        raise TypeError(f"Expected arguments `head` and `path` to be a module and a string, but got {got}.")
    for name, function in functions.items():
        if function is not None and not callable(function):
            what = "a function of the arguments of the model's forward"
            raise TypeError(f"Expected argument `{name}` to be {what}, but got {type(function).__name__}.")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if path not in names:
        near = get_close_matches(path, names) or names[-5:]
        raise ValueError(
            f"Expected `path` to be that of a module in {type(model).__name__}, but got {path!r}; nearest: {near}."
        )
    old = model.get_submodule(path)
    if isinstance(old, nn.Linear) and isinstance(head, DecoupledPrototypeHead):
        width = sum(head.in_features.values())
        if old.in_features != width:
            raise ValueError(f"Expected a head of {old.in_features} features at {path!r}, but got {head.in_features}.")
