"""The layout of DPL's checkpoints: where their two towers and DCP's prompts stand in open_clip's CLIP and in ours."""

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from protohead.adapters import attach
from protohead.classifier import PrototypeClassifier
from protohead.head import DecoupledPrototypeHead
from protohead.prompts import DcpPrompts

__all__ = ["read_model"]

TRAINED = ("visual.proj", "visual.ln_post.*", "ln_final.*")
HEAD_WIDTH = 64  # Of every CLIP of OpenAI's.
FORMS = {"image": {"image", "img", "visual"}, "text": {"text", "txt"}}
CASES = ("complete", "image", "text")
TABLES = {"static.image": 2, "static.text": 2, "common": 3}
DYNAMIC = {"dynamic.image": 2, "dynamic.text": 2}
START = "image_encoder.conv1.weight"


def read_model(state: Mapping[str, Tensor], head: DecoupledPrototypeHead) -> PrototypeClassifier:
    """The model of a DPL_DCP or DPL_NoPrompt state_dict, in eval mode.

    Args:
        state: With keys ``model.image_encoder.*``, ``model.text_encoder.*`` and, for DCP, ``model.prompt_learner.*``.
        head: The head of the checkpoint, which is copied.

    Raises:
        ValueError: If that is not what is there.
    """
    towers, prompts = _split(state)
    clip = _build_clip(towers)
    module = _build_prompts(prompts) if prompts else None
    model: PrototypeClassifier = attach(
        clip,
        head.num_classes,
        prompts=module,
        trainable=TRAINED,
        cases="all",
        scale=dict(zip(head.cases, head.scale.tolist(), strict=True)),
        margin=dict(zip(head.cases, head.margin.tolist(), strict=True)),
        centered=False,
        dtype=next(head.parameters()).dtype,
    )
    model.head.load_state_dict(head.state_dict())
    if module is not None:
        (encoder,) = model.encoders.values()
        encoder.seen.fill_(1)  # type: ignore[operator]
    return model.eval()


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the towers by open_clip's names, and those of the prompts by ours."""
    prefixes = [key.removesuffix(START) for key in state if key.endswith(START)]
    if len(prefixes) != 1:
        raise ValueError(f"Expected the checkpoint of a DPL model with one '...{START}', but got {len(prefixes)}.")
    towers, prompts = {}, {}
    for key, x in state.items():
        if not key.startswith(prefixes[0]) or "_pl_head." in key or key.endswith("attn_mask"):
            continue
        part, _, name = key.removeprefix(prefixes[0]).partition(".")
        modality = {"image_encoder": "image", "text_encoder": "text"}.get(part)
        if part == "prompt_learner":
            prompts[_learner_name(name, key)] = x
        elif modality is not None and ("attn_prompt." in name or "prompts_dynamic" in name):
            prompts[_block_name(name, modality)] = x
        else:
            towers[{"image": f"visual.{name}", "text": name}.get(modality or "", f"{part}.{name}".strip("."))] = x
    return towers, prompts


def _learner_name(name: str, key: str) -> str:
    """What we call a parameter of the prompt learner, by the words and numbers in its name; a table's with its row."""
    words, numbers = set(re.findall(r"[a-z]+", name.lower())), [int(x) for x in re.findall(r"\d+", name)]
    named = [modality for modality, forms in FORMS.items() if words & forms]
    last = name.rpartition(".")[2]
    if last not in ("weight", "bias"):
        cases = [i for i, case in enumerate(CASES) if case in words]
        if "common" in words and len(cases) == 1:
            return f"common/{cases[0]}"
        if len(named) == 1 and len(words & {"complete", "missing"}) == 1:
            return f"static.{named[0]}/{int('missing' in words)}"
    elif len(named) == 1:
        if "common" in words and len(numbers) == 1:
            return f"common_projection.{named[0]}.{numbers[0]}.{last}"
        if len(numbers) == 1:  # The norm before the linear layers.
            return f"stages.{named[0]}.{numbers[0]}.0.{last}"
        if len(numbers) == 2:
            return f"stages.{named[0]}.{numbers[0]}.{numbers[1] + 1}.{last}"
    raise ValueError(f"Expected the parameters of DCP's prompt learner, but {key!r} does not tell which it is.")


def _block_name(name: str, modality: str) -> str:
    """What we call a parameter of the first block; that of the third case, which a tower never sees, falls away."""
    if "attn_prompt." in name:
        return f"attention.{modality}.{name.partition('attn_prompt.')[2]}"
    case = name.rpartition("_")[2]
    row = {"complete": 0, modality: 1}.get(case, case)
    return f"dynamic.{modality}/{row}"


def _build_prompts(found: dict[str, Tensor]) -> DcpPrompts:
    tables = TABLES | (DYNAMIC if "dynamic.image/0" in found else {})
    if lacking := [f"{name}/{i}" for name, rows in tables.items() for i in range(rows) if f"{name}/{i}" not in found]:
        raise ValueError(f"Expected all of DCP's prompts, but the checkpoint lacks {lacking}.")
    state = {name: x for name, x in found.items() if "/" not in name}
    state |= {name: torch.stack([found[f"{name}/{i}"] for i in range(rows)]) for name, rows in tables.items()}
    widths = {name: state[f"static.{name}"].shape[2] for name in ("image", "text")}
    depth = len({name.split(".")[2] for name in state if name.startswith("stages.image.")})
    prompts = DcpPrompts(widths, 3 * state["common"].shape[1], depth)
    if "dynamic.image" not in state:
        warnings.warn(
            "The checkpoint does not hold DCP's dynamic prompts, as the published code never saves them: they are "
            "drawn anew, and features differ a little from those of the run that wrote it.",
            stacklevel=4,
        )
        state |= {f"dynamic.{name}": p.detach() for name, p in prompts.dynamic.items()}
    _load(prompts, state, "DCP's prompts")
    return prompts


def _build_clip(state: dict[str, Tensor]) -> Any:
    """An open_clip CLIP of the sizes that the weights have."""
    from open_clip import CLIP

    try:
        image, text = state["visual.conv1.weight"], state["token_embedding.weight"]
        patch, places = image.shape[-1], state["visual.positional_embedding"].shape[0]
        vision = {"image_size": patch * round((places - 1) ** 0.5), "patch_size": patch, "head_width": HEAD_WIDTH}
        vision |= {"width": image.shape[0], "layers": _layers("visual.transformer.resblocks.", state)}
        words = {"context_length": state["positional_embedding"].shape[0], "vocab_size": text.shape[0]}
        words |= {"width": text.shape[1], "heads": max(1, text.shape[1] // HEAD_WIDTH)}
        words |= {"layers": _layers("transformer.resblocks.", state)}
        width = state["visual.proj"].shape[1]
    except KeyError as error:
        raise ValueError(f"Expected both towers of a CLIP, but the checkpoint lacks {error}.") from None
    clip = CLIP(width, vision_cfg=vision, text_cfg=words, quick_gelu=True)
    _load(clip, {"logit_scale": clip.logit_scale.detach(), **state}, "the towers")  # No feature depends on that.
    return clip


def _layers(start: str, names: Iterable[str]) -> int:
    return len({name.removeprefix(start).split(".")[0] for name in names if name.startswith(start)})


def _load(module: torch.nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"Expected {what} of a DPL checkpoint, but they do not fit: {error}") from error
