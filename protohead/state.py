"""The state of a head: how it is made, described, moved, written and checked. What it computes is in head.py."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from protohead.cases import case_names
from protohead.logits import uncalibrate
from protohead.options import check_count, check_names
from protohead.prototypes import Prototypes, draw
from protohead.sharding import is_sharded

__all__ = [
    "add_classes",
    "apply",
    "arguments",
    "before_load",
    "check_checkpoint",
    "check_same_head",
    "description",
    "forget",
    "kind",
    "pack",
    "packed",
    "register_buffers",
    "set_classes",
    "take_over",
    "text",
    "unpack",
]

# What the constructor needs; scale and margin are in the checkpoint as tensors.
DESCRIPTION = ("in_features", "num_classes", "cases", "shared_space", "centered", "class_names")
# What must agree. Where shapes do, other cases would be swapped in silence, and another loss be trained.
MUST_AGREE = ("cases", "shared_space")
# In the order in which they are registered; others, such as the mask of a pruned bias, are not ours.
BUFFERS = ("scale", "margin", "seen", "_masks", "center", "center_rows", "center_spread", "temperature", "shift")
# What the paper's head has not.
LEARNED = ("bias", "center", "center_rows", "center_spread")


def set_classes(
    head: Any,
    num_classes: int,
    class_names: Sequence[str] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Give a head the parameters for so many classes, not yet drawn; what was frozen stays frozen."""
    count, old = check_count("num_classes", num_classes), dict(head.named_parameters())
    head.class_names, head.num_classes = check_names(class_names, count), count
    blocks = {name: sum(name in case.split("+") for case in head.cases) for name in head.modalities}
    head.prototypes = Prototypes(blocks, count, head.in_features, device, dtype)
    bias = nn.Parameter(torch.empty(count, device=device, dtype=dtype)) if head.centered else None
    head.register_parameter("bias", bias)
    if (shift := head._buffers.get("shift")) is not None:
        head.shift = shift.new_zeros(*shift.shape[:-1], count)
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name not in old or old[name].requires_grad)


