"""The head against the slow transcription of its formulas."""

import math
from contextlib import nullcontext
from itertools import combinations, product

import pytest
import reference
import torch
import torch.nn.functional as F
from roads import BOTH_ROADS, UNTRAINED, every_block

from protohead import DecoupledPrototypeHead
from protohead.functional import add_angular_margin, case_cosine, prototype_contrast

pytestmark = UNTRAINED
WIDTHS = {
    1: {"a": 5},
    2: {"a": 5, "b": 3},
    3: {"a": 5, "b": 3, "c": 4},
    4: dict.fromkeys("abcd", 4),
    5: dict.fromkeys("abcde", 4),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def every_case(head, rows=2):
    """A (B, M) mask with every case `rows` times and as many rows with nothing, and features for it."""
    masks = torch.tensor([[name in case for name in head.modalities] for case in reference.cases_of(head.modalities)])
    present = torch.cat([masks, torch.zeros(1, len(head.modalities), dtype=torch.bool)]).repeat(rows, 1)
    dtype = next(head.parameters()).dtype
    features = {name: torch.randn(len(present), width, dtype=dtype) for name, width in head.in_features.items()}
    return features, present


def make(modalities, dtype=torch.float64, num_classes=4, **options):
    torch.manual_seed(modalities)
    count = 2**modalities - 1
    head = DecoupledPrototypeHead(WIDTHS[modalities], num_classes, cases="all", dtype=dtype, **options)
    head.scale.copy_(torch.linspace(5, 32, count))
    head.margin.copy_(torch.linspace(0.05, 0.6, count))
    return head


@BOTH_ROADS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_logits_and_contributions(modalities, dtype, road):
    head = make(modalities, dtype)
    features, present = every_case(head)
    expected = reference.contributions(head, features, present)
    bound = TOLERANCE[dtype] * 32  # The bound holds for the cosines; the largest scale is 32.
    with road():
        assert (head.contributions(features, present) - expected).abs().max() < bound
        assert (head(features, present) - expected.sum(1)).abs().max() < bound
        assert head(features, present).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("kind", ["integer", "multi-hot", "soft"])
def test_logits_with_margins(modalities, dtype, kind):
    head = make(modalities, dtype)
    features, present = every_case(head, rows=4)
    labels = {
        "integer": torch.randint(-1, 4, (len(present),)),
        "multi-hot": torch.randint(0, 2, (len(present), 4)).to(dtype),
        "soft": torch.rand(len(present), 4, dtype=dtype),
    }[kind]
    labels = torch.where(labels < 0, -100, labels)
    expected = reference.contributions(head, features, present, labels=labels)
    for training in (True, False):  # Margins depend on the labels alone.
        assert (head.train(training)(features, present, labels) - expected).abs().max() < TOLERANCE[dtype] * 32


def test_margin_past_the_turning_point():
    z = torch.tensor([[-1.0, -0.99, -0.5, 0.0, 0.9, 1.0]], dtype=torch.float64)
    for margin in (0.0, 0.3, 3.0):
        moved = add_angular_margin(z, torch.ones_like(z), torch.tensor([margin], dtype=torch.float64))
        expected = [reference.phi(value, margin) for value in z[0].tolist()]
        torch.testing.assert_close(moved[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


def test_margin_zero_is_plain_cosine_softmax():
    head = make(2, margin=0.0)
    head.margin.zero_()
    features, present = every_case(head)
    labels = torch.arange(len(present)) % 4
    torch.testing.assert_close(head(features, present, labels), head(features, present), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("modalities", "shared_space", "temperature"),
    [*product((1, 2, 3), (False,), (1.0, 0.07, 0.01)), *product((2,), (True,), (1.0, 0.07, 0.01)), (4, True, 0.07)],
)
def test_prototype_loss(modalities, shared_space, temperature, dtype):
    torch.manual_seed(0)
    widths = dict.fromkeys(WIDTHS[modalities], 4) if shared_space else WIDTHS[modalities]
    head = DecoupledPrototypeHead(widths, 3, cases="all", dtype=dtype, shared_space=shared_space)
    groups = [head.cases, head.cases[:1], head.cases[-1:], head.cases[: len(head.cases) // 2 + 1], head.cases[1::2]]
    for seen in groups:
        head.seen.copy_(torch.tensor([[case in seen] for case in head.cases]))
        taking_part = seen or head.cases
        expected = reference.prototype_loss(head, taking_part, temperature)
        bound = {"rel": 1e-5 if dtype == torch.float32 else 1e-12, "abs": 1e-6}
        with every_block():
            assert head.prototype_loss(temperature=temperature).item() == pytest.approx(expected, **bound)
        got = head.prototype_loss(temperature=temperature)
        assert got.dtype == dtype
        assert got.item() == pytest.approx(expected, **bound)
        head.zero_grad()
        got.backward()
        for name, prototype in head.prototypes.items():
            assert prototype.grad.isfinite().all()
            held = [case for case in head.cases if name in case.split("+")]
            for case, grad in zip(held, prototype.grad, strict=True):
                assert case in taking_part or not grad.any()  # An unseen block is neither anchor nor contrast.


def test_prototype_loss_before_any_case_was_seen():
    head = make(2)
    assert head.seen_cases == ()
    assert head.prototype_loss().item() == pytest.approx(reference.prototype_loss(head, head.cases, 1.0), rel=1e-12)


def test_prototype_loss_of_one_class():
    head = DecoupledPrototypeHead({"image": 4, "text": 4}, 1, cases="all", shared_space=True, dtype=torch.float64)
    assert head.prototype_loss().item() == pytest.approx(reference.prototype_loss(head, head.cases, 1.0), rel=1e-12)


def test_prototype_loss_by_hand():
    # Two blocks of two orthogonal classes: each anchor has one positive at 1 and two contrasts at 0 and 0.
    blocks, seen = torch.eye(2, dtype=torch.float64).expand(2, 2, 2), torch.tensor([True, True])
    assert prototype_contrast([blocks], [seen]).item() == pytest.approx(math.log(math.e + 2) - 1)


@pytest.mark.parametrize("shared_space", [False, True])
def test_gradients(shared_space):
    head = DecoupledPrototypeHead({"a": 3, "b": 3}, 3, cases="all", dtype=torch.float64, shared_space=shared_space)
    features, present = every_case(head, rows=1)
    labels = torch.arange(len(present)) % 3
    inputs = [x.requires_grad_() for x in features.values()] + list(head.prototypes.values())

    def loss(a, b, *_):
        logits = head({"a": a, "b": b}, present, labels)
        return F.cross_entropy(logits, labels) + 0.9 * head.prototype_loss(0.1)

    assert torch.autograd.gradcheck(loss, inputs)


@BOTH_ROADS
@pytest.mark.parametrize("cases", ["shared", "all"])
@pytest.mark.parametrize("labels", ["none", "one", "soft"])
def test_gradients_of_all_that_is_learned(labels, cases, road):
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"a": 3, "b": 2}, 3, cases=cases, dtype=torch.float64)
    features, present = every_case(head, rows=2)
    with torch.no_grad():
        head.bias.copy_(torch.randn(3))
        head.center.copy_(torch.randn(5))
    y = {"none": None, "one": torch.arange(len(present)) % 4 - 1, "soft": torch.rand(len(present), 3).double()}[labels]
    if labels == "one":
        y[y == -1] = -100
    inputs = [x.requires_grad_() for x in features.values()] + list(head.parameters())

    def logits(a, b, *_):
        return head({"a": a, "b": b}, present, y)

    with road():
        assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(logits, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # Of torch's vmap.
def test_prototype_loss_under_function_transforms():
    prototypes, seen = torch.randn(5, 2, 3, 4, dtype=torch.float64), [torch.ones(2, dtype=torch.bool)]
    expected = torch.stack([torch.func.grad(lambda p: prototype_contrast([p], seen))(p) for p in prototypes])
    got = torch.func.vmap(torch.func.grad(lambda p: prototype_contrast([p], seen)))(prototypes)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradgradcheck(lambda p: prototype_contrast([p], seen), prototypes[0].requires_grad_())


@pytest.mark.parametrize("parameters", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
def test_mixed_dtypes_are_computed_in_the_widest(parameters, given):
    head = make(2, parameters, shared_space=False)
    features, present = every_case(head)
    features = {"a": features["a"].to(given), "b": features["b"]}
    labels = torch.rand(len(present), 4).to(given)
    expected = reference.contributions(head, features, present, labels=labels)
    wide = torch.float64 if torch.float64 in (parameters, given) else torch.float32
    logits = head(features, present, labels)
    assert logits.dtype == wide
    assert (logits - expected).abs().max() < TOLERANCE[wide] * 32
    assert head.contributions({"b": features["b"]}).dtype == (wide if parameters == wide else torch.float32)


@pytest.mark.parametrize("cases", ["shared", "all", "some"])
@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_both_roads_agree(modalities, cases):
    """One formula, and one gradient, whatever the batch: mixed, of one case, with NaN where nothing is."""
    head = make(modalities)
    if cases != "all":
        names = list(head.cases)
        some = names[::2] if modalities > 1 else names
        head = DecoupledPrototypeHead(head.in_features, 4, cases="shared" if cases == "shared" else some).double()
    with torch.no_grad():
        head.center.normal_(), head.bias.normal_()
    features, present = every_case(head, rows=3)
    for m, x in enumerate(features.values()):
        x[~present[:, m]] = math.nan
    hard = torch.arange(len(present)) % 4
    hard[1] = -100
    soft = torch.rand(len(present), 4, dtype=torch.float64)
    every, kinds = torch.arange(len(present)), len(present) // 3
    some_rows = [every, every[:1].repeat(9), every[:2], every[kinds - 2 : kinds], every[:0], every[kinds - 1 : kinds]]
    head({name: x[:2] for name, x in features.items()}, present[:2])  # In eval most rows fall back.
    marks = head.seen.clone()
    for rows, training, labels in product(some_rows, (True, False), (None, hard, soft)):
        head.train(training)
        results = []
        for road in (nullcontext, every_block):
            leaves = {name: x[rows].requires_grad_() for name, x in features.items()}
            head.zero_grad()
            head.seen.copy_(marks)
            with road():
                logits = head(leaves, present[rows], None if labels is None else labels[rows])
            logits.backward(torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits))
            parameters = [p.grad for p in head.parameters()]
            results.append([logits.detach(), head.seen.clone(), *parameters, *[x.grad for x in leaves.values()]])
        for a, b in zip(*results, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * head.scale.max().item())


def test_many_modalities_with_few_cases():
    names = [f"m{m}" for m in range(10)]
    cases = ["+".join(names), "m0+m1", *names]
    torch.manual_seed(0)
    head = DecoupledPrototypeHead(dict.fromkeys(names, 4), 3, cases=cases, dtype=torch.float64)
    present, x = torch.rand(40, 10) < 0.3, torch.randn(40, 40, dtype=torch.float64)
    features = dict(zip(names, x.split(4, 1), strict=True))
    expected = reference.contributions(head, features, present).sum(1)
    for road in (nullcontext, every_block):
        with road():
            torch.testing.assert_close(head(x, present), expected)


@pytest.mark.parametrize("size", [1e-38, 1e-23, 1e-22, 1e19, 1e30])
@BOTH_ROADS
def test_size_of_features_does_not_matter(size, road):
    """Where float32 cannot hold their squares."""
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"a": 5, "b": 3}, 4, cases="all", centered=False)
    present = head._masks[[0, 1, 2] * 3] > 0
    x = (torch.randn(9, 8) * size).requires_grad_()
    labels = torch.arange(9) % 4
    with road():
        logits = head(x, present, labels)
        expected = head(x.detach().double() / size, present, labels)
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
        (0.01 * F.cross_entropy(logits, labels)).backward()  # Of 1e-38, the gradient itself nears float32's limits.
    assert x.grad.isfinite().all()
    assert (x.grad != 0).any(1).all() or size > 1e18
    assert all(p.grad.isfinite().all() for p in head.parameters())


@BOTH_ROADS
def test_gradients_of_features_whose_squares_overflow(road):
    head = DecoupledPrototypeHead({"a": 5}, 4, centered=False)
    torch.nn.init.normal_(head.prototypes["a"])
    x, grads = torch.randn(3, 5), []
    for size in (1.0, 1e25, 1e-25):
        leaf = (x * size).requires_grad_()
        with road():
            head(leaf, torch.ones(3, 1, dtype=torch.bool)).square().sum().backward()
        grads.append(leaf.grad * size)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-4, atol=1e-3)


@BOTH_ROADS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_a_center_leaves_of_a_constant_is_nothing(dtype, road):
    """Noise of rounding, once normalised, would be a feature as long as any other."""
    torch.manual_seed(0)
    x = torch.randn(300).mul(30).to(dtype).repeat(8, 1)
    wide = x.float() if dtype == torch.float16 else x
    noisy = wide * (1 + 4 * torch.finfo(wide.dtype).eps * torch.randn(wide.shape, dtype=wide.dtype))
    prototypes, block = torch.randn(1, 4, 300, dtype=wide.dtype), torch.zeros(8, dtype=torch.int64)
    with road():
        assert not case_cosine(noisy, prototypes, block, wide[0]).any()
        more = noisy.clone()
        more[:, 0] += 0.1
        assert case_cosine(more, prototypes, block, wide[0]).any(1).all()


def published_head(head, features, missing_type, labels, y):
    """The two-modality head as the papers write it: gather each row's weights, normalise, multiply, add the margins."""
    image, text = head.prototypes["image"], head.prototypes["text"]
    logits = []
    for i, kind in enumerate(missing_type):
        z_image = F.normalize(features["image"][i], dim=0) @ F.normalize(image[0 if kind == 0 else 1], dim=1).T
        z_text = F.normalize(features["text"][i], dim=0) @ F.normalize(text[0 if kind == 0 else 1], dim=1).T
        z = [(z_image + z_text) / 2, z_image, z_text][kind]
        m, s = head.margin[kind].item(), head.scale[kind].item()
        turned = torch.where(
            z > math.cos(math.pi - m), z * math.cos(m) - (1 - z**2).sqrt() * math.sin(m), z - m * math.sin(math.pi - m)
        )
        logits.append(s * (y[i] * turned + (1 - y[i]) * z))
    views = F.normalize(torch.cat([image, text]), dim=2)
    flat, count = views.flatten(0, 1), len(views) * head.num_classes
    logit = flat @ flat.T
    logit = logit - logit.max(1, keepdim=True).values.detach()
    off = 1 - torch.eye(count, dtype=logit.dtype)
    positive = torch.eye(head.num_classes, dtype=logit.dtype).repeat(len(views), len(views)) * off
    log_prob = logit - (off * logit.exp()).sum(1, keepdim=True).log()
    contrast = -((positive * log_prob).sum(1) / positive.sum(1)).mean()
    return F.cross_entropy(torch.stack(logits), labels), contrast


def test_two_modalities_in_a_shared_space_are_the_published_head():
    torch.manual_seed(3)
    options = {"cases": "all", "scale": 32, "centered": False, "shared_space": True}
    head = DecoupledPrototypeHead({"image": 6, "text": 6}, 5, dtype=torch.float64, **options)
    missing_type = [0, 1, 2, 2, 1, 0, 0]
    present = torch.tensor([[kind != 2, kind != 1] for kind in missing_type])
    labels = torch.randint(0, 5, (7,))
    leaves = [torch.randn(7, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    features = dict(zip(head.modalities, leaves, strict=True))
    ours = F.cross_entropy(head(features, present, labels), labels), head.prototype_loss()
    theirs = published_head(head, features, missing_type, labels, F.one_hot(labels, 5).double())
    everything = [*leaves, *head.prototypes.values()]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(sum(ours), everything), torch.autograd.grad(sum(theirs), everything)
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def contrast_inputs(blocks=3, classes=5):
    torch.manual_seed(0)
    prototypes = [torch.randn(blocks, classes, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    seen = [torch.tensor([True, True, False][:blocks]), torch.tensor([True, False, True][:blocks])]
    return prototypes, seen


@BOTH_ROADS
@pytest.mark.parametrize("shared_space", [False, True])
def test_prototype_loss_in_chunks(monkeypatch, shared_space, road):
    prototypes, seen = contrast_inputs()
    expected = prototype_contrast(prototypes, seen, shared_space, 0.5)
    gradients = torch.autograd.grad(expected, prototypes)
    monkeypatch.setattr("protohead.functional.CHUNK", 60)  # 2 to 6 anchors of 10 to 30 at a time.
    held = []
    inner = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, dim: held.append(x.numel()) or inner(x, dim))
    with road():
        loss = prototype_contrast(prototypes, seen, shared_space, 0.5)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(loss, prototypes), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert len(held) >= 6
    assert max(held) <= 60


@pytest.mark.parametrize("sample", [None, 2])
@pytest.mark.parametrize("shared_space", [False, True])
def test_prototype_loss_counts_the_same_anchors_on_both_roads(shared_space, sample):
    """Blocks that are not seen, blocks without a positive, and a prototype of zeros."""
    prototypes, seen = contrast_inputs()
    with torch.no_grad():
        prototypes[0][0, 1] = 0
    for patterns in (
        seen,
        [torch.tensor([True, True, True]), torch.tensor([False, True, False])],
        [seen[0] & False] * 2,
    ):
        results = []
        for road in (nullcontext, every_block):
            torch.manual_seed(1)
            with road():
                loss = prototype_contrast(prototypes, patterns, shared_space, 0.5, sample)
            results.append([loss, *torch.autograd.grad(loss, prototypes)])
        for a, b in zip(*results, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@BOTH_ROADS
def test_prototype_loss_with_prototypes_of_zeros(road):
    head = DecoupledPrototypeHead({"a": 4, "b": 4}, 3, cases="all", dtype=torch.float64, shared_space=True)
    with torch.no_grad():
        head.prototypes["a"][1, 0] = 0
        head.prototypes["b"][:, 2] = 0
    with road():
        got = head.prototype_loss(0.5)
    assert got.item() == pytest.approx(reference.prototype_loss(head, head.cases, 0.5), rel=1e-12)


@pytest.mark.parametrize("shared_space", [False, True])
def test_prototype_loss_of_a_sample_is_unbiased(monkeypatch, shared_space):
    prototypes, seen = contrast_inputs()
    expected = prototype_contrast(prototypes, seen, shared_space)
    losses = []
    for drawn in combinations(range(5), 2):
        monkeypatch.setattr(torch, "randperm", lambda n, device, first=drawn: torch.tensor([*first, 0, 0, 0]))
        losses.append(prototype_contrast(prototypes, seen, shared_space, sample=2))
    assert len({loss.item() for loss in losses}) == 10
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=0, atol=1e-12)
    assert torch.equal(prototype_contrast(prototypes, seen, shared_space, sample=5), expected)


@BOTH_ROADS
def test_gradients_by_torch_func(road):
    head = make(2)
    features, present = every_case(head, rows=1)
    labels = torch.arange(len(present)) % 4

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(head, parameters, (features, present, labels)), labels)

    parameters = dict(head.named_parameters())
    with road():
        expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    got = torch.func.grad(loss)(parameters)
    for grad, name in zip(expected, parameters, strict=True):
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_of_each_sample(training, soft):
    head = make(2)
    features, present = every_case(head, rows=2)
    head({name: x[:2] for name, x in features.items()}, present[:2])  # In eval the others fall back.
    marks = head.train(training).seen.clone()
    labels = torch.rand(len(present), 4).double() if soft else torch.arange(len(present)) % 4
    parameters = dict(head.named_parameters())

    def loss(parameters, row, here, label):
        row = {name: x[None] for name, x in row.items()}
        return F.cross_entropy(
            torch.func.functional_call(head, parameters, (row, here[None], label[None])), label[None]
        )

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, features, present, labels)
    assert torch.equal(head.seen, marks)
    for i in range(len(present)):
        one = loss(parameters, {name: x[i] for name, x in features.items()}, present[i], labels[i])
        expected = torch.autograd.grad(one, list(parameters.values()))
        head.seen.copy_(marks)
        for grad, name in zip(expected, parameters, strict=True):
            torch.testing.assert_close(got[name][i], grad, rtol=0, atol=1e-12)
