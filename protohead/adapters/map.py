"""MAP (missing-aware prompts on ViLT, CVPR 2023): the head in the place of a task's classifier.

Nothing of MAP is imported: what has its attributes and calls is taken for it. What MAP's objectives, its optimizer and
its training loop do stays theirs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from protohead.head import DecoupledPrototypeHead
from protohead.inputs import check_labels
from protohead.objective import Objective
from protohead.present import present_from_missing_type

__all__ = ["LOOKED_FOR", "TaskHead", "attach_map", "fits"]

LOOKED_FOR = "MAP's ViLTransformerSS: a method `infer`, `transformer.norm`, and a classifier of its task"
TASKS = ("hatememes", "food101", "mmimdb")
# The paper's head: in MAP's own loop the classification loss is its own, which learns no center.
PAPER = {"cases": "all", "scale": 32.0, "shared_space": True, "centered": False}


class TaskHead(nn.Module):
    """What stands at `<task>_classifier`: the head, called with the features alone as MAP's objectives do.

    Which modalities are present, and the labels, come with the features: `infer` leaves them as an attribute of the
    tensor that it returns. So there is no state that another batch could find.

    Args:
        head: For the modalities image and text.
        prototype_weight: λ of the prototype loss.
    """

    def __init__(self, head: DecoupledPrototypeHead, prototype_weight: float) -> None:
        super().__init__()
        self.head = head
        self.prototype_weight = prototype_weight

    def forward(self, cls_feats: Tensor) -> Tensor:
        """(B, 2·D) features to (B, K) logits.

        Features that do not come from `infer` are read as the head does without a mask: zeros are missing.

        Raises:
            RuntimeError: If such features come in training mode, where the margins need labels.
        """
        rows = getattr(cls_feats, "_protohead_rows", None)
        if rows is None and self.training:
            raise RuntimeError(
                'Expected the tensor `infer(batch)["cls_feats"]` itself in training, but got features without their '
                "missing types and labels."
            )
        present, labels = rows or (None, None)
        logits: Tensor = self.head(cls_feats, present, labels)
        return logits


def fits(backbone: object) -> bool:
    """Whether this is, by its attributes, MAP's model."""
    transformer = getattr(backbone, "transformer", None)
    has_norm = isinstance(getattr(transformer, "norm", None), nn.Module)
    return isinstance(backbone, nn.Module) and has_norm and callable(getattr(backbone, "infer", None))


def attach_map(
    module: nn.Module, num_classes: int, prototype_weight: float | None, head_options: Mapping[str, Any]
) -> nn.Module:
    """Put a head in the place of the classifier of MAP's task, so that MAP's own training loop trains it.

    The features are the text CLS and the image CLS after the last norm, in both prompt modes. The prototype loss joins
    what ``forward`` returns in training, as ``<task>_prototype_loss``; MAP's `training_step` sums it with the rest. The
    pooler no longer reaches the loss and is frozen, since DDP refuses parameters without a gradient. Load a checkpoint
    that has the head after this: what loads it before, with ``strict=False``, drops the head in silence. Where the
    module can log, the prototype loss is logged, too.

    Args:
        module: MAP's ViLTransformerSS, with one task: hatememes or food101 (labels: one class a row) or mmimdb
            (multi-hot lists). Changed in place.
        num_classes: K, that of the old classifier.
        prototype_weight: λ. None is 0.9; of the 47 published runs that have the loss, 0.1, 0.6 and 0.9 are the most
            common (six each).
        head_options: For :class:`~protohead.DecoupledPrototypeHead`; by default those of the paper, since MAP's own
            loop has its objective: ``cases="all", scale=32, centered=False, shared_space=True``.

    Returns:
        The same module.

    Raises:
        ValueError: If the module or an argument is not as said, or has a head; the module is as it was.
    """
    task, linears = find_classifier(module)
    install(module, task, _infer, linears[0].in_features, num_classes, prototype_weight, head_options)
    if isinstance(pooler := getattr(module, "pooler", None), nn.Module):
        pooler.requires_grad_(False)
    return module


