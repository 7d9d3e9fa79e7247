"""What encoders are given, and what they say: of the rows that have their modality or, in recorded graphs, of all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from protohead.context import is_readable, is_recorded
from protohead.inputs import Present, check_agreement, is_enough, kind_of, read_present
from protohead.present import is_empty
from protohead.raw import raw_hint

__all__ = [
    "Encoder",
    "batch_size",
    "blank_row",
    "check_inputs",
    "encode_present",
    "encode_rows",
    "joint_rows",
    "select_rows",
]

Encoder = Callable[..., Any]


def encode_present(name: str, encoder: Encoder, x: Any, present: Tensor) -> Tensor | None:
    """The features of one modality; None if no row has it.

    A recorded graph cannot depend on how many rows have it. There every row is encoded, a blank one where the modality
    is missing: so nothing that stands there, NaN or an unknown token, reaches a feature or a gradient.

    Args:
        name: The modality.
        encoder: Its encoder.
        x: Its inputs of B rows.
        present: (B,) bool.

    Returns:
        (B, D), zeros where the modality is missing.

    Raises:
        ValueError: If the encoder returns anything else.
    """
    if is_recorded():
        if x is None:
            return None
        features = encode_rows(name, encoder, _with_blanks(x, present), present.shape[0])
        return torch.where(present.to(features.device)[:, None], features, 0)
    index = present.nonzero()[:, 0]
    if len(index) == 0:
        return None
    batch = batch_size(name, x)
    some = None if len(index) == batch else index
    features = encode_rows(name, encoder, select_rows(x, some, batch), len(index))
    if some is None:
        return features
    return features.new_zeros(batch, features.shape[1]).index_copy(0, index.to(features.device), features)


def _with_blanks(x: Any, present: Tensor) -> Any:
    """A tensor or a mapping of tensors, with blanks in the rows that lack the modality."""
    if isinstance(x, Mapping):
        return {key: _with_blanks(value, present) for key, value in x.items()}
    if not isinstance(x, Tensor):
        return x
    here = present.to(x.device).reshape(-1, *[1] * (x.dim() - 1))
    if x.dtype == torch.bool:  # ONNX Runtime has no `where` of booleans.
        return x | ~here
    return torch.where(here, x, blank_row(x))


def encode_rows(name: str, encoder: Encoder, rows: Any, count: int) -> Tensor:
    """What an encoder says of `count` rows: (count, D) features.

    Raises:
        ValueError: If it returns anything else.
        TypeError: If it cannot take texts or pictures that nobody has prepared.
    """
    try:
        out = encoder(**rows) if isinstance(rows, Mapping) else encoder(rows)
    except Exception as error:
        # An encoder of one's own may take texts, or pictures: only now it is known.
        if isinstance(error, (AttributeError, TypeError)) and (hint := raw_hint(name, rows)):
            raise TypeError(f"Expected inputs of {name!r} that its encoder takes, but {hint}.") from error
        if hasattr(error, "add_note"):  # From Python 3.11 on. The shapes in the message are not those of the batch.
            error.add_note(f"This was the encoder of {name!r}, given the {count} rows that have it.")
        raise
    return _features(name, out, count)


def joint_rows(encoder: Encoder, inputs: Mapping[str, Any], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a joint encoder says of all rows: name to (B, D_m) features.

    Raises:
        ValueError: If it returns anything else.
    """
    out = encoder(inputs, present)
    if not isinstance(out, Mapping) or set(out) != set(present):
        got = tuple(out) if isinstance(out, Mapping) else type(out).__name__
        raise ValueError(f"Expected the joint encoder to return features of {tuple(present)}, but got {got}.")
    return {name: _features(name, out[name], column.shape[0]) for name, column in present.items()}


def _features(name: str, out: Any, count: int) -> Tensor:
    x = getattr(out, "pooler_output", out)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2 or x.shape[0] != count:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(out).__name__
        wanted = f"({count}, D) floating-point features of {count} rows, or an object with such `pooler_output`"
        raise ValueError(f"Expected the encoder of {name!r} to return {wanted}, but got {got}.")
    return x


# -- what they are given ----------------------------------------------------------------------------------------------


