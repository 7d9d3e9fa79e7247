"""Put the head on a model that you already have: :func:`attach` and :func:`replace_module`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from protohead.adapters import dcp, map, open_clip, transformers
from protohead.adapters.extra import add_extra, check_extra, without
from protohead.adapters.probe import chosen_parameters, parameters_of, try_encoders
from protohead.adapters.replace import replace_module
from protohead.adapters.towers import put_on, read_towers
from protohead.classifier import PrototypeClassifier
from protohead.head import DecoupledPrototypeHead
from protohead.options import check_count

__all__ = ["attach", "replace_module"]


@torch.inference_mode(False)  # Else nothing could ever be trained.
def attach(
    backbone: Any,
    num_classes: int,
    *,
    trainable: str | Sequence[str] | None = None,
    prompts: str | nn.Module | None = None,
    example: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    prototype_weight: float | None = None,
    **head_options: Any,
) -> Any:
    """Put a head on a backbone, in one line; the backbone is frozen but for what `trainable` names.

    The backbone is not copied: it is the model's own, frozen and set to eval mode in place.

    Args:
        backbone: An open_clip model; a transformers model with `get_image_features` and `get_text_features`, or a
            `ViltModel`; a mapping of modality name to encoder, as :class:`~protohead.PrototypeClassifier` takes; or the
            Lightning module of MAP or DCP, which is changed in place, so that its own loop trains the head.
        num_classes: K.
        trainable: Shell-style patterns of the backbone's parameter names (for a mapping, after the modality's name and
            a dot), such as ``("visual.proj", "*ln_post*", "ln_final*")``. Parameters that the head never reaches, such
            as CLIP's `logit_scale`, stay frozen. By default none; with prompts, what DCP trains: the image projection
            and the final norms.
        prompts: Missing-aware prompts for the two towers, which are trained: ``"dcp"``, ``"map"`` or a module, such as
            :class:`protohead.prompts.DcpPrompts` with other lengths; see :mod:`protohead.prompts`.
        example: Inputs of one row or more, as the model will be given them, on which each encoder is tried once, to
            find its width and the parameters that it uses; without it, all are taken for used. It may be on the meta
            device: modules are then tried there. For open_clip and transformers models one is made.
        extra: Further modalities, each to an encoder of your own, as in ``{"tabular": mlp}``. They stay trainable as
            they are. Their widths are found on `example`, which may be of them alone, or, where an encoder begins with
            a linear layer, on a row of zeros.
        prototype_weight: λ, the weight of the prototype loss in what MAP's and DCP's own loops sum (default there:
            see :mod:`protohead.adapters.map`). In your own loop you add the loss yourself.
        **head_options: As in :class:`~protohead.DecoupledPrototypeHead`. `in_features` is needed for a mapping without
            `example`; where it is given, its order is that of the modalities. `shared_space` is True for open_clip and
            transformers models.

    Returns:
        A :class:`~protohead.PrototypeClassifier`; for MAP and DCP the module that was given.

    Raises:
        TypeError: If the backbone is none of these, with what was looked for.
        ValueError: If a pattern finds nothing to train, the towers cannot take prompts, or an argument is not as said.
            The backbone is then unchanged.

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
            if trainable or any(x is not None for x in (prompts, example, extra, head_options.get("in_features"))):
                raise ValueError(
                    "Expected no `trainable`, `prompts`, `example`, `extra` or `in_features` for a module that trains "
                    "itself: it says what it trains, and how wide its features are."
                )
            return attach_in_place(backbone, num_classes, prototype_weight, head_options)
    if prototype_weight is not None:
        raise ValueError(
            "Expected `prototype_weight` for the modules of MAP and DCP only: in your own loop, give it to "
            "`model.loss`."
        )
    check_count("num_classes", num_classes)
    encoders, own, named = _read_backbone(backbone)
    extra, in_features = check_extra(extra, encoders), head_options.pop("in_features", None)
    if prompts is not None and extra:
        raise ValueError("Expected `prompts` or `extra`, since prompts make one encoder of two towers, but got both.")
    towers = None if prompts is None else read_towers(backbone, prompts)
    if trainable is None:
        trainable = () if towers is None else towers.trained
    widths, reached = _try(encoders, own, without(example, extra), named, without(in_features, extra))
    if extra:
        widths = add_extra(widths, extra, example or {}, in_features)
        encoders = {**encoders, **extra}
    chosen = chosen_parameters([trainable] if isinstance(trainable, str) else trainable, named, reached)
    defaults: dict[str, Any] = {"device": named[0][1].device if named else None}
    if own is not None:  # The towers of one model, trained together.
        defaults["shared_space"] = len(set(widths.values())) == 1 and not extra
    head = DecoupledPrototypeHead(widths, num_classes, **{**defaults, **head_options})
    if towers is not None:
        encoders = put_on(towers, widths)
    model = PrototypeClassifier(encoders, head)
    for _, p in named:
        p.requires_grad_(p in chosen)
    return model.train()


def _try(
    encoders: Any,
    own: Mapping[str, Any] | None,
    example: Mapping[str, Any] | None,
    named: Sequence[tuple[str, nn.Parameter]],
    in_features: Mapping[str, int] | None,
) -> tuple[dict[str, int], set[nn.Parameter]]:
    """The widths of the encoders, in the user's order, and the parameters that they use: tried on an example."""
    if example is None and own is None and in_features is None:
        raise ValueError("Expected `in_features` or `example`, without which the encoders' widths are not known.")
    if lazy := [name for name, p in named if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise ValueError(f"Expected parameters that have their shapes, but these wait for a first batch: {lazy}.")
    widths, reached = in_features, {p for _, p in named if p.is_floating_point()}
    if example is not None:
        widths, reached = try_encoders(encoders, example, reached)
    elif own is not None:
        try:
            widths, reached = try_encoders(encoders, own, reached)
        except Exception as error:
            what = f"The backbone cannot be tried on inputs made for it ({error}): give `example`."
            raise ValueError(what) from error
    if in_features is not None and dict(in_features) != widths:
        raise ValueError(f"Expected `in_features` to be {widths}, as the encoders return, but got {dict(in_features)}.")
    return dict(widths if in_features is None else in_features), reached  # type: ignore[arg-type]


def _read_backbone(backbone: Any) -> tuple[Any, dict[str, Any] | None, list[tuple[str, nn.Parameter]]]:
    """The encoders of a backbone; inputs of one row, where the family is known; and the named parameters."""
    for family in (open_clip, transformers):
        if family.fits(backbone):
            return *family.encoders(backbone), list(backbone.named_parameters())
    if isinstance(backbone, nn.ModuleDict):
        backbone = dict(backbone.items())
    if isinstance(backbone, Mapping):
        named = [(f"{name}.{tail}", p) for name, x in backbone.items() for tail, p in parameters_of(x)]
        return dict(backbone), None, named
    looked_for = "".join(f"\n- {family.LOOKED_FOR}" for family in (open_clip, transformers, map, dcp))
    if isinstance(backbone, PrototypeClassifier):
        hint = " It has a head: `model.head.reset(num_classes)` gives that other classes."
    else:
        hint = " A function that makes models may return more than the model." * isinstance(backbone, tuple)
    raise TypeError(
        f"Expected a backbone that `attach` knows, but got {type(backbone).__name__}.{hint} "
        f"What was looked for:{looked_for}\n- any model: a mapping of modality name to encoder"
    )