def _infer(module: Any, task: str, batch: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """MAP's `infer`, with both CLS tokens as ``cls_feats``."""
    present, labels = read_batch(module, task, batch)
    outputs: list[Tensor] = []
    hook = module.transformer.norm.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        result: dict[str, Any] = type(module).infer(module, batch, *args, **kwargs)
    finally:
        hook.remove()
    # From the end: with prompts in the attention, infer's own slices start 16 tokens late.
    length, texts, images = outputs[-1].shape[1], result["text_ids"].shape[1], result["image_masks"].shape[1]
    if (first := length - texts - images) < 0:
        raise ValueError(f"Expected at least {texts} + {images} tokens after `transformer.norm`, but got {length}.")
    features = {"image": outputs[-1][:, first + texts], "text": outputs[-1][:, first]}
    # Where prompts lengthen the sequence, infer's slices are right.
    if first and not all(_begins(result[f"{name}_feats"], feature) for name, feature in features.items()):
        raise ValueError(
            "Expected MAP's layout, prompts before text before image, but infer's `text_feats` and `image_feats` begin "
            "elsewhere: in MemPrompt's layout, for one, prompts stand before the image, too. `replace_module` takes "
            "other models."
        )
    modalities = getattr(module, f"{task}_classifier").head.modalities
    here = present.to(outputs[-1].device)
    rows = [torch.where(here[:, m, None], features[name], 0) for m, name in enumerate(modalities)]
    result["cls_feats"] = add_rows(torch.cat(rows, dim=1), present, labels)
    return result


def _begins(tokens: Tensor, first: Tensor) -> bool:
    """Whether (B, N, H) tokens begin with these; a view of the same memory does, for which no GPU has to wait."""
    return tokens[:, 0].data_ptr() == first.data_ptr() or torch.equal(tokens[:, 0], first)


# -- what MAP and DCP, which is built on MAP's code, share ------------------------------------------------------------


def find_classifier(module: nn.Module) -> tuple[str, list[nn.Linear]]:
    """The task whose classifier the module has, and the classifier's linear layers in order."""
    children = dict(module.named_children())
    found = [task for task in TASKS if f"{task}_classifier" in children]
    if len(found) != 1:
        wanted = [f"{task}_classifier" for task in TASKS]
        got = [name for name in children if name.endswith("_classifier")] or list(children)
        raise ValueError(f"Expected {type(module).__name__} to have exactly one of {wanted}, but it has {got}.")
    name = f"{found[0]}_classifier"
    if isinstance(children[name], TaskHead):
        raise ValueError(f"Expected {name} to be the module's own, but `attach` has put a head there: attach once.")
    if not (linears := [part for part in children[name].modules() if isinstance(part, nn.Linear)]):
        raise ValueError(f"Expected {name} to hold an nn.Linear, but got {children[name]}.")
    return found[0], linears


def install(
    module: Any,
    task: str,
    infer: Callable[..., dict[str, Any]],
    width: int,
    num_classes: int,
    prototype_weight: float | None,
    head_options: Mapping[str, Any],
) -> None:
    """Check all; then replace the classifier, override `infer` on the instance, and add the prototype loss."""
    name = f"{task}_classifier"
    old = module.get_submodule(name)
    last = [part for part in old.modules() if isinstance(part, nn.Linear)][-1]
    if num_classes != last.out_features:
        raise ValueError(
            f"Expected argument `num_classes` to be {last.out_features} as in {name}, but got {num_classes}."
        )
    objective = Objective() if prototype_weight is None else Objective(prototype_weight)
    if "infer" in vars(module):
        raise ValueError(f"Expected `infer` to be a method of {type(module).__name__}, but this module has its own.")
    options = {**PAPER, "device": last.weight.device, "dtype": last.weight.dtype, **head_options}
    head = DecoupledPrototypeHead({"image": width, "text": width}, num_classes, **options)

    setattr(module, name, TaskHead(head, float(objective.prototype_weight)).train(old.training))
    # Partials of functions of this file, so that a copied or pickled module calls itself, not the original.
    module.infer = partial(infer, module, task)
    module.register_forward_hook(partial(_add_prototype_loss, task))


def read_batch(module: Any, task: str, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(B, 2) which modalities are present, and the labels in training, from a batch of MAP's loader; on the CPU.

    Before the model runs: MAP's answers an unknown missing type with the previous row's prompt.
    """
    head = getattr(module, f"{task}_classifier").head
    present = present_from_missing_type(batch["missing_type"], head.modalities)
    if not module.training or "label" not in batch:
        return present, None
    # As the task's loss reads them.
    labels = torch.as_tensor(batch["label"]).to(torch.float32 if task == "mmimdb" else torch.int64)
    check_labels(labels, len(present), head.num_classes)
    return present, labels


def add_rows(cls_feats: Tensor, present: Tensor, labels: Tensor | None) -> Tensor:
    """The same features, with what :class:`TaskHead` needs to know about their rows as an attribute."""
    if len(cls_feats) != len(present):
        raise ValueError(f"Expected one missing type a row, but got {len(present)} for {len(cls_feats)} rows.")
    device = cls_feats.device
    rows = present.to(device), None if labels is None else labels.to(device)
    cls_feats._protohead_rows = rows  # type: ignore[attr-defined]
    return cls_feats


def _add_prototype_loss(task: str, module: nn.Module, args: Any, output: Any) -> None:
    # Under DDP, Lightning calls the module for its training_step too, whose output is no dict of losses.
    if module.training and isinstance(output, dict) and f"{task}_loss" in output:
        part = getattr(module, f"{task}_classifier")
        loss = output[f"{task}_prototype_loss"] = part.prototype_weight * part.head.prototype_loss()
        if _can_log(module):
            module.log(f"{task}/train/prototype_loss", loss.detach())  # type: ignore[operator]


def _can_log(module: Any) -> bool:
    """Whether the module has `log`, and, as Lightning's, is now trained by a trainer."""
    if not callable(getattr(module, "log", None)):
        return False
    try:
        trainer = module.trainer
    except AttributeError:
        return True  # Not Lightning's.
    except RuntimeError:
        return False  # Lightning's, without a trainer.
    return trainer is not None and bool(getattr(trainer, "training", True))