def kind(head: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a head's parameters."""
    parameter = next(head.parameters())
    return parameter.device, parameter.dtype


def add_classes(head: Any, count: int, class_names: Sequence[str] | None) -> None:
    """Give a head parameters for more classes; the new prototypes are drawn, what was there is copied."""
    count, old = check_count("count", count), dict(head.named_parameters())
    new = check_names(class_names, count)
    if (new is None) != (head.class_names is None):
        expected = "the names of the new classes" if new is None else "no names, since the other classes have none"
        raise ValueError(f"Expected argument `class_names` to be {expected}, but got {class_names!r}.")
    names = None if new is None else (*head.class_names, *new)
    known = head.num_classes
    set_classes(head, known + count, names, *kind(head))
    draw(head.prototypes)
    with torch.no_grad():
        for name, grown in head.named_parameters():
            if name == "bias":
                grown.fill_(old[name].mean())  # No class is likelier than the others.
            grown.narrow(max(grown.dim() - 2, 0), 0, known).copy_(old[name])
    uncalibrate(head)


def register_buffers(head: Any, masks: Tensor, scales: list[float], margins: list[float]) -> None:
    """Give a head its constants, and what it learns beside its parameters.

    They are real even where the parameters are on the meta device, so that `to_empty` cannot lose them. All are floats:
    tools that average checkpoints cannot average bools, nor some of them integers.
    """
    parameter = next(head.parameters())
    device = torch.device("cpu") if parameter.is_meta else parameter.device
    tensor = partial(torch.tensor, dtype=_constant_dtype(device), device=device)
    head.register_buffer("scale", tensor(scales))
    head.register_buffer("margin", tensor(margins))
    head.register_buffer("seen", torch.zeros_like(tensor(masks.tolist())))
    head.register_buffer("_masks", tensor(masks.tolist()), persistent=False)
    count = len(head.modalities)
    widths = {"center": sum(head.in_features.values()), "center_rows": count, "center_spread": count}
    for name, width in widths.items():
        head.register_buffer(name, tensor([0.0] * width) if head.centered else None)
    for name, size in (("temperature", 2), ("shift", head.num_classes)):  # By modality: whether it is used.
        head.register_buffer(name, tensor(0.0).repeat((2,) * count + (size,)))


@torch.no_grad()
def forget(head: Any) -> None:
    """Set to zero what training has left beside the prototypes; forget a calibration."""
    uncalibrate(head)
    for x in (head.bias, head.center, head.center_rows, head.center_spread, head.seen):
        if x is not None:
            x.zero_()


def apply(head: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Move or cast a head. The buffers follow to the device, or into shared memory, but in nothing else.

    `half()` must not round a margin, nor `to_empty()` wipe what was seen.
    """
    own = {name: head._buffers.pop(name) for name in BUFFERS}
    try:
        nn.Module._apply(head, fn, recurse)
    finally:
        head._buffers.update(own)
    parameter = next(head.parameters())
    if parameter.is_meta:
        return head
    for name, value in own.items():
        if value is not None:
            moved = value.to(parameter.device, _constant_dtype(parameter.device))
            head._buffers[name] = moved.share_memory_() if parameter.is_shared() else moved
    return head


def _constant_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64.


def arguments(head: Any) -> str:
    """The arguments that make a head, for its repr."""
    numbers = [dict(zip(head.cases, values.tolist(), strict=True)) for values in (head.scale, head.margin)]
    scale, margin = (next(iter(x.values())) if len({*x.values()}) == 1 else x for x in numbers)
    every = case_names(head.modalities)
    cases = "shared" if head.cases == every[:1] else "all" if head.cases == every else list(head.cases)
    names = f", class_names={list(head.class_names)}" if head.class_names else ""
    return (
        f"{head.in_features}, num_classes={head.num_classes}, cases={cases!r}, scale={scale}, margin={margin}, "
        f"shared_space={head.shared_space}, centered={head.centered}{names}"
    )


def description(head: nn.Module) -> dict[str, Any]:
    """What makes a head of this kind, in the types of JSON."""
    return {key: list(x) if isinstance(x := getattr(head, key), tuple) else x for key in DESCRIPTION}


def text(head: Any) -> str:
    """A head's repr, by which it can be made again."""
    return f"{head._get_name()}({arguments(head)})"


def packed(head: Any) -> Tensor:
    """What makes a head, as a tensor: see :func:`protohead.load_head`."""
    return pack(description(head))


def take_over(head: Any, state: Any) -> None:
    """Refuse the checkpoint of another head; take over its class names."""
    config = unpack(state)
    check_same_head(config, description(head))
    if config.get("num_classes") == head.num_classes:  # Else torch names the weights of other shapes.
        head.class_names = head.class_names or check_names(config.get("class_names"), head.num_classes)


def pack(config: Mapping[str, Any]) -> Tensor:
    """JSON as a tensor, since safetensors holds nothing else; of floats, so that tools which average can average it."""
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.float32, device="cpu")


def unpack(state: Any) -> dict[str, Any]:
    """The inverse of :func:`pack`, also of an average of equals.

    Raises:
        ValueError: If this is anything else.
    """
    try:
        config = json.loads(bytes(state.flatten().double().round().long().tolist()).decode())
        if not isinstance(config, dict) or not set(MUST_AGREE) <= set(config):
            raise ValueError(f"Expected an object with {MUST_AGREE}.")
    except (AttributeError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(
            f"Expected the description of a head in `_extra_state`, but it cannot be read: {error}"
        ) from None
    return config


def check_same_head(config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse what describes another head.

    Raises:
        ValueError: If the cases, whether there is a shared space, or the class names are others.
    """
    try:
        check_names(config.get("class_names"), config.get("num_classes", 0))
        modalities = list(config.get("in_features", ()))
    except TypeError as error:
        raise ValueError(f"Expected the description of a head, but it is malformed: {error}") from None
    for key in (*MUST_AGREE, "class_names"):
        theirs, ours = config.get(key), own.get(key)
        both_named = theirs is not None and ours is not None
        if theirs != ours and (both_named or key in MUST_AGREE):
            raise ValueError(f"Expected a checkpoint of a head with {key}={ours}, but got one with {theirs}.")
    # The names of some cases do not tell the order of all modalities, which is that of the center.
    if modalities != (ours := list(own["in_features"])):
        raise ValueError(f"Expected a checkpoint of a head with the modalities {ours}, but got one with {modalities}.")


def check_checkpoint(state: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse the checkpoint of another head, and one with values that no head has.

    Args:
        state: A state_dict.
        own: The description of the head that is to load it.
        prefix: Before the head's names in it.

    Raises:
        ValueError: If it is of a head with other cases, or a weight, scale or margin cannot be right.
    """
    if (extra := state.get(f"{prefix}_extra_state")) is not None:
        check_same_head(unpack(extra), own)
    for name, x in state.items():
        tail = name.removeprefix(prefix)
        known = tail.startswith("prototypes.") or tail in (*LEARNED, "shift")
        if not name.startswith(prefix) or not isinstance(x, Tensor) or x.is_meta or is_sharded(x):
            continue
        if known and x.is_floating_point() and not x.isfinite().all():
            raise ValueError(f"Expected finite numbers in {name!r} of the checkpoint, but it has others.")
        if tail == "seen" and not (x >= 0).all():  # Infinity is many, in half precision.
            raise ValueError(f"Expected counts in {name!r} of the checkpoint, but got {x.tolist()}.")
        if tail in ("scale", "temperature") and not ((x > 0) & (x < math.inf)).all():
            raise ValueError(f"Expected positive numbers in {name!r} of the checkpoint, but got {x.tolist()}.")
        if tail == "margin" and not ((x >= 0) & (x < math.pi)).all():
            raise ValueError(f"Expected numbers in [0, pi) in {name!r} of the checkpoint, but got {x.tolist()}.")


def before_load(head: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before anything of a checkpoint is copied: refuse it, or add the zeros that the paper's head has not."""
    check_checkpoint(state, description(head), prefix)
    scale = state.get(f"{prefix}scale")  # Without it the checkpoint is not of a head at all.
    if head.centered and scale is not None and not any(f"{prefix}{name}" in state for name in LEARNED):
        for name in LEARNED:
            own: Any = getattr(head, name)
            state[f"{prefix}{name}"] = torch.zeros_like(own, device=scale.device if own.is_meta else None)
