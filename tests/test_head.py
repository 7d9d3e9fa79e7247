"""What holds for every head: invariants, edge cases, fall-back, imprinting."""

import pytest
import reference
import torch
import torch.nn.functional as F
from roads import BOTH_ROADS, UNTRAINED
from test_formula import every_case, make

from protohead import DecoupledPrototypeHead

pytestmark = UNTRAINED


def gradients(head, features, present, labels, autocast=None):
    """Logits, and the gradients of a loss on them with respect to features and prototypes."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in features.items()}
    head.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = head(leaves, present, labels)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    return logits.detach(), {name: x.grad for name, x in leaves.items()}, [p.grad for p in head.parameters()]


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_batch_permutation(modalities):
    head = make(modalities)
    features, present = every_case(head)
    order = torch.randperm(len(present))
    shuffled = {name: x[order] for name, x in features.items()}
    torch.testing.assert_close(head(shuffled, present[order]), head(features, present)[order], rtol=0, atol=1e-14)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_feature_scaling_changes_nothing(factor):
    head = make(3)
    features, present = every_case(head)
    scaled = {name: x * factor for name, x in features.items()}
    torch.testing.assert_close(head(scaled, present), head(features, present), rtol=0, atol=1e-12)


@pytest.mark.parametrize("garbage", [0.0, 7.0, 1e38, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("modalities", [2, 3])
def test_what_stands_in_missing_rows_changes_neither_logits_nor_gradients(modalities, garbage):
    head = make(modalities, torch.float32)
    features, present = every_case(head)
    labels = torch.arange(len(present)) % 4
    spoilt = {name: torch.where(present[:, m, None], features[name], garbage) for m, name in enumerate(head.modalities)}
    logits, by_feature, by_prototype = gradients(head, features, present, labels)
    other, by_other_feature, by_other_prototype = gradients(head, spoilt, present, labels)
    assert torch.equal(logits, other)
    for m, name in enumerate(head.modalities):
        assert torch.equal(by_feature[name], by_other_feature[name])
        assert not by_other_feature[name][~present[:, m]].any()
    assert all(torch.equal(a, b) for a, b in zip(by_prototype, by_other_prototype, strict=True))


def test_contributions_sum_to_the_logits_in_both_modes():
    head = make(3)
    features, present = every_case(head)
    head(features, present[[0, 2]].repeat(8, 1))  # Leaves cases unseen, so that eval falls back.
    for training in (False, True):
        head.train(training)
        parts = head.contributions(features, present)
        assert parts.shape == (len(present), 3, 4)
        torch.testing.assert_close(parts.sum(1), head(features, present), rtol=0, atol=1e-13)
        assert not parts[~present].any()


def test_nothing_present_is_uniform_and_without_gradient():
    head = make(2)
    features, _ = every_case(head, rows=1)
    nothing = torch.zeros(4, 2, dtype=torch.bool)
    labels = torch.tensor([0, 1, 2, -100])
    logits, by_feature, by_prototype = gradients(head, features, nothing, labels)
    assert torch.equal(logits, torch.zeros(4, 4, dtype=torch.float64))
    assert not any(grad.any() for grad in [*by_feature.values(), *by_prototype])
    assert head.seen_cases == ()


def test_features_without_a_positive_entry_are_present():
    head = make(2)
    x = -torch.rand(4, 8, dtype=torch.float64) - 0.1
    assert torch.equal(head(x), head(x, torch.ones(4, 2, dtype=torch.bool)))


def test_present_none_is_the_zero_padding_convention():
    head = make(3)
    features, present = every_case(head)
    padded = {name: torch.where(present[:, m, None], features[name], 0) for m, name in enumerate(features)}
    assert torch.equal(head(padded), head(features, present))
    assert torch.equal(head(torch.cat(list(padded.values()), dim=1)), head(features, present))
    # A row that is all zeros and said to be present is present: its cosines are zero.
    zeros = torch.zeros_like(features["b"])
    everything = torch.ones_like(present)
    features["b"] = zeros
    halves = head.contributions(features, everything)
    assert not halves[:, 1].any()
    without = torch.tensor([True, False, True]).expand_as(present)
    assert not torch.allclose(head(features, everything), head(features, without))


def test_absent_modality_is_missing_for_the_whole_batch_and_stays_in_the_graph():
    head = make(2)
    features, _ = every_case(head)
    present = torch.tensor([[True, False]]).repeat(8, 1)
    expected = head(features, present)
    for given in ({"a": features["a"]}, {"a": features["a"], "b": None}):
        assert torch.equal(head(given), expected)
        assert torch.equal(head(given, present), expected)
    head(given).sum().backward()
    assert torch.equal(head.prototypes["b"].grad, torch.zeros_like(head.prototypes["b"]))
    assert torch.equal(head({}, torch.zeros(3, 2, dtype=torch.bool)), torch.zeros(3, 4))


def test_drops_in_where_a_linear_layer_stood():
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), DecoupledPrototypeHead({"image": 5, "text": 3}, 7))
    assert model(torch.randn(4, 3)).shape == (4, 7)


def test_ignored_labels_have_no_margin_and_no_gradient():
    head = make(2)
    features, present = every_case(head)
    labels = torch.full((8,), -100)
    assert torch.equal(head(features, present, labels), head(features, present))
    labels[3] = 1
    _, by_feature, _ = gradients(head, features, present, labels)
    assert not by_feature["a"][torch.arange(8) != 3].any()


@pytest.mark.parametrize("kind", ["integer", "multi-hot"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finite_at_the_ends_of_the_cosine(dtype, autocast, sign, kind):
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"image": 64, "text": 64}, 3, cases="all", shared_space=True, dtype=dtype)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    present = torch.tensor([[True, True], [True, False], [False, True]]).repeat_interleave(3, 0)
    rows = {
        name: sign * 3 * torch.cat([p[0, labels[:3]], p[1 if name == "image" else 0, labels[3:6]], p[1, labels[6:]]])
        for name, p in head.prototypes.items()
    }
    rows = {name: x.detach().requires_grad_() for name, x in rows.items()}
    with torch.no_grad():
        head.prototypes["text"][0].copy_(head.prototypes["image"][0])  # |cos| = 1 between prototypes, too.
    targets = labels if kind == "integer" else F.one_hot(labels, 3).to(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = head(rows, present, targets)
        loss = F.cross_entropy(logits, targets.to(logits.dtype) if kind == "multi-hot" else targets)
        loss = loss + head.prototype_loss(0.01)
    loss.backward()
    assert loss.isfinite()
    for tensor in [*rows.values(), *head.parameters()]:
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_precision_alone(dtype):
    head = make(2, torch.float32)
    features, present = every_case(head)
    labels = torch.arange(8) % 4
    expected, by_feature, by_prototype = gradients(head, features, present, labels)
    logits, by_feature_2, by_prototype_2 = gradients(head, features, present, labels, autocast=dtype)
    with torch.autocast("cpu", dtype):
        assert head.contributions(features, present).dtype == torch.float32
        loss = head.prototype_loss()
    assert logits.dtype == loss.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert torch.equal(loss, head.prototype_loss())
    assert all(torch.equal(by_feature[name], by_feature_2[name]) for name in by_feature)
    assert all(torch.equal(a, b) for a, b in zip(by_prototype, by_prototype_2, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_and_parameters(dtype):
    head = make(2, torch.float32)
    features, present = every_case(head)
    rounded = {name: x.to(dtype) for name, x in features.items()}
    assert torch.equal(head(rounded, present), head({name: x.float() for name, x in rounded.items()}, present))
    logits = head.to(dtype)(rounded, present)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head.float()(rounded, present), rtol=0, atol=1e-5)


def test_zero_rows_and_zero_prototypes_have_finite_gradients():
    for dtype in (torch.float16, torch.float32, torch.float64):
        head = DecoupledPrototypeHead({"image": 8, "text": 8}, 3, cases="all", dtype=dtype)
        with torch.no_grad():
            head.prototypes["image"][:, 0] = 0
        x = torch.zeros(4, 16, dtype=dtype, requires_grad=True)
        labels = torch.tensor([0, 1, 2, 0])
        logits = head(x, torch.ones(4, 2, dtype=torch.bool), labels)
        (F.cross_entropy(logits, labels) + head.prototype_loss()).backward()
        assert not head(x, torch.ones(4, 2, dtype=torch.bool)).any()
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() < 100
        assert all(p.grad.isfinite().all() for p in head.parameters())


def test_empty_batch():
    head = make(2)
    for features in (torch.zeros(0, 8), {"a": torch.zeros(0, 5), "b": torch.zeros(0, 3)}, {"a": torch.zeros(0, 5)}):
        logits = head(features, None, torch.zeros(0, dtype=torch.long))
        assert logits.shape == (0, 4)
        logits.sum().backward()
    assert head.contributions(features).shape == (0, 2, 4)
    assert head.seen_cases == ()


def test_training_marks_the_cases_of_the_batch_as_seen_and_eval_does_not():
    head = make(2)
    features, present = every_case(head, rows=1)
    head.eval()(features, present)
    assert head.seen_cases == ()
    head.train()(features, present[[0, 2, 3, 3]])
    assert head.seen_cases == ("a+b", "b")
    head(features, present[[1]].repeat(4, 1))
    assert head.seen_cases == ("a+b", "a", "b")
    head.reset_parameters()
    assert head.seen_cases == ()


def test_eval_falls_back_to_the_nearest_seen_case():
    """Every subset of seen cases, every row, three modalities, against the transcription."""
    head = make(3).eval()
    features, present = every_case(head, rows=1)
    cases = reference.cases_of(head.modalities)
    for pattern in range(1, 2 ** len(cases)):
        seen = [case for c, case in enumerate(cases) if pattern >> c & 1]
        head.seen.copy_(torch.tensor([[case in seen] for case in cases]))
        if pattern % 9:  # A ninth of the 127 subsets is compared in full.
            continue
        expected = reference.contributions(head, features, present, seen=seen)
        assert (head.contributions(features, present) - expected).abs().max() < 1e-12


def test_eval_with_nothing_in_common_is_uniform():
    head = make(2)
    features, _ = every_case(head)
    head(features, torch.tensor([[False, True]]).repeat(8, 1))
    logits = head.eval()(features, torch.tensor([[True, False]]).repeat(8, 1))
    assert not logits.any()


def test_declared_cases_fall_back_in_training_too():
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"a": 5, "b": 3, "c": 4}, 4, cases=["c", "a+b+c", "a+b"], dtype=torch.float64)
    assert head.cases == ("a+b+c", "a+b", "c")
    assert {name: len(p) for name, p in head.prototypes.items()} == {"a": 2, "b": 2, "c": 2}
    features, present = every_case(head, rows=1)
    expected = reference.contributions(head, features, present)
    for training in (True, False):
        assert (head.train(training).contributions(features, present) - expected).abs().max() < 1e-12
    # In the order of all cases, then nothing: abc, ab, ac, bc, a, b, c.
    assert head.case_index(present).tolist() == [0, 1, 0, 0, 1, 1, 2, 3]
    head.train()(features, present[4:5].repeat(8, 1))
    assert head.seen_cases == ("a+b",)


@BOTH_ROADS
@pytest.mark.parametrize("cases", ["all", "shared", ["a+b", "b"]])
def test_a_modality_that_was_never_trained_says_nothing(cases, road):
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"a": 5, "b": 3}, 4, cases=cases, dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    only_a = torch.tensor([[True, False]] * 3)
    with road():
        head(x, only_a)
        assert head.seen_cases == ("a" if cases == "all" else "a+b",)
        head.eval()
        torch.testing.assert_close(head(x, torch.ones(3, 2, dtype=torch.bool)), head(x, only_a))
        torch.testing.assert_close(head.contributions(x).sum(2)[:, 1], torch.zeros(3, dtype=torch.float64))
        assert not head(x, ~only_a).any()
        head.prototype_loss().backward()
        assert not head.prototypes["b"].grad.any()
        head.train()(x, ~only_a)
        assert head.eval()(x, ~only_a).any(1).all()


def test_imprint_of_one_modality():
    head = DecoupledPrototypeHead({"a": 5, "b": 3}, 4)
    with pytest.warns(UserWarning, match="has 'a'"):
        head.imprint({"b": torch.randn(4, 3)}, torch.arange(4))
    x, there = torch.randn(3, 8), torch.ones(3, 2, dtype=torch.bool)
    there[1, 1] = False
    assert head.seen_cases == ("a+b",)
    expected = 20 * F.cosine_similarity(x[:, None, 5:], head.prototypes["b"], dim=2)
    expected[1] = 0
    torch.testing.assert_close(head.eval()(x, there), expected)


def test_case_index():
    head = make(2)
    present = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    assert head.case_index(present).tolist() == [0, 1, 2, 3]
    head.seen[0] = True
    assert head.eval().case_index(present).tolist() == [0, 1, 2, 3]


def test_imprint_is_the_class_means():
    head = make(2)
    features, present = every_case(head, rows=6)
    present[:4] = True  # Every class has both modalities.
    labels = torch.arange(len(present)) % 4
    labels[-1] = -100
    head.imprint(features, labels, present, shrinkage=1)
    for m, name in enumerate(head.modalities):
        for k in range(4):
            rows = features[name][(labels == k) & present[:, m]]
            mean = F.normalize(F.normalize(rows, dim=1).mean(0), dim=0)
            for block in head.prototypes[name]:
                torch.testing.assert_close(block[k], mean)
    assert head.seen_cases == head.cases
    one_hot = F.one_hot(labels.clamp(min=0), 4).double() * (labels >= 0)[:, None]
    before = [p.clone() for p in head.parameters()]
    head.reset_parameters()
    head.imprint(features, one_hot, present, shrinkage=1)
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_imprint_is_computed_in_full_precision_and_adds_to_what_was_seen(dtype):
    head = make(2, torch.float32)
    x = torch.randn(200, 5).to(dtype)
    labels = torch.arange(200) % 4
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="'b'"):
        head.imprint({"a": x}, labels, shrinkage=1)
    for k in range(4):
        mean = F.normalize(F.normalize(x[labels == k].double(), dim=1).mean(0), dim=0)
        assert (head.prototypes["a"][:, k] - mean).abs().max() < 1e-6
    with pytest.warns(UserWarning, match="'a'"):
        head.imprint({"b": torch.randn(4, 3)}, torch.arange(4))
    assert head.seen_cases == ("a+b", "a", "b")


def test_imprint_leaves_a_class_whose_rows_cancel():
    head = make(1)
    before = head.prototypes["a"].clone()
    x = torch.randn(1, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"classes \[0, 2, 3\]"):
        head.imprint(torch.cat([x, -x, x]), torch.tensor([0, 0, 1]))
    assert torch.equal(head.prototypes["a"][:, [0, 2, 3]], before[:, [0, 2, 3]])


def test_imprint_classifies_without_training():
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"image": 16, "text": 8}, 5)
    centres = {"image": torch.randn(5, 16), "text": torch.randn(5, 8)}
    labels = torch.arange(100) % 5
    features = {name: c[labels] + 0.1 * torch.randn(100, c.shape[1]) for name, c in centres.items()}
    present = torch.tensor([[True, True], [True, False], [False, True]])[torch.randint(0, 3, (100,))]
    head.imprint(features, labels, present)
    assert (head.eval()(features, present).argmax(1) == labels).all()


def test_imprint_says_which_classes_it_has_no_rows_for():
    head = make(2)
    before = {name: p.clone() for name, p in head.prototypes.items()}
    x = torch.randn(2, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="No row of classes") as caught:
        head.imprint({"a": x}, torch.tensor([0, 2]))
    texts = [str(w.message) for w in caught]
    assert "classes [1, 3] has 'a'" in texts[0]
    assert "classes [0, 1, 2, 3] has 'b'" in texts[1]
    assert torch.equal(head.prototypes["a"][:, [1, 3]], before["a"][:, [1, 3]])
    assert torch.equal(head.prototypes["b"], before["b"])
    assert head.seen_cases == ("a+b", "a")


def test_initialisation_is_xavier_normal_per_block():
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"image": 300, "text": 100}, 50, cases="all")
    for name, width in head.in_features.items():
        for block in head.prototypes[name]:
            assert block.std().item() == pytest.approx((2 / (50 + width)) ** 0.5, rel=0.03)


def test_defaults():
    widths = {"image": 4, "text": 4}
    head = DecoupledPrototypeHead(widths, 3)
    assert head.cases == ("image+text",)
    assert (head.scale.tolist(), head.margin.tolist(), head.centered) == ([20.0], [0.10], True)
    paper = DecoupledPrototypeHead(widths, 3, cases="all", scale=32, centered=False)
    assert paper.scale.tolist() == [32.0, 32.0, 32.0]
    assert paper.margin.tolist() == [0.10, 0.15, 0.15]
    margin = {"text": 0.2, "image": 0.3, "image+text": 0.1}
    assert DecoupledPrototypeHead(widths, 3, cases="all", margin=margin).margin.tolist() == [0.1, 0.3, 0.2]


def test_prototypes_made_in_inference_mode():
    x = torch.randn(5, 14)
    with torch.inference_mode():
        head = DecoupledPrototypeHead({"image": 8, "text": 6}, 3).eval()
        before = head(x)
        head.prototypes["text"].mul_(torch.linspace(0.1, 3, 6))
        after = head(x)
    assert not torch.equal(before, after)
    twin = DecoupledPrototypeHead({"image": 8, "text": 6}, 3).eval()
    twin.load_state_dict(head.state_dict())
    torch.testing.assert_close(twin(x), after)


@BOTH_ROADS
def test_marks_that_were_set_for_whole_rows_are_added_to(road):
    head = make(2)
    features, present = every_case(head, rows=1)
    head.seen[0] = True
    head.seen[1] = torch.tensor([1])
    with road():
        head(features, present[[2, 1, 0, 3]])
        head(features, present[[2, 2, 2, 3]])
    assert head.seen.tolist() == [[2, 2], [2, 1], [0, 4]]
    assert head.seen_cases == head.cases


@BOTH_ROADS
def test_rows_are_counted(road):
    head = make(3)
    features, present = every_case(head, rows=2)
    shared = DecoupledPrototypeHead(head.in_features, 4, dtype=torch.float64)
    with road():
        for _ in range(2):
            head(features, present)
        shared(features, present)
    assert torch.equal(head.seen, 4.0 * head._masks)
    assert shared.seen.tolist() == [present.sum(0).tolist()]


@BOTH_ROADS
def test_the_bias_may_change_between_forward_and_backward(road):
    head, x = make(2, torch.float32), torch.randn(4, 8)
    with road():
        logits = head(x)
        expected = torch.autograd.grad(logits.sin().sum(), list(head.parameters()), retain_graph=True)
        with torch.no_grad():
            head.bias.add_(1)
        got = torch.autograd.grad(logits.sin().sum(), list(head.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_eval_is_training_where_a_larger_case_is_half_seen():
    """Imprinting from images alone marks them in the complete case, too; training then changes the other block only."""
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"a": 4, "b": 4}, 3, cases="all", centered=False)
    x, present, labels = torch.randn(6, 8), torch.tensor([[True, False]] * 6), torch.arange(6) % 3
    with pytest.warns(UserWarning, match="has 'b'"):
        head.imprint(x, labels, present)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        head.loss(x, present, labels).backward()
        optimizer.step()
    expected = head(x, present)
    torch.testing.assert_close(head.eval()(x, present), expected)
