"""`calibrate`: temperatures against what the logits were made with; which rows a case is fitted on; nothing stale."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from roads import UNTRAINED
from test_closed_form import WIDTHS, build, data

from protohead import DecoupledPrototypeHead, PrototypeClassifier, load_head
from protohead.calibration import MIN_ROWS, fit_cases
from protohead.cases import case_masks, case_names

pytestmark = UNTRAINED
NAMES = ("image", "text")
MASKS = case_masks(NAMES)
TEMPERATURES, SHIFTS = (3.0, 1.0, 0.2), (0.5, -2.0, 0.0)


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


@pytest.mark.parametrize("several", [False, True])
def test_known_temperatures_and_shifts_are_found(several):
    logits, labels, present = made(12000, several)
    case = torch.arange(12000) % 3
    temperature, shift = (torch.tensor(x).double()[case, None] for x in (TEMPERATURES, SHIFTS))
    found = fit(temperature * (logits - int(several) * shift), labels, present)
    assert list(found) == ["image+text", "image", "text"]
    assert [t for t, _ in found.values()] == pytest.approx(TEMPERATURES, rel=0.06)
    assert [b for _, b in found.values()] == pytest.approx(SHIFTS if several else [0, 0, 0], abs=0.06)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_no_other_temperature_or_shift_is_better(several, seed):
    logits, labels, present = made(90, several, seed=seed)
    for c, (temperature, shift) in enumerate(fit(5 * logits + 3, labels, present).values()):
        z, y = 5 * logits[c::3] + 3, labels[c::3]
        best = loss(z / temperature + shift, y)
        others = [0.999, 1.001, *torch.logspace(-2, 2, 50, dtype=torch.float64).tolist()]
        assert all(best < loss(z / (other * temperature) + shift, y) for other in others)
        if several:
            assert all(best < loss(z / temperature + shift + other, y) for other in (-1, -0.001, 0.001, 1))


def test_soft_labels_are_fitted_as_the_share_of_many_hard_ones():
    logits, labels, present = made(180, True)
    every = torch.cat([labels, labels, 1 - labels])
    soft = fit(logits, (2 * labels + 1 - labels) / 3, present)
    hard = fit(logits.repeat(3, 1), every, present.repeat(3, 1))
    for a, b in zip(soft.values(), hard.values(), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("several", [False, True])
def test_at_a_bound_it_warns(right, several):
    labels = torch.arange(60) % 3
    logits = 4.0 * F.one_hot(labels if right else (labels + 1) % 3).double() - 2
    labels = F.one_hot(labels).double() if several else labels
    bound = 0.01 if right else 100
    with pytest.warns(UserWarning, match=rf"at a bound: image\+text {bound:.3g}, image {bound:.3g}, text"):
        found = fit(logits, labels, torch.ones(60, 2, dtype=torch.bool))
    temperature, shift = found["image+text"]
    assert temperature == pytest.approx(bound)
    assert (logits / temperature + shift).sigmoid().mean().item() == pytest.approx(1 / 3, abs=1e-6) or not several


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("several", [False, True])
def test_logits_that_say_nothing_keep_their_temperature(value, several):
    _, labels, present = made(90, several)
    for c, (temperature, shift) in enumerate(fit(torch.full((90, 4), value).double(), labels, present).values()):
        assert temperature == 1
        rate = labels[c::3].mean().item() if several else 0
        assert shift == pytest.approx(math.log(rate / (1 - rate)) - value if several else 0, abs=1e-6)


def test_labels_that_never_occur_leave_numbers_finite():
    logits, labels, present = made(90, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit(logits, 0 * labels, present)
    assert all(math.isfinite(x) for pair in found.values() for x in pair)
    assert all((logits / t + b).sigmoid().mean() < 0.01 for t, b in found.values())


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
        temperature, shift = fit(raw[rows], labels[rows], present[rows] | True)["image+text"]
        assert found[name] == pytest.approx(temperature)
        assert found[name] == head.temperature[tuple(mask.long())].item()
        torch.testing.assert_close(logits[rows], raw[rows] / temperature + shift)
        assert loss(logits[rows], labels[rows]) < loss(raw[rows], labels[rows]) - 1e-3


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
    assert (head.temperature != 1).sum() == 3


def test_of_complete_rows_it_is_right_for_rows_with_gaps():
    head = build()
    head.imprint(*data(300), shrinkage=1)
    features, labels, _ = data(300, seed=7, spread=2.0)
    found = head.calibrate(features, labels)
    for name, mask in zip(case_names(NAMES), MASKS, strict=True):
        here = mask.expand(300, -1)
        logits = uncalibrated(head)(features, here)
        assert found[name] == pytest.approx(fit(logits, labels, here | True)["image+text"][0])
    assert len(set(found.values())) == 3


def test_a_case_of_few_rows_uses_those_that_hold_it_and_else_all():
    head = build()
    head.imprint(*data(300), shrinkage=1)
    features, labels, _ = data(60, seed=7, spread=2.0)
    present = MASKS[1].repeat(60, 1)  # Rows with an image only,
    present[: MIN_ROWS - 1] = True  # and complete ones: too few for a text alone, too.
    found = head.calibrate(features, labels, present)
    raw, complete = uncalibrated(head), torch.ones_like(present)
    everything = fit(raw(features, present), labels, complete)["image+text"][0]
    assert found["image+text"] == found["text"] == pytest.approx(everything)
    assert found["image"] == pytest.approx(
        fit(raw(features, present)[19:], labels[19:], complete[19:])["image+text"][0]
    )
    present[MIN_ROWS - 1] = True
    found = head.calibrate(features, labels, present)
    some = features["text"][:MIN_ROWS], labels[:MIN_ROWS], complete[:MIN_ROWS]
    assert found["text"] == pytest.approx(fit(raw({"text": some[0]}), *some[1:])["image+text"][0])
    assert found["image+text"] == pytest.approx(fit(raw(features, present)[:20], *some[1:])["image+text"][0])


def test_three_modalities():
    widths = {**WIDTHS, "audio": 5}
    head = build(widths)
    features, labels, present = data(700, widths, spread=2.0)
    head.imprint(features, labels, present, shrinkage=1)
    found = head.calibrate(features, labels, present)
    raw, names = uncalibrated_like(head, widths), case_names(widths)
    logits, expected = head.eval()(features, present), raw(features, present)
    assert list(found) == list(names)
    assert head.temperature.shape == head.shift.shape == (2, 2, 2)
    for name, mask in zip(names, case_masks(list(widths)), strict=True):
        rows = (present == mask).all(1)
        torch.testing.assert_close(logits[rows], expected[rows] / found[name])
        assert found[name] == head.temperature[tuple(mask.long())]


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


def test_all_rows_right_is_a_warning_at_the_call():
    head = build()
    features, labels, present = data(300, spread=0.01)
    head.imprint(features, labels, present, shrinkage=1)
    with pytest.warns(UserWarning, match="at a bound: image.text 0.01") as caught:
        head.calibrate(features, labels, present)
    assert caught[0].filename == __file__


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


def test_a_wrong_call_leaves_it_as_it_was():
    head, (features, labels, present), _ = calibrated()
    before = head.temperature.clone()
    for wrong in (labels + 1, labels.float(), labels[:5], torch.full_like(labels, -100)):
        with pytest.raises((ValueError, TypeError), match="Expected"):
            head.calibrate(features, wrong, present)
    assert torch.equal(head.temperature, before)


def test_an_error_on_the_way_leaves_it_as_it_was():
    """Such as the warning of a bound, where warnings are errors, as here."""
    head, (features, labels, present), _ = calibrated(several=True)
    before, shift = head.temperature.clone(), head.shift.clone()
    with pytest.raises(UserWarning, match="at a bound"):
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
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
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
    assert head.temperature.tolist() == [[1, 1], [1, 1]]
    assert head.shift.tolist() == [[0, 0], [0, 0]]
