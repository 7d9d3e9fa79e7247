"""Files: a head from its file alone, and a model's head with what is trained beside it."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from torch import Tensor, nn

from protohead.head import DecoupledPrototypeHead
from protohead.sharding import gather, is_sharded, shard_like
from protohead.state import check_checkpoint, description, unpack

__all__ = ["frozen_modules", "load_head", "load_model", "save_model"]


def load_head(source: str | os.PathLike[str] | Mapping[str, Any]) -> DecoupledPrototypeHead:
    """The head of a file, made and loaded from that alone.

    Args:
        source: A safetensors file: of ``head.state_dict()``, of a model that holds a head, or one that
            :meth:`PrototypeClassifier.save` wrote; or a folder with such a ``model.safetensors``. Or such a state_dict,
            for instance from ``torch.load``.

    Returns:
        The head on the CPU, in eval mode.

    Raises:
        ValueError: If there is not exactly one head, or it cannot be made.

    Example:
        >>> head = DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=2, class_names=["cat", "dog"])
        >>> load_head(head.state_dict()).class_names
        ('cat', 'dog')
    """
    state = source if isinstance(source, Mapping) else _read(source)[0]
    ends = [name.removesuffix("_extra_state") for name in state if name.endswith("_extra_state")]
    prefixes = [prefix for prefix in ends if {f"{prefix}scale", f"{prefix}margin", f"{prefix}seen"} <= set(state)]
    if len(prefixes) != 1:
        what = "with `scale`, `margin`, `seen` and `_extra_state`"
        raise ValueError(f"Expected the weights of exactly one head, {what}, but got {len(prefixes)}: {prefixes}.")
    (prefix,) = prefixes
    own = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    config = unpack(own["_extra_state"])
    dtype = next((x.dtype for name, x in own.items() if name.startswith("prototypes.")), None)
    try:
        head = DecoupledPrototypeHead(**config, dtype=dtype, device="cpu")
        head.load_state_dict(own)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"Expected the weights of a head, but it cannot be made of them: {error}") from error
    return head.eval()


def save_model(model: Any, path: str | os.PathLike[str]) -> None:
    """Write a :class:`PrototypeClassifier`: see its :meth:`~PrototypeClassifier.save`."""
    from safetensors.torch import save_file

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder that exists for {path}, but there is no {path.parent}.")
    state, trained = model.state_dict(), _trained_names(model)
    writes = not any(is_sharded(value) for value in state.values()) or dist.get_rank() == 0
    kept = {}
    for name in state:
        if name in trained or name.startswith("head."):
            whole = gather(state[name])
            if writes:  # On its own storage on the CPU, as safetensors wants.
                kept[name] = whole.cpu().clone().contiguous()
    metadata = {"format": "pt", "frozen": json.dumps(_samples(model))}
    if not writes:
        return
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        save_file(kept, part, metadata)
        os.replace(part, path)  # An interruption, or another rank, never leaves half a file.
    finally:
        part.unlink(missing_ok=True)


def load_model(model: Any, path: str | os.PathLike[str]) -> None:
    """Read into a :class:`PrototypeClassifier`: see its :meth:`~PrototypeClassifier.load`."""
    state, metadata = _read(path)
    then = _read_samples(metadata, path)
    if isinstance(model.head, DecoupledPrototypeHead):  # Another's names and shapes are compared, below.
        check_checkpoint(state, description(model.head), "head.")
    own, samples = model.state_dict(), _samples(model, every=True)
    wanted = {name for name in own if name.startswith("head.")} | ((set(samples) - set(then)) & set(own))
    for what, names in (("lacks", wanted - set(state)), ("also holds", set(state) - set(own))):
        if names:
            raise ValueError(f"Expected a checkpoint of this model, but {path} {what} {_some(sorted(names))}.")
    for name, value in state.items():
        if value.shape != own[name].shape and name != "head._extra_state":
            got = f"{tuple(value.shape)} in {path}"
            raise ValueError(f"Expected {name!r} of shape {tuple(own[name].shape)}, but got {got}.")
    others = [name for name, numbers in then.items() if not _is_close(samples.get(name), numbers)]
    if others:
        raise ValueError(
            f"Expected the frozen weights with which {path} was trained, but {len(others)} of {len(then)} are others: "
            f"{_some(others)}."
        )
    model.load_state_dict({name: shard_like(value, own[name]) for name, value in state.items()}, strict=False)


def frozen_modules(model: Any) -> set[nn.Module]:
    """The modules in the encoders that hold parameters, none of them trainable, with all that is in them."""
    frozen: set[nn.Module] = set()
    for module in model.encoders.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            frozen.update(module.modules())
    return frozen


# -- the steps --------------------------------------------------------------------------------------------------------


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path) / "model.safetensors" if os.path.isdir(path) else path
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        what = f"Expected a safetensors file, but {path} cannot be read ({error})"
        advice = "load_head(torch.load(path)), or model.load_state_dict(torch.load(path))"
        raise ValueError(f"{what}; what torch.save wrote takes torch.load, as in {advice}.") from None


def _read_samples(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """The numbers of frozen parameters that a file keeps."""
    if "frozen" not in metadata:
        raise ValueError(f"Expected a file that `save` wrote, but {path} is another safetensors file.")
    try:
        samples = json.loads(metadata["frozen"])
        return {name: [float(number) for number in numbers] for name, numbers in samples.items()}
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected a file that `save` wrote, but {path} has other metadata: {error}") from None


def _trained_names(model: Any) -> set[str]:
    """The trainable parameters of the encoders, and the buffers of modules that are not frozen."""
    frozen, names = frozen_modules(model), set()
    for prefix, module in model.encoders.named_modules(prefix="encoders"):
        if module not in frozen:
            own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
            own += [name for name, _ in module.named_buffers(recurse=False)]
            names |= {f"{prefix}.{name}" for name in own}
    return names


def _samples(model: Any, every: bool = False) -> dict[str, list[float]]:
    """Some numbers of each frozen parameter of the encoders and of what frozen norms have counted; or of all."""
    frozen, samples = frozen_modules(model), {}
    for prefix, module in model.encoders.named_modules(prefix="encoders"):
        tensors = [(name, p, p.requires_grad) for name, p in module.named_parameters(recurse=False)]
        tensors += [(name, b, module not in frozen) for name, b in module.named_buffers(recurse=False)]
        for name, x, trained in tensors:
            if x.is_floating_point() and x.numel() and (every or not trained):
                samples[f"{prefix}.{name}"] = gather(x).flatten()[:: max(1, x.numel() // 8)][:8].tolist()
    return samples


def _is_close(a: Sequence[float] | None, b: Sequence[float]) -> bool:
    """Within the precision of bfloat16, for a backbone that was cast since; NaN, as in unused memory, equals NaN."""
    if a is None or len(a) != len(b):
        return False
    pairs = list(zip(a, b, strict=True))
    return all(math.isclose(x, y, rel_tol=1e-2, abs_tol=1e-6) or (math.isnan(x) and math.isnan(y)) for x, y in pairs)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")
