"""`head.loss`: the whole objective, and the bias. What becomes of the center is in test_center.py."""

import dataclasses
import warnings

import pytest
import reference
import torch
import torch.nn.functional as F
from roads import BOTH_ROADS, UNTRAINED, every_block

from protohead import DecoupledPrototypeHead
from protohead.objective import Objective, split_modalities

pytestmark = UNTRAINED
WIDTHS = {"image": 5, "text": 3}
PRESENT = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [0, 1], [1, 1]]).bool()
SCORED = PRESENT.any(1)
HARD = torch.tensor([0, 1, 2, 3, 1, -100, 2])
SOFT = torch.rand(7, 4, generator=torch.Generator().manual_seed(3))


def build(widths=WIDTHS, **options):
    torch.manual_seed(0)
    return DecoupledPrototypeHead(widths, 4, dtype=torch.float64, **{"cases": "all", **options})


def batch(rows=7, widths=WIDTHS):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(rows, d, generator=generator, dtype=torch.float64) + 1 for name, d in widths.items()}


def slow_logits(head, features, present, labels):
    """The formula of docs/method.md with the center and the bias, one number at a time."""
    centers = dict(zip(head.modalities, head.center.split(list(head.in_features.values())), strict=True))
    moved = {name: x - centers[name] for name, x in features.items()}
    labels = torch.full((len(present),), -100) if labels is None else labels
    logits = reference.contributions(head, moved, present, labels=labels)
    return logits + torch.where(present.any(1)[:, None], head.bias, 0)


def slow_row_losses(logits, labels):
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none").mean(1)
    return F.cross_entropy(logits, labels, reduction="none")


@BOTH_ROADS
@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["one label", "several labels"])
def test_the_whole_is_the_sum_of_its_parts(labels, road):
    head, features = build(), batch()
    with torch.no_grad():
        head.bias.copy_(torch.linspace(-1, 1, 4))
    with road():
        loss = head.loss(features, PRESENT, labels, prototype_weight=0.7, subcase_weight=0.3)
    whole = slow_row_losses(slow_logits(head, features, PRESENT, labels), labels)
    expected = whole[SCORED].sum()
    both = PRESENT.all(1)
    for m in range(2):
        alone = torch.zeros_like(PRESENT)
        alone[both, m] = True
        parts = slow_row_losses(slow_logits(head, features, alone, labels), labels)
        expected = expected + 0.3 * parts[both].sum()
    expected = expected / (5 if labels is HARD else 6)  # One label is ignored, and one row has nothing.
    expected = expected + 0.7 * reference.prototype_loss(head, head.cases, 1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert head.seen_cases == head.cases


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["one label", "several labels"])
def test_the_papers_objective(labels):
    head, features = build(centered=False), batch()
    criterion = F.cross_entropy if labels is HARD else F.binary_cross_entropy_with_logits
    target = labels if labels is HARD else labels.double()
    expected = criterion(head(features, PRESENT, labels)[SCORED], target[SCORED]) + 0.9 * head.prototype_loss()
    assert head.bias is None
    assert head.center is None
    torch.testing.assert_close(head.loss(features, PRESENT, labels, subcase_weight=0), expected, rtol=1e-12, atol=0)
    # What has not been trained by `loss` is the paper's head too.
    torch.testing.assert_close(build()(features, PRESENT, labels), head(features, PRESENT, labels), rtol=1e-12, atol=0)


def test_class_weights_and_smoothing_are_torchs():
    head, features, weight = build(centered=False), batch(), torch.tensor([0.5, 1.0, 2.0, 4.0])
    options = {"prototype_weight": 0, "subcase_weight": 0, "class_weight": weight}
    logits = head(features, PRESENT, HARD)[SCORED]
    expected = F.cross_entropy(logits, HARD[SCORED], weight.double(), label_smoothing=0.2)
    torch.testing.assert_close(head.loss(features, PRESENT, HARD, label_smoothing=0.2, **options), expected)
    logits, soft = head(features, PRESENT, SOFT)[SCORED], SOFT[SCORED].double()
    expected = F.binary_cross_entropy_with_logits(logits, soft * 0.8 + 0.1, weight.double())
    torch.testing.assert_close(head.loss(features, PRESENT, SOFT, label_smoothing=0.2, **options), expected)


def test_class_weights_weigh_subcases_by_the_same_sum():
    head, features, weight = build(centered=False), batch(), torch.tensor([0.5, 1.0, 2.0, 4.0])
    options = {"prototype_weight": 0, "class_weight": weight}
    whole = head.loss(features, PRESENT, HARD, subcase_weight=0, **options)
    got = head.loss(features, PRESENT, HARD, subcase_weight=0.5, **options)
    both, known = PRESENT.all(1), (HARD >= 0) & SCORED
    total = sum(
        F.cross_entropy(
            head(features, PRESENT & torch.tensor(keep), HARD)[both], HARD[both], weight.double(), reduction="sum"
        )
        for keep in ([True, False], [False, True])
    )
    torch.testing.assert_close(got, whole + 0.5 * total / weight[HARD[known]].sum())


