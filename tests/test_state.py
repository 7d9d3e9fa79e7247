"""Checkpoints, devices, dtypes, copies."""

import copy
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from protohead import DecoupledPrototypeHead

WIDTHS = {"image": 5, "text": 3}


def trained_head(**options):
    torch.manual_seed(0)
    margin = {"image+text": 0.1, "image": 0.2, "text": 0.3}
    head = DecoupledPrototypeHead(WIDTHS, 4, scale=17.5, margin=margin, **options)
    head(torch.randn(2, 8), torch.tensor([[True, True], [False, True]]))
    return head.eval()


def same(a, b):
    x = torch.randn(6, 8)
    present = torch.tensor([[True, True], [True, False], [False, True]]).repeat(2, 1)
    labels = torch.arange(6) % 4
    assert a.seen_cases == b.seen_cases == ("image+text", "text")
    assert torch.equal(a(x, present), b(x, present))
    assert torch.equal(a(x, present, labels), b(x, present, labels))
    assert torch.equal(a.prototype_loss(), b.prototype_loss())


def test_state_dict_keys():
    paper = ["_extra_state", "margin", "prototypes.image", "prototypes.text", "scale", "seen"]
    assert sorted(DecoupledPrototypeHead(WIDTHS, 4, centered=False).state_dict()) == paper
    assert sorted(trained_head().state_dict()) == sorted([*paper, "bias", "center", "center_rows"])


def test_strict_state_dict_round_trip(tmp_path):
    head, other = trained_head(), DecoupledPrototypeHead(WIDTHS, 4).eval()
    torch.save(head.state_dict(), tmp_path / "head.pt")
    assert (
        str(other.load_state_dict(torch.load(tmp_path / "head.pt"), strict=True)) == "<All keys matched successfully>"
    )
    same(head, other)
    assert other.margin.tolist() == [0.1, 0.2, 0.3]


def test_safetensors_round_trip(tmp_path):
    head, other, third = trained_head(), DecoupledPrototypeHead(WIDTHS, 4).eval(), DecoupledPrototypeHead(WIDTHS, 4)
    save_file(head.state_dict(), tmp_path / "a.safetensors")
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    same(head, other)
    model = torch.nn.Sequential(head)
    save_model(model, str(tmp_path / "b.safetensors"))
    load_model(torch.nn.Sequential(third), str(tmp_path / "b.safetensors"))
    same(head, third.eval())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_copies(twin):
    head = trained_head()
    other = twin(head)
    same(head, other)
    other.seen.fill_(True)
    assert head.seen_cases == ("image+text", "text")


def test_a_checkpoint_cast_to_half_by_hand_loads():
    head, other = trained_head(), DecoupledPrototypeHead(WIDTHS, 4)
    other.load_state_dict({name: value.half() for name, value in head.state_dict().items()})
    assert other.seen_cases == head.seen_cases


def test_another_heads_checkpoint_is_refused():
    state = trained_head().state_dict()
    for other in (
        DecoupledPrototypeHead({"text": 3, "image": 5}, 4),  # Equal shapes; its cases are in another order.
        DecoupledPrototypeHead({"image": 5, "audio": 3}, 4),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=r"cases .*, but got one with \('image\+text', 'image', 'text'\)"):
            torch.nn.Sequential(other).load_state_dict({f"0.{name}": value for name, value in state.items()})
        torch.testing.assert_close(dict(other.state_dict()), dict(before), rtol=0, atol=0)


def test_swapped_cases_are_refused():
    head = DecoupledPrototypeHead({"a": 3, "b": 3}, 2, cases=["a", "b"])
    other = DecoupledPrototypeHead({"b": 3, "a": 3}, 2, cases=["a", "b"])
    with pytest.raises(ValueError, match="cases"):
        other.load_state_dict(head.state_dict())


def test_meta_device_construction():
    head = trained_head()
    with torch.device("meta"):
        empty = DecoupledPrototypeHead(WIDTHS, 4, scale=9.0, margin=0.25)
    assert all(p.is_meta for p in empty.parameters())
    also_empty = DecoupledPrototypeHead(WIDTHS, 4, scale=9.0, margin=0.25, device="meta")
    also_empty.load_state_dict(head.state_dict(), assign=True)
    same(head, also_empty.eval())
    empty.to_empty(device="cpu").reset_parameters()
    assert empty.scale.tolist() == [9.0] * 3
    assert empty.margin.tolist() == [0.25] * 3
    assert empty.seen_cases == ()
    assert empty(torch.randn(2, 8)).isfinite().all()
    empty.load_state_dict(head.state_dict())
    same(head, empty.eval())


