"""Missing-aware prompts: learned tokens, by missing case, in front of those of a CLIP's two frozen towers.

MAP (multimodal prompting with missing modalities, CVPR 2023, arXiv 2303.03369) and DCP (deep correlated prompting,
NeurIPS 2024, arXiv 2410.06558). :func:`protohead.attach` puts them on a model: ``attach(clip, 101, prompts="dcp")``.

A prompt module is any module with ``forward(modality, case)``, where `case` names what a row has, ``"image+text"``,
``"image"`` or ``"text"``. It returns a list of functions, the j-th of which changes the tokens (n, L, width) of the n
rows of this case before block j of the modality's tower. What it adds goes in front, the same number in either case.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock, get_ident

import torch
from torch import Tensor, nn

from protohead.options import check_count

__all__ = ["Blocks", "DcpPrompts", "Edit", "MapPrompts", "put_in_front"]

Edit = Callable[[Tensor], Tensor]

LOCK = Lock()  # Of what a tower is prompted with.
COMPLETE = "image+text"
MODALITIES = ("image", "text")
STD = 0.02


class DcpPrompts(nn.Module):
    """The prompts of DCP: a third each of staged, common and dynamic ones.

    The staged prompts of a block are made of both towers' in the block before, and replace these; the common ones are
    the same for both towers; the dynamic ones are read from the tokens of the row.

    Args:
        widths: ``"image"`` and ``"text"`` to the width of the tower's tokens: see
            :func:`protohead.adapters.towers.tower_widths`.
        length: How many tokens come in front: a multiple of three.
        depth: J, the number of blocks with staged prompts of their own.

    Raises:
        ValueError: If an argument is not as said.

    Example:
        >>> prompts = DcpPrompts({"image": 8, "text": 6}, length=6, depth=3)
        >>> edits = prompts("image", "image+text")
        >>> len(edits), edits[0](torch.randn(2, 5, 8)).shape
        (3, torch.Size([2, 11, 8]))
    """

    def __init__(self, widths: Mapping[str, int], length: int = 36, depth: int = 6) -> None:
        super().__init__()
        self.widths = widths = _check(widths, length, depth)
        if length % 3:
            raise ValueError(f"Expected argument `length` to be a multiple of three for DCP, but got {length}.")
        rows, text, both = length // 3, widths["text"], sum(widths.values())
        self.length, self.depth = length, depth
        self.static = nn.ParameterDict({name: _normal(2, rows, width) for name, width in widths.items()})
        self.common = _normal(3, rows, text)
        self.dynamic = nn.ParameterDict({name: _normal(2, rows, width) for name, width in widths.items()})
        self.stages, self.common_projection, self.attention = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for name, width in widths.items():
            stages = [nn.Sequential(nn.LayerNorm(both), *_mlp(both, width)) for _ in range(depth)]
            for stage in stages[1:]:  # As published, they start as copies of one.
                stage.load_state_dict(stages[0].state_dict())
            self.stages[name] = nn.ModuleList(stages)
            self.common_projection[name] = nn.Sequential(*_mlp(text, width))
            self.attention[name] = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, modality: str, case: str) -> list[Edit]:
        """J functions: the first puts `length` tokens in front, the others replace the first third of these.

        Args:
            modality: ``"image"`` or ``"text"``.
            case: What the rows have: ``"image+text"``, or the modality alone.

        Raises:
            ValueError: If it is another.
        """
        alone = _is_alone(modality, case)
        if self.length == 0:
            return []
        prompts = {
            "image": self.static["image"][int(case == "text")],
            "text": self.static["text"][int(case == "image")],
        }
        staged = []
        for j in range(self.depth):
            both = torch.cat([prompts["image"], prompts["text"]], dim=1)
            names = (modality,) if j + 1 == self.depth else MODALITIES  # The other's last prompts are of no use.
            prompts = {name: self.stages[name][j](both) for name in names}  # type: ignore[index]
            staged.append(prompts[modality])
        # A tower sees two of the three cases: a third dynamic prompt would never be trained.
        query = self.dynamic[modality][alone]
        common = self.common_projection[modality](self.common[(COMPLETE, *MODALITIES).index(case)])
        first = partial(self._insert, modality=modality, prompts=torch.cat([staged[0], common]), query=query)
        return [first, *(partial(_replace, prompts=x) for x in staged[1:])]

    def _insert(self, tokens: Tensor, modality: str, prompts: Tensor, query: Tensor) -> Tensor:
        x = tokens.to(query.dtype)
        dynamic = self.attention[modality](query.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]
        return put_in_front(put_in_front(tokens, dynamic), prompts)


class MapPrompts(nn.Module):
    """The prompts of MAP at the input level: each of the first blocks gets some more tokens in front, which are kept.

    They start small and random. (The published zeros with one row of ones leave most of them equal for ever.)

    Args:
        widths: As in :class:`DcpPrompts`.
        length: How many tokens a block adds.
        depth: J, the number of blocks that do.

    Raises:
        ValueError: If an argument is not as said.

    Example:
        >>> prompts = MapPrompts({"image": 8, "text": 6}, length=4, depth=3)
        >>> [edit(torch.randn(2, 5, 6)).shape[1] for edit in prompts("text", "text")]
        [9, 9, 9]
    """

    def __init__(self, widths: Mapping[str, int], length: int = 16, depth: int = 6) -> None:
        super().__init__()
        self.widths = widths = _check(widths, length, depth)
        # A tower sees two of the three cases.
        self.prompts = nn.ParameterDict({name: _normal(2, depth, length, width) for name, width in widths.items()})

    def forward(self, modality: str, case: str) -> list[Edit]:
        """J functions, each of which puts `length` tokens in front.

        Args:
            modality: ``"image"`` or ``"text"``.
            case: What the rows have: ``"image+text"``, or the modality alone.

        Raises:
            ValueError: If it is another.
        """
        alone = _is_alone(modality, case)
        return [partial(put_in_front, prompts=x) for x in self.prompts[modality][alone]]


def put_in_front(tokens: Tensor, prompts: Tensor) -> Tensor:
    """(n, L, W) tokens behind (P, W) or (n, P, W) prompts, in the tokens' dtype: a tower may be in half precision."""
    return torch.cat([prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)


def _replace(tokens: Tensor, prompts: Tensor) -> Tensor:
    return put_in_front(tokens[:, len(prompts) :], prompts)


def _is_alone(modality: str, case: str) -> int:
    """0 for complete rows, 1 for those that have this modality alone: no others reach its tower."""
    if modality not in MODALITIES or case not in (COMPLETE, modality):
        raise ValueError(
            f"Expected a tower of {MODALITIES}, and {COMPLETE!r} or it alone, but got {modality!r}, {case!r}."
        )
    return int(case == modality)


def _normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(STD * torch.randn(shape))


def _mlp(width: int, out: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return nn.Linear(width, max(1, width // 16)), nn.GELU(), nn.Linear(max(1, width // 16), out)


def _check(widths: Mapping[str, int], length: int, depth: int) -> dict[str, int]:
    if set(widths) != set(MODALITIES):
        raise ValueError(f"Expected argument `widths` to name 'image' and 'text', but got {tuple(widths)}.")
    if length != 0:  # No prompts: the bare model.
        check_count("length", length)
    check_count("depth", depth)
    return {name: check_count(f"widths[{name!r}]", widths[name]) for name in MODALITIES}


# -- on a tower -------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """What a tower's stack of blocks inherits from, too, so that its tokens can be edited between blocks.

    Attributes:
        edits: The functions, while a prompted call runs; else None, and all is as it was.
        thread: In which it runs; 0 where a compiler, which cannot tell, has put it.
        causal: Whether a token sees only those before it.
    """

    edits: Sequence[Edit] | None = None
    thread: int = 0
    causal: bool = False

    def is_prompted(self) -> bool:
        """Whether this call is a prompted one, and not one beside it in another thread."""
        return self.edits is not None and (torch.compiler.is_compiling() or self.thread in (0, get_ident()))

    @contextmanager
    def prompted(self, edits: Sequence[Edit]) -> Iterator[None]:
        """Prompt the calls of this thread.

        Raises:
            RuntimeError: If those of another one are prompted.
        """
        with nullcontext() if torch.compiler.is_compiling() else LOCK:
            if self.edits is not None:
                raise RuntimeError("Expected one call at a time of each tower, but another one has its prompts.")
            self.edits, self.thread = edits, 0 if torch.compiler.is_compiling() else get_ident()
        try:
            yield
        finally:
            self.edits = None

    def run(self, tokens: Tensor, blocks: Sequence[Callable[..., Tensor]], masks: Sequence[Tensor | None]) -> Tensor:
        """(n, L, W) tokens through edits and blocks; those that were added are dropped again, so that pooling fits.

        Args:
            tokens: As the tower embeds them.
            blocks: From (n, L', W) tokens and the masks to tokens.
            masks: (..., L, L) or (..., 1, L), or None, which grow with the tokens.
        """
        edits, size = self.edits or (), tokens.shape[1]
        grown = masks
        for j, block in enumerate(blocks):
            if j < len(edits):
                before, tokens = tokens.shape[1], edits[j](tokens)
                if tokens.shape[1] != before:
                    grown = [None if x is None else self._grow(x, tokens.shape[1] - size) for x in masks]
            tokens = block(tokens, *grown)
        return tokens[:, tokens.shape[1] - size :]

    def _grow(self, mask: Tensor, count: int) -> Tensor:
        """A mask, 0 or True where one may look, for prompts in front: all see them, and they see what a token may."""
        if mask.dim() == 2 and not mask.is_floating_point():  # (n, L), of flash attention.
            return torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)
        seen, hidden = (True, False) if mask.dtype == torch.bool else (0.0, -torch.inf)
        columns = torch.cat([mask.new_full((*mask.shape[:-1], count), seen), mask], dim=-1)
        if mask.shape[-2] == 1:
            return columns
        # The last token sees all that any may. In a causal tower prompts stand before the tokens, in their own order.
        rows = columns[..., -1:, :].expand(*mask.shape[:-2], count, -1)
        if self.causal:
            later = torch.ones(count, columns.shape[-1], dtype=torch.bool, device=mask.device).triu(1)
            # ONNX Runtime has no `where` of booleans.
            rows = rows & ~later if rows.dtype == torch.bool else rows.masked_fill(later, hidden)
        return torch.cat([rows, columns], dim=-2)