def test_nothing_to_learn_from_is_zero():
    head = build()
    loss = head.loss(batch(), PRESENT, torch.full((7,), -100), prototype_weight=0)
    assert loss == 0
    loss.backward()
    assert not any(p.grad.any() for p in head.parameters())
    empty = head.loss(batch(0), PRESENT[:0], HARD[:0], prototype_weight=0)
    assert empty == 0
    nothing = head.loss(batch(), torch.zeros_like(PRESENT), HARD, prototype_weight=0)
    assert nothing == 0


def test_rows_that_nothing_scores_do_not_dilute():
    head, features = build(cases=["image"], widths={"image": 5}), {"image": batch()["image"]}
    some, options = torch.tensor([True, False] * 3 + [True])[:, None], {"prototype_weight": 0}
    labels = HARD.clamp(min=0)
    first = head.loss(features, some, labels, **options)
    head.center.zero_(), head.center_rows.zero_(), head.center_spread.zero_()
    kept = some[:, 0]
    only = head.loss({"image": features["image"][kept]}, some[kept], labels[kept], **options)
    torch.testing.assert_close(first, only)


def test_cases_that_are_not_seen_cost_nothing():
    head = DecoupledPrototypeHead({f"m{i}": 4 for i in range(7)}, 3, cases="all")
    head.loss(torch.randn(4, 28), torch.ones(4, 7).bool(), torch.tensor([0, 1, 2, 0]), subcase_weight=0)
    assert head.seen_cases == head.cases[:1]
    with torch.profiler.profile(profile_memory=True) as profile:
        assert head.prototype_loss() == 0
    assert max(event.cpu_memory_usage for event in profile.key_averages()) < 2**16


def test_many_cases_are_told():
    with pytest.warns(UserWarning, match="255 cases.*list those that occur, or share them") as caught:
        DecoupledPrototypeHead({f"m{i}": 2 for i in range(8)}, 3, cases="all")
    assert caught[0].filename == __file__
    DecoupledPrototypeHead({f"m{i}": 2 for i in range(8)}, 3)


def test_one_modality_has_no_subcases():
    head = build({"image": 5})
    features, present = {"image": batch()["image"]}, PRESENT[:, :1]
    options = {"prototype_weight": 0}
    first = head.loss(features, present, HARD, subcase_weight=0.5, **options)
    head.center.zero_(), head.center_rows.zero_(), head.center_spread.zero_()
    torch.testing.assert_close(first, head.loss(features, present, HARD, subcase_weight=0, **options))


def test_splits_are_all_equally_likely_within_a_size():
    torch.manual_seed(0)
    present = torch.tensor([True, True, False, True]).expand(6000, 4)
    first, second = split_modalities(present)
    assert torch.equal(first | second, present)
    assert not (first & second).any()
    codes, counts = torch.unique(first.long() @ torch.tensor([8, 4, 2, 1]), return_counts=True)
    assert codes.tolist() == [1, 4, 5, 8, 9, 12]  # every part, neither empty nor all
    assert (counts - 1000).abs().max() < 120
    for row in ([True, False], [False, False]):
        assert not torch.stack(split_modalities(torch.tensor([row]))).any()
    both = split_modalities(torch.tensor([[True, True]]))
    assert sorted(x.tolist() for x in both) == [[[False, True]], [[True, False]]]


def test_three_modalities_train_the_parts_that_are_drawn():
    widths = {"a": 4, "b": 3, "c": 2}
    head = build(widths, centered=False)
    features, labels, present = batch(6, widths), torch.arange(6) % 4, torch.ones(6, 3, dtype=torch.bool)
    present[5] = torch.tensor([True, False, False])
    torch.manual_seed(5)
    got = head.loss(features, present, labels, prototype_weight=0, subcase_weight=0.25)
    torch.manual_seed(5)
    parts = split_modalities(present)
    expected = F.cross_entropy(head(features, present, labels), labels)
    for part in parts:
        rows = F.cross_entropy(head(features, part, labels), labels, reduction="none")
        expected = expected + 0.25 * rows[:5].sum() / 6
    torch.testing.assert_close(got, expected)


def test_gradients_of_missing_rows_are_zero():
    head, features = build(), {name: x.requires_grad_() for name, x in batch().items()}
    head.loss(features, PRESENT, HARD).backward()
    for m, x in enumerate(features.values()):
        assert not x.grad[~PRESENT[:, m]].any()
        assert x.grad[PRESENT[:, m] & (HARD >= 0)].any(1).all()


