"""What speed.py and gpu.py time: the head, `nn.Linear`, other heads, the prototype loss, and their sizes."""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protohead import DecoupledPrototypeHead

METHODS = ("nn.Linear", "head", "head, each case", "products alone", "linear per case", "ArcFaceLoss", "gather")


class Size(NamedTuple):
    """Rows, features per modality, classes, modalities, missing rate."""

    batch: int
    width: int
    classes: int
    modalities: int
    missing: float

    def __str__(self) -> str:  # noqa: D105
        return f"({self.batch}, {self.width}, {self.classes})"


TWO = [(4, 512, 23), (64, 512, 101), (256, 512, 101), (256, 512, 1000), (1024, 768, 1000), (64, 768, 21843)]
SIZES = [Size(*size, 2, missing) for size in TWO for missing in (0.0, 0.7, 0.9)]
SIZES += [Size(256, 256, 101, modalities, 0.7) for modalities in (3, 4, 6)]
QUICK = [SIZES[1], Size(32, 16, 5, 3, 0.7)]
# The largest (B, ΣD, K) weight that the gather formulation is let make, in bytes; a training step holds several.
LARGEST_GATHER = 2**30


class PerCase(nn.Module):
    """One linear layer per missing case, on the rows of that case."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        count, self.classes = 2**size.modalities, size.classes
        self.layers = nn.ModuleList(nn.Linear(size.modalities * size.width, size.classes) for _ in range(count))

    def forward(self, x: Tensor, case: Tensor) -> Tensor:  # noqa: D102
        out = x.new_zeros(len(x), self.classes)
        for number, layer in enumerate(self.layers):
            mask = case == number
            if mask.any():
                out[mask] = layer(x[mask])
        return out


class Products(nn.Module):
    """The limit: for each missing case one product of its rows, of the modalities they have, and a weight."""

    def __init__(self, size: Size, present: Tensor) -> None:
        super().__init__()
        self.classes, self.groups = size.classes, []
        for has in present.unique(dim=0):
            rows = (present == has).all(1).nonzero()[:, 0]
            columns = torch.arange(size.modalities * size.width, device=present.device).view(size.modalities, -1)[has]
            self.groups.append((rows, columns.flatten()))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(size.classes, len(columns)) / size.width**0.5) for _, columns in self.groups
        )

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = x.new_zeros(len(x), self.classes)
        for (rows, columns), weight in zip(self.groups, self.weights, strict=True):
            out = out.index_copy(0, rows, x[rows[:, None], columns] @ weight.T)
        return out


class Gather(nn.Module):
    """The formula with one weight a row: normalise the (B, ΣD, K) weight of each row's case by modality, multiply."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        shape = 2**size.modalities, size.modalities * size.width, size.classes
        self.weight = nn.Parameter(torch.randn(shape) / size.width**0.5)

    def forward(self, x: Tensor, case: Tensor, count: Tensor) -> Tensor:  # noqa: D102
        size = self.size
        weight = self.weight[case].unflatten(1, (size.modalities, size.width))
        features = F.normalize(x.unflatten(1, (size.modalities, size.width)), dim=2)
        cosine = torch.einsum("bmd,bmdk->bk", features, F.normalize(weight, dim=2)) / count[:, None]
        logits: Tensor = 20 * cosine
        return logits


class Mode(NamedTuple):
    """How a method runs: its name in the table, under bfloat16 autocast or not, and the backend of torch.compile."""

    name: str
    half: bool = False
    backend: str | None = None


