"""`imprint` against a slow transcription of its formula; rows in any order and number; what it refuses."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from roads import UNTRAINED

from protohead import DecoupledPrototypeHead, closed_form, imprint, moments

pytestmark = UNTRAINED
WIDTHS = {"image": 6, "text": 4}
K = 3


def data(rows=90, widths=WIDTHS, num_classes=K, seed=0, spread=1.0, several=False):
    """Rows around class means, some of which lack a modality."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % num_classes
    features = {}
    for name, width in widths.items():
        means = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(1)).double()
        noise = torch.randn(rows, width, generator=generator).double()
        features[name] = 3 + means[labels] + spread * noise @ torch.diag(torch.linspace(0.3, 1.5, width).double())
    present = torch.rand(rows, len(widths), generator=generator) < 0.7
    present[~present.any(1), 0] = True
    if several:
        labels = (torch.rand(rows, num_classes, generator=generator) < 0.2).double()
        labels[torch.arange(rows), torch.arange(rows) % num_classes] = 1
    return features, labels, present


def build(widths=WIDTHS, num_classes=K, **options):
    torch.manual_seed(0)
    return DecoupledPrototypeHead(widths, num_classes, dtype=torch.float64, **options)


def slow(x, labels, shrinkage, center):
    """The prototypes of one modality from its rows: every sum is written out."""
    rows = [F.normalize(row - center, dim=0) for row in x]
    several = labels.is_floating_point()
    table = labels if several else F.one_hot(labels, K).double()
    means = []
    for k in range(table.shape[1]):
        weights = table[:, k].tolist()
        means.append(sum(w * row for w, row in zip(weights, rows, strict=True)) / max(sum(weights), 1e-9))
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    if several or not center.any():
        for row in rows:
            covariance += torch.outer(row, row)
    else:
        for k in range(K):
            mine = [row for row, label in zip(rows, labels.tolist(), strict=True) if label == k]
            mean = sum(mine) / (len(mine) + 1)  # One row more, at the center.
            for row in mine:
                covariance += torch.outer(row - mean, row - mean)
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / x.shape[1] * eye
    return torch.stack([F.normalize(torch.linalg.solve(shrunk, mean), dim=0) for mean in means])


@pytest.mark.parametrize("shrinkage", [0, 0.3, 0.99])
@pytest.mark.parametrize("kind", ["one label", "several labels", "soft labels", "no center"])
def test_prototypes_are_those_of_the_formula(kind, shrinkage):
    features, labels, present = data(several=kind == "several labels")
    if kind == "soft labels":
        labels = torch.rand(90, K, generator=torch.Generator().manual_seed(2)).double()
    head = build(cases="all", centered=kind != "no center")
    head.imprint(features, labels, present, shrinkage)
    for m, (name, x) in enumerate(features.items()):
        here = present[:, m]
        center = x[here].mean(0) if head.centered else torch.zeros(x.shape[1], dtype=torch.float64)
        expected = slow(x[here], labels[here], shrinkage, center)
        for block in head.prototypes[name]:
            torch.testing.assert_close(block.detach(), expected, rtol=1e-7, atol=1e-7)
    if head.centered:
        means = [x[here].mean(0) for x, here in zip(features.values(), present.T, strict=True)]
        torch.testing.assert_close(head.center, torch.cat(means))
        assert head.center_rows.tolist() == present.sum(0).tolist()
    assert head.seen.tolist() == [[*row] for row in (present.sum(0) * head._masks).tolist()]


