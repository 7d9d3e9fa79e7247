"""What torch's own tools do to a head as to any layer: pruning, parametrizations, vectors, swaps, sharing."""

import copy

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune

from protohead import DecoupledPrototypeHead

X = torch.randn(6, 14, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3
PRESENT = torch.tensor([[True, True], [True, False], [False, True]] * 2)


class Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x.flip(-1)


def pruned(head):
    prune.l1_unstructured(head.prototypes, "image", 0.5)


def normed(head):
    parametrizations.weight_norm(head.prototypes, "image")


def doubled(head):
    parametrize.register_parametrization(head.prototypes, "image", Double())


def doubled_bias(head):
    parametrize.register_parametrization(head, "bias", Double())


def trained(prepare=None, seed=0, steps=3):
    torch.manual_seed(seed)
    head = DecoupledPrototypeHead({"image": 8, "text": 6}, 3, cases="all")
    if prepare:
        prepare(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(torch.randn(6, 14), PRESENT, LABELS).backward()
        optimizer.step()
    return head


def test_a_pruned_head_trains_what_is_left():
    start, head = trained(pruned, steps=0), trained(pruned)
    mask, logits = head.prototypes.image_mask, head.eval()(X, PRESENT)
    assert mask.mean() == 0.5
    changed = head.prototypes.image_orig != start.prototypes.image_orig
    assert changed[mask > 0].all()
    plain = trained(steps=0)
    plain.load_state_dict(
        {
            **{name: x for name, x in head.state_dict().items() if "image_" not in name},
            "prototypes.image": head.prototypes.image_orig.detach() * mask,
        }
    )
    torch.testing.assert_close(logits, plain.eval()(X, PRESENT))
    with torch.no_grad():
        head.prototypes.image_orig.add_(1 - mask)  # What is pruned says nothing.
    assert torch.equal(head(X, PRESENT), logits)
    prune.remove(head.prototypes, "image")
    torch.testing.assert_close(head(X, PRESENT), logits)
    head.imprint(X, LABELS, torch.ones_like(PRESENT))


@pytest.mark.parametrize("prepare", [pruned, normed, doubled, doubled_bias])
def test_its_checkpoint_loads_into_another(prepare):
    head, other = trained(prepare), trained(prepare, seed=5)
    expected = head.eval()(X, PRESENT)
    assert not torch.equal(other.eval()(X, PRESENT), expected)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(X, PRESENT), expected)
    other.train().loss(X, PRESENT, LABELS).backward()
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("prepare", [pruned, normed, doubled])
def test_its_prototype_loss_is_that_of_the_weights_it_has_now(prepare):
    head, other = trained(prepare), trained(prepare, seed=5)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other.prototype_loss(), head.prototype_loss())
    optimizer, before = torch.optim.SGD(head.parameters(), 0.1), head.prototype_loss().item()
    for _ in range(2):
        head.prototype_loss().backward()
        optimizer.step()
    assert head.prototype_loss().item() < before


@pytest.mark.parametrize("method", ["imprint", "reset_parameters", "reset"])
@pytest.mark.parametrize("prepare", [pruned, normed, doubled, doubled_bias])
def test_what_writes_prototypes_is_refused_while_they_are_made_of_others(prepare, method):
    head = trained(prepare)
    before = copy.deepcopy(head.state_dict())
    arguments = {"imprint": (X, LABELS), "reset_parameters": (), "reset": (7,)}[method]
    name = "bias" if prepare is doubled_bias else "prototypes.image"
    with pytest.raises(RuntimeError, match=f"`{method}` of plain parameters, but {name} is pruned or parametrized"):
        getattr(head, method)(*arguments)
    assert head.num_classes == 3
    torch.testing.assert_close(dict(head.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("prepare", [normed, doubled])
def test_parametrizations_can_be_removed(prepare):
    head = trained(prepare)
    logits = head.eval()(X, PRESENT)
    parametrize.remove_parametrizations(head.prototypes, "image")
    torch.testing.assert_close(head(X, PRESENT), logits)
    head.reset_parameters()
    assert not torch.allclose(head.train()(X, PRESENT), logits)


def test_parameters_as_one_vector():
    head, other = trained(), trained(seed=5)
    vector = torch.nn.utils.parameters_to_vector(head.parameters())
    torch.nn.utils.vector_to_parameters(vector, other.parameters())
    for a, b in zip(head.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clipped_gradients_and_frozen_prototypes():
    head = trained()
    head.loss(X, PRESENT, LABELS).backward()
    assert torch.nn.utils.clip_grad_norm_(head.parameters(), 1e-3) > 1e-3
    assert sum(p.grad.square().sum() for p in head.parameters()) <= 1.001e-6
    head.prototypes.requires_grad_(False)
    head.zero_grad()
    head.loss(X, PRESENT, LABELS).backward()
    assert [name for name, p in head.named_parameters() if p.grad is not None] == ["bias"]


def test_conversions_that_swap_parameters():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        head = trained()
        head.loss(X, PRESENT, LABELS).backward()
        expected = head.eval()(X, PRESENT).detach()
        head.double()
        logits = head(X, PRESENT)
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits, expected.double(), rtol=0, atol=1e-5)
        head.train().loss(X, PRESENT, LABELS).backward()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_shared_memory():
    head = torch.nn.Sequential(trained())
    before = head.eval()(X)
    head.share_memory()
    tensors = dict([*head.named_parameters(), *head.named_buffers()])
    assert "0._masks" in tensors
    assert [name for name, x in tensors.items() if not x.is_shared()] == []
    assert torch.equal(head(X), before)


def test_the_mask_of_a_pruned_bias_has_the_dtype_of_the_bias():
    head = DecoupledPrototypeHead({"image": 4, "text": 3}, 5)
    torch.nn.utils.prune.l1_unstructured(head, "bias", 0.5)
    for dtype in (torch.bfloat16, torch.float32):
        head.to(dtype)
        assert head.bias_mask.dtype == head.bias_orig.dtype == dtype
        assert head.scale.dtype == head.seen.dtype == torch.float64
