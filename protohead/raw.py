"""Inputs that nobody has prepared for an encoder yet: texts, pictures, arrays. What prepares them, for an error."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from protohead.present import is_empty

__all__ = ["raw_hint"]

TOKENISE = (
    "tokenise them first, as in inputs[{name!r}] = tokenizer(texts), with open_clip.get_tokenizer(model_name), or with "
    "transformers' AutoTokenizer tokenizer(texts, padding=True, return_tensors='pt')"
)
PREPROCESS = (
    "preprocess them first, as in inputs[{name!r}] = torch.stack([preprocess(picture) for picture in pictures]), with "
    "the transform that open_clip.create_model_and_transforms returns, or with transformers' AutoImageProcessor "
    "image_processor(pictures, return_tensors='pt')"
)


def raw_hint(name: str, inputs: Any) -> str:
    """What the inputs of a modality are, and the call that prepares them; empty if they are tensors, or unknown.

    Args:
        name: The modality.
        inputs: A list with one input a row, an array or series of them, or one of them alone.

    Example:
        >>> raw_hint("text", ["a red fox"])[:48]
        "got texts: tokenise them first, as in inputs['te"
    """
    if isinstance(inputs, (Tensor, Mapping)):
        return ""
    first = _first(inputs)
    if isinstance(first, str) or _is_list_of_numbers(first):
        if name == "image":
            return f"got names of files: open and {PREPROCESS.format(name=name)}" if isinstance(first, str) else ""
        kind = "texts" if isinstance(first, str) else "lists of numbers"
        return f"got {kind}: {TOKENISE.format(name=name)}"
    # By their class's module: neither package need be there.
    if type(first).__module__.partition(".")[0] == "PIL":
        return f"got pictures: {PREPROCESS.format(name=name)}"
    if type(first).__module__ == "numpy":
        if len(getattr(first, "shape", ())) == 3:
            return f"got arrays: {PREPROCESS.format(name=name)}"
        return "got arrays: torch.as_tensor(array) makes a tensor"
    return ""


def _first(inputs: Any) -> Any:
    """The first input that is there; of an array or a series that of its rows."""
    if isinstance(inputs, str) or not hasattr(inputs, "__len__") or not len(inputs):
        return inputs
    if hasattr(inputs, "tolist") and getattr(inputs, "ndim", 0) == 1:  # A series, or an array of texts.
        inputs = inputs.tolist()
    if not isinstance(inputs, Sequence):
        return inputs
    return next((row for row in inputs if not is_empty(row)), None)


def _is_list_of_numbers(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and bool(x) and all(isinstance(value, int) for value in x)
