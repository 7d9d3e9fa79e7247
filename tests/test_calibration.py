"""`calibrate`: temperatures against what the logits were made with; which rows a case is fitted on; nothing stale."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from roads import UNTRAINED
from test_closed_form import WIDTHS, build, data

from protohead import DecoupledPrototypeHead, PrototypeClassifier, load_head
from protohead.calibration import MIN_ROWS, PRIOR, fit_cases
from protohead.cases import case_masks, case_names

pytestmark = UNTRAINED
NAMES = ("image", "text")
MASKS = case_masks(NAMES)
TEMPERATURES, ABOVE = (3.0, 1.0, 0.2), (1.5, 1.0, 0.4)  # Of one label; of logits above 0, where there are several.
SHIFTS = (0.5, -2.0, 0.0)


def made(rows, several, classes=4, seed=0):
    """Logits whose probabilities are those by which the labels were drawn; the three cases in turn."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) - int(several)
    if several:
        labels = (torch.rand(rows, classes, generator=generator) < logits.sigmoid()).double()
    else:
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits, labels, MASKS[torch.arange(rows) % 3]


def fit(logits, labels, present):
    """Whatever a row may have, its logits are the same."""
    return fit_cases(lambda index, case: logits[index], labels, present, NAMES)


def loss(logits, labels):
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, labels).item()
    return F.cross_entropy(logits, labels).item()


# -- the fit ----------------------------------------------------------------------------------------------------------


def apply(logits, found):
    """What a fit makes of logits, plainly."""
    (below, above), shift = found
    return logits.clamp(max=0) / below + logits.clamp(min=0) / above + shift


def approx(found, **options):
    return pytest.approx([x for pair in found for x in pair.tolist()], **{"rel": 1e-4, "abs": 1e-4, **options})


def test_known_temperatures_are_found():
    logits, labels, present = made(12000, False)
    temperature = torch.tensor(TEMPERATURES).double()[torch.arange(12000) % 3, None]
    found = fit(temperature * logits, labels, present)
    assert list(found) == ["image+text", "image", "text"]
    for (temperatures, shift), expected in zip(found.values(), TEMPERATURES, strict=True):
        assert temperatures.tolist() == pytest.approx([expected] * 2, rel=0.06)
        assert shift.tolist() == [0] * 4


def test_known_temperatures_and_shifts_of_several_labels_are_found():
    logits, labels, present = made(24000, True)
    case, by_class = torch.arange(24000) % 3, torch.tensor([0.0, 0.3, -0.3, 0.5])
    below, above, shift = (torch.tensor(x).double()[case, None] for x in (TEMPERATURES, ABOVE, SHIFTS))
    true = logits - shift - by_class
    found = fit(true.clamp(max=0) * below + true.clamp(min=0) * above, labels, present)
    for (temperatures, shifts), *expected in zip(found.values(), TEMPERATURES, ABOVE, SHIFTS, strict=True):
        assert temperatures.tolist() == pytest.approx(expected[:2], rel=0.15)
        assert shifts.tolist() == pytest.approx((expected[2] + by_class).tolist(), abs=0.15)


@pytest.mark.parametrize("seed", range(2))
def test_no_other_temperature_is_better(seed):
    logits, labels, present = made(90, False, seed=seed)
    for c, found in enumerate(fit(5 * logits, labels, present).values()):
        z, y = 5 * logits[c::3], labels[c::3]

        def penalised(temperature, z=z, y=y):
            return (
                F.cross_entropy(z / temperature, y, reduction="sum").item() + math.log(temperature) ** 2 / 2 / PRIOR**2
            )

        best = found[0][0].item()
        others = [0.999, 1.001, *torch.logspace(-2, 2, 50, dtype=torch.float64).tolist()]
        assert all(penalised(best) < penalised(best * other) for other in others)


@pytest.mark.parametrize("seed", range(2))
def test_nothing_else_is_better_for_several_labels(seed):
    """The slope of the loss, by autograd, is 0: of log T on either side, of the common shift, and of each class."""
    logits, labels, present = made(90, True, seed=seed)
    for c, ((below, above), shift) in enumerate(fit(5 * logits + 3, labels, present).values()):
        z, y = 5 * logits[c::3] + 3, labels[c::3]
        spread, count = z.std(correction=0), y.numel()
        assert shift.sum() != 0
        # Of the shifts, their mean is the common one where its slope is 0, since the penalty is of what is off it.
        x = torch.stack([(spread / below).log(), (spread / above).log(), shift.mean()]).requires_grad_()
        off = (shift - shift.mean()).requires_grad_()
        low, high = x[:2].exp() / spread
        fitted = z.clamp(max=0) * low + z.clamp(min=0) * high + x[2] + off
        bce = F.binary_cross_entropy_with_logits(fitted, (count * y + 0.5) / (count + 1), reduction="sum")
        total = bce + (x[0] ** 2 + (x[1] - x[0]) ** 2 + off.square().sum()) / 2 / PRIOR**2
        slopes = torch.autograd.grad(total, [x, off])
        assert max(slope.abs().max() for slope in slopes) < 1e-4