def batch_of(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features with zeros where a modality is missing, the present mask, labels.

    A row that is not complete has any of the incomplete cases, each as likely.
    """
    generator = torch.Generator().manual_seed(0)
    cases = torch.arange(1, 2**size.modalities)[:, None] >> torch.arange(size.modalities) & 1
    chosen = torch.randint(0, len(cases) - 1, (size.batch,), generator=generator)
    incomplete = torch.rand(size.batch, generator=generator) < size.missing
    present = torch.where(incomplete[:, None], cases[chosen] > 0, True)
    x = torch.randn(size.batch, size.modalities, size.width, generator=generator)
    x = torch.where(present[:, :, None], x, 0).flatten(1)
    labels = torch.randint(0, size.classes, (size.batch,), generator=generator)
    return x.to(device), present.to(device), labels.to(device)


def method(name: str, size: Size, device: torch.device) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A module, and what makes logits, or a loss, of it, features and labels or None."""
    x, present, labels = batch_of(size, device)
    case = (present.long() << torch.arange(size.modalities, device=device)).sum(1)
    total = size.modalities * size.width
    if name in ("head", "head, each case"):
        widths = {f"m{m}": size.width for m in range(size.modalities)}
        cases = "shared" if name == "head" else "all"
        head = DecoupledPrototypeHead(widths, size.classes, cases=cases, device=device)
        with torch.no_grad():  # It has a center then. A few rows, so that memory is not touched before it is measured.
            head.loss(x[:2], present[:2], labels[:2], prototype_weight=0.0)
        return head, lambda head, x, y: head(x, present, y)
    if name == "products alone":
        return Products(size, present).to(device), lambda products, x, y: products(x)
    if name == "nn.Linear":
        return nn.Linear(total, size.classes, device=device), lambda layer, x, y: layer(x)
    if name == "linear per case":
        return PerCase(size).to(device), lambda layers, x, y: layers(x, case)
    if name == "ArcFaceLoss":
        from pytorch_metric_learning.losses import ArcFaceLoss

        loss = ArcFaceLoss(size.classes, total).to(device)
        return loss, lambda loss, x, y: loss.get_logits(x) if y is None else loss(x, y)
    return Gather(size).to(device), lambda gather, x, y: gather(x, case, present.sum(1))


def steps(name: str, size: Size, device: torch.device, mode: Mode) -> dict[str, Callable[[], None]]:
    """The two things that are timed, as functions of nothing."""
    torch.manual_seed(0)
    module, call = method(name, size, device)
    x, _, labels = batch_of(size, device)
    trained = x.clone().requires_grad_()  # As behind an encoder that is trained.
    # One graph for each size, or an error: a head that falls back to eager mode is not measured as compiled.
    run = torch.compile(call, backend=mode.backend, dynamic=False, fullgraph=True) if mode.backend else call

    def context() -> AbstractContextManager[object]:
        # Entered at every call, as in training: autocast keeps the weights that it has cast until it is left.
        return torch.autocast(device.type, torch.bfloat16) if mode.half else nullcontext()

    def forward() -> None:
        if module.training:
            module.eval()
        with torch.no_grad(), context():
            run(module, x, None)

    def step() -> None:
        if not module.training:
            module.train()
        trained.grad = None
        for p in module.parameters():
            p.grad = None
        with context():
            out = run(module, trained, labels)
            loss = out if out.dim() == 0 else F.cross_entropy(out, labels)
        loss.backward()

    step()  # The head has then seen all cases.
    return {"forward": forward, "forward + backward": step}


def plain_prototype_loss(head: DecoupledPrototypeHead) -> Tensor:
    """The formula with all similarities at once."""
    flat = F.normalize(torch.cat(list(head.prototypes.values())), dim=2).flatten(0, 1)
    classes = torch.arange(len(flat), device=flat.device) % head.num_classes
    similarity = (flat @ flat.T).fill_diagonal_(-math.inf)
    log_fraction = similarity - similarity.logsumexp(1, keepdim=True)
    positive = (classes[:, None] == classes).fill_diagonal_(False)
    return -(torch.where(positive, log_fraction, 0).sum(1) / positive.sum(1)).mean()


def prototype_losses(classes: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """The prototype loss and its gradient: the plain form, and the head's."""
    torch.manual_seed(0)
    widths = {"image": 512, "text": 512}
    head = DecoupledPrototypeHead(widths, classes, cases="all", shared_space=True, device=device)

    def step(loss: Callable[[], Tensor]) -> None:
        head.zero_grad()
        loss().backward()

    return {
        "plain": functools.partial(step, functools.partial(plain_prototype_loss, head)),
        "head": functools.partial(step, head.prototype_loss),
    }
