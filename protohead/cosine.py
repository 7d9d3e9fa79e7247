"""Cosines of features with class prototypes, on two roads: by block on the CPU, with every block elsewhere."""

import math
from typing import Any

import torch
from torch import Tensor

from protohead.context import full_precision, is_readable

__all__ = ["case_cosine", "centered", "normalize"]

NOISE = 64  # Times the dtype's epsilon: how much a feature must differ from its center, relative to that.


def case_cosine(x: Tensor, prototypes: Tensor, block: Tensor, center: Tensor | None = None) -> Tensor:
    """Cosines of one modality's features with the prototypes of each row's missing case: `ĥ[i,m] · ŵ[m][c_i,k]`.

    On the CPU in eager mode the rows that share a block are multiplied by it together. Elsewhere every block is
    multiplied and each row takes its own, which waits for no device and can be recorded in a graph.

    Args:
        x: (B, D) features.
        prototypes: (V, K, D).
        block: (B,) int64 in [-1, V). A row of -1 gets zeros, and what stands in it reaches no gradient.
        center: (D,), subtracted from the features. A row that differs from it by no more than rounding gets zeros.

    Returns:
        (B, K) cosines.

    Example:
        >>> prototypes = torch.eye(2).expand(3, 2, 2)
        >>> x = torch.tensor([[2.0, 0.0], [float("nan"), 1.0]])
        >>> case_cosine(x, prototypes, torch.tensor([2, -1]))
        tensor([[1., 0.],
                [0., 0.]])
    """
    x = x.to(prototypes.dtype)
    if not is_readable(block):
        here = block[:, None] >= 0
        x, _ = centered(torch.where(here, x, 0), center)
        every = torch.einsum("bd,vkd->bvk", normalize(torch.where(here, x, 0)), prototypes) * inverse_norm(prototypes)
        index = block.clamp(min=0)[:, None, None].expand(-1, 1, prototypes.shape[1])
        return every.gather(1, index).squeeze(1)  # Not take_along_dim: it fixes the batch size of an exported graph.
    rows, counts = _rows_by_block(block, prototypes.shape[0])
    whole = rows.shape[0] == x.shape[0] == max(counts)  # All in one block, in order.
    x, inverse = centered(x if whole else x.index_select(0, rows), center)
    if len(counts) == 1:
        cosine = block_cosine(x, inverse, prototypes.squeeze(0))
    else:
        parts = zip(counts, x.split(counts), inverse.split(counts), prototypes.unbind(), strict=True)
        cosine = torch.cat([block_cosine(*part) for count, *part in parts if count or not sum(counts)])
    if whole:
        return cosine
    return cosine.new_zeros(block.shape[0], prototypes.shape[1]).index_copy_(0, rows, cosine)


def _rows_by_block(block: Tensor, blocks: int) -> tuple[Tensor, list[int]]:
    """The rows that have a block, in order of their blocks, and how many each block has."""
    if blocks == 1:
        rows = (block >= 0).nonzero()[:, 0]
        return rows, [rows.shape[0]]
    missing, *counts = torch.bincount(block + 1, minlength=blocks + 1).tolist()
    return block.argsort(stable=True)[missing:], counts


def block_cosine(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """Cosines of rows (N, D), whose inverse norms are (N, 1), with one block of prototypes (K, D): (N, K)."""
    if not torch.is_grad_enabled():
        product: Tensor = (x * inverse) @ weight.T
        return product.mul_(inverse_norm(weight))
    cosine: Tensor = _BlockCosine.apply(x, inverse, weight)
    return cosine


class _BlockCosine(torch.autograd.Function):
    """Autograd alone would go through the prototypes twice more: half of a step with thousands of classes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        b = inverse_norm(weight)
        cosine = ((x * a) @ weight.T).mul_(b)
        ctx.save_for_backward(x, a, weight, b, cosine)
        return cosine

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, weight, b, cosine = ctx.saved_tensors
        with full_precision(grad.device):
            if torch.is_grad_enabled():  # Gradients of gradients go through the norms.
                a, b = inverse_norm(x)[:, None], inverse_norm(weight)
            unit, scaled, along = x * a, grad * b, grad * cosine
            to_x = to_weight = None
            if ctx.needs_input_grad[0]:
                to_x = (scaled @ weight).addcmul_(unit, along.sum(1, keepdim=True), value=-1).mul_(a)
            if ctx.needs_input_grad[2]:
                to_weight = (scaled.T @ unit).addcmul_(weight, (along.sum(0) * b * b)[:, None], value=-1)
            return to_x, None, to_weight


def centered(x: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features less their center, of some length whose square is a number, and 1 / that length.

    Args:
        x: (N, D).
        center: (D,). A row that differs from it by no more than rounding becomes zero.

    Returns:
        (N, D); and (N, 1), without a gradient, 1 for a row of zeros.
    """
    noise: Tensor | float = 0.0
    if center is not None:
        x, noise = x - center, NOISE * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(center, math.inf)
    norm = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)
    if is_readable(x) and x.shape[0]:  # Nearly all batches are what they should be.
        low, high = norm.aminmax()
        if max(1e-15, float(noise)) < low.item() and high.item() < 1e15:
            return x, norm.reciprocal()
    largest = torch.linalg.vector_norm(x.detach(), math.inf, dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) * largest
    x = torch.where(norm <= noise, 0, x)  # NaN stays.
    return x, inverse_norm(x.detach())[:, None]


def normalize(x: Tensor) -> Tensor:
    """Scale to length one, x / ‖x‖, along the last dimension; a zero vector stays zero, with a finite gradient.

    Shape:
        (..., D) -> (..., D)

    Example:
        >>> normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return x * inverse_norm(x).unsqueeze(-1)


def inverse_norm(x: Tensor) -> Tensor:
    """1 / ‖x‖ along the last dimension, (..., D) -> (...); 1 for a zero vector."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return torch.reciprocal(norm + (norm == 0))