def test_dtype_changes_leave_the_margins_exact():
    head = trained_head().half().double()
    assert head.margin.tolist() == [0.1, 0.2, 0.3]
    assert {p.dtype for p in head.parameters()} == {torch.float64}
    assert DecoupledPrototypeHead(WIDTHS, 4, dtype=torch.bfloat16).prototypes["image"].dtype == torch.bfloat16


def test_repr_makes_an_equal_head():
    head = trained_head(cases=["image+text", "image", "text"], shared_space=False)
    other = eval(repr(head), {"DecoupledPrototypeHead": DecoupledPrototypeHead})
    other.load_state_dict(head.state_dict())
    same(head, other.eval())
    assert repr(other) == repr(head)
    assert repr(torch.nn.Sequential(head)).splitlines()[1].strip() == f"(0): {head!r}"


def test_the_widths_are_the_heads_own():
    widths = dict(WIDTHS)
    head = DecoupledPrototypeHead(widths, 4)
    widths["image"] = 9
    assert head.in_features == WIDTHS


def test_reset_keeps_a_frozen_head_frozen():
    head = trained_head().requires_grad_(False)
    head.reset(7)
    assert not any(p.requires_grad for p in head.parameters())


def test_buffers_of_children_stay_with_them():
    head = trained_head()
    head.prototypes.register_buffer("mask", torch.ones(2))
    own = {"scale", "margin", "center", "center_rows", "seen", "_masks", "_block"}
    assert set(dict(head.double().named_buffers(recurse=False))) == own


def test_works_beside_another_default_device():
    head = trained_head()
    x, present = torch.randn(3, 8), torch.tensor([[True, True], [True, False], [False, True]])
    expected = head(x, present, torch.arange(3))
    with torch.device("meta"):
        assert torch.equal(head(x, present, torch.arange(3, device="cpu")), expected)


def test_numpy_numbers_are_numbers():
    head = DecoupledPrototypeHead({"image": np.int64(5)}, np.int64(4), scale=np.float32(16))
    assert "np." not in repr(head)
    assert head.scale.tolist() == [16.0]


def test_reset():
    head = trained_head(dtype=torch.float64)
    head.reset(7)
    assert head.num_classes == 7
    assert head.seen_cases == ()
    assert {tuple(p.shape) for p in head.parameters()} == {(2, 7, 5), (2, 7, 3), (7,)}
    assert {p.dtype for p in head.parameters()} == {torch.float64}
    assert head(torch.randn(2, 8)).shape == (2, 7)
    assert "num_classes=7" in repr(head)


def test_the_papers_checkpoint_inside_a_model():
    paper, twin = trained_head(centered=False), DecoupledPrototypeHead(WIDTHS, 4, centered=False).eval()
    twin.load_state_dict(paper.state_dict())
    same(paper, twin)
    other = DecoupledPrototypeHead(WIDTHS, 4).eval()
    torch.nn.init.ones_(other.bias), other.center.fill_(1), other.center_rows.fill_(1)
    torch.nn.Sequential(other).load_state_dict(torch.nn.Sequential(paper).state_dict())
    same(paper, other)
    assert not any(x.any() for x in (other.bias, other.center, other.center_rows))


@pytest.mark.parametrize("lost", ["bias", "center", "center_rows"])
def test_a_checkpoint_that_lacks_one_of_them_is_refused(lost):
    head = trained_head()
    torch.nn.init.ones_(head.bias), head.center.fill_(1), head.center_rows.fill_(1)
    state = {name: value.clone() for name, value in head.state_dict().items() if name != lost}
    with pytest.raises(RuntimeError, match=f"Missing key.*{lost}"):
        head.load_state_dict(state)
    assert all(x.all() for x in (head.bias, head.center, head.center_rows))


def test_another_modules_weights_leave_the_center_alone():
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 3), "head": DecoupledPrototypeHead(WIDTHS, 4)})
    model["head"].loss(torch.randn(4, 8), None, torch.arange(4))
    center = model["head"].center.clone()
    model.load_state_dict({"encoder.weight": torch.zeros(3, 3)}, strict=False)
    assert torch.equal(model["head"].center, center)


def test_the_papers_checkpoint_in_a_meta_head():
    head = DecoupledPrototypeHead(WIDTHS, 4, device="meta")
    head.load_state_dict(trained_head(centered=False).state_dict(), assign=True)
    assert not any(p.is_meta for p in head.parameters())


def test_reset_with_a_frozen_bias_trains_the_prototypes():
    head = DecoupledPrototypeHead(WIDTHS, 4)
    head.bias.requires_grad_(False)
    head.prototypes["text"].requires_grad_(False)
    head.reset(7)
    assert {name: p.requires_grad for name, p in head.named_parameters()} == {
        "bias": False,
        "prototypes.image": True,
        "prototypes.text": False,
    }