def held_out(head, features, labels, present, shrinkage):
    """Logits without scale and bias: each row by prototypes of the rows that are not in its fold."""
    parts = [torch.where(here[:, None], x, 0) for x, here in zip(features.values(), present.T, strict=True)]
    rows = moments.Rows(torch.cat(parts, dim=1), labels, present)
    order = closed_form._keys(rows, head.in_features.values()).argsort()
    if not labels.is_floating_point():
        order = order[labels[order].argsort(stable=True)]
    total = torch.zeros(len(labels), head.num_classes, dtype=torch.float64)
    for number in range(closed_form.FOLDS):
        rows = order[number :: closed_form.FOLDS]
        others = torch.ones(len(labels), dtype=torch.bool)
        others[rows] = False
        for m, x in enumerate(features.values()):
            here, center = present[:, m], x[present[:, m]].mean(0)
            prototypes = slow(x[here & others], labels[here & others], shrinkage, center)
            cosines = F.normalize(x[rows] - center, dim=1) @ prototypes.T
            total[rows] += torch.where(here[rows][:, None], cosines, 0)
    return total / present.sum(1, keepdim=True)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_chosen_has_the_least_loss_of_rows_that_are_held_out(several, weighted):
    features, labels, present = data(60, spread=2.0, several=several)
    weight = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64) if weighted else None
    head = build()
    chosen = head.imprint(features, labels, present, class_weight=weight)["image"]["shrinkage"].item()
    if several:
        prior = ((labels.sum(0) + 1) / (len(labels) + 2)).logit()
    else:
        rows = torch.bincount(labels, minlength=K) * (torch.ones(K) if weight is None else weight) + 1
        prior = (rows / rows.sum()).log()

    def loss(logits):
        if several:
            return F.binary_cross_entropy_with_logits(logits, labels, weight)
        return F.cross_entropy(logits, labels, weight)

    losses = {}
    for shrinkage in closed_form.SHRINKAGE:
        cosines = held_out(head, features, labels, present, shrinkage)
        losses[shrinkage] = min(loss(scale * cosines + prior).item() for scale in closed_form.SCALES)
    assert chosen == min(losses, key=losses.get)
    assert len(set(losses.values())) == len(losses)

    cosines = held_out(head, features, labels, present, chosen)

    def objective(scale, bias):
        unusual = (math.log(scale) - math.log(20)) ** 2 + (bias - prior).square().sum()
        return loss(scale * cosines + bias) + unusual / (2 * len(labels))

    scale, bias = head.scale.item(), head.bias.detach()
    best = objective(scale, bias)
    for step in (1.05, 1 / 1.05):
        assert objective(scale * step, bias) > best
    for k in range(K):
        for step in (0.05, -0.05):
            assert objective(scale, bias + step * F.one_hot(torch.tensor(k), K)) > best


def test_its_probabilities_are_true():
    """Of Gaussian rows whose covariance is shared, whose posterior is known but for the lengths of the rows."""
    head = build()
    head.imprint(*data(900, spread=1.5))
    features, labels, present = data(3000, seed=5, spread=1.5)
    with torch.no_grad():
        logits = head.eval()(features, present)
        better = min(F.cross_entropy(logits * factor, labels).item() for factor in (0.7, 0.85, 1.2, 1.5))
        loss = F.cross_entropy(logits, labels).item()
    assert loss < better + 1e-3
    assert loss < 0.8 * math.log(K)
    confidence, said = logits.softmax(1).max(1)
    assert confidence.mean().item() == pytest.approx((said == labels).double().mean().item(), abs=0.03)


def test_imprinting_in_every_case_is_the_same_but_for_the_scale():
    rows = data(300, spread=2.0)
    shared, own = build(), build(cases="all")
    shared.imprint(*rows)
    own.imprint(*rows)
    for name, prototype in shared.prototypes.items():
        for block in own.prototypes[name]:
            torch.testing.assert_close(block[None], prototype)
    assert len(set(own.scale.tolist())) == 3
    some = build(cases=["image", "text"])  # The complete rows are classified by their picture.
    some.imprint(*rows)
    torch.testing.assert_close(some.prototypes["text"], shared.prototypes["text"])


# -- rows in any order and number ------------------------------------------------------------------------------------


def same(a, b, atol=1e-9):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=atol, msg=name)


def batches(features, labels, present, size):
    for index in torch.arange(len(labels)).split(size):
        yield {name: x[index] for name, x in features.items()}, labels[index], present[index]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("sample", [10_000, 40])
