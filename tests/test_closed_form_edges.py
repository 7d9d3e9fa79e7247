"""`imprint` where rows are few, tiny or alike, where modalities say nothing, and with earlier rows of another kind."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from roads import UNTRAINED
from test_closed_form import WIDTHS, K, build, data, same

from protohead import DecoupledPrototypeHead, closed_form, imprint, moments

pytestmark = UNTRAINED


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-20, 1e20, 1e30])
def test_sizes_whose_squares_are_no_numbers_in_float32(centered, size):
    features, labels, present = data()
    big, usual = (DecoupledPrototypeHead(WIDTHS, K, centered=centered) for _ in range(2))
    usual.imprint({name: x.float() for name, x in features.items()}, labels, present, 0.3)
    big.imprint({name: (x * size).float() for name, x in features.items()}, labels, present, 0.3)
    close = 0.99 if size == 1e-40 else 0.9999  # The smallest numbers have few bits.
    for name, prototype in big.prototypes.items():
        assert F.cosine_similarity(prototype, usual.prototypes[name], dim=2).min() > close


def test_a_tiny_row_among_others():
    features, labels, present = data()
    features = {name: x.float() for name, x in features.items()}
    usual, tiny = (DecoupledPrototypeHead(WIDTHS, K, centered=False) for _ in range(2))
    usual.imprint(features, labels, present)
    tiny.imprint({name: torch.cat([x[:1] * 1e-30, x[1:]]) for name, x in features.items()}, labels, present)
    torch.testing.assert_close(tiny.prototypes["image"], usual.prototypes["image"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"shrinkage": 1}, {"classes": [0, 1, 2]}])
def test_sums_do_not_move_with_the_center(options):
    head = build()
    features, labels, present = data()
    kept = head.imprint(features, labels, present, **options)
    head.loss(features, present, labels)
    assert head.center.any()
    assert not kept["image"]["origin"].any()


@pytest.mark.parametrize("cases", ["shared", "all"])
def test_probabilities_beside_a_modality_that_says_nothing(cases):
    """In eval mode it does not count, since training never had it; nor does it where the scale is chosen."""
    features, labels, present = data(300, spread=2.0)
    present[:] = True
    alone, beside = build(cases=cases), build(cases=cases)
    with pytest.warns(UserWarning, match="has 'text'"):
        alone.imprint({"image": features["image"]}, labels)
    constant = {"image": features["image"], "text": torch.ones_like(features["text"])}
    with pytest.warns(UserWarning, match="has 'text'"):
        beside.imprint(constant, labels, present)
    wanted = alone.eval()({"image": features["image"]})
    torch.testing.assert_close(alone(constant, present), wanted, rtol=0.01, atol=0.01)
    torch.testing.assert_close(beside.scale, alone.scale, rtol=0.1, atol=0)  # The folds are others.
    torch.testing.assert_close(beside.eval()(constant, present), wanted, rtol=0.2, atol=0.2)


def test_cases_without_rows_have_the_scale_of_those_with():
    features, labels, present = data(300, spread=2.0)
    head = build(cases="all")
    head.imprint(features, labels, torch.ones_like(present))
    assert head.scale.max() - head.scale.min() < 0.01
    assert abs(head.scale[0].item() - 20) > 1


def test_rows_at_right_angles_to_all_of_their_class_count():
    """Most rows have a feature that no other has: what is said of them is often wrong, and the scale must show it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (1200,), generator=generator)
    others = torch.randint(3, 400, (1200,), generator=generator)
    column = torch.where(torch.rand(1200, generator=generator) < 0.3, labels, others)
    x = F.one_hot(column, 400).double()
    head = build({"image": 400}, centered=False)
    head.imprint({"image": x[:300]}, labels[:300])
    logits, labels = head.eval()({"image": x[300:]}), labels[300:]
    loss = F.cross_entropy(logits, labels)
    assert loss < F.cross_entropy(logits * 0.5, labels) + 0.05


@pytest.mark.parametrize("shrinkage", [None, 0.3])
def test_the_only_row_that_has_a_modality_is_its_prototype(shrinkage):
    """It is the mean of all, too; but the center stays where it is."""
    head, x = build(), {name: torch.randn(K, width).double() for name, width in WIDTHS.items()}
    present = torch.tensor([[True, True], [True, False], [True, False]])
    with pytest.warns(UserWarning, match=r"classes \[1, 2\] has 'text'"):
        head.imprint(x, torch.arange(K), present, shrinkage)
    torch.testing.assert_close(head.prototypes["image"][0].detach(), F.normalize(x["image"], dim=1))
    torch.testing.assert_close(head.prototypes["text"][0, 0].detach(), F.normalize(x["text"][0], dim=0))
    assert not head.center.any()


