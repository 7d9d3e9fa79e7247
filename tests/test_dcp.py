"""DCP's module trains the head, with no edit of its source."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from standins import CLASSES, CLIPransformerSS, ViLTransformerSS, config, dcp_batch
from torch import nn

from protohead import attach
from protohead.adapters.dcp import attach_dcp, fits

# Most of these heads are scored as they were made.
pytestmark = pytest.mark.filterwarnings("ignore:This head is in eval mode")


def dcp_model(task="hatememes", weight=0.5, **head_options):
    torch.manual_seed(0)
    module = CLIPransformerSS(config(task))
    assert attach_dcp(module, CLASSES[task], weight, head_options) is module
    return module


def head_of(module, task="hatememes"):
    return getattr(module, f"{task}_classifier").head


def expected_logits(module, batch, task, with_labels):
    """One row at a time, through a head that is given the mask by hand; the towers' features are not zeroed."""
    head = copy.deepcopy(head_of(module, task))
    features = module.model(batch["image"][0], batch["text"][0], batch["missing_type"])
    rows = []
    for i, code in enumerate(batch["missing_type"]):
        given = {"image": features[i : i + 1, :16], "text": features[i : i + 1, 16:]}
        for name in {0: (), 1: ("text",), 2: ("image",)}[int(code)]:
            del given[name]
        label = torch.tensor(batch["label"])[i : i + 1]
        label = label.float() if task == "mmimdb" else label
        rows.append(head(given, None, label if with_labels else None))
    return torch.cat(rows)


@pytest.mark.parametrize("task", list(CLASSES))
def test_logits_and_losses(task):
    module, batch = dcp_model(task), dcp_batch(task)
    module.eval().set_task()
    torch.testing.assert_close(module(batch)[f"{task}_logits"], expected_logits(module, batch, task, False))

    module.train()
    total, output = module.training_step(batch), module(batch)
    logits = expected_logits(module, batch, task, True)
    torch.testing.assert_close(output[f"{task}_logits"], logits)
    label = torch.tensor(batch["label"])
    if task == "mmimdb":
        loss = F.binary_cross_entropy_with_logits(logits, label.float())
    else:
        loss = F.cross_entropy(logits, label)
    torch.testing.assert_close(total, loss + 0.5 * head_of(module, task).prototype_loss())


def test_trains():
    module = dcp_model("food101")
    optimizer = module.configure_optimizers()
    before = {name: p.clone() for name, p in module.named_parameters()}
    losses = []
    for step in range(60):
        loss = module.training_step(dcp_batch("food101", seed=step % 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert {f"food101_classifier.head.prototypes.{name}" for name in ("image", "text")} < changed
    # DDP refuses a trainable parameter without a gradient.
    assert {name for name, p in module.named_parameters() if p.requires_grad} == changed


def test_masks_and_labels_belong_to_one_batch():
    module = dcp_model("food101").eval()
    classifier = module.food101_classifier
    first, second = dcp_batch("food101"), dcp_batch("food101", [2.0, 2.0, 1.0, 1.0, 0.0, 0.0], seed=1)
    alone = [classifier(module.infer(batch)["cls_feats"]) for batch in (first, second)]
    both = [module.infer(batch)["cls_feats"] for batch in (first, second)]
    for logits, features in zip(alone, both, strict=True):
        torch.testing.assert_close(classifier(features), logits)
        torch.testing.assert_close(classifier(features.clone()), logits)  # No mask: zeros are missing.


def test_attaching_twice():
    with pytest.raises(ValueError, match="hatememes_classifier to be the module's own, but `attach` has put a head"):
        attach(dcp_model(), 2)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_use_their_own_head(twin):
    module, batch = dcp_model(), dcp_batch()
    other = twin(module)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for each in (module, other):
        each.eval().set_task()
        expected = expected_logits(each, batch, "hatememes", False)
        torch.testing.assert_close(each(batch)["hatememes_logits"], expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"missing_type": [0.0, 1.0, 2.0, 3.0, 0.0, 0.0]}, "3.0 in row 3"),
        # DCP itself would read one missing type as that of every row.
        ({"missing_type": [1.0], "label": [1]}, "one missing type a row, but got 1 for 6 rows"),
        ({"label": [0, 1, -1, 0, 0, 0]}, r"in \[0, 2\), or -100, but got -1 in row 2"),
    ],
)
def test_wrong_batches(change, match):
    with pytest.raises(ValueError, match=match):
        dcp_model().training_step(dcp_batch() | change)


def test_fits():
    assert fits(CLIPransformerSS(config("hatememes")))
    assert not fits(ViLTransformerSS(config("hatememes")))
    assert not fits(nn.Linear(2, 2))
    assert not fits(None)


def test_failures_leave_the_module_as_it_was():
    module = CLIPransformerSS(config("hatememes"))
    keys = set(vars(module))
    with pytest.raises(ValueError, match="`num_classes` to be 2 as in hatememes_classifier, but got 3"):
        attach_dcp(module, 3, None, {})
    with pytest.raises(ValueError, match="`margin` to name exactly the cases"):
        attach_dcp(module, 2, None, {"margin": {"image": 0.1}})
    old = module.hatememes_classifier
    module.hatememes_classifier = nn.Linear(33, 2)
    with pytest.raises(ValueError, match="features of one width, but got 33"):
        attach_dcp(module, 2, None, {})
    module.hatememes_classifier = old
    assert set(vars(module)) == keys
    assert not module._forward_hooks
    with pytest.raises(ValueError, match="exactly one of"):
        attach_dcp(CLIPransformerSS(config("hatememes", "food101")), 2, None, {})