def test_batches_are_the_rows_at_once_in_any_order(monkeypatch, several, sample):
    monkeypatch.setattr(moments, "SAMPLE", sample)
    monkeypatch.setattr(moments, "FEWEST", sample)
    rows = data(200, several=several)
    at_once, stream, shuffled = build(), build(), build()
    at_once.imprint(*rows)
    stream.imprint(batches(*rows, size=7))
    same(at_once, stream, atol=1e-6)
    if sample > 200:  # Else another order is another sample.
        features, labels, present = rows
        order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
        shuffled.imprint({name: x[order] for name, x in features.items()}, labels[order], present[order])
        same(at_once, shuffled, atol=1e-6)


def test_rows_that_are_sorted_by_class(monkeypatch):
    """The first rows are of one class: their mean is far from that of all, which is the center all the same."""
    features, labels, present = data(300, spread=2.0)
    order = labels.argsort(stable=True)
    rows = {name: x[order] for name, x in features.items()}, labels[order], present[order]
    at_once, stream = build(), build()
    at_once.imprint(*rows)
    monkeypatch.setattr(moments, "SAMPLE", 50)
    stream.imprint(batches(*rows, size=10))
    torch.testing.assert_close(stream.center, at_once.center)
    assert (stream.prototypes["image"] * at_once.prototypes["image"]).sum(2).min() > 0.98
    logits = [head.eval()(features, present).argmax(1) for head in (at_once, stream)]
    assert (logits[0] == logits[1]).double().mean() > 0.95


def test_no_more_than_a_sample_is_kept(monkeypatch):
    monkeypatch.setattr(moments, "SAMPLE", 30)
    monkeypatch.setattr(moments, "FEWEST", 30)
    held = []
    smallest = moments._smallest
    monkeypatch.setattr(
        moments, "_smallest", lambda parts, n: held.append(sum(len(x[0]) for x in parts)) or smallest(parts, n)
    )
    rows = imprint.read_rows(build(), batches(*data(1000), size=20), None, None)
    _, sample = moments.collect(rows, WIDTHS, K, None, build().seen)
    assert len(sample.labels) == 30
    assert max(held) <= 80
    assert len(held) < 20  # Hardly any row of a later batch is even looked at.


@pytest.mark.parametrize("shrinkage", [0.2, 1])
def test_rows_that_come_later(tmp_path, shrinkage):
    features, labels, present = data(200)
    first, later = slice(0, 120), slice(120, 200)
    parts = [({n: x[p] for n, x in features.items()}, labels[p], present[p]) for p in (first, later)]
    head, whole = build(), build()
    kept = head.imprint(*parts[0], shrinkage)
    torch.save(kept, tmp_path / "moments.pt")
    kept = torch.load(tmp_path / "moments.pt")
    before = {name: {key: x.clone() for key, x in sums.items()} for name, sums in kept.items()}
    sums = head.imprint(*parts[1], shrinkage, moments=kept)
    torch.testing.assert_close(kept, before)  # What was given is as it was.
    expected = whole.imprint(features, labels, present, shrinkage)
    torch.testing.assert_close(sums["image"]["rows"], expected["image"]["rows"])
    torch.testing.assert_close(head.center, whole.center)
    for name, prototype in head.prototypes.items():  # Rows are weighed as seen from the first ones' mean.
        assert (prototype * whole.prototypes[name]).sum(2).min() > 0.9995
    assert torch.equal(head.seen, whole.seen)