def test_one_more_row_leaves_the_shrinkage():
    """No row can be held out; that does not make class means of a head of many rows."""
    rows = data(200, spread=2.0)
    head = build()
    kept = head.imprint(*rows)
    assert kept["image"]["shrinkage"] < 1
    before = {name: x.clone() for name, x in head.state_dict().items()}
    new = {name: x[:1] for name, x in rows[0].items()}
    sums = head.imprint(new, rows[1][:1], rows[2][:1], moments=kept)
    assert sums["image"]["shrinkage"] == kept["image"]["shrinkage"]
    for name, prototype in head.prototypes.items():
        assert F.cosine_similarity(prototype, before[f"prototypes.{name}"], dim=2).min() > 0.99
    assert torch.equal(head.scale, before["scale"])


def test_one_label_after_several_is_refused():
    head = build()
    kept = head.imprint(*data(several=True))
    with pytest.raises(ValueError, match="one kind, but those of `moments`"):
        head.imprint(*data(), moments=kept)


def test_class_weights_of_inference_mode():
    rows = data()
    a, b = build(), build()
    with torch.inference_mode():
        a.imprint(*rows, class_weight=torch.tensor([1.0, 2, 3]).double())
    b.imprint(*rows, class_weight=torch.tensor([1.0, 2, 3]).double())
    same(a, b)


