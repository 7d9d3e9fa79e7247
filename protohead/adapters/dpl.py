"""DPL (arXiv 2505.08283): models and prototypes from the checkpoints of its published code, and prototypes back.

For each task that code has `<task>_pl_head` with four matrices of one shape: for complete rows one of the image and one
of the text (`w_mi_c`, `w_mt_c`), for rows without text one of the image (`w_mi_tm`), for rows without image one of the
text (`w_mt_im`).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from protohead.adapters.dpl_layout import read_model
from protohead.classifier import PrototypeClassifier
from protohead.head import DecoupledPrototypeHead

__all__ = ["dpl_names", "load_dpl", "load_dpl_model", "to_dpl"]

# What each matrix is, in DPL's words, and where it goes: the modality, and the block of that modality's prototypes.
SLOTS = {
    "complete_image": ("image", 0),
    "complete_text": ("text", 0),
    "text_missing": ("image", 1),
    "image_missing": ("text", 1),
}
NAMES = {"w_mi_c": "complete_image", "w_mt_c": "complete_text", "w_mi_tm": "text_missing", "w_mt_im": "image_missing"}
TYPE3 = ("w_mi_im", "w_mt_tm")  # What such a head has besides: of the modality that is missing.


def load_dpl(
    checkpoint: Mapping[str, Any],
    task: str,
    num_classes: int,
    *,
    scale: float | Mapping[str, float] = 32.0,
    margin: float | Mapping[str, float] | None = None,
    names: Mapping[str, str] | None = None,
) -> DecoupledPrototypeHead:
    """A head with the prototypes of a DPL checkpoint. All its cases count as seen.

    Args:
        checkpoint: A state_dict, or a Lightning checkpoint that holds one, with any prefix before ``<task>_pl_head``.
        task: Such as ``"hatememes"``.
        num_classes: K; tells (K, D) from (D, K).
        scale: As for the head. The checkpoint does not hold it.
        margin: As for the head. The checkpoint does not hold it.
        names: The keys of the four matrices, if they are not DPL's own, by what they are: ``complete_image``,
            ``complete_text``, ``text_missing`` (the image's, for rows without text) and ``image_missing``.

    Returns:
        A head on the CPU for the modalities image and text, with ``shared_space=True``, in the checkpoint's dtype.

    Raises:
        ValueError: If the matrices are not found, are those of a Type3 head, or are not all (K, D) or all (D, K).

    Example:
        >>> matrix = {name: torch.randn(8, 5) for name in ("w_mi_c", "w_mt_c", "w_mi_tm", "w_mt_im")}
        >>> head = load_dpl({f"food101_pl_head.{name}": w for name, w in matrix.items()}, "food101", num_classes=5)
        >>> torch.equal(head.prototypes["image"][1], matrix["w_mi_tm"].T)
        True
    """
    state = _state_dict(checkpoint)
    names = _checked(state, task, names)
    first = state[names["complete_image"]]
    transpose = _is_transposed(state, names, num_classes)
    width = first.shape[0 if transpose else 1]
    head = DecoupledPrototypeHead(
        {"image": width, "text": width},
        num_classes,
        cases="all",
        scale=scale,
        margin=margin,
        shared_space=True,
        centered=False,
        device="cpu",
        dtype=first.dtype,
    )
    with torch.no_grad():
        for slot, (modality, block) in SLOTS.items():
            matrix = state[names[slot]]
            head.prototypes[modality][block].copy_(matrix.T if transpose else matrix)
    head.seen.fill_(1)
    return head


def load_dpl_model(
    checkpoint: Mapping[str, Any],
    task: str,
    num_classes: int,
    *,
    scale: float | Mapping[str, float] = 32.0,
    margin: float | Mapping[str, float] | None = None,
    names: Mapping[str, str] | None = None,
) -> PrototypeClassifier:
    """The whole model of a DPL_DCP or DPL_NoPrompt checkpoint: an open_clip CLIP, DCP's prompts if any, and the head.

    Trainable is what the published code trains. That does not save DCP's dynamic prompts: they are drawn anew, and the
    features differ a little (it was 0.005) from those of the run that wrote the checkpoint.

    Args:
        checkpoint: A Lightning checkpoint, as ``torch.load`` reads it, or its state_dict.
        task: As in :func:`load_dpl`.
        num_classes: As in :func:`load_dpl`.
        scale: As in :func:`load_dpl`.
        margin: As in :func:`load_dpl`.
        names: As in :func:`load_dpl`.

    Returns:
        A model in eval mode, which takes pixels of CLIP's transform and ids of its tokenizer.

    Raises:
        ValueError: As :func:`load_dpl`, or if the towers or prompts are not found or are others.
    """
    head = load_dpl(checkpoint, task, num_classes, scale=scale, margin=margin, names=names)
    return read_model(_state_dict(checkpoint), head)


def to_dpl(
    head: DecoupledPrototypeHead, checkpoint: Mapping[str, Any], task: str, names: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """The inverse of :func:`load_dpl`: the four matrices of a head under the keys, and in the layout, of a checkpoint.

    Args:
        head: For the modalities image and text with all three cases.
        checkpoint: Of a DPL model, trained or not, such as its ``state_dict()``. It is not changed.
        task: As for :func:`load_dpl`.
        names: As for :func:`load_dpl`.

    Returns:
        Four tensors to update the DPL model's state_dict with.

    Raises:
        ValueError: As :func:`load_dpl`, or if the head is another.
    """
    if set(head.modalities) != {"image", "text"} or len(head.cases) != 3:
        got = f"{head.modalities} and {head.cases}"
        raise ValueError(f"Expected a head for image and text with all three cases, but got {got}.")
    if any(x is not None and x.any() for x in (head.bias, head.center)):
        raise ValueError("Expected a head without center and bias, for which DPL has no place; train `centered=False`.")
    state = _state_dict(checkpoint)
    names = _checked(state, task, names)
    transpose = _is_transposed(state, names, head.num_classes)
    result = {}
    for slot, (modality, block) in SLOTS.items():
        old, matrix = state[names[slot]], head.prototypes[modality][block].detach()
        matrix = matrix.T if transpose else matrix
        if matrix.shape != old.shape:
            raise ValueError(
                f"Expected {names[slot]} to be of shape {tuple(matrix.shape)}, but got {tuple(old.shape)}."
            )
        result[names[slot]] = matrix.to(old.device, old.dtype, copy=True).contiguous()
    return result


def dpl_names(checkpoint: Mapping[str, Any], task: str) -> dict[str, str]:
    """Which key of a checkpoint holds which matrix, by DPL's own names.

    Args:
        checkpoint: As for :func:`load_dpl`.
        task: As for :func:`load_dpl`.

    Returns:
        The argument `names` of :func:`load_dpl`.

    Raises:
        ValueError: If the matrices have other names, which are never guessed, or there are others beside them, as in a
            Type3 head; the message lists the keys.
    """
    state = _state_dict(checkpoint)
    inside = re.compile(rf"(?:.*\.)?{re.escape(task)}_pl_head\.(.+)")
    found = {key: match[1] for key in state if (match := inside.fullmatch(key))}
    if not found:
        heads = sorted({match[1] for key in state if (match := re.search(r"(\w+)_pl_head\.", key))})
        raise ValueError(f"Expected keys like {task}_pl_head.*, but got heads of the tasks {heads}.")
    matrices = {key: name for key, name in found.items() if isinstance(state[key], Tensor) and state[key].dim() == 2}
    if set(TYPE3) & set(matrices.values()):
        raise ValueError(
            f"Expected a head of four matrices (DPL's Type4), but got one of Type3: {list(matrices)}. A modality that "
            "is missing has prototypes there, too, for which this head has no place."
        )
    if sorted(matrices.values()) != sorted(NAMES):
        shapes = {key: tuple(getattr(state[key], "shape", ())) for key in found}
        example = "{" + ", ".join(f"{slot!r}: key" for slot in SLOTS) + "}"
        raise ValueError(
            f"Expected the four matrices {list(NAMES)}, but got {shapes}; pass `names={example}` where they have other "
            "names."
        )
    return {NAMES[name]: key for key, name in matrices.items()}


def _state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    state: Mapping[str, Any] = checkpoint.get("state_dict", checkpoint)
    return state


def _checked(state: Mapping[str, Any], task: str, names: Mapping[str, str] | None) -> Mapping[str, str]:
    names = dpl_names(state, task) if names is None else names
    if set(names) != set(SLOTS) or len(set(names.values())) != 4:
        raise ValueError(f"Expected argument `names` to give {list(SLOTS)} four different keys, but got {dict(names)}.")
    if lacking := [key for key in names.values() if not isinstance(state.get(key), Tensor)]:
        raise ValueError(f"Expected tensors under the keys in `names`, but the checkpoint has none under {lacking}.")
    return names


def _is_transposed(state: Mapping[str, Any], names: Mapping[str, str], num_classes: int) -> bool:
    """Whether the matrices are (D, K)."""
    shapes = {key: tuple(state[key].shape) for key in names.values()}
    first = next(iter(shapes.values()))
    wanted = f"four matrices of one shape, (K, D) or (D, K) with K = {num_classes}"
    if len(set(shapes.values())) != 1 or len(first) != 2 or num_classes not in first:
        raise ValueError(f"Expected {wanted}, but got {shapes}.")
    if first[0] == first[1]:
        raise ValueError(f"Expected {wanted} and another D, since square ones do not tell K from D; got {shapes}.")
    return bool(first[1] == num_classes)