def test_soft_labels_are_fitted_as_the_share_of_many_hard_ones(monkeypatch):
    logits, labels, present = made(1800, True)
    every = torch.cat([labels, labels, 1 - labels])
    soft = fit(logits, (2 * labels + 1 - labels) / 3, present)
    monkeypatch.setattr("protohead.calibration.PRIOR", PRIOR / 3**0.5)  # Three times the rows outweigh it as much.
    hard = fit(logits.repeat(3, 1), every, present.repeat(3, 1))
    for a, b in zip(soft.values(), hard.values(), strict=True):
        assert [x for pair in a for x in pair.tolist()] == approx(b, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("count", "right", "low", "high"), [(20, True, 0.4, 1), (60, True, 0.2, 1), (60, False, 3, 50)]
)
def test_few_rows_that_are_all_right_or_wrong_do_not_make_it_certain(count, right, low, high):
    labels = torch.arange(count) % 3
    logits = 4.0 * F.one_hot(labels if right else (labels + 1) % 3).double() - 2
    found = fit(logits, labels, torch.ones(count, 2, dtype=torch.bool))["image+text"]
    assert low < found[0][0] == found[0][1] < high


@pytest.mark.parametrize("right", [True, False])
def test_several_labels_that_are_all_right_or_wrong_have_no_bound(right):
    """The probabilities of so few rows are neither 0 nor 1; where the logits mislead they hardly differ."""
    answer = F.one_hot(torch.arange(60) % 3).double()
    logits = 4 * (answer if right else answer.roll(1, 1)) - 2
    found = fit(logits, answer, torch.ones(60, 2, dtype=torch.bool))["image+text"]
    probability = apply(logits, found).sigmoid()
    assert probability.mean().item() == pytest.approx(1 / 3, abs=0.02)
    if right:
        assert probability[answer == 1].min() > 0.97
        assert 1e-4 < probability[answer == 0].max() < 0.03
    else:
        assert (probability.max() - probability.min()) < 0.2


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("several", [False, True])
def test_logits_that_say_nothing_keep_their_temperature(value, several):
    _, labels, present = made(900, several)
    logits = torch.full((900, 4), value).double()
    for c, found in enumerate(fit(logits, labels, present).values()):
        assert found[0].tolist() == pytest.approx([1, 1], abs=1e-2)
        if several:
            assert (apply(logits, found).sigmoid().mean() - labels[c::3].mean()).abs() < 1e-2
        else:
            assert not found[1].any()


def test_labels_that_never_occur_leave_numbers_finite():
    logits, labels, present = made(90, True)
    for found in fit(logits, 0 * labels, present).values():
        assert all(x.isfinite().all() for x in found)
        assert apply(logits, found).sigmoid().mean() < 0.02


def test_several_logits_far_from_zero_are_fitted_as_near_ones():
    logits, labels, present = made(300, True)
    near, far = logits - 20, logits / 1000 - 20  # All of them below 0: the same but for their unit and origin.
    for a, b in zip(fit(near, labels, present).values(), fit(far, labels, present).values(), strict=True):
        torch.testing.assert_close(b[0][:1], a[0][:1] / 1000, rtol=1e-3, atol=0)
        torch.testing.assert_close(
            (far / b[0][0] + b[1]).sigmoid(), (near / a[0][0] + a[1]).sigmoid(), rtol=0, atol=1e-3
        )


# -- the head ---------------------------------------------------------------------------------------------------------


def calibrated(several=False, rows=300, **options):
    """A head, validation rows, and what calibrate returned. Imprinted with labels that are too sure."""
    head = build(**options)
    head.imprint(*data(rows, several=several), shrinkage=1)
    validation = data(rows, seed=7, spread=2.0, several=several)
    return head.eval(), validation, head.calibrate(*validation)


def uncalibrated(head):
    other = build(cases=list(head.cases), centered=head.centered)
    other.load_state_dict(head.state_dict())
    other.temperature.fill_(1), other.shift.zero_()
    return other.eval()


