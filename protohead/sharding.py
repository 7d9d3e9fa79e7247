"""Several processes: what DDP's ranks must tell each other, and tensors of which FSDP2 has each rank hold a shard.

FSDP2 is `torch.distributed.fsdp.fully_shard`; the shards are DTensors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protohead.encoding import blank_row

__all__ = [
    "from_all_ranks",
    "gather",
    "gather_for_loss",
    "has_ranks",
    "is_collective",
    "is_managed",
    "is_sharded",
    "run_blank",
    "shard_like",
    "sum_between_ranks",
    "sum_over_ranks",
    "zero_of",
]


def sum_between_ranks(x: Tensor, module: nn.Module) -> Tensor:
    """In a forward pass of DDP or FSDP2, the sum over the ranks, in place; all of them must call it.

    DDP copies the buffers of rank 0 to the others, so what only another rank has seen must reach rank 0. FSDP2 leaves
    each rank its own, but the prototype loss must be that of the same cases everywhere.
    """
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is not None or is_managed(module):
        dist.all_reduce(x, group=None if ddp is None else ddp.process_group)
    return x


def has_ranks() -> bool:
    """Whether there may be other processes, whose rows have other modalities and cases."""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over the ranks, if there are several; all of them must call it."""
    if has_ranks():
        dist.all_reduce(x)
    return x


def from_all_ranks(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """What each rank gives, in order of the ranks; all of them must call it."""
    if not has_ranks():
        return [list(tensors)]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [x.cpu() for x in tensors])
    device = tensors[0].device if tensors else torch.device("cpu")
    return [[x.to(device) for x in one] for one in every]


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP2 has the module's parameters, whichever module it was given; it leaves this mark for Dynamo."""
    return getattr(module, "_is_fsdp_managed_module", False)


def is_sharded(x: object) -> bool:
    """Whether this is a DTensor, without an import that costs every program half a second."""
    return hasattr(x, "full_tensor")


def gather(x: Any) -> Tensor:
    """The whole of a tensor, without its graph; all ranks must call it if that is sharded."""
    whole: Tensor = x.detach().full_tensor() if is_sharded(x) else x.detach()
    return whole


def gather_for_loss(prototypes: nn.ParameterDict, name: str, module: nn.Module) -> Tensor:
    """A parameter outside the forward pass, for which FSDP2 gathers it; with gradients as in FSDP2's backward."""
    prototype: Any = prototypes[name]
    if is_sharded(prototype):
        from torch.distributed.tensor import Partial, Replicate

        dims = prototype.device_mesh.ndim
        whole = prototype.redistribute(placements=[Replicate()] * dims)
        local: Tensor = whole.to_local(grad_placements=[Partial("avg")] * dims)  # The mean over the ranks.
        return local
    if not (is_managed(module) and prototype.requires_grad and torch.is_grad_enabled()):
        unchanged: Tensor = prototype
        return unchanged

    def check(_: Tensor) -> None:
        if prototypes[name] is not prototype:
            raise RuntimeError(
                "Expected one backward pass through the sum of the classification and the prototype loss, but "
                "another one has freed the prototypes; or shard the head on its own: `fully_shard(model.head)`."
            )

    # It is gathered from the forward until the end of the backward pass, which also reduces its gradient.
    copy: Tensor = prototype.clone()
    copy.register_hook(check)
    return copy


def shard_like(whole: Tensor, x: Any) -> Tensor:
    """This rank's shards of what rank 0 gives as `whole`, if `x` is sharded; else `whole`."""
    if not is_sharded(x):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(x.dtype), x.device_mesh, x.placements)


def is_collective(encoder: nn.Module, name: str) -> bool:
    """Whether every rank must run an encoder of sharded parameters, even one that no row of the rank needs.

    Raises:
        ValueError: If the other ranks would wait for rows that this one does not have.
    """
    from torch.distributed.fsdp import FSDPModule

    synced = any(isinstance(m, nn.SyncBatchNorm) and m.training for m in encoder.modules())
    if synced and dist.get_world_size() > 1:
        raise ValueError(
            f"Expected rows with {name!r} on every rank, as its encoder has a SyncBatchNorm, but got none."
        )
    return any(isinstance(m, FSDPModule) for m in encoder.modules())


def run_blank(encoder: nn.Module, run: Callable[..., Tensor], name: str, inputs: Mapping[str, Any]) -> Tensor:
    """What a sharded encoder says of one blank row: its forward is a collective, too.

    Args:
        encoder: It is in eval mode meanwhile: a blank row must not reach the running statistics of a batch norm.
        run: The call, of `rows`.
        name: The modality.
        inputs: The batch's, whose rows do not have it.

    Raises:
        ValueError: If the form of the inputs does not show.
    """
    x = inputs.get(name)
    if not isinstance(x, (Tensor, Mapping)):
        raise ValueError(
            f"Expected inputs of {name!r} as tensors although no row of this rank has it, but got "
            f"{type(x).__name__}: with sharded encoders every rank runs every encoder. What stands in missing "
            "rows does not matter."
        )
    modes = {m: m.training for m in encoder.modules()}
    try:
        encoder.eval()
        return run(rows=blank_row(x))
    finally:
        for m, mode in modes.items():
            m.training = mode


def zero_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor | float:
    """A sum over nothing of each: it puts them in the graph, no NaN can come from it, and its gradient is zero."""
    zeros = [x.flatten()[:0].sum(dtype=torch.float32).to(device) for x in tensors]
    return torch.stack(zeros).sum() if zeros else 0.0
