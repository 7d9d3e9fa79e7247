"""Gradients in unusual surroundings: autocast, checkpoints, graphs of graphs, both roads."""

import pytest
import torch
import torch.nn.functional as F
from roads import BOTH_ROADS, UNTRAINED, every_block
from torch.utils.checkpoint import checkpoint

from protohead import DecoupledPrototypeHead

pytestmark = UNTRAINED
PRESENT = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]]).bool()
LABELS = torch.arange(4)


def build(**options):
    torch.manual_seed(0)
    return DecoupledPrototypeHead({"a": 5, "b": 5}, 4, dtype=torch.float64, **{"cases": "all", **options})


@pytest.mark.parametrize("shared", [True, False])
def test_create_graph_changes_no_gradient_of_features_that_depend_on_each_other(shared):
    head, matrix = build().eval(), torch.randn(5, 5, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    grads = []
    for create_graph in (False, True):
        a = 1 * x
        loss = F.cross_entropy(head({"a": a, "b": a if shared else a @ matrix}, PRESENT, LABELS), LABELS)
        grads += torch.autograd.grad(loss, x, create_graph=create_graph)
    torch.testing.assert_close(grads[1], grads[0])


def test_backward_under_autocast():
    head = DecoupledPrototypeHead(dict.fromkeys("abc", 8), 4, cases="all")
    x, present = torch.randn(7, 24, requires_grad=True), head._masks > 0
    loss = head(x, present).square().mean()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (twice,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(twice, expected)
        (once,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(once, expected)


@BOTH_ROADS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(road, use_reentrant):
    head, x = build(), torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    with road():
        head(x, PRESENT).square().sum().backward()
        expected, x.grad = x.grad, None
        checkpoint(lambda x: head(x, PRESENT).square().sum(), x, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("centered", [True, False])
def test_zero_vectors_have_one_gradient(centered):
    head, x = build(centered=centered), torch.randn(4, 10, dtype=torch.float64)
    x[0, :5] = 0
    x.requires_grad_()
    with torch.no_grad():
        head.prototypes["a"][:, 0] = 0
    leaves = [x, *head.parameters()]
    expected = torch.autograd.grad(F.cross_entropy(head(x, PRESENT, LABELS), LABELS), leaves)
    with every_block():
        got = torch.autograd.grad(F.cross_entropy(head(x, PRESENT, LABELS), LABELS), leaves)
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_soft_labels_take_gradients():
    head, x = build(), torch.randn(4, 10, dtype=torch.float64)
    labels = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(head.loss(x, PRESENT, labels), labels)
    with every_block():
        got = torch.autograd.grad(build().loss(x, PRESENT, labels), labels)
    torch.testing.assert_close(got, expected)


def test_labels_that_are_overwritten_before_the_backward_pass():
    head, x, labels = build(), torch.randn(4, 10, dtype=torch.float64), torch.arange(4)
    (expected,) = torch.autograd.grad(head(x, PRESENT, labels).square().sum(), head.prototypes["a"])
    loss = head(x, PRESENT, labels).square().sum()
    labels.zero_()
    try:
        (got,) = torch.autograd.grad(loss, head.prototypes["a"])
    except RuntimeError:  # As of anything else that is saved.
        return
    torch.testing.assert_close(got, expected)


def test_contributions_share_the_bias_in_full():
    head, x = DecoupledPrototypeHead(dict.fromkeys("abc", 3), 4, dtype=torch.float64), torch.randn(2, 9)
    with torch.no_grad():
        head.bias.fill_(1.0)
    torch.testing.assert_close(head.contributions(x).sum(1), head(x), rtol=0, atol=1e-13)


def test_wide_prototypes_and_narrow_rows_have_one_center():
    head, x = build(), torch.randn(4, 10) + 1000
    head.loss(x, PRESENT, LABELS)
    head.eval()
    expected = head(x, PRESENT)
    torch.testing.assert_close(head.contributions(x, PRESENT).sum(1), expected)
    with every_block():
        torch.testing.assert_close(head(x, PRESENT), expected)


@pytest.mark.parametrize("create_graph", [True, False])
def test_prototypes_that_are_not_row_major(create_graph):
    torch.manual_seed(0)
    head = build()
    state = {name: x.mT.contiguous().mT if "prototypes" in name else x for name, x in head.state_dict().items()}
    head.load_state_dict(state, assign=True)
    head.requires_grad_(True)
    assert not head.prototypes["a"].is_contiguous()
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    grads = []
    for model in (head, build()):
        loss = (model(x, PRESENT, LABELS) - 1).square().sum()
        grads.append(torch.autograd.grad(loss, [x, *model.parameters()], create_graph=create_graph))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@BOTH_ROADS
def test_a_batch_is_left_as_it_was(road):
    head, x = build(cases="shared"), torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        head.center.normal_()
    before = [x.detach().clone(), *[p.detach().clone() for p in head.parameters()]]
    for context in (torch.enable_grad, torch.no_grad):
        with road(), context():
            logits = head(x, torch.ones(7, 2, dtype=torch.bool), torch.arange(7) % 4)
            if logits.requires_grad:
                logits.square().sum().backward()
        for a, b in zip([x, *head.parameters()], before, strict=True):
            assert torch.equal(a, b)


def test_whole_jacobians():
    """All rows of a Jacobian in one backward pass, which is transformed although the forward was not."""
    head, x = build(), torch.randn(4, 10, dtype=torch.float64)
    results = [torch.autograd.functional.jacobian(lambda x: head(x, PRESENT), x, vectorize=v) for v in (True, False)]
    torch.testing.assert_close(*results)
