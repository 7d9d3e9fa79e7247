"""Warnings of heads that are used as if they were trained, and of what trains silently less."""

import copy

import pytest
import torch
import torch.nn.functional as F

from protohead import DecoupledPrototypeHead

RANDOM = "This head is in eval mode and has seen no training.*prototypes are random"
UNLEARNED = "its center has never been learned"
X, LABELS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def build(**options):
    return DecoupledPrototypeHead({"a": 5, "b": 3}, 4, **options)


def step(head, **options):
    """A loss of the user's own."""
    loss = F.cross_entropy(head(X, None, LABELS), LABELS)
    loss.backward(**options)
    return loss


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_random_prototypes_in_eval_mode_warn_once(context):
    head = build().eval()
    with context():
        with pytest.warns(UserWarning, match=RANDOM) as caught:
            head(X)
        assert len(caught) == 1
        head(X)
        with pytest.warns(UserWarning, match=RANDOM):
            build().eval()(X)  # Each head for itself.
        head.reset_parameters()
        with pytest.warns(UserWarning, match=RANDOM):
            head(X)


def test_prototypes_that_are_not_random_do_not_warn():
    trained, imprinted, loaded = build(), build().eval(), build().eval()
    trained(X)
    imprinted.imprint(X, LABELS)
    loaded.load_state_dict(imprinted.state_dict())
    for head in (trained.eval(), imprinted, loaded):
        head(X)
    trained.reset_parameters()
    trained.train()(X)  # In training they may be random.


def test_a_center_that_is_never_learned_warns_once():
    head = build()
    with pytest.warns(UserWarning, match=UNLEARNED) as caught:
        step(head, retain_graph=True).backward()
    assert len(caught) == 1
    step(head)
    with pytest.warns(UserWarning, match=UNLEARNED):
        step(build())
    head.reset_parameters()
    with pytest.warns(UserWarning, match=UNLEARNED):
        step(head)


def test_copies_warn_for_themselves():
    head = build()
    twin = copy.deepcopy(head)
    for each in (head, twin):
        with pytest.warns(UserWarning, match=UNLEARNED):
            step(each)


def by_loss(head):
    head.loss(X, None, LABELS).backward()
    step(head)


def by_loss_first(head):
    logits = head(X, None, LABELS)
    (head.loss(X, None, LABELS) + F.cross_entropy(logits, LABELS)).backward()


def without_gradients(head):
    with torch.no_grad():
        head(X, None, LABELS)


def without_labels(head):
    head(X).sum().backward()


def without_backward(head):
    head(X, None, LABELS)


def in_eval_mode(head):
    head(X)
    head.eval()
    step(head)


@pytest.mark.parametrize(
    "use", [by_loss, by_loss_first, without_gradients, without_labels, without_backward, in_eval_mode]
)
def test_a_center_that_need_not_be_learned_does_not_warn(use):
    use(build())


def test_the_papers_head_does_not_warn():
    step(build(cases="all", scale=32, centered=False))
