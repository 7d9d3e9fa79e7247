"""Encoders of one's own beside the towers of a model: of a table, a signal, another model's embedding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protohead.adapters.probe import parameters_of, try_encoders
from protohead.encoding import check_inputs, select_rows

__all__ = ["add_extra", "check_extra", "without"]


def check_extra(extra: Mapping[str, Any] | None, encoders: Any) -> dict[str, Any]:
    """The further encoders, which must be of other modalities than the backbone's.

    Raises:
        ValueError: If a name is the backbone's, or the backbone encodes all its modalities together.
        TypeError: If `extra` is not a mapping.
    """
    if extra is None:
        return {}
    if isinstance(extra, nn.ModuleDict):
        extra = dict(extra.items())
    if not isinstance(extra, Mapping):
        got = type(extra).__name__
        raise TypeError(f"Expected argument `extra` to map modalities to encoders, but got {got}.")
    if not isinstance(encoders, Mapping):
        raise ValueError("Expected no `extra` beside a backbone in which the modalities meet, but got some.")
    if both := [name for name in extra if name in encoders]:
        raise ValueError(f"Expected `extra` to name other modalities than {tuple(encoders)}, but got {both}.")
    return dict(extra)


def without(values: Mapping[str, Any] | None, extra: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is said of the backbone's own modalities; None where nothing is."""
    if not extra or values is None:
        return values
    return {name: value for name, value in values.items() if name not in extra} or None


def add_extra(
    widths: Mapping[str, int],
    extra: Mapping[str, Any],
    example: Mapping[str, Any],
    in_features: Mapping[str, int] | None,
) -> dict[str, int]:
    """The widths of all encoders, in the user's order or with those of `extra` last.

    Raises:
        ValueError: If a width is not known: the encoder cannot be tried on the user's example, or on a row of zeros.
    """
    found = dict(widths)
    for name, encoder in extra.items():
        x, wanted = example.get(name), (in_features or {}).get(name)
        try:
            row = _zeros(encoder) if x is None else _first_row(name, x)
            found |= try_encoders({name: encoder}, {name: row}, {p for _, p in parameters_of(encoder)})[0]
        except Exception as error:
            if x is not None:
                raise
            if wanted is None:
                what = f"`example={{{name!r}: ...}}`, a row for its encoder"
                raise ValueError(f"Expected {what}, which cannot be tried on zeros ({error}).") from error
            found[name] = wanted
        if wanted not in (None, found[name]):
            raise ValueError(f"Expected `in_features` of {name!r} to be {found[name]}, but got {wanted}.")
    if in_features is None:
        return found
    if set(in_features) != set(found):
        raise ValueError(f"Expected `in_features` of {tuple(found)}, but got {tuple(in_features)}.")
    return {name: found[name] for name in in_features}


def _first_row(name: str, x: Any) -> Any:
    count = len(check_inputs({name: x}, None, [name]))
    return select_rows(x, torch.tensor([0]), count)


def _zeros(encoder: Any) -> Tensor:
    """A row for an encoder that begins with a linear layer or a norm of rows."""
    owner = getattr(encoder, "__self__", encoder)
    if not isinstance(owner, nn.Module):
        raise ValueError("it is a function")
    first = next((module for module in owner.modules() if not list(module.children())), None)
    width = None
    if isinstance(first, nn.Linear):
        width = first.in_features
    elif isinstance(first, nn.BatchNorm1d):
        width = first.num_features
    elif isinstance(first, nn.LayerNorm) and len(first.normalized_shape) == 1:
        width = first.normalized_shape[0]
    tensor = next(owner.parameters(), None)
    if width is None or tensor is None:
        raise ValueError("its first layer does not tell what it takes")
    return torch.zeros(1, width, dtype=tensor.dtype, device=tensor.device)