# -- classes that come later -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cases": "all"}, {"centered": False}])
def test_classes_that_are_added_leave_the_others_alone(options):
    head = build(**options)
    kept = head.imprint(*data())
    features, _, present = data(seed=3)
    before, old = head.eval()(features, present), {name: p.detach().clone() for name, p in head.named_parameters()}
    head.bias is None or head.bias.requires_grad_(False)
    head.add_classes(2)
    assert head.num_classes == 5
    after = head(features, present)
    assert after.shape == (90, 5)
    torch.testing.assert_close(after[:, :3], before)
    assert head.bias is None or not head.bias.requires_grad
    assert head.prototypes["image"].requires_grad

    new_rows, labels, present = data(20, seed=7)
    new_rows = {name: 5 - x for name, x in new_rows.items()}
    rest = {name: x.clone() for name, x in head.state_dict().items()}
    head.imprint(new_rows, torch.full_like(labels, 4), present, classes=[4], moments=kept)
    for name, x in head.named_parameters():
        which = torch.tensor([0, 1, 2, 3])
        dim = max(x.dim() - 2, 0)
        assert torch.equal(x.index_select(dim, which), rest[name].index_select(dim, which)), name
        if name != "bias":
            assert not torch.equal(x.select(dim, 4), rest[name].select(dim, 4))
    for name in ("scale", "margin", *(["center", "center_rows"] if head.centered else [])):
        assert torch.equal(head.state_dict()[name], rest[name])
    if head.centered:
        assert head.bias[4].item() == pytest.approx(head.bias[:4].mean().item())
    assert (head(new_rows, present).argmax(1) == 4).double().mean() > 0.4  # Of rows that are like none of the others.
    assert old.keys() == dict(head.named_parameters()).keys()


def test_a_class_that_is_added_has_the_covariance_of_all_rows():
    features, labels, present = data(300)
    head, whole = build(num_classes=2), build()
    few = labels < 2
    kept = head.imprint({n: x[few] for n, x in features.items()}, labels[few], present[few], shrinkage=0.1)
    head.add_classes(1)
    rows = {n: x[~few] for n, x in features.items()}, labels[~few], present[~few]
    head.imprint(*rows, classes=[2], moments=kept)
    whole.imprint(features, labels, present, shrinkage=0.1)
    alone = build()
    alone.imprint(*rows, shrinkage=1, classes=[2])
    for name, prototype in whole.prototypes.items():
        by_moments = (head.prototypes[name] * prototype).sum(2)[0, 2]
        by_means = (alone.prototypes[name] * prototype).sum(2)[0, 2]
        assert by_moments > by_means


def test_names_of_classes_that_are_added():
    head = build(class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="the names of the new classes"):
        head.add_classes(1)
    with pytest.raises(ValueError, match="class_names"):
        head.add_classes(2, ["d"])
    with pytest.raises(ValueError, match="class_names"):
        head.add_classes(1, ["a"])
    assert head.num_classes == 3
    head.add_classes(1, ["d"])
    assert head.class_names == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match="no names"):
        build().add_classes(1, ["d"])
    for wrong in (0, -1, 1.5, True):
        with pytest.raises((ValueError, TypeError), match="count"):
            build().add_classes(wrong)


# -- edges ------------------------------------------------------------------------------------------------------------


def test_one_row_of_each_class_is_its_prototype_and_nothing_else_changes():
    head = build()
    x = {name: torch.randn(K, width).double() for name, width in WIDTHS.items()}
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.imprint(x, torch.arange(K))
    for name, prototype in head.prototypes.items():
        torch.testing.assert_close(prototype[0].detach(), F.normalize(x[name], dim=1))
    for name, value in head.state_dict().items():
        if not name.startswith(("prototypes", "seen", "_extra")):
            assert torch.equal(value, before[name]), name


def test_class_means_leave_all_but_the_prototypes():
    head = build()
    head.loss(*[data()[i] for i in (0, 2, 1)])
    before = {name: value.clone() for name, value in head.state_dict().items()}
    features, labels, present = data(seed=4)
    head.imprint(features, labels, present, shrinkage=1)
    for name in ("scale", "bias", "center", "center_rows", "center_spread"):
        assert torch.equal(head.state_dict()[name], before[name])
    here = present[:, 0]
    for k in range(K):
        rows = features["image"][here & (labels == k)] - head.center[:6]
        torch.testing.assert_close(
            head.prototypes["image"][0, k].detach(), F.normalize(F.normalize(rows).mean(0), dim=0)
        )


