"""Tensors of which FSDP2 (`torch.distributed.fsdp.fully_shard`) has each rank hold a shard, as a DTensor."""

from typing import Any

from torch import Tensor

__all__ = ["gather", "gather_for_loss", "is_sharded", "shard_like"]


def is_sharded(x: object) -> bool:
    """Whether this is a DTensor, told without an import that costs every program half a second."""
    return hasattr(x, "full_tensor")


def gather(x: Any) -> Tensor:
    """The whole of a tensor, without its graph; all ranks must call it if that is sharded."""
    whole: Tensor = x.detach().full_tensor() if is_sharded(x) else x.detach()
    return whole


def gather_for_loss(x: Any) -> Tensor:
    """The whole of a sharded tensor; each rank's shard gets the mean gradient of all ranks, as in FSDP2's backward."""
    from torch.distributed.tensor import Partial, Replicate

    dims = x.device_mesh.ndim
    whole: Tensor = x.redistribute(placements=[Replicate()] * dims).to_local(grad_placements=[Partial("avg")] * dims)
    return whole


def shard_like(whole: Tensor, x: Any) -> Tensor:
    """This rank's shards of what rank 0 gives as `whole`, if `x` is sharded; else `whole`."""
    if not is_sharded(x):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(x.dtype), x.device_mesh, x.placements)