def test_a_warning_that_is_made_an_error_changes_nothing():
    features, labels, present = data()
    head = build()
    before = {name: x.clone() for name, x in head.state_dict().items()}
    features["text"] = torch.ones_like(features["text"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has 'text'"):
            head.imprint(features, labels, present)
    torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0)


def test_the_spread_is_the_mean_distance_from_the_center(monkeypatch):
    """Also where the first rows are of one class, or the sums began at a center that stays."""
    monkeypatch.setattr(moments, "SAMPLE", 50)
    monkeypatch.setattr(moments, "FEWEST", 300)
    features, labels, present = data(300)
    order = labels.argsort(stable=True)
    rows = {name: x[order] for name, x in features.items()}, labels[order], present[order]
    head, later = build(), build()
    head.imprint(*rows)
    later.imprint(*rows, moments=later.imprint(*rows, shrinkage=1))
    x = features["image"][present[:, 0]]
    expected = (x - x.mean(0)).norm(dim=1).mean().item()
    assert head.center_spread[0].item() == pytest.approx(expected, rel=0.1)
    assert later.center_spread[0].item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("size", [32, 4000])
def test_a_sample_of_rows_of_which_many_are_the_same(monkeypatch, size):
    """Of 40 kinds of rows each is drawn as often as it occurs, not all of its rows or none."""
    monkeypatch.setattr(moments, "SAMPLE", 400)
    monkeypatch.setattr(moments, "FEWEST", 400)
    kinds = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    which = torch.randint(0, 40, (4000,), generator=torch.Generator().manual_seed(1))
    head = build({"image": 6})
    batches = (({"image": kinds[i]}, i % K) for i in which.split(size))
    rows = imprint.read_rows(head, batches, None, None)
    _, sample = moments.collect(rows, head.in_features, K, None, head.seen)
    occurs = (sample.features[:, None] == kinds).all(2).sum(0)
    assert occurs.sum() == 400
    assert occurs.min() >= 2
    assert occurs.max() <= 25


def test_a_row_at_the_mean_of_the_first_ones_is_one_row_still():
    """As seen from there it has hardly a length; when the center moves it must not outweigh all others."""
    features, labels, _ = data(120)
    x, later = features["image"], features["image"] + 2
    close = x.mean(0) + 1e-7
    plain, beside = build({"image": 6}), build({"image": 6})
    kept = plain.imprint({"image": x}, labels, shrinkage=0.3)
    plain.imprint({"image": later}, labels, shrinkage=0.3, moments=kept)
    kept = beside.imprint({"image": torch.cat([x, close[None]])}, torch.cat([labels, labels[:1]]), shrinkage=0.3)
    beside.imprint({"image": later}, labels, shrinkage=0.3, moments=kept)
    assert F.cosine_similarity(plain.prototypes["image"], beside.prototypes["image"], dim=2).min() > 0.8


# -- what stays -------------------------------------------------------------------------------------------------------


def test_a_modality_without_rows_leaves_what_was_learned_of_it(monkeypatch):
    monkeypatch.setattr(imprint, "WINDOW", 50)
    features, labels, present = data()
    head = build()
    head.loss(features, present, labels)
    before = {name: x.clone() for name, x in head.state_dict().items()}
    with pytest.warns(UserWarning, match="has 'text'"):
        head.imprint({"image": features["image"]}, labels)
    assert torch.equal(head.center[6:], before["center"][6:])
    assert head.center_rows.tolist() == [50, before["center_rows"][1]]
    assert head.center_spread[1] == before["center_spread"][1] > 0
    assert head.seen[0, 1] == before["seen"][0, 1] > 0


def test_a_modality_that_was_trained_counts_where_it_says_nothing_now():
    """In eval mode it does: the rows that have it then get half as much of the other."""
    features, labels, present = data(300, spread=2.0)
    present[:] = True
    head, alone = build(), build()
    head.loss(features, present, labels)
    features["text"] = torch.ones_like(features["text"])
    with pytest.warns(UserWarning, match="has 'text'"):
        head.imprint(features, labels, present)
    with pytest.warns(UserWarning, match="has 'text'"):
        alone.imprint({"image": features["image"]}, labels)
    torch.testing.assert_close(head.scale, 2 * alone.scale, rtol=0.2, atol=0)


def test_rows_with_nothing_that_counts_choose_nothing():
    features, labels, _ = data(200, several=True)
    features["text"] = torch.ones_like(features["text"])
    present = torch.tensor([[True, False], [False, True]]).repeat(100, 1)
    labels[1::2] = 1  # They get zero logits, whatever the bias.
    head, alone = build(), build()
    with pytest.warns(UserWarning, match="has 'text'"):
        head.imprint(features, labels, present)
    with pytest.warns(UserWarning, match="has 'text'"):
        alone.imprint({"image": features["image"][::2]}, labels[::2])
    torch.testing.assert_close(head.bias, alone.bias, rtol=0.1, atol=0.1)


def test_the_bias_of_classes_that_are_named():
    rows, head = data(), build()
    head.imprint(*rows)
    with torch.no_grad():
        head.bias[:] = torch.tensor([1.0, 2.0, 9.0])
    head.imprint(*rows, classes=[2])
    assert head.bias.tolist() == [1, 2, 1.5]
    head.imprint(*rows, classes=[0, 1, 2])  # There is no other.
    assert head.bias.tolist() == [1, 2, 1.5]


def test_the_scale_of_a_head_without_a_bias(monkeypatch):
    """It has the least loss of rows that are held out, without what classes are frequent."""
    features, labels, present = data(300, spread=2.0)
    keep = (labels == 0) | (torch.arange(300) % 5 == 0)
    features, labels, present = {n: x[keep] for n, x in features.items()}, labels[keep], present[keep]
    calls, calibrate = [], closed_form._calibrate
    monkeypatch.setattr(closed_form, "_calibrate", lambda *args: calls.append(args) or calibrate(*args))
    head = build(centered=False)
    head.imprint(features, labels, present)
    cosine, loss, *_ = calls[0]

    def objective(scale):
        return loss(scale * cosine).item() + math.log(scale / 20) ** 2 / (2 * len(labels))

    best = min(torch.logspace(0, 2, 2000).tolist(), key=objective)
    assert head.scale.item() == pytest.approx(best, rel=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_shrinkage_of_fewer_rows_than_dimensions(dtype):
    """In directions in which no row lies there is nothing but rounding, of either sign."""
    widths = {"image": 100}
    features, labels, _ = data(30, widths)
    head = build(widths)
    head.imprint({"image": features["image"].to(dtype)}, labels, None, 0)
    fresh, answers, _ = data(300, widths, seed=6)
    assert (head.eval()(fresh).argmax(1) == answers).double().mean() > 0.9


def test_the_bias_of_classes_that_are_added():
    head = build()
    head.imprint(*data(spread=2.0))
    with torch.no_grad():
        head.bias[:] = torch.tensor([1.0, 2.0, 9.0])
    head.add_classes(2)
    assert head.bias.tolist() == [1, 2, 9, 4, 4]