def check_inputs(inputs: Mapping[str, Any], present: Present | None, modalities: Sequence[str]) -> Tensor:
    """Check what encoders are to be given; return the (B, M) present mask, on the CPU but in a recorded graph."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"Expected argument `inputs` to map modalities to inputs, but got {kind_of(inputs)}.")
    if unknown := [name for name in inputs if name not in modalities]:
        raise ValueError(f"Expected inputs of {tuple(modalities)}, but got others: {unknown}.")
    rows = {name: x for name in modalities if (x := inputs.get(name)) is not None}
    sizes = {name: batch_size(name, x) for name, x in rows.items()}
    mask = None if present is None else read_present(present, modalities)
    if mask is not None:
        sizes["present"] = mask.shape[0]
    batch = next(iter(sizes.values()), None)
    if batch is None or any(size != batch for size in sizes.values()):
        raise ValueError(f"Expected inputs of {tuple(modalities)}, all of one batch size, but got {sizes or 'none'}.")
    if is_recorded():
        return _recorded_mask(rows, mask, modalities)
    columns = {name: rows.get(name, [None] * batch) for name in modalities}
    if mask is None:
        return torch.stack([_rows_there(x) for x in columns.values()], dim=1)
    mask = mask.cpu()
    for m, (name, x) in enumerate(columns.items()):
        # Of a tensor `present` may say that zeros are there; what is None cannot be.
        if isinstance(x, Sequence) and (lacking := mask[:, m] & ~_rows_there(x)).any():
            row = lacking.nonzero()[0].item()
            raise ValueError(f"Expected inputs of {name!r}, which `present` says that row {row} has; got none.")
    if is_enough(mask) and all(_is_on_cpu(x) for x in columns.values()):
        check_agreement(mask, ~torch.stack([_rows_there(x) for x in columns.values()], dim=1), modalities)
    return mask


def _recorded_mask(rows: Mapping[str, Any], present: Tensor | None, modalities: Sequence[str]) -> Tensor:
    """The mask in a graph that is recorded, where no value is read: a modality that is left out is missing."""
    if lists := [name for name, x in rows.items() if isinstance(x, Sequence)]:
        raise TypeError(f"Expected tensors, or mappings of them, in a recorded graph, but got lists of {lists}.")
    if present is None:
        there = {name: _rows_there(x) for name, x in rows.items()}
        none = torch.zeros_like(next(iter(there.values())))
        return torch.stack([there.get(name, none) for name in modalities], dim=1)
    return present & torch.tensor([name in rows for name in modalities], device=present.device)


def batch_size(name: str, x: Any) -> int:
    """How many rows an input has."""
    if isinstance(x, Sequence) and not isinstance(x, (str, bytes)):
        return len(x)
    tensors = [value for value in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(value, Tensor)]
    if not tensors or any(value.dim() == 0 for value in tensors):
        wanted = "a tensor, a mapping of tensors (return_tensors='pt'), or a list, with one row a sample"
        _, mark, advice = raw_hint(name, x).partition(": ")
        raise TypeError(f"Expected inputs of {name!r} to be {wanted}, but got {kind_of(x)}{mark}{advice}.")
    size = tensors[0].shape[0]
    if any(value.shape[0] != size for value in tensors):
        got = {key: tuple(value.shape) for key, value in x.items() if isinstance(value, Tensor)}
        raise ValueError(f"Expected the tensors of {name!r} to have one batch size, but got {got}.")
    return size


def _is_on_cpu(x: Any) -> bool:
    """Whether this is a tensor or a mapping, whose tensors can be read without waiting."""
    tensors = [value for value in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(value, Tensor)]
    return bool(tensors) and all(is_readable(value) for value in tensors)


def _rows_there(x: Any) -> Tensor:
    """(B,) bool on the CPU: the rows that are neither None nor NaN in a list, or not zeros in all the tensors."""
    if isinstance(x, Sequence):
        missing = [is_empty(row) for row in x]
        return ~torch.tensor(missing, dtype=torch.bool, device="cpu")
    tensors = [value for value in (x.values() if isinstance(x, Mapping) else [x]) if isinstance(value, Tensor)]
    if any(value.is_meta for value in tensors):
        return torch.ones(len(tensors[0]), dtype=torch.bool, device="cpu")  # There are no values to read.
    there = torch.stack([(value != 0)[:, None].flatten(1).any(1) for value in tensors]).any(0)
    return there if is_recorded() else there.cpu()


def select_rows(x: Any, index: Tensor | None, batch: int) -> Any:
    """Some of the B rows, or all, of what :func:`check_inputs` accepts; a list of tensors is stacked."""
    if isinstance(x, Mapping):
        by_row = {key for key, value in x.items() if isinstance(value, (Tensor, list, tuple)) and len(value) == batch}
        return {key: select_rows(value, index, batch) if key in by_row else value for key, value in x.items()}
    if isinstance(x, Tensor):
        return x if index is None else x[index.to(x.device)]
    rows = list(x) if index is None else [x[i] for i in index.tolist()]
    return torch.stack(rows) if all(isinstance(row, Tensor) for row in rows) else rows


def blank_row(x: Tensor | Mapping[str, Any]) -> Any:
    """One row of the same form that an encoder can take: pictures of zeros, tokens and attention masks of ones."""
    if isinstance(x, Mapping):
        return {key: blank_row(value) if isinstance(value, Tensor) else value for key, value in x.items()}
    return x.new_full((1, *x.shape[1:]), 0 if x.is_floating_point() else 1)
