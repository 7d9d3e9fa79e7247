"""A warning, once, where a model's batches say that rows lack something, and its head cannot know."""

import inspect
import re
import warnings
from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from protohead.context import is_eager
from protohead.head import DecoupledPrototypeHead

__all__ = ["MaskWatch"]

KEY = re.compile(r"missing_(types?|masks?|codes?|modality|modalities)")
LOOKS = 1000  # At so many batches: on a GPU each look waits for it.


class MaskWatch:
    """Hooks of a model, and of a head in it that reads from zeros what is missing.

    What the codes in a batch mean is not guessed: where they differ between rows, not all rows are complete. If then
    no row has zeros for a modality, the model does not zero what is missing.
    """

    def __init__(self) -> None:
        self.looks = LOOKS
        self.kinds: set[Hashable] = set()
        self.batch: tuple[str, list[Hashable]] | None = None

    def read_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model runs."""
        self.batch = _codes(model, args, kwargs) if self.looks and is_eager() else None

    def read_features(self, head: DecoupledPrototypeHead, args: tuple[Any, ...]) -> None:
        """Before the head runs."""
        if self.batch is None or not args or not isinstance(args[0], Tensor):
            return
        (key, codes), self.batch = self.batch, None
        self.looks -= 1
        parts = args[0].detach().split([*head.in_features.values()], dim=1)
        if any((part == 0).all(1).any() for part in parts):
            self.looks = 0  # The model zeroes what is missing.
            return
        self.kinds.update(codes)
        if len(self.kinds) > 1:
            self.looks = 0
            warnings.warn(
                f"The head takes every row for complete: no modality is zeros in any row so far, though the model's "
                f"batches have {key!r}, and not all rows are alike there. Give `replace_module` a function `present` "
                "that reads the mask from it (True where a modality is there: see protohead.present).",
                stacklevel=4,
            )


def _codes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, list[Hashable]] | None:
    """A name like missing_types among a model's arguments, or in one of them, and what it says of each row."""
    try:
        named = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        named = {}
    mappings = [named, *(x for x in (*args, *kwargs.values()) if isinstance(x, Mapping))]
    for name, value in (item for mapping in mappings for item in mapping.items()):
        if isinstance(name, str) and KEY.fullmatch(name):
            rows = value.tolist() if hasattr(value, "tolist") else value
            if isinstance(rows, (list, tuple)):
                return name, [str(row) for row in rows]
    return None
