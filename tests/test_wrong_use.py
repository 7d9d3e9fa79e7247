"""Each wrong use is an error that says what was expected and what came."""

import math

import pytest
import torch
from roads import UNTRAINED

import protohead
from protohead import DecoupledPrototypeHead

pytestmark = UNTRAINED

WIDTHS = {"image": 4, "text": 3}
IMAGE, TEXT = torch.ones(2, 4), torch.ones(2, 3)
BOTH = torch.ones(2, 2, dtype=torch.bool)
LABELS = torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"in_features": ["image"]}, TypeError, "map names to widths, but got .'image'."),
        ({"in_features": {}}, ValueError, "at least one modality"),
        ({"in_features": {"image": 0}}, ValueError, "in_features.'image'.* positive integer, but got 0"),
        ({"in_features": {"image": 4.0}}, ValueError, "positive integer, but got 4.0"),
        ({"in_features": {"a+b": 4}}, ValueError, "'a.b'"),
        ({"in_features": {"keys": 4}}, ValueError, "ParameterDict can hold, but got 'keys'"),
        ({"in_features": {"training": 4}}, ValueError, "got 'training'"),
        ({"in_features": {"a,b": 4}}, ValueError, "got 'a,b'"),
        ({"num_classes": 0}, ValueError, "`num_classes` to be a positive integer, but got 0"),
        ({"num_classes": True}, ValueError, "got True"),
        ({"scale": 0}, ValueError, r"`scale` to be positive, for each of the cases .*text',\), but got \[0.0"),
        ({"scale": float("nan")}, ValueError, "`scale`"),
        ({"scale": "32"}, TypeError, "`scale` to be a number, or numbers by case, but got '32'"),
        ({"scale": True}, TypeError, "got True"),
        ({"margin": [0.1, 0.2, 0.3]}, TypeError, "`margin` .* got .0.1, 0.2, 0.3."),
        ({"scale": {"image": 32}}, ValueError, r"`scale` to name exactly .*text',\), but got \('image',\)"),
        (
            {"scale": {"image+text": 32}, "cases": "all"},
            ValueError,
            r"`scale` to name exactly .*'text'\), but got \('image\+text',\)",
        ),
        ({"scale": float("inf")}, ValueError, r"`scale` to be positive, .*text',\), but got \[inf"),
        ({"scale": None}, TypeError, "got None"),
        ({"margin": math.pi}, ValueError, "`margin`"),
        ({"margin": -0.1}, ValueError, "`margin`"),
        ({"margin": 30}, ValueError, r"radians, for each of the cases .*text',\), but got \[30.0"),
        ({"margin": {"image+text": 0.1, "image": 0.1, "txt": 0.1}}, ValueError, "'txt'"),
        ({"cases": ["image+text", "audio"]}, ValueError, r"got \['audio'\]"),
        ({"cases": "image+text"}, ValueError, r"'all' or a list of names, such as .* but got 'image.text'"),
        ({"shared_space": True}, ValueError, "equal widths .*'image': 4, 'text': 3"),
    ],
)
def test_construction(arguments, error, match):
    with pytest.raises(error, match=match):
        DecoupledPrototypeHead(**{"in_features": WIDTHS, "num_classes": 5, **arguments})