@pytest.mark.parametrize("options", [{}, {"cases": "all"}, {"cases": "all", "centered": False}])
@pytest.mark.parametrize("several", [False, True])
def test_each_case_gets_what_fits_it_best(several, options):
    head, (features, labels, present), found = calibrated(several, **options)
    raw, logits = uncalibrated(head)(features, present), head(features, present)
    assert list(found) == list(case_names(NAMES))
    for name, mask in zip(NAMES and case_names(NAMES), MASKS, strict=True):
        rows = (present == mask).all(1)
        expected = fit(raw[rows], labels[rows], present[rows] | True)["image+text"]
        assert found[name] == pytest.approx(expected[0][0].item())
        assert found[name] == head.temperature[tuple(mask.long())][0].item()
        torch.testing.assert_close(logits[rows], apply(raw[rows], expected).to(logits))
        assert loss(logits[rows], labels[rows]) < loss(raw[rows], labels[rows]) - 1e-3


def test_logits_of_either_side_have_their_temperature():
    head, (features, _, present), _ = calibrated(True)
    raw, case = uncalibrated(head), present.long().unbind(1)
    for x in (head, raw):
        x.bias.data.sub_(raw(features, present).median())  # Else hardly any are above 0, or hardly any below.
    head.temperature[...] = torch.tensor([0.5, 3.0])
    logits, before = head(features, present), raw(features, present)
    assert 0.4 < (before > 0).double().mean() < 0.6
    torch.testing.assert_close(logits, apply(before, ((0.5, 3.0), head.shift[case])).to(logits))
    torch.testing.assert_close(head.contributions(features, present).sum(1), logits)


@pytest.mark.parametrize("several", [False, True])
def test_contributions_still_sum_to_the_logits(several):
    head, (features, _, present), _ = calibrated(several)
    present[:3] = False
    parts, logits = head.contributions(features, present), head(features, present)
    torch.testing.assert_close(parts.sum(1), logits)
    assert not logits[:3].any()
    assert not parts[~present].any()
    head.train()
    assert torch.equal(
        head.contributions(features, present), uncalibrated(head).train().contributions(features, present)
    )


