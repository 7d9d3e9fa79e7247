"""Put the head on a model that you already have: :func:`attach` and :func:`replace_module`."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from protohead.adapters import dcp, map, open_clip, transformers
from protohead.classifier import PrototypeClassifier, encode_rows, joint_rows
from protohead.head import DecoupledPrototypeHead
from protohead.inputs import check_count, check_inputs

__all__ = ["attach", "replace_module"]


def attach(
    backbone: Any,
    num_classes: int,
    *,
    trainable: str | Sequence[str] = (),
    example: Mapping[str, Any] | None = None,
    prototype_weight: float | None = None,
    **head_options: Any,
) -> Any:
    """Put a head on a backbone, in one line; the backbone is frozen but for what `trainable` names.

    Args:
        backbone: An open_clip model; a transformers model with `get_image_features` and `get_text_features`, or a
            `ViltModel`; a mapping of modality name to encoder, as :class:`~protohead.PrototypeClassifier` takes; or the
            Lightning module of MAP or DCP, which is changed in place, so that its own loop trains the head.
        num_classes: K.
        trainable: Shell-style patterns of the backbone's parameter names (for a mapping, after the modality's name and
            a dot), such as ``("visual.proj", "*ln_post*", "ln_final*")``. Parameters that the head never reaches, such
            as CLIP's `logit_scale`, stay frozen.
        example: Inputs of one row or more, as the model will be given them, on which each encoder is tried once, to
            find its width and the parameters that it uses. open_clip and transformers models make their own. With an
            example on the meta device, modules are tried there, for their widths only.
        prototype_weight: λ, the weight of the prototype loss in what MAP's and DCP's own loops sum (default there:
            see :mod:`protohead.adapters.map`). In your own loop you add the loss yourself.
        **head_options: As in :class:`~protohead.DecoupledPrototypeHead`. `in_features` is needed for a mapping without
            `example`; `shared_space` is True for open_clip and transformers models.

    Returns:
        A :class:`~protohead.PrototypeClassifier`; for MAP and DCP the module that was given.

    Raises:
        TypeError: If the backbone is none of these, with what was looked for.
        ValueError: If a pattern finds nothing to train, or an argument is not as said. The backbone is then unchanged.

    Example:
        >>> encoders = {"image": nn.Linear(8, 4), "text": nn.Linear(6, 4)}
        >>> example = {"image": torch.zeros(1, 8), "text": torch.zeros(1, 6)}
        >>> model = attach(encoders, num_classes=5, example=example, trainable="text.*")
        >>> model.head.in_features
        {'image': 4, 'text': 4}
        >>> [name for name, p in model.encoders.named_parameters() if p.requires_grad]
        ['text.weight', 'text.bias']
    """
    for fits, attach_in_place in ((map.fits, map.attach_map), (dcp.fits, dcp.attach_dcp)):
        if fits(backbone):
            if trainable or example is not None or "in_features" in head_options:
                raise ValueError(
                    "Expected no `trainable`, `example` or `in_features` for a module that trains itself: it says what "
                    "it trains, and how wide its features are."
                )
            return attach_in_place(backbone, num_classes, prototype_weight, head_options)
    if prototype_weight is not None:
        raise ValueError(
            "Expected `prototype_weight` for the modules of MAP and DCP only: in your own loop, add "
            "`weight * model.head.prototype_loss()` to the loss."
        )
    check_count("num_classes", num_classes)
    for family in (open_clip, transformers):
        if family.fits(backbone):
            encoders, own = family.encoders(backbone)
            named = list(backbone.named_parameters())
            break
    else:
        if not isinstance(backbone, Mapping):
            looked_for = "".join(f"\n- {family.LOOKED_FOR}" for family in (open_clip, transformers, map, dcp))
            raise TypeError(
                f"Expected a backbone that `attach` knows, but got {type(backbone).__name__}. What was looked for:"
                f"{looked_for}\n- any model: a mapping of modality name to encoder"
            )
        encoders, own = dict(backbone), None
        named = [(f"{name}.{tail}", p) for name, x in encoders.items() for tail, p in _parameters(x)]
    given = head_options.pop("in_features", None)
    if example is None and own is None and given is None:
        raise ValueError("Expected `in_features` or `example`, without which the encoders' widths are not known.")
    widths, reached = given, {p for _, p in named}
    if example is not None or own is not None:
        try:
            widths, reached = _try(encoders, own if example is None else example, reached)
        except Exception as error:
            if example is not None:
                raise
            what = f"{type(backbone).__name__} cannot be tried on inputs made for it ({error}): give `example`."
            raise ValueError(what) from error
        if given is not None and dict(given) != widths:
            raise ValueError(f"Expected `in_features` to be {widths}, as the encoders return, but got {dict(given)}.")
    chosen = _chosen([trainable] if isinstance(trainable, str) else trainable, named, reached)
    defaults = {"device": named[0][1].device if named else None}
    if own is not None:  # The towers of one model, trained together.
        defaults["shared_space"] = len(set(widths.values())) == 1
    head = DecoupledPrototypeHead(widths, num_classes, **{**defaults, **head_options})
    model = PrototypeClassifier(encoders, head)
    for _, p in named:
        p.requires_grad_(p in chosen)
    return model.train()


def replace_module(model: nn.Module, path: str, head: nn.Module) -> nn.Module:
    """Put `head` in the place of the module at a dotted path, and return the module that stood there.

    Args:
        model: Any model; changed in place.
        path: As in ``model.get_submodule``, for instance ``"classifier"`` or ``"blocks.3.mlp"``.
        head: The new module. It is moved to the device of the old one's parameters, if that had any.

    Raises:
        ValueError: If there is no module at the path, with the nearest names; or if the old module is an
            ``nn.Linear`` of another width than the head. The model is then unchanged.
        TypeError: If `head` is not a module.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(7, 5))
        >>> replace_module(model, "1", DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=5))
        Linear(in_features=7, out_features=5, bias=True)
        >>> model(torch.randn(2, 7)).shape
        torch.Size([2, 5])
    """
    if not isinstance(head, nn.Module):
        raise TypeError(f"Expected argument `head` to be a module, but got {type(head).__name__}.")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if path not in names:
        near = get_close_matches(path, names) or names[-5:]
        raise ValueError(
            f"Expected `path` to be that of a module in {type(model).__name__}, but got {path!r}; nearest: {near}."
        )
    old = model.get_submodule(path)
    if isinstance(old, nn.Linear) and isinstance(head, DecoupledPrototypeHead):
        width = sum(head.in_features.values())
        if old.in_features != width:
            raise ValueError(f"Expected a head of {old.in_features} features at {path!r}, but got {head.in_features}.")
    parameter = next(old.parameters(), None)
    if parameter is not None:
        head.to(parameter.device)
    head.train(old.training)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, head)
    return old


def _parameters(encoder: Any) -> list[tuple[str, Tensor]]:
    owner = getattr(encoder, "__self__", encoder)
    return list(owner.named_parameters()) if isinstance(owner, nn.Module) else []


def _try(encoders: Any, example: Mapping[str, Any], parameters: set[Tensor]) -> tuple[dict[str, int], set[Tensor]]:
    """Run the encoders once; the widths of their features, and the parameters that these depend on."""
    joint = not isinstance(encoders, Mapping)
    modalities = tuple(example) if joint else tuple(encoders)
    batch = len(check_inputs(example, None, modalities))
    if lacking := [name for name in modalities if example.get(name) is None]:
        raise ValueError(f"Expected `example` to hold inputs of {modalities}, but it lacks {lacking}.")
    each = [encoders] if joint else list(encoders.values())
    owners = [owner for x in each if isinstance(owner := getattr(x, "__self__", x), nn.Module)]
    modes = {module: module.training for owner in owners for module in owner.modules()}
    flags = {p: p.requires_grad for p in parameters}
    try:
        for owner in owners:
            owner.eval()  # One row must not reach the running statistics of a batch norm.
        for p in parameters:
            p.requires_grad_(p.is_floating_point())
        with torch.enable_grad():
            if joint:
                features = joint_rows(encoders, example, {x: torch.ones(batch, dtype=torch.bool) for x in modalities})
            else:
                features = {x: encode_rows(x, _on_meta(encoders[x], example[x]), example[x], batch) for x in modalities}
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, flag in flags.items():
            p.requires_grad_(flag)
    widths = {name: x.shape[1] for name, x in features.items()}
    if any(x.is_meta for x in features.values()) and not any(p.is_meta for p in parameters):
        return widths, parameters  # The graph is that of copies.
    return widths, _leaves(features.values()) & parameters


def _on_meta(encoder: Any, example: Any) -> Any:
    """The encoder, or where the example is on the meta device a stand-in on that device, which computes nothing."""
    tensors = [x for x in (example.values() if isinstance(example, Mapping) else [example]) if isinstance(x, Tensor)]
    if not isinstance(encoder, nn.Module) or not any(x.is_meta for x in tensors):
        return encoder
    state = {name: x.to("meta") for name, x in (*encoder.named_parameters(), *encoder.named_buffers())}
    return lambda *args, **kwargs: torch.func.functional_call(encoder, state, args, kwargs)


def _leaves(outputs: Any) -> set[Tensor]:
    """The leaves of the autograd graph of some tensors."""
    waiting, known, leaves = [x.grad_fn for x in outputs], set(), set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in known:
            known.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
            if hasattr(node, "variable"):
                leaves.add(node.variable)
    return leaves


def _chosen(patterns: Sequence[str], named: Sequence[tuple[str, Tensor]], reached: set[Tensor]) -> set[Tensor]:
    """The parameters that the patterns name and the head reaches."""
    chosen: set[Tensor] = set()
    for pattern in patterns:
        found = {name: p for name, p in named if fnmatchcase(name, pattern)}
        if not found:
            near = get_close_matches(pattern, [name for name, _ in named]) or [name for name, _ in named[-5:]]
            raise ValueError(f"Expected `trainable` to name parameters, but {pattern!r} matches none; nearest: {near}.")
        if not reached.intersection(found.values()):
            raise ValueError(f"Expected `trainable` to name parameters that the head reaches, but got {list(found)}.")
        chosen |= reached.intersection(found.values())
    return chosen
