"""Gradients and remembered norms in unusual surroundings: autocast, checkpoints, graphs of graphs, both roads."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from protohead import DecoupledPrototypeHead

PRESENT = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]]).bool()
LABELS = torch.arange(4)


def build(**options):
    torch.manual_seed(0)
    return DecoupledPrototypeHead({"a": 5, "b": 5}, 4, dtype=torch.float64, **options)


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
    head = DecoupledPrototypeHead(dict.fromkeys("abc", 8), 4)
    x, present = torch.randn(7, 24, requires_grad=True), head._masks.clone()
    loss = head(x, present).square().mean()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (twice,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(twice, expected)
        (once,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(once, expected)


def test_activation_checkpointing():
    head, x = build(), torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    head.eval()(x, PRESENT).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(lambda x: head(x, PRESENT).square().sum(), x, use_reentrant=False).backward()
    torch.testing.assert_close(x.grad, expected)


def test_remembered_norms_do_not_survive_their_prototypes():
    torch.manual_seed(0)
    head, x = DecoupledPrototypeHead({"a": 512, "b": 512}, 200).eval(), torch.randn(3, 1024)
    for column in range(1, 6):  # Each copy is freed; the next one has its address and its first numbers.
        changed = head.prototypes["a"].detach().clone()
        changed[..., column] += 5
        call = torch.func.functional_call
        expected = call(head, {"prototypes.a": changed}, (x,)).detach()
        with torch.no_grad():
            got = call(head, {"prototypes.a": changed}, (x,))
        torch.testing.assert_close(got, expected)
        del changed


def test_zero_vectors_have_one_gradient(monkeypatch):
    head, x = build(centered=False), torch.randn(4, 10, dtype=torch.float64)
    x[0, :5] = 0
    x.requires_grad_()
    with torch.no_grad():
        head.prototypes["a"][:, 0] = 0
    leaves, grads = [x, *head.parameters()], []
    for road in (False, True):
        if road:
            monkeypatch.setattr("protohead.head._reads_values", lambda _: False)
        grads.append(torch.autograd.grad(F.cross_entropy(head(x, PRESENT, LABELS), LABELS), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_soft_labels_take_gradients(monkeypatch):
    head, x = build(), torch.randn(4, 10, dtype=torch.float64)
    labels = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(head.loss(x, PRESENT, labels), labels)
    monkeypatch.setattr("protohead.head._reads_values", lambda _: False)
    head.reset_parameters(), head.load_state_dict(build().state_dict())
    torch.testing.assert_close(grads, torch.autograd.grad(head.loss(x, PRESENT, labels), labels))


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


def test_wide_prototypes_and_narrow_rows_have_one_center(monkeypatch):
    head, x = build(), torch.randn(4, 10) + 1000
    head.loss(x, PRESENT, LABELS)
    head.eval()
    expected = head(x, PRESENT)
    torch.testing.assert_close(head.contributions(x, PRESENT).sum(1), expected)
    monkeypatch.setattr("protohead.head._reads_values", lambda _: False)
    torch.testing.assert_close(head(x, PRESENT), expected)


@pytest.mark.parametrize("row_major", [True, False])
@pytest.mark.parametrize("width", [2, 40])  # The cosines are made again in the backward pass, or kept for it.
def test_blocks_with_few_rows(width, row_major, monkeypatch):
    torch.manual_seed(0)
    head = DecoupledPrototypeHead(dict.fromkeys("abc", width), 4, dtype=torch.float64)
    if not row_major:
        state = {name: x.mT.contiguous().mT if "prototypes" in name else x for name, x in head.state_dict().items()}
        head.load_state_dict(state, assign=True)
        head.requires_grad_(True)
        assert not head.prototypes["a"].is_contiguous()
    present = torch.cat([head._masks, head._masks, torch.zeros(2, 3, dtype=torch.bool)])
    x = torch.randn(len(present), 3 * width, dtype=torch.float64, requires_grad=True)
    labels, leaves, grads = torch.arange(len(present)) % 4, [x, *head.parameters()], []
    for road, create_graph in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr("protohead.head._reads_values", lambda _, road=road: road)
        loss = (head(x, present, labels) - 1).square().sum()
        grads.append(torch.autograd.grad(loss, leaves, create_graph=create_graph))
    for a, b, expected in zip(*grads, strict=True):
        torch.testing.assert_close(a, expected)
        torch.testing.assert_close(b, expected)


@pytest.mark.parametrize("cases", [None, "a+b"])
@pytest.mark.parametrize("lacking", [[], [1, 4, 5]])
def test_a_modality_that_all_rows_have(cases, lacking, monkeypatch):
    head = build(cases=cases)
    with torch.no_grad():
        head.center.normal_()
    present = torch.ones(7, 2, dtype=torch.bool)
    present[lacking, 1] = False
    x = torch.randn(7, 10, dtype=torch.float64, requires_grad=True)
    before, labels, results = x.detach().clone(), torch.arange(7) % 4, []
    for road in (True, False):
        monkeypatch.setattr("protohead.head._reads_values", lambda _, road=road: road)
        logits = head(x, present, labels)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [x, *head.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(x, before)