def test_fewer_rows_than_dimensions():
    widths = {"image": 200}
    features, labels, present = data(30, widths)
    head = build(widths)
    head.imprint(features, labels, present)
    assert all(x.isfinite().all() for x in head.state_dict().values())
    fresh, answers, _ = data(300, widths, seed=6)
    assert (head.eval()(fresh).argmax(1) == answers).double().mean() > 0.9


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-20, 1e15])
def test_constant_features_say_nothing(value):
    head = build()
    before = head.prototypes["text"].detach().clone()
    features, labels, present = data()
    features["text"] = torch.full_like(features["text"], value)
    with pytest.warns(UserWarning, match=r"No row of classes \[0, 1, 2\] has 'text'"):
        head.imprint(features, labels, present)
    assert torch.equal(head.prototypes["text"], before)
    assert all(x.isfinite().all() for x in head.state_dict().values())


def test_a_class_without_rows():
    features, labels, present = data()
    keep = labels != 1
    head = build()
    before = head.prototypes["image"].detach().clone()
    with pytest.warns(UserWarning, match=r"No row of classes \[1\]"):
        head.imprint({n: x[keep] for n, x in features.items()}, labels[keep], present[keep])
    assert torch.equal(head.prototypes["image"][:, 1], before[:, 1])
    assert head.bias[1] < head.bias[[0, 2]].min() - 2  # It is not seen where there is nothing to see.


@pytest.mark.parametrize("widths", [{"a": 1}, {"a": 1, "b": 2, "c": 5}])
def test_few_dimensions_and_other_numbers_of_modalities(widths):
    head = build(widths, 2)
    rows = data(200, widths, num_classes=2)
    head.imprint(*rows)
    assert (head.eval()(rows[0], rows[2]).argmax(1) == rows[1]).double().mean() > 0.6


def test_one_class():
    head = build(num_classes=1)
    features, labels, present = data(num_classes=1)
    head.imprint(features, labels, present)
    assert head.eval()(features, present).isfinite().all()


