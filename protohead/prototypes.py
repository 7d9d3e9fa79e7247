"""The prototypes of a head as a module, and what may be written to them."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from protohead.sharding import is_managed, is_sharded, shard_like

__all__ = ["Prototypes", "draw", "refuse_derived", "write_known"]


class Prototypes(nn.ParameterDict):
    """Name of a modality to its (V, K, D_m) Parameter.

    It is called, as a layer is: what `torch.nn.utils` does to a weight (pruning, norms) is done anew at each call.
    """

    def __init__(
        self,
        blocks: Mapping[str, int],
        num_classes: int,
        in_features: Mapping[str, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name in in_features:
            if hasattr(nn.ParameterDict(), name):
                raise ValueError(f"Expected a modality name that nn.ParameterDict can hold, but got {name!r}.")
        super().__init__()
        for name, width in in_features.items():  # One by one: ParameterDict would sort the names.
            shape = blocks[name], num_classes, width
            self[name] = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    __call__ = nn.Module.__call__  # ParameterDict refuses to be called.

    def forward(self) -> list[Tensor]:
        """The tensors in the order of the modalities."""
        return [self[name] for name in self.keys()]


@torch.no_grad()
def draw(prototypes: Prototypes) -> None:
    """Fill every (case, modality) block from Xavier's normal distribution."""
    for prototype in prototypes.values():
        new = torch.empty(prototype.shape, dtype=prototype.dtype, device=prototype.device)
        for block in new:
            nn.init.xavier_normal_(block)
        prototype.copy_(shard_like(new, prototype))


def write_known(prototypes: Prototypes, new: Sequence[Tensor], classes: Tensor) -> Tensor:
    """Write class prototypes into every block; those of zeros are not known and left out.

    Args:
        prototypes: Of the head.
        new: M tensors (K, D_m).
        classes: (K,) bool, which of them.

    Returns:
        (M,) bool, whether any is known.

    Warns:
        UserWarning: For classes among these that are not known.
    """
    every = [(one != 0).any(1) & classes for one in new]
    for name, known in zip(prototypes, every, strict=True):  # First of all, since a warning may be made an error.
        if lacking := (classes & ~known).nonzero()[:, 0].tolist():
            warnings.warn(f"No row of classes {lacking} has {name!r}: these prototypes are unchanged.", stacklevel=5)
    for prototype, one, known in zip(prototypes.values(), new, every, strict=True):
        prototype.copy_(torch.where(known[:, None], one, prototype))
    return torch.stack([known.any() for known in every])


def refuse_derived(head: nn.Module, method: str, allow_shards: bool = False) -> None:
    """Refuse to write to tensors that are made of others, which would keep their values.

    Raises:
        RuntimeError: If parameters are sharded, pruned or parametrized.
    """
    tensors = {"bias": head.bias, **{f"prototypes.{name}": p for name, p in head.prototypes.items()}}  # type: ignore[union-attr,operator]
    shards = allow_shards and all(is_sharded(p) for p in head.parameters())  # As `to_empty` leaves it.
    if is_managed(head) and not shards:
        raise RuntimeError(f"Expected `{method}` before `fully_shard`, but the prototypes are sharded already.")
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            raise RuntimeError(
                f"Expected `{method}` of plain parameters, but {name} is pruned or parametrized: remove that first "
                "(torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)."
            )