@pytest.mark.parametrize("several", [False, True])
def test_with_labels_all_is_as_before(several):
    head, (features, labels, present), _ = calibrated(several)
    assert torch.equal(head(features, present, labels), uncalibrated(head)(features, present, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"subcase_weight": 0.0}
        assert head.loss(features, present, labels, **options) == uncalibrated(head).loss(
            features, present, labels, **options
        )
    assert (head.temperature != 1).sum() == 6


def test_of_complete_rows_it_is_right_for_rows_with_gaps():
    head = build()
    head.imprint(*data(300), shrinkage=1)
    features, labels, _ = data(300, seed=7, spread=2.0)
    found = head.calibrate(features, labels)
    for name, mask in zip(case_names(NAMES), MASKS, strict=True):
        here = mask.expand(300, -1)
        logits = uncalibrated(head)(features, here)
        assert found[name] == pytest.approx(fit(logits, labels, here | True)["image+text"][0][0].item())
    assert len(set(found.values())) == 3


def test_a_case_of_few_rows_uses_those_that_hold_it_and_else_all():
    head = build()
    head.imprint(*data(300), shrinkage=1)
    features, labels, _ = data(60, seed=7, spread=2.0)
    present = MASKS[1].repeat(60, 1)  # Rows with an image only,
    present[: MIN_ROWS - 1] = True  # and complete ones: too few for a text alone, too.
    found = head.calibrate(features, labels, present)
    raw, complete = uncalibrated(head), torch.ones_like(present)
    everything = fit(raw(features, present), labels, complete)["image+text"][0][0].item()
    assert found["image+text"] == found["text"] == pytest.approx(everything)
    assert found["image"] == pytest.approx(
        fit(raw(features, present)[19:], labels[19:], complete[19:])["image+text"][0][0].item()
    )
    present[MIN_ROWS - 1] = True
    found = head.calibrate(features, labels, present)
    some = features["text"][:MIN_ROWS], labels[:MIN_ROWS], complete[:MIN_ROWS]
    assert found["text"] == pytest.approx(fit(raw({"text": some[0]}), *some[1:])["image+text"][0][0].item())
    assert found["image+text"] == pytest.approx(fit(raw(features, present)[:20], *some[1:])["image+text"][0][0].item())


def test_three_modalities():
    widths = {**WIDTHS, "audio": 5}
    head = build(widths)
    features, labels, present = data(700, widths, spread=2.0)
    head.imprint(features, labels, present, shrinkage=1)
    found = head.calibrate(features, labels, present)
    raw, names = uncalibrated_like(head, widths), case_names(widths)
    logits, expected = head.eval()(features, present), raw(features, present)
    assert list(found) == list(names)
    assert head.temperature.shape == (2, 2, 2, 2)
    assert head.shift.shape == (2, 2, 2, 3)
    for name, mask in zip(names, case_masks(list(widths)), strict=True):
        rows = (present == mask).all(1)
        torch.testing.assert_close(logits[rows], expected[rows] / found[name])
        assert found[name] == head.temperature[tuple(mask.long())][0]


def uncalibrated_like(head, widths):
    other = build(widths)
    other.load_state_dict(head.state_dict())
    other.temperature.fill_(1)
    return other.eval()


def test_what_training_never_had_says_nothing():
    """Rows that have it, too, count as rows without."""
    head, (features, labels, _) = build(), data(300, spread=2.0)
    with pytest.warns(UserWarning, match="has 'text'"):
        head.imprint({"image": features["image"]}, labels, shrinkage=1)
    found = head.calibrate(features, labels)
    assert head.calibrate({"image": features["image"]}, labels)["image"] == pytest.approx(found["image"])
    logits = head.eval()(features)
    torch.testing.assert_close(logits, head({"image": features["image"]}))
    torch.testing.assert_close(head.contributions(features).sum(1), logits)
    assert not head({"text": features["text"]}).any()


def test_batches_are_as_good_as_all_at_once_and_so_is_either_mode():
    head, validation, found = calibrated()
    features, labels, present = validation
    parts = [slice(0, 100), slice(100, 300)]
    batches = [({n: x[i] for n, x in features.items()}, labels[i], present[i]) for i in parts]
    assert head.train().calibrate(batches) == pytest.approx(found)
    assert head.training
    assert head.prototypes.training
    again = head.eval().calibrate(*validation)  # It starts from the logits, not from what it made of them.
    assert not head.training
    assert again == pytest.approx(found)


def test_many_rows_are_worked_through_in_parts(monkeypatch):
    head, validation, found = calibrated()
    monkeypatch.setattr("protohead.calibration.CHUNK", 7)
    assert head.calibrate(*validation) == pytest.approx(found)


def test_rows_without_a_label_do_not_count():
    head, (features, labels, present), found = calibrated()
    labels, present = torch.cat([labels, labels]), torch.cat([present, present])
    labels[300:] = -100
    present[150:300][:0] = False
    assert head.calibrate({n: torch.cat([x, x]) for n, x in features.items()}, labels, present) == pytest.approx(found)


@pytest.mark.parametrize("several", [False, True])
def test_rows_that_the_head_says_nothing_about_do_not_count(several):
    """Those with only a modality that training never had; even where, for want of others, all rows are taken."""
    head, image_only = build(), torch.tensor([True, False])
    features, labels, _ = data(300, several=several)
    head.train().loss(features, image_only.expand(300, 2), labels)
    features, labels, _ = data(60, seed=7, several=several)
    present = torch.where(torch.arange(60)[:, None] < 15, image_only, ~image_only)
    found = head.calibrate(features, labels, present), head.shift.clone()
    some = {name: x[:15] for name, x in features.items()}
    assert head.calibrate(some, labels[:15], present[:15]) == found[0]
    assert torch.equal(head.shift, found[1])
    with pytest.raises(ValueError, match="a modality that training has had, but got none"):
        head.calibrate(features, labels, ~image_only.expand(60, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_features(dtype):
    head, (features, labels, present), found = calibrated()
    features = {name: x.to(dtype) for name, x in features.items()}
    assert head.to(dtype).calibrate(features, labels, present) == pytest.approx(found, rel=0.05)
    assert head.temperature.dtype == torch.float64
    logits = head(features, present)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_one_class():
    head = build(num_classes=1)
    features, _, present = data()
    found = head.calibrate(features, torch.zeros(90, dtype=torch.int64), present)
    assert set(found.values()) == {1.0}


# -- nothing stale ----------------------------------------------------------------------------------------------------

ACTIONS = {
    "loss": lambda head, rows: head.train().loss(rows[0], rows[2], rows[1]),
    "forward": lambda head, rows: head.train()(rows[0], rows[2], rows[1]),
    "forward without labels": lambda head, rows: head.train()(rows[0], rows[2]),
    "imprint": lambda head, rows: head.imprint(*rows),
    "imprint a class": lambda head, rows: head.imprint(*rows, classes=[1]),
    "add_classes": lambda head, rows: head.add_classes(2),
    "reset": lambda head, rows: head.reset(5),
    "reset_parameters": lambda head, rows: head.reset_parameters(),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_what_changes_the_logits_takes_it_back(action):
    head, validation, _ = calibrated(several=action != "imprint a class")
    assert (head.temperature != 1).any()
    ACTIONS[action](head, validation)
    assert (head.temperature == 1).all()
    assert not head.shift.any()
    assert head.shift.shape == (2, 2, head.num_classes)
    assert load_head(head.state_dict()).num_classes == head.num_classes


def test_a_wrong_call_leaves_it_as_it_was():
    head, (features, labels, present), _ = calibrated()
    before = head.temperature.clone()
    for wrong in (labels + 1, labels.float(), labels[:5], torch.full_like(labels, -100)):
        with pytest.raises((ValueError, TypeError), match="Expected"):
            head.calibrate(features, wrong, present)
    assert torch.equal(head.temperature, before)


def test_an_error_on_the_way_leaves_it_as_it_was(monkeypatch):
    head, (features, labels, present), _ = calibrated(several=True)
    before, shift = head.temperature.clone(), head.shift.clone()
    monkeypatch.setattr("protohead.calibration.fit_cases", lambda *_: [].pop())
    with pytest.raises(IndexError):
        head.train().calibrate(features, 1 - labels, present)
    assert head.training
    assert torch.equal(head.temperature, before)
    assert torch.equal(head.shift, shift)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f, y, p: (f, y + 3, p), r"`labels` to be in \[0, 3\), or -100, but got"),
        (lambda f, y, p: (f, y[:0], p), "`labels` to be int64"),
        (lambda f, y, p: ({n: x[:0] for n, x in f.items()}, y[:0], p[:0]), "at least one row .* but got none"),
        (lambda f, y, p: (f, y, p & False), "at least one row .* but got none"),
        (lambda f, y, p: ([],), "at least one row .* but got none"),
        (lambda f, y, p: ({n: x / 0 for n, x in f.items()}, y, p), "finite features of 'image'"),
        (lambda f, y, p: ({**f, "image": torch.where(p[:, :1], 0, f["image"])}, y, p), "the mask is inverted"),
    ],
)
def test_what_it_refuses(change, match):
    with pytest.raises(ValueError, match=match):
        build().calibrate(*change(*data()))


def test_it_needs_labels():
    with pytest.raises(TypeError, match="Expected argument `labels`"):
        build().calibrate(data()[0])


# -- where a head goes ------------------------------------------------------------------------------------------------


def test_it_is_in_the_checkpoint():
    head, (features, _, present), _ = calibrated(several=True)
    assert torch.equal(load_head(head.state_dict())(features, present), head(features, present))


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("temperature", math.nan), ("shift", math.inf)])
def test_numbers_that_no_calibration_has_are_refused(name, value):
    head, _, _ = calibrated()
    checkpoint = head.state_dict()
    checkpoint[name] = checkpoint[name].clone().fill_(value)
    with pytest.raises(ValueError, match=f"Expected .* numbers in '{name}' of the checkpoint"):
        head.load_state_dict(checkpoint)