def test_features_in_half_precision():
    features, labels, present = data()
    halves = {name: x.half() for name, x in features.items()}
    a, b = (DecoupledPrototypeHead(WIDTHS, K) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        a.imprint(halves, labels, present)
    b.imprint({name: x.float() for name, x in halves.items()}, labels, present)
    same(a, b)


def test_what_stands_in_missing_and_unlabelled_rows_is_not_looked_at():
    features, labels, present = data()
    a, b = build(), build()
    labels[:6] = -100
    a.imprint({name: x[6:] for name, x in features.items()}, labels[6:], present[6:])
    garbage = {
        name: torch.where(here[:, None], x, math.nan)
        for (name, x), here in zip(features.items(), present.T, strict=True)
    }
    more = torch.zeros(2, 2, dtype=torch.bool)
    rows = {name: torch.cat([x, torch.full_like(x[:2], math.inf)]) for name, x in garbage.items()}
    b.imprint(rows, torch.cat([labels, torch.tensor([1, 2])]), torch.cat([present, more]))
    same(a, b)


def test_lengths_of_rows_do_not_matter_without_a_center():
    features, labels, present = data()
    a, b = build(centered=False), build(centered=False)
    a.imprint(features, labels, present, 0.1)
    lengths = torch.logspace(-6, 6, 90).double()[:, None]
    b.imprint({name: x * lengths for name, x in features.items()}, labels, present, 0.1)
    torch.testing.assert_close(a.prototypes["image"], b.prototypes["image"], rtol=1e-6, atol=1e-6)


def test_training_goes_on_from_there():
    features, labels, present = data(600)
    head = build()
    head.imprint(features, labels, present)
    center = head.center.clone()
    head.loss({name: x[:20] + 1 for name, x in features.items()}, present[:20], labels[:20]).backward()
    assert 0 < (head.center - center).abs().max() < 0.1  # One batch of hundreds of rows.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.eval()(features, present)


@pytest.mark.parametrize("options", [{"shrinkage": 0.5}, {"shrinkage": None}])
def test_a_second_time_is_the_same(options):
    head, rows = build(), data()
    head.imprint(*rows, **options)
    once = {name: x.clone() for name, x in head.state_dict().items()}
    head.imprint(*rows, **options)
    for name, x in head.state_dict().items():
        torch.testing.assert_close(x, 2 * once[name] if name == "seen" else once[name])


# -- what is refused --------------------------------------------------------------------------------------------------

FEATURES, LABELS, PRESENT = data()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (
            (FEATURES, LABELS, PRESENT),
            {"shrinkage": 1.5},
            ValueError,
            "`shrinkage` to be a number in .0, 1., or None, but got 1.5",
        ),
        ((FEATURES, LABELS, PRESENT), {"shrinkage": math.nan}, ValueError, "shrinkage"),
        ((FEATURES, LABELS, PRESENT), {"shrinkage": True}, ValueError, "shrinkage"),
        ((FEATURES, LABELS, PRESENT), {"shrinkage": "auto"}, ValueError, "shrinkage"),
        (
            (FEATURES, LABELS, PRESENT),
            {"classes": [3]},
            ValueError,
            r"`classes` to hold numbers in \[0, 3\), but got 3",
        ),
        ((FEATURES, LABELS, PRESENT), {"classes": []}, ValueError, "at least one class"),
        (
            (FEATURES, LABELS, PRESENT),
            {"classes": 2},
            TypeError,
            "`classes` to be a list of numbers",
        ),
        ((FEATURES, LABELS, PRESENT), {"classes": torch.tensor([4])}, ValueError, "but got 4"),
        ((FEATURES, LABELS, PRESENT), {"classes": torch.tensor(1)}, TypeError, "`classes` to be a list of numbers"),
        ((FEATURES, LABELS, PRESENT), {"class_weight": torch.ones(4)}, ValueError, "class_weight"),
        ((FEATURES, LABELS, PRESENT), {"moments": {"image": 3}}, TypeError, "`moments` to be what `imprint` returns"),
        ((FEATURES,), {}, TypeError, "Expected argument `labels`; or, as the first, batches"),
        ((3,), {}, TypeError, "Expected argument `labels`; or, as the first, batches"),
        (([FEATURES],), {}, TypeError, r"batches of \(features, labels\)"),
        (([(FEATURES, LABELS, PRESENT)] * 2, LABELS), {}, TypeError, "`features` to be a tensor or a mapping"),
        (([(FEATURES, LABELS), (FEATURES, torch.rand(90, 3))],), {}, ValueError, "one kind, but those of batch 1"),
        (([],), {}, ValueError, "at least one row with a label and a modality"),
        ((FEATURES, torch.full((90,), -100), PRESENT), {}, ValueError, "at least one row with a label and a modality"),
        ((FEATURES, LABELS, torch.zeros_like(PRESENT)), {}, ValueError, "at least one row with a label"),
        (([(FEATURES, LABELS + 1)],), {}, ValueError, "labels"),
        (
            ([(FEATURES, LABELS), ({"image": FEATURES["image"] / 0}, LABELS)],),
            {},
            ValueError,
            "finite features of 'image' of batch 1",
        ),
    ],
)
def test_what_is_refused_changes_nothing(arguments, options, error, match):
    head = build()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with pytest.raises(error, match=match):
        head.imprint(*arguments, **options)
    torch.testing.assert_close(dict(head.state_dict()), before, rtol=0, atol=0)


def test_sums_of_another_head():
    kept = build().imprint(*data())
    swapped = {"text": 4, "image": 6}
    for head in (build(swapped), build({"image": 6, "text": 5}), build(num_classes=2)):
        with pytest.raises(ValueError, match="`moments` of a head with"):
            head.imprint(torch.randn(4, sum(head.in_features.values())).double(), torch.arange(4) % 2, moments=kept)
