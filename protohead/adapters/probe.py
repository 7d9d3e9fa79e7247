"""What encoders return, and on which parameters that depends: found by running them once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from protohead.encoding import check_inputs, encode_rows, joint_rows, select_rows

__all__ = ["chosen_parameters", "parameters_of", "try_encoders"]


def parameters_of(encoder: Any) -> list[tuple[str, nn.Parameter]]:
    """The named parameters of a module or of a bound method's module."""
    owner = getattr(encoder, "__self__", encoder)
    return list(owner.named_parameters()) if isinstance(owner, nn.Module) else []


def try_encoders(
    encoders: Any, example: Mapping[str, Any], parameters: set[nn.Parameter]
) -> tuple[dict[str, int], set[nn.Parameter]]:
    """Run each encoder once, in eval mode; leave everything as it was.

    Args:
        encoders: As for :class:`~protohead.PrototypeClassifier`.
        example: Inputs of one row or more.
        parameters: Those that may be trained.

    Returns:
        The width of each modality, and those of the parameters that the features depend on.

    Raises:
        ValueError: If the example or what the encoders return is not as said, or if they depend on other parameters.
    """
    joint = not isinstance(encoders, Mapping)
    modalities = tuple(example) if joint else tuple(encoders)
    there = check_inputs(example, None, modalities)
    rows = torch.arange(len(there))
    for name in modalities:
        x = example.get(name)
        if x is None or (isinstance(x, (list, tuple)) and any(row is None for row in x)):
            raise ValueError(f"Expected `example` to hold inputs of {name!r} in every row, but it lacks some.")
    each = [encoders] if joint else list(encoders.values())
    owners = [owner for x in each if isinstance(owner := getattr(x, "__self__", x), nn.Module)]
    twins: dict[Tensor, nn.Parameter] = {}
    with _all_trainable(owners, parameters), torch.enable_grad():
        if joint:
            features = joint_rows(encoders, example, {name: rows >= 0 for name in modalities})
        else:
            features = {
                name: encode_rows(
                    name,
                    _on_meta(encoder, example[name], twins),
                    select_rows(example[name], None, len(rows)),
                    len(rows),
                )
                for name, encoder in encoders.items()
            }
    leaves = _leaves(features.values())
    reached = parameters
    if leaves is not None:
        found = {twins.get(leaf, leaf) for leaf in leaves}
        if any(isinstance(leaf, nn.Parameter) and leaf not in parameters for leaf in found):
            raise ValueError(
                "Expected encoders whose trainable parameters are a module's, but a function uses others: pass the "
                "module, or its bound method, or freeze them."
            )
        reached = found & parameters
    return {name: x.shape[1] for name, x in features.items()}, reached


@contextmanager
def _all_trainable(owners: Sequence[nn.Module], parameters: set[nn.Parameter]) -> Iterator[None]:
    """Parameters that take gradients, in modules in eval mode: one row must not reach what a batch norm has counted."""
    modes = {module: module.training for owner in owners for module in owner.modules()}
    flags = {p: p.requires_grad for p in parameters}
    try:
        for owner in owners:
            owner.eval()
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, flag in flags.items():
            p.requires_grad_(flag)


def _on_meta(encoder: Any, example: Any, twins: dict[Tensor, nn.Parameter]) -> Any:
    """The encoder; for an example on the meta device its twin there, which computes nothing."""
    tensors = [x for x in (example.values() if isinstance(example, Mapping) else [example]) if isinstance(x, Tensor)]
    if not isinstance(encoder, nn.Module) or not any(x.is_meta for x in tensors):
        return encoder
    state: dict[str, Tensor] = {name: buffer.to("meta") for name, buffer in encoder.named_buffers()}
    for name, p in encoder.named_parameters():
        state[name] = p.detach().to("meta").requires_grad_(p.requires_grad)
        twins[state[name]] = p
    return lambda *args, **kwargs: torch.func.functional_call(encoder, state, args, kwargs)


def _leaves(outputs: Iterable[Tensor]) -> set[Any] | None:
    """The leaves of the graph of some tensors; None where reentrant checkpoints hide what they depend on."""
    waiting, known, leaves = [x.grad_fn for x in outputs], set(), set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in known:
            known.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
            if type(node).__name__ == "CheckpointFunctionBackward":
                return None
            if hasattr(node, "variable"):
                leaves.add(node.variable)
    return leaves


def chosen_parameters(
    patterns: Sequence[str], named: Sequence[tuple[str, nn.Parameter]], reached: set[nn.Parameter]
) -> set[nn.Parameter]:
    """The parameters that the patterns name and the head reaches.

    Raises:
        ValueError: If a pattern names none, or none that the head reaches.
        TypeError: If a pattern is not a string.
    """
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        got = type(patterns).__name__
        raise TypeError(f"Expected argument `trainable` to be a string or several, but got {got} of something else.")
    chosen: set[nn.Parameter] = set()
    for pattern in patterns:
        found = {name: p for name, p in named if fnmatchcase(name, pattern)}
        if not found:
            near = get_close_matches(pattern, [name for name, _ in named]) or [name for name, _ in named[-5:]]
            raise ValueError(f"Expected `trainable` to name parameters, but {pattern!r} matches none; nearest: {near}.")
        if not reached.intersection(found.values()):
            raise ValueError(f"Expected `trainable` to name parameters that the head reaches, but got {list(found)}.")
        chosen |= reached.intersection(found.values())
    return chosen