def test_an_exported_graph_is_calibrated():
    head, (features, _, present), _ = calibrated(several=True)
    batch = torch.export.Dim("batch")
    shapes = ({"image": {0: batch}, "text": {0: batch}}, {0: batch})
    program = torch.export.export(head, (features, present), dynamic_shapes=shapes).module()
    some = {name: x[:7] for name, x in features.items()}, present[:7]
    torch.testing.assert_close(program(*some), head(*some))


def test_a_compiled_head_is_calibrated_and_forgets_in_training():
    head, (features, labels, present), _ = calibrated()
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, present), head(features, present))
    head.train()
    compiled(features, present, labels).sum().backward()
    assert (head.temperature == 1).all()


def test_a_classifiers_head():
    head, (features, labels, present), _ = calibrated()
    identity = torch.nn.Identity()
    model = PrototypeClassifier({"image": identity, "text": torch.nn.Identity()}, head).eval()
    model.head.calibrate(model.encode(features, present), labels, present)
    torch.testing.assert_close(model(features, present), head(features, present))


def test_a_fresh_head_is_uncalibrated():
    head = DecoupledPrototypeHead(WIDTHS, 3)
    assert torch.equal(head.temperature, torch.ones(2, 2, 2))
    assert torch.equal(head.shift, torch.zeros(2, 2, 3))


@pytest.mark.parametrize("several", [False, True])
def test_in_inference_mode_too(several):
    head, validation, found = calibrated(several)
    with torch.inference_mode():
        assert head.calibrate(*validation) == pytest.approx(found)
