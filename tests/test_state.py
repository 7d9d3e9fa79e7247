"""Checkpoints, devices, dtypes, copies."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from roads import UNTRAINED
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.optim import swa_utils

from protohead import DecoupledPrototypeHead, state

pytestmark = UNTRAINED

WIDTHS = {"image": 5, "text": 3}


def plain_head(**options):
    return DecoupledPrototypeHead(WIDTHS, 4, **{"cases": "all", **options})


def trained_head(**options):
    torch.manual_seed(0)
    margin = {"image+text": 0.1, "image": 0.2, "text": 0.3}
    head = plain_head(scale=17.5, margin=margin, **options)
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
    paper = ["_extra_state", "margin", "prototypes.image", "prototypes.text", "scale", "seen", "shift", "temperature"]
    assert sorted(plain_head(centered=False).state_dict()) == paper
    assert sorted(trained_head().state_dict()) == sorted([*paper, "bias", "center", "center_rows", "center_spread"])


def test_strict_state_dict_round_trip(tmp_path):
    head, other = trained_head(), plain_head().eval()
    torch.save(head.state_dict(), tmp_path / "head.pt")
    assert (
        str(other.load_state_dict(torch.load(tmp_path / "head.pt"), strict=True)) == "<All keys matched successfully>"
    )
    same(head, other)
    assert other.margin.tolist() == [0.1, 0.2, 0.3]


def test_safetensors_round_trip(tmp_path):
    head, other, third = trained_head(), plain_head().eval(), plain_head()
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
    other.seen.fill_(1)
    assert head.seen_cases == ("image+text", "text")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 10, 100_000])
def test_a_checkpoint_cast_by_hand_loads(dtype, rows):
    head, other = trained_head(class_names=["a", "b", "é", "\N{CAT}"]), plain_head()
    head.seen.mul_(rows)
    other.load_state_dict({name: value.to(dtype) for name, value in head.state_dict().items()})
    assert other.seen_cases == head.seen_cases
    assert list(other.class_names) == list(head.class_names)


def test_another_heads_checkpoint_is_refused():
    checkpoint = trained_head().state_dict()
    for other in (
        DecoupledPrototypeHead({"text": 3, "image": 5}, 4, cases="all"),  # Equal shapes; its cases in another order.
        DecoupledPrototypeHead({"image": 5, "audio": 3}, 4, cases="all"),
        plain_head(cases="shared"),
        plain_head(cases=["image", "text"]),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=r"cases=.*, but got one with \['image\+text', 'image', 'text'\]"):
            torch.nn.Sequential(other).load_state_dict({f"0.{name}": value for name, value in checkpoint.items()})
        torch.testing.assert_close(dict(other.state_dict()), dict(before), rtol=0, atol=0)


def test_swapped_cases_are_refused():
    head = DecoupledPrototypeHead({"a": 3, "b": 3}, 2, cases=["a", "b"])
    other = DecoupledPrototypeHead({"b": 3, "a": 3}, 2, cases=["a", "b"])
    with pytest.raises(ValueError, match="cases"):
        other.load_state_dict(head.state_dict())


def test_meta_device_construction():
    head = trained_head()
    with torch.device("meta"):
        empty = plain_head(scale=9.0, margin=0.25)
    assert all(p.is_meta for p in empty.parameters())
    also_empty = plain_head(scale=9.0, margin=0.25, device="meta")
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
    assert plain_head(dtype=torch.bfloat16).prototypes["image"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "cases='all', scale=17.5, margin={'image+text': 0.1, 'image': 0.2, 'text': 0.3}, "),
        ({"cases": ["text", "image+text", "image"], "centered": False}, "shared_space=False, centered=False)"),
        ({"class_names": ["a", "b", "c", "d"]}, "centered=True, class_names=['a', 'b', 'c', 'd'])"),
    ],
)
def test_repr_makes_an_equal_head(options, shown):
    head = trained_head(**options)
    other = eval(repr(head), {"DecoupledPrototypeHead": DecoupledPrototypeHead})
    other.load_state_dict(head.state_dict())
    same(head, other.eval())
    assert repr(other) == repr(head)
    assert shown in repr(head)
    assert repr(torch.nn.Sequential(head)).splitlines()[1].strip() == f"(0): {head!r}"


def test_repr_says_which_cases():
    assert "cases='shared', scale=20.0, margin=0.1, " in repr(DecoupledPrototypeHead(WIDTHS, 4))
    some = DecoupledPrototypeHead(WIDTHS, 4, cases=["text", "image+text"])
    assert "cases=['image+text', 'text'], scale=20.0, margin={'image+text': 0.1, 'text': 0.15}, " in repr(some)


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
    own = {"scale", "margin", "center", "center_rows", "center_spread", "seen", "_masks", "temperature", "shift"}
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
    paper, twin = trained_head(centered=False), plain_head(centered=False).eval()
    twin.load_state_dict(paper.state_dict())
    same(paper, twin)
    other = plain_head().eval()
    torch.nn.init.ones_(other.bias), other.center.fill_(1), other.center_rows.fill_(1)
    torch.nn.Sequential(other).load_state_dict(torch.nn.Sequential(paper).state_dict())
    same(paper, other)
    assert not any(x.any() for x in (other.bias, other.center, other.center_rows))


@pytest.mark.parametrize("lost", ["bias", "center", "center_rows", "center_spread"])
def test_a_checkpoint_that_lacks_one_of_them_is_refused(lost):
    head = trained_head()
    torch.nn.init.ones_(head.bias), head.center.fill_(1), head.center_rows.fill_(1)
    rest = {name: value.clone() for name, value in head.state_dict().items() if name != lost}
    with pytest.raises(RuntimeError, match=f"Missing key.*{lost}"):
        head.load_state_dict(rest)
    assert all(x.all() for x in (head.bias, head.center, head.center_rows))


def test_another_modules_weights_leave_the_center_alone():
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(3, 3), "head": plain_head()})
    model["head"].loss(torch.randn(4, 8), None, torch.arange(4))
    center = model["head"].center.clone()
    model.load_state_dict({"encoder.weight": torch.zeros(3, 3)}, strict=False)
    assert torch.equal(model["head"].center, center)


def test_the_papers_checkpoint_in_a_meta_head():
    head = plain_head(device="meta")
    head.load_state_dict(trained_head(centered=False).state_dict(), assign=True)
    assert not any(p.is_meta for p in head.parameters())


def test_reset_with_a_frozen_bias_trains_the_prototypes():
    head = plain_head()
    head.bias.requires_grad_(False)
    head.prototypes["text"].requires_grad_(False)
    head.reset(7)
    assert {name: p.requires_grad for name, p in head.named_parameters()} == {
        "bias": False,
        "prototypes.image": True,
        "prototypes.text": False,
    }


@pytest.mark.parametrize(
    ("own", "theirs", "match"),
    [
        ({"shared_space": True}, {}, "shared_space=True, but got one with False"),
        ({}, {"shared_space": True}, "shared_space=False, but got one with True"),
        (
            {"class_names": list("abcd")},
            {"class_names": list("abdc")},
            r"class_names=\['a', 'b', 'c', 'd'\], but got one",
        ),
    ],
)
def test_what_shapes_do_not_tell_is_refused(own, theirs, match):
    widths = {"image": 4, "text": 4}
    head, other = (DecoupledPrototypeHead(widths, 4, **options) for options in (own, theirs))
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=match):
        head.load_state_dict(other.state_dict())
    torch.testing.assert_close(dict(head.state_dict()), dict(before), rtol=0, atol=0)


def test_class_names_are_taken_over():
    named, head = trained_head(class_names=list("abcd")), plain_head()
    head.load_state_dict(named.state_dict())
    assert head.class_names == named.class_names == ("a", "b", "c", "d")
    head.load_state_dict(plain_head().state_dict())  # It has none; these stay.
    assert head.class_names == ("a", "b", "c", "d")
    head.reset(3)
    assert head.class_names is None
    head.reset(2, ["x", "y"])
    assert head.class_names == ("x", "y")


def test_class_names_of_a_checkpoint_that_does_not_fit_are_not_taken_over():
    named, head = DecoupledPrototypeHead(WIDTHS, 5, cases="all", class_names=list("abcde")), plain_head()
    with pytest.raises((RuntimeError, ValueError)):
        head.load_state_dict(named.state_dict())
    assert head.class_names is None


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (["a", "b"], ValueError, "4 different `class_names`, but got 2"),
        (["a", "b", "c", "a"], ValueError, "4 different"),
        ("abcd", TypeError, "list of strings, but got 'abcd'"),
        ([1, 2, 3, 4], TypeError, "list of strings"),
    ],
)
def test_wrong_class_names(names, error, match):
    with pytest.raises(error, match=match):
        plain_head(class_names=names)
    head = plain_head()
    with pytest.raises(error, match=match):
        head.reset(4, names)
    assert head.num_classes == 4
    assert head.class_names is None


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("prototypes.text", math.nan, "finite numbers in '0.prototypes.text'"),
        ("bias", math.inf, "finite numbers in '0.bias'"),
        ("center", math.nan, "finite numbers in '0.center'"),
        ("seen", math.nan, "counts in '0.seen'"),
        ("scale", -1.0, r"positive numbers in '0.scale' of the checkpoint, but got \[-1.0"),
        ("scale", 0.0, "positive"),
        ("scale", math.nan, "positive"),
        ("scale", math.inf, "positive"),
        ("margin", math.pi, r"in \[0, pi\) in '0.margin'"),
        ("margin", -0.1, "in '0.margin'"),
        ("margin", math.nan, "in '0.margin'"),
    ],
)
def test_numbers_that_no_head_has_are_refused(name, value, match):
    model = torch.nn.Sequential(plain_head())
    before = copy.deepcopy(model.state_dict())
    checkpoint = copy.deepcopy(torch.nn.Sequential(trained_head()).state_dict())
    checkpoint[f"0.{name}"].view(-1)[-1] = value
    if name == "scale" and value == -1:
        checkpoint[f"0.{name}"].fill_(value)
    with pytest.raises(ValueError, match=match):
        model.load_state_dict(checkpoint)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.float32)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0)).float(),
        torch.randn(200, generator=torch.Generator().manual_seed(0)) * 1000,
        torch.full((5,), math.nan),
        torch.zeros(0),
        torch.zeros(2, 2),
        torch.tensor(1e15),
        text("[" * 100_000),
        text('{"a":' * 100_000),
        text("[1, 2]"),
        text('"a string"'),
        text("{}"),
        text('{"cases": ["image+text", "image", "text"]}'),
        '{"cases": []}',
        {"cases": []},
        5,
        b"{}",
    ],
    ids=lambda x: None,
)
def test_malformed_metadata_is_refused(wrong):
    head = plain_head()
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match="`_extra_state`, but it cannot be read"):
        head.load_state_dict({**trained_head().state_dict(), "_extra_state": wrong})
    torch.testing.assert_close(dict(head.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize("names", [7, "abcd", [1, 2, 3, 4], ["a"], {"a": 1}])
def test_malformed_class_names_are_refused(names):
    head, checkpoint = plain_head(), trained_head().state_dict()
    config = {**state.unpack(checkpoint["_extra_state"]), "class_names": names}
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match="class_names"):
        head.load_state_dict({**checkpoint, "_extra_state": state.pack(config)})
    assert head.class_names is None
    torch.testing.assert_close(dict(head.state_dict()), dict(before), rtol=0, atol=0)


def test_the_description_is_json_in_floats():
    head = trained_head(class_names=["é", "b", "c", "d"])
    extra = head.get_extra_state()
    assert extra.dtype == torch.float32
    assert json.loads(bytes(extra.byte().tolist())) == state.description(head) == state.unpack(extra)
    assert state.description(head)["in_features"] == WIDTHS
    assert state.unpack(extra * 0.9 + extra * 0.1) == state.description(head)


# Averages.

X, MASKS, LABELS = torch.randn(8, 8), torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]] * 2).bool(), torch.arange(8) % 4


def two_heads():
    """Of one training run; the second has seen a case that the first has not."""
    head = plain_head(class_names=list("abcd"))
    head.loss(X, MASKS, LABELS, subcase_weight=0).backward()
    first = copy.deepcopy(head)
    optimizer = torch.optim.SGD(head.parameters(), 1.0)
    head.loss(X, torch.tensor([[False, True]]).expand(8, 2), LABELS).backward()
    optimizer.step()
    return first, head


def mean_of(heads, weights):
    """A head whose parameters are a mean, made by hand."""
    other = copy.deepcopy(heads[0])
    for name, p in other.named_parameters():
        p.data = sum(w * dict(h.named_parameters())[name].data for w, h in zip(weights, heads, strict=True))
    other.center.copy_(sum(w * h.center for w, h in zip(weights, heads, strict=True)))
    other.seen.copy_(sum(h.seen for h in heads))
    return other.eval()


@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.1, 0.9), (1 / 3, 2 / 3)])
def test_an_average_of_checkpoints(weights):
    heads = two_heads()
    a, b = (head.state_dict() for head in heads)
    averaged = {name: weights[0] * a[name] + weights[1] * b[name] for name in a}
    head = plain_head().eval()
    head.load_state_dict(averaged)
    assert heads[0].seen_cases == ("image+text", "image")
    assert head.seen_cases == ("image+text", "image", "text")
    assert head.class_names == ("a", "b", "c", "d")
    torch.testing.assert_close(head(X, ~MASKS), mean_of(heads, weights)(X, ~MASKS))
    head.train().loss(X, MASKS, LABELS).backward()


def test_the_mean_of_three_checkpoints():
    first, second = two_heads()
    states = [first.state_dict(), second.state_dict(), second.state_dict()]
    head = plain_head().eval()
    head.load_state_dict({name: torch.stack([x[name] for x in states]).mean(0) for name in states[0]})
    assert head.seen_cases == ("image+text", "image", "text")
    torch.testing.assert_close(head(X, MASKS), mean_of((first, second, second), (1 / 3,) * 3)(X, MASKS))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"avg_fn": swa_utils.get_swa_avg_fn()},
        {"avg_fn": swa_utils.get_ema_avg_fn(0.99)},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.99)},
        {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    ],
    ids=["default", "swa", "ema", "ema of many", "swa of many"],
)
def test_averaged_models(how):
    first, second = two_heads()
    averaged = swa_utils.AveragedModel(torch.nn.Sequential(first), use_buffers=True, **how)
    for head in (first, second):
        averaged.update_parameters(torch.nn.Sequential(head))
    head = averaged.module[0].eval()
    ema = "ema" in str(next(iter(how.values()), "")).split(" at ")[0]
    assert head.seen_cases == ("image+text", "image", "text")
    assert torch.equal(head._masks, first._masks)
    expected = mean_of((first, second), (0.99, 0.01) if ema else (0.5, 0.5))
    torch.testing.assert_close(head(X, ~MASKS), expected(X, ~MASKS))
    loaded = plain_head().eval()
    loaded.load_state_dict(head.state_dict())
    assert torch.equal(loaded(X, ~MASKS), head(X, ~MASKS))


def test_another_order_of_modalities_that_the_cases_do_not_show():
    def make(names):
        return DecoupledPrototypeHead(dict.fromkeys(names, 4), 3, cases=["a+b", "c"])

    head = make("cab")
    with pytest.raises(ValueError, match=r"modalities \['c', 'a', 'b'\], but got one with \['a', 'b', 'c'\]"):
        head.load_state_dict(make("abc").state_dict())
