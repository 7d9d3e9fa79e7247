"""The center: a mean that follows the features, and that no few rows can carry away."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from roads import BOTH_ROADS, UNTRAINED
from test_objective import HARD, PRESENT, WIDTHS, batch, build

from protohead import DecoupledPrototypeHead

pytestmark = UNTRAINED

CLASSES = 4


def toy(rows, seed, dtype=torch.float32, shift=0.0):
    """Separable classes, far from the origin, one modality of two missing in half of the rows."""
    centres = torch.randn(2, CLASSES, 16, generator=torch.Generator().manual_seed(77)) + 3
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(rows) + seed) % CLASSES
    noise = 0.1 * torch.randn(2, rows, 16, generator=generator)
    features = dict(zip(("a", "b"), (centres[:, labels] + noise + shift).to(dtype), strict=True))
    kind = torch.randint(0, 4, (rows,), generator=generator)
    return features, torch.stack([kind != 1, kind != 2], dim=1), labels


def accuracy(head, **options):
    features, present, labels = toy(400, seed=99, **options)
    with torch.no_grad():
        right = head.eval()(features, present).argmax(1) == labels
    head.train()
    return right.float().mean().item()


class Trainer:
    def __init__(self, **options):
        torch.manual_seed(0)
        self.head = DecoupledPrototypeHead({"a": 16, "b": 16}, CLASSES, **options)
        self.optimizer = torch.optim.Adam(self.head.parameters(), 0.05)

    def step(self, features, present, labels):
        self.optimizer.zero_grad()
        self.head.loss(features, present, labels, prototype_weight=0).backward()
        self.optimizer.step()


def spread(head):
    return head.center_spread.max().item()


@pytest.mark.parametrize("value", [64504.0, 1e10, 1e30])
@pytest.mark.parametrize("first", [True, False])
@BOTH_ROADS
def test_one_outlier_does_not_carry_the_center_away(value, first, road):
    bad, good = Trainer(), Trainer()
    with road():
        for i in range(30):
            features, present, labels = toy(64, seed=i)
            good.step(features, present, labels)
            if i == 0 if first else i in (20, 29):
                features["a"][5, 3] = value
                present[5] = True
            bad.step(features, present, labels)
            if i == 0:  # From nothing, a row can move it by 3 times the usual length of a feature.
                length = features["b"].norm(dim=1).max().item()
                assert (bad.head.center - good.head.center).norm() < 3.2 * length / 32
        assert accuracy(good.head) == 1
        assert accuracy(bad.head) == 1
    assert (bad.head.center - good.head.center).norm() < 0.3 * spread(good.head)
    assert spread(bad.head) < 1.5 * spread(good.head)


@pytest.mark.parametrize("rows", [2, 3])
def test_outliers_in_small_batches(rows):
    bad, good = Trainer(), Trainer()
    for i in range(100):
        features, present, labels = toy(rows, seed=i)
        good.step(features, present, labels)
        if i % 20 == 0:
            features["a"][0, 3] = 64504
            present[0] = True
        bad.step(features, present, labels)
    assert accuracy(good.head) == 1
    assert accuracy(bad.head) == 1
    assert (bad.head.center - good.head.center).norm() < spread(good.head)


def test_half_precision_with_its_largest_number():
    trainer = Trainer()
    for i in range(30):
        features, present, labels = toy(64, seed=i, dtype=torch.float16)
        features["b"][i, 3] = 65504
        trainer.step(features, present, labels)
    assert trainer.head.center.isfinite().all()
    assert accuracy(trainer.head, dtype=torch.float16) == 1


@BOTH_ROADS
def test_encoders_that_drift_are_followed(road):
    trainer = Trainer()
    with road():
        for i in range(10):
            trainer.step(*toy(64, seed=i))
        width = spread(trainer.head)
        shift = 100 * width / 4  # In each of 16 features: 100 times the usual distance from the center.
        for bound, steps in ((5.0, 50), (0.2, 100)):
            for i in range(steps):
                with torch.no_grad():
                    trainer.head.loss(*toy(512, seed=i, shift=shift))
            moved = torch.cat([x.mean(0) for x in toy(4000, seed=5, shift=shift)[0].values()])
            assert (trainer.head.center - moved).norm() < bound * width
        for i in range(20):
            trainer.step(*toy(64, seed=i, shift=shift))
    assert accuracy(trainer.head, shift=shift) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@BOTH_ROADS
def test_a_modality_that_never_changes_says_nothing(dtype, road):
    trainer = Trainer(dtype=torch.float64 if dtype == torch.float64 else None)
    head, everything = trainer.head, torch.ones(63, 2, dtype=torch.bool)
    constant = torch.randn(16, generator=torch.Generator().manual_seed(1)).mul(7).to(dtype)
    with road():
        for i in range(5):  # From the first batch on, whose mean is rounded.
            features, present, labels = toy(63, seed=i, dtype=dtype)
            features["b"] = constant.expand(63, 16)
            trainer.step(features, present, labels)
            with torch.no_grad():
                head.bias.zero_()
            parts = head.contributions(features, everything)
            assert not parts[:, 1].any()
            assert parts[:, 0].any(1).all()
            torch.testing.assert_close(head(features, everything), parts.sum(1))
            assert not head({"b": features["b"]}).any()


@pytest.mark.parametrize("size", [1e-38, 1e-23, 1e19, 1e30])
@BOTH_ROADS
def test_the_size_of_features_does_not_matter(size, road):
    """In training, too, where float32 cannot hold the squares."""
    results = []
    with road():
        for factor in (1.0, size):
            torch.manual_seed(0)
            head = DecoupledPrototypeHead({"a": 16, "b": 16}, CLASSES)
            features, present, labels = toy(64, seed=0)
            features = {name: x * factor for name, x in features.items()}
            loss = head.loss(features, present, labels)
            loss.backward()
            assert head.center.isfinite().all()
            assert head.center_spread.isfinite().all()
            results.append([loss, head(features, present), *[p.grad for p in head.parameters()]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@BOTH_ROADS
def test_the_center_is_the_mean_of_what_is_there(road):
    head, features = build(), batch()
    with road():
        head.loss(features, PRESENT, HARD)
        means = [features[name][PRESENT[:, m]].mean(0) for m, name in enumerate(WIDTHS)]
        torch.testing.assert_close(head.center, torch.cat(means))
        assert head.center_rows.tolist() == PRESENT.sum(0).tolist()
        more = {name: x + 1 for name, x in features.items()}
        head.loss(more, PRESENT, HARD)
        torch.testing.assert_close(head.center, 0.5 + torch.cat(means))
        before = head.center.clone()
        head.eval()
        with torch.no_grad():
            head.loss(more, PRESENT, HARD)
            head.train()(more, PRESENT, HARD)  # Only `loss` learns it.
        assert torch.equal(head.center, before)


def test_the_center_forgets_what_is_long_ago():
    head, present = build(), torch.ones(30_000, 2, dtype=torch.bool)
    for value in (0.0, 1.0):
        rows = {name: torch.full((30_000, d), value) for name, d in WIDTHS.items()}
        head.loss(rows, present, torch.zeros(30_000, dtype=torch.int64), prototype_weight=0)
    torch.testing.assert_close(head.center, torch.ones_like(head.center))


@BOTH_ROADS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_missing_or_has_overflowed_does_not_reach_the_center(value, road):
    head, features = build(), batch()
    clean = {name: torch.where(PRESENT[:, m, None], x, 0) for m, (name, x) in enumerate(features.items())}
    bad = {name: torch.where(PRESENT[:, m, None], x, value) for m, (name, x) in enumerate(features.items())}
    other = build()
    with road():
        expected, loss = head.loss(clean, PRESENT, HARD), other.loss(bad, PRESENT, HARD)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in other.parameters())
    assert torch.equal(other.center, head.center)
    kept = PRESENT[:, 0].clone()
    kept[0] = False
    third, features = build(), batch()
    features["image"][0, 2] = value
    if road is nullcontext:  # There values are read, and it is an error.
        with pytest.raises(ValueError, match="finite features of 'image', but row 0 has others"):
            third.loss(features, PRESENT, HARD)
        assert not third.center.any()
        return
    with road():
        third.loss(features, PRESENT, HARD)
    assert third.center_rows.tolist() == [kept.sum(), PRESENT[:, 1].sum()]
    torch.testing.assert_close(third.center[:5], features["image"][kept].mean(0))


def test_rows_whose_sum_has_overflowed_count():
    head, features = build(), {name: x.half() for name, x in batch().items()}
    features["image"][:, 1:] = 6e4
    head.loss(features, PRESENT, HARD)
    assert head.center_rows.tolist() == PRESENT.sum(0).tolist()
    torch.testing.assert_close(head.center[1:5], torch.full((4,), 6e4).half().double())


def test_nothing_there_leaves_the_center_alone():
    head, features = build(), batch()
    head.loss(features, PRESENT, HARD)
    before = {name: x.clone() for name, x in head.named_buffers() if name.startswith("center")}
    head.loss({name: x + 9 for name, x in features.items()}, torch.zeros_like(PRESENT), HARD)
    head.loss(batch(0), PRESENT[:0], HARD[:0])
    for name, x in before.items():
        assert torch.equal(getattr(head, name), x)


def test_the_center_is_subtracted():
    head, features = build(cases="shared"), batch()
    head.loss(features, PRESENT, HARD)
    for name, center in zip(WIDTHS, head.center.split(list(WIDTHS.values())), strict=True):
        alone = head.eval()({name: features[name]})
        cosine = F.normalize(features[name] - center) @ F.normalize(head.prototypes[name][0]).T
        torch.testing.assert_close(alone, 20 * cosine + head.bias)