def test_rows_with_nothing_keep_zero_logits():
    head, features = build(), batch()
    head.loss(features, PRESENT, HARD)
    with torch.no_grad():
        head.bias.fill_(2.0)
    for mode in (True, False):
        logits = head.train(mode)(features, PRESENT)
        assert not logits[4].any()
        torch.testing.assert_close(logits, slow_logits(head, features, PRESENT, None))
        torch.testing.assert_close(head.contributions(features, PRESENT).sum(1), logits)


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["one label", "several labels"])
@pytest.mark.parametrize("cases", ["all", "shared"])
def test_both_roads_agree(cases, labels):
    results, weight = [], torch.tensor([0.5, 1.0, 2.0, 4.0])
    for road in (warnings.catch_warnings, every_block):
        head, features = build(cases=cases), {name: x.requires_grad_() for name, x in batch().items()}
        with road():
            for _ in range(2):
                loss = head.loss(features, PRESENT, labels, class_weight=weight, label_smoothing=0.1)
                loss.backward()
        grads = [x.grad for x in [*features.values(), *head.parameters()]]
        results.append([loss, *grads, head.seen, head.center, head.center_rows, head.center_spread])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision():
    head = DecoupledPrototypeHead(WIDTHS, 4)
    features = {name: x.bfloat16() for name, x in batch().items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(features, PRESENT, HARD)
    assert loss.dtype == torch.float32
    wide = DecoupledPrototypeHead(WIDTHS, 4)
    wide.prototypes = head.prototypes
    torch.testing.assert_close(loss, wide.loss({name: x.float() for name, x in features.items()}, PRESENT, HARD))


def test_eval_mode_warns_where_something_is_trained():
    head, features = build().eval(), batch()
    with pytest.warns(UserWarning, match="call train"):
        head.loss(features, PRESENT, HARD)
    assert head.seen_cases == ()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        head.loss(features, PRESENT, HARD)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prototype_weight": -1}, r"`prototype_weight` to be a number in \[0, inf\), but got -1"),
        ({"prototype_weight": float("nan")}, "but got nan"),
        ({"subcase_weight": True}, "but got True"),
        ({"subcase_weight": "much"}, "but got 'much'"),
        ({"label_smoothing": 1}, r"in \[0, 1\), but got 1"),
        ({"class_weight": torch.ones(3)}, r"`class_weight` to be of shape \(4,\), but got \(3,\)"),
        ({"class_weight": torch.ones(1)}, r"but got \(1,\)"),
        ({"class_weight": torch.ones(4, 1)}, r"floating-point \(K,\) tensor, but got torch.float32 \(4, 1\)"),
        ({"class_weight": torch.tensor(1.0)}, r"but got torch.float32 \(\)"),
        ({"class_weight": [1.0] * 4}, r"but got \[1.0"),
        ({"class_weight": torch.ones(4, dtype=torch.int64)}, "int64"),
        ({"class_weight": -torch.ones(4)}, "finite and not negative"),
        ({"class_weight": torch.tensor([1.0, 1.0, 1.0, float("nan")])}, "finite and not negative"),
        ({"weight": 1}, r"some of the options \('prototype_weight', .*'label_smoothing'\), but got \{'weight': 1\}"),
    ],
)
def test_wrong_options(options, match):
    head = build()
    with pytest.raises(ValueError, match=match):
        head.loss(batch(), PRESENT, HARD, **options)
    assert head.seen_cases == ()
    assert not head.center.any()


@pytest.mark.parametrize(
    ("labels", "objective", "match"),
    [
        (None, {}, "`labels` for the objective"),
        (HARD, {"weight": 1}, "'weight': 1"),
        (HARD, ["prototype_weight"], r"but got \['prototype_weight'\]"),
        (HARD, 1, "but got 1"),
        (HARD, Objective(class_weight=torch.ones(3)), r"shape \(4,\), but got \(3,\)"),
        (HARD + 4, {}, "in row 0"),
    ],
)
def test_wrong_use_of_the_objective(labels, objective, match):
    head = build()
    with pytest.raises(ValueError, match=match):
        head(batch(), PRESENT, labels, objective)
    assert head.seen_cases == ()
    assert not head.center.any()
    assert not head.center_rows.any()