@pytest.mark.parametrize(
    ("features", "present", "labels", "error", "match"),
    [
        (torch.ones(2, 8), None, None, ValueError, r"\(B, 7\) for .*, but got \(2, 8\)"),
        (torch.ones(7), None, None, ValueError, r"but got \(7,\)"),
        ([IMAGE, TEXT], None, None, TypeError, "tensor or a mapping, but got list"),
        ({"img": IMAGE}, None, None, ValueError, r"'image', 'text'.*, but got others: \['img'\]"),
        ({"image": IMAGE.int()}, None, None, TypeError, "'image' .*floating-point tensor, but got torch.int32"),
        ({"image": [1.0]}, None, None, TypeError, "got list"),
        ({"image": TEXT}, None, None, ValueError, r"'image' to be of shape \(B, 4\), but got \(2, 3\)"),
        ({"image": IMAGE, "text": TEXT[:1]}, None, None, ValueError, "'image': 2, 'text': 1"),
        ({}, None, None, ValueError, "at least one of"),
        ({"image": IMAGE, "text": TEXT}, BOTH[:, :1], None, ValueError, r"\(B, 2\) .*, but got \(2, 1\)"),
        ({"image": IMAGE, "text": TEXT}, BOTH[:1], None, ValueError, "'text': 2, 'present': 1"),
        ({"image": IMAGE, "text": TEXT}, BOTH[0], None, ValueError, r"but got \(2,\)"),
        (
            {"image": IMAGE, "text": TEXT},
            BOTH.long(),
            None,
            TypeError,
            r"bool tensor, .*, but got torch.int64. .*as_tensor\(mask\).bool\(\); protohead.present_from_flags .*_type",
        ),
        (
            {"image": IMAGE, "text": TEXT},
            [[True, True]] * 2,
            None,
            TypeError,
            "bool tensor, or columns by name, but got list",
        ),
        ({}, [[True, True]], None, TypeError, "bool tensor, or columns by name, but got list"),
        ({}, torch.tensor(True), None, ValueError, r"\(B, 2\) .*, but got \(\)"),
        ({"image": IMAGE}, None, torch.full((2, 5), -0.5), ValueError, "got -0.5 in row 0"),
        ({"image": IMAGE}, BOTH, None, ValueError, "'text', which `present` says that row 0 has"),
        ({"image": IMAGE, "text": None}, BOTH, None, ValueError, "'text'"),
        ({"image": IMAGE}, None, LABELS.float(), ValueError, r"point \(B, 5\), but got torch.float32 \(2,\) for B = 2"),
        ({"image": IMAGE}, None, LABELS[:1], ValueError, r"int64 \(B,\), .*, but got torch.int64 \(1,\) for B = 2"),
        ({"image": IMAGE}, None, LABELS.int(), TypeError, r"got torch.int32; `.long\(\)` casts one class a row"),
        ({"image": IMAGE}, None, LABELS.float(), ValueError, r"got torch.float32 \(2,\) .*`.long\(\)` casts one class"),
        ({"image": IMAGE}, None, torch.ones(2, 5).long(), ValueError, r"torch.int64 \(2, 5\) .*`.float\(\)` casts sev"),
        ({"image": IMAGE}, None, LABELS.bool(), TypeError, r"got torch.bool; `.long\(\)` casts one class a row"),
        ({"image": IMAGE}, None, [0, 4], TypeError, "got list; torch.as_tensor"),
        ({"image": IMAGE}, None, LABELS + 1, ValueError, r"in \[0, 5\), or -100, but got 5 in row 1"),
        ({"image": IMAGE}, None, LABELS - 1, ValueError, "got -1 in row 0"),
        ({"image": IMAGE}, None, torch.full((2, 5), 1.5), ValueError, r"in \[0, 1\], but got 1.5 in row 0"),
        ({"image": IMAGE}, None, torch.full((2, 5), float("nan")), ValueError, "got nan"),
    ],
)
def test_forward(features, present, labels, error, match):
    head = DecoupledPrototypeHead(WIDTHS, 5)
    with pytest.raises(error, match=match):
        head(features, present, labels)
    assert head.seen_cases == ()  # Nothing half-done is left behind.
    if labels is None:
        with pytest.raises(error, match=match):
            head.contributions(features, present)
    else:
        with pytest.raises(error, match=match):
            head.imprint(features, labels, present)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_imprint_from_features_that_are_not_finite(wrong):
    head = DecoupledPrototypeHead(WIDTHS, 5)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    text = torch.tensor([[1.0, 2.0, 3.0], [1.0, wrong, 3.0]])
    with pytest.raises(ValueError, match="finite features of 'text', but row 1"):
        head.imprint({"image": IMAGE, "text": text}, LABELS)
    torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="No row"):
        head.imprint({"image": IMAGE, "text": text}, LABELS, torch.tensor([[True, True], [True, False]]))
    assert all(p.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", ["image", "present", "labels"])
def test_another_device(name):
    head = DecoupledPrototypeHead(WIDTHS, 5)
    batch = {"image": IMAGE, "text": TEXT, "present": BOTH, "labels": LABELS}
    batch[name] = batch[name].to("meta")
    with pytest.raises(ValueError, match=f"`{name}` to be on the device of the head, cpu, but got it on meta"):
        head({"image": batch["image"], "text": batch["text"]}, batch["present"], batch["labels"])
    assert head.seen_cases == ()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("scale", torch.full((3,), -5.0), r"`scale` to be positive, for each of the cases .*'text'\), but got \[-5.0"),
        ("scale", torch.tensor([32.0]), r"for each of the cases .*, but got \[32.0\]"),
        ("margin", torch.full((3,), 9.0), r"`margin` to be in \[0, pi\) radians, .*'text'\), but got \[9.0"),
        ("margin", torch.zeros(4), r"for each of the cases .*, but got \[0.0, 0.0, 0.0, 0.0\]"),
    ],
)
def test_constants_that_were_changed(name, value, match):
    head = DecoupledPrototypeHead(WIDTHS, 5, cases="all")
    head({"image": IMAGE, "text": TEXT}, BOTH)  # What was right before does not hide it.
    setattr(head, name, value)
    for mode in (True, False):
        with pytest.raises(ValueError, match=match):
            head.train(mode)({"image": IMAGE, "text": TEXT}, BOTH)


def test_other_methods():
    head = DecoupledPrototypeHead(WIDTHS, 5)
    with pytest.raises(ValueError, match="`temperature` to be positive, but got 0"):
        head.prototype_loss(temperature=0)
    with pytest.raises(TypeError, match="bool"):
        head.case_index(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"\(B, 2\) .*, but got \(2, 3\)"):
        head.case_index(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got \(\)"):
        head.case_index(torch.tensor(True))
    before = repr(head)
    with pytest.raises(ValueError, match="num_classes"):
        head.reset(0)
    assert repr(head) == before


def test_public_names():
    assert set(protohead.__all__) <= set(dir(protohead))
    for module in (protohead.cases, protohead.functional, protohead.head):
        assert set(module.__all__) <= set(dir(module))
