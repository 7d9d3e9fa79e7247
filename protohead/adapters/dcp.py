"""DCP (deep correlated prompting on CLIP, NeurIPS 2024): the head in the place of a task's classifier.

DCP is built on MAP's code, and so is this on :mod:`protohead.adapters.map`. Nothing of DCP is imported.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from protohead.adapters.map import add_rows, find_classifier, install, read_batch

__all__ = ["LOOKED_FOR", "attach_dcp", "fits"]

LOOKED_FOR = "DCP's CLIPransformerSS: a method `infer`, `model.image_encoder`, `model.text_encoder`, and a classifier"


def fits(backbone: object) -> bool:
    """Whether this is, by its attributes, DCP's model."""
    model = getattr(backbone, "model", None)
    encoders = [getattr(model, f"{name}_encoder", None) for name in ("image", "text")]
    has_encoders = all(isinstance(encoder, nn.Module) for encoder in encoders)
    return isinstance(backbone, nn.Module) and has_encoders and callable(getattr(backbone, "infer", None))


def attach_dcp(
    module: nn.Module, num_classes: int, prototype_weight: float | None, head_options: Mapping[str, Any]
) -> nn.Module:
    """Put a head in the place of the classifier of DCP's task, so that DCP's own training loop trains it.

    As :func:`protohead.adapters.map.attach_map`; the features are those that DCP's `infer` returns: image, then text.

    Args:
        module: DCP's CLIPransformerSS, with one task. Changed in place.
        num_classes: K, that of the old classifier.
        prototype_weight: λ; None is 0.9.
        head_options: As in :func:`~protohead.adapters.map.attach_map`.

    Returns:
        The same module.

    Raises:
        ValueError: If the module or an argument is not as said; the module is as it was.
    """
    task, linears = find_classifier(module)
    if (width := linears[0].in_features) % 2:
        raise ValueError(f"Expected {task}_classifier to read image and text features of one width, but got {width}.")
    install(module, task, _infer, width // 2, num_classes, prototype_weight, head_options)
    return module


def _infer(module: Any, task: str, batch: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """DCP's `infer`; its features have what the head needs to know about their rows."""
    present, labels = read_batch(module, task, batch)
    result: dict[str, Any] = type(module).infer(module, batch, *args, **kwargs)
    add_rows(result["cls_feats"], present, labels)
    return result