def test_the_options_are_one_frozen_dataclass():
    objective = Objective(prototype_weight=0.3, label_smoothing=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.prototype_weight = 1
    assert dataclasses.replace(objective, subcase_weight=0).prototype_weight == 0.3
    with pytest.raises(ValueError, match="but got -1"):
        dataclasses.replace(objective, subcase_weight=-1)
    losses = [
        build().loss(batch(), PRESENT, HARD, prototype_weight=0.3, label_smoothing=0.1),
        build()(batch(), PRESENT, HARD, objective),
        build()(batch(), PRESENT, HARD, {"prototype_weight": 0.3, "label_smoothing": 0.1}),
    ]
    assert losses[0] == losses[1] == losses[2]
    assert build().loss(batch(), PRESENT, HARD) == build()(batch(), PRESENT, HARD, Objective())


def test_checkpoints():
    head, features = build(), batch()
    head.loss(features, PRESENT, HARD).backward()
    with torch.no_grad():
        head.bias -= head.bias.grad
    other = build()
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other.eval()(features, PRESENT), head.eval()(features, PRESENT), rtol=0, atol=0)
    paper = build(centered=False)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        paper.load_state_dict(head.state_dict())
    other.load_state_dict(paper.state_dict())  # The paper's head is one with zeros.
    assert not other.bias.any()
    assert not other.center.any()
    torch.testing.assert_close(other.eval()(features, PRESENT), paper.eval()(features, PRESENT))


def test_reset_forgets():
    head = build()
    head.loss(batch(), PRESENT, HARD)
    with torch.no_grad():
        head.bias.fill_(1.0)
    head.reset_parameters()
    assert not any(x.any() for x in (head.bias, head.center, head.center_rows, head.center_spread, head.seen))


def test_one_block_for_all_cases():
    head, features = build(cases="shared"), batch()
    assert head.prototype_loss() == 0
    loss = head.loss(features, PRESENT, HARD)
    loss.backward()
    assert head.seen_cases == ("image+text",)
    for name, mask in (("image", [True, False]), ("text", [False, True])):
        alone = head.eval()(features, torch.tensor([mask]).expand(7, 2))
        center = head.center[:5] if name == "image" else head.center[5:]
        cosine = F.normalize(features[name] - center) @ F.normalize(head.prototypes[name][0]).T
        torch.testing.assert_close(alone, 20 * cosine + head.bias)


def test_eight_modalities_share_one_block_each():
    widths = {name: 3 for name in "abcdefgh"}
    head = build(widths, cases="shared")
    assert {tuple(p.shape) for p in head.prototypes.values()} == {(1, 4, 3)}
    features = batch(40, widths)
    present = torch.rand(40, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    labels = torch.arange(40) % 4
    head.loss(features, present, labels).backward()
    assert all(p.grad.any() for p in head.parameters())
    every = head.eval()(features, present)
    moved = dict(zip(widths, torch.cat(list(features.values()), 1).sub(head.center).split(3, 1), strict=True))
    unit = {name: F.normalize(x) @ F.normalize(head.prototypes[name][0]).T for name, x in moved.items()}
    total = torch.where(present[:, :, None], torch.stack(list(unit.values()), 1), 0).sum(1)
    expected = 20 * total / present.sum(1, keepdim=True).clamp(min=1) + head.bias
    torch.testing.assert_close(every, torch.where(present.any(1)[:, None], expected, 0))


def test_two_losses_before_one_backward_pass():
    """The second moves the center in place, which the first has subtracted."""
    first, second = batch(), {name: 5 * x for name, x in batch().items()}
    grads = []
    for together in (True, False):
        head = build()
        losses = []
        for features in (first, second):
            losses.append(head.loss(features, PRESENT, HARD))
            if not together:
                losses.pop().backward()
        if together:
            sum(losses).backward()
        grads.append([p.grad for p in head.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_second_derivatives_with_a_center():
    head, features = build(), batch()
    head.loss(features, PRESENT, HARD)
    head.eval()
    leaves = [x.requires_grad_() for x in features.values()] + list(head.parameters())
    inputs = dict(zip(WIDTHS, leaves, strict=False))
    assert torch.autograd.gradgradcheck(lambda *_: head(inputs, PRESENT, HARD), leaves, fast_mode=True)
    logits = head(inputs, PRESENT, HARD)
    once, twice = (
        torch.autograd.grad(logits.square().sum(), leaves, retain_graph=True, create_graph=again)
        for again in (False, True)
    )
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_head_in_eval_mode_does_not_warn():
    head = build().eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.loss({name: x.requires_grad_() for name, x in batch().items()}, PRESENT, HARD).backward()


def test_imprint_takes_the_means_of_centered_features():
    head, features, labels = build(), batch(), torch.arange(7) % 4
    everything = torch.ones_like(PRESENT)
    head.loss(features, everything, labels)
    head.imprint(features, labels, everything, shrinkage=1)
    for name, center in zip(WIDTHS, head.center.split(list(WIDTHS.values())), strict=True):
        for k in range(4):
            mean = F.normalize(F.normalize(features[name][labels == k] - center).mean(0), dim=0)
            torch.testing.assert_close(head.prototypes[name][:, k], mean.expand(2, -1))
