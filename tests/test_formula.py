"""The head against the slow transcription of its formulas."""

import math
from itertools import combinations, product

import pytest
import reference
import torch
import torch.nn.functional as F

from protohead import DecoupledPrototypeHead
from protohead.functional import add_angular_margin, prototype_contrast

WIDTHS = {1: {"a": 5}, 2: {"a": 5, "b": 3}, 3: {"a": 5, "b": 3, "c": 4}, 5: dict.fromkeys("abcde", 4)}
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
    head = DecoupledPrototypeHead(WIDTHS[modalities], num_classes, dtype=dtype, **options)
    head.scale.copy_(torch.linspace(5, 32, count))
    head.margin.copy_(torch.linspace(0.05, 0.6, count))
    return head


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_logits_and_contributions(modalities, dtype):
    head = make(modalities, dtype)
    features, present = every_case(head)
    expected = reference.contributions(head, features, present)
    bound = TOLERANCE[dtype] * 32  # The bound holds for the cosines; the largest scale is 32.
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
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.01])
@pytest.mark.parametrize(("modalities", "shared_space"), [(1, False), (2, False), (2, True), (3, False), (5, True)])
def test_prototype_loss(modalities, shared_space, temperature, dtype):
    torch.manual_seed(0)
    widths = dict.fromkeys(WIDTHS[modalities], 4) if shared_space else WIDTHS[modalities]
    head = DecoupledPrototypeHead(widths, 3, dtype=dtype, shared_space=shared_space)
    groups = [head.cases, head.cases[:1], head.cases[-1:], head.cases[: len(head.cases) // 2 + 1], head.cases[1::2]]
    for seen in groups:
        head.seen.copy_(torch.tensor([[case in seen] for case in head.cases]))
        taking_part = seen or head.cases
        expected = reference.prototype_loss(head, taking_part, temperature)
        got = head.prototype_loss(temperature=temperature)
        assert got.dtype == dtype
        assert got.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12, abs=1e-6)
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
    head = DecoupledPrototypeHead({"image": 4, "text": 4}, 1, shared_space=True, dtype=torch.float64)
    assert head.prototype_loss().item() == pytest.approx(reference.prototype_loss(head, head.cases, 1.0), rel=1e-12)


def test_prototype_loss_by_hand():
    # Two blocks of two orthogonal classes: each anchor has one positive at 1 and two contrasts at 0 and 0.
    blocks, seen = torch.eye(2, dtype=torch.float64).expand(2, 2, 2), torch.tensor([True, True])
    assert prototype_contrast([blocks], [seen]).item() == pytest.approx(math.log(math.e + 2) - 1)


@pytest.mark.parametrize("shared_space", [False, True])
def test_gradients(shared_space):
    head = DecoupledPrototypeHead({"a": 3, "b": 3}, 3, dtype=torch.float64, shared_space=shared_space)
    features, present = every_case(head, rows=1)
    labels = torch.arange(len(present)) % 3
    inputs = [x.requires_grad_() for x in features.values()] + list(head.prototypes.values())

    def loss(a, b, *_):
        logits = head({"a": a, "b": b}, present, labels)
        return F.cross_entropy(logits, labels) + 0.9 * head.prototype_loss(0.1)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("labels", ["none", "one", "soft"])
def test_gradients_of_all_that_is_learned(labels, monkeypatch):
    monkeypatch.setattr("protohead.grouped.CHUNK", 6)  # Two prototypes at a time.
    head = DecoupledPrototypeHead({"a": 3, "b": 2}, 3, dtype=torch.float64)
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

    assert torch.autograd.gradcheck(logits, inputs)
    assert torch.autograd.gradgradcheck(logits, inputs)


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


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_both_roads_agree(modalities):
    """Eager CPU groups the rows; graphs and GPUs score every block and choose. One formula, and one gradient."""
    head = make(modalities)
    features, present = every_case(head, rows=3)
    # A case with more rows than are padded, and garbage where nothing is.
    present = torch.cat([present, present[:1].expand(9, -1)])
    features = {name: torch.cat([x, torch.randn(9, x.shape[1]).to(x)]) for name, x in features.items()}
    for m, x in enumerate(features.values()):
        x[~present[:, m]] = math.nan
    head({name: x[:2] for name, x in features.items()}, present[:2])
    hard = torch.arange(len(present)) % 4
    hard[1] = -100
    soft = torch.rand(len(present), 4, dtype=torch.float64)
    for training, labels in product(
        (True, False), (None, hard, soft)
    ):  # In eval most rows fall back, to shared blocks.
        head.train(training)
        seen = head.seen.clone()
        results = []
        for road in (head._grouped, head._every_block):
            rows = [x.detach().requires_grad_() for x in features.values()]
            head.zero_grad()
            head.seen.copy_(seen)
            logits, _ = road(rows, present, labels)
            logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits))
            results.append([logits.detach(), head.seen.clone()] + [x.grad for x in [*rows, *head.prototypes.values()]])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * head.scale.max().item())
        head.seen.copy_(seen)


@pytest.mark.parametrize("more", [3, 4, 20])  # Up to four rows are padded.
@pytest.mark.parametrize("case", [0, 5, 15, 26, 27, 30])
def test_one_block_of_a_padded_modality_has_more_rows(case, more):
    head = make(5)
    features, present = every_case(head, rows=1)
    present = torch.cat([present, present[case].expand(more, -1)])
    rows = [torch.randn(len(present), x.shape[1], dtype=x.dtype) for x in features.values()]
    torch.testing.assert_close(head._grouped(rows, present, None), head._every_block(rows, present, None))


def test_second_derivatives():
    head = DecoupledPrototypeHead({"a": 3, "b": 2}, 2, dtype=torch.float64)
    features, present = every_case(head, rows=1)
    labels = torch.arange(len(present)) % 2
    inputs = [x.requires_grad_() for x in features.values()] + list(head.prototypes.values())
    assert torch.autograd.gradgradcheck(lambda a, b, *_: head({"a": a, "b": b}, present, labels), inputs)


def test_second_derivatives_after_inference():
    """What inference mode has remembered of the same rows can be used in training."""
    head = DecoupledPrototypeHead({"a": 3, "b": 2}, 2, dtype=torch.float64)
    features, present = every_case(head, rows=1)
    with torch.inference_mode():
        head(features, present)
    rows = [x.requires_grad_() for x in features.values()]
    logits = head(features, present)
    grads = torch.autograd.grad(logits.square().sum(), rows, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in grads), rows)


def test_many_modalities_with_few_cases():
    """More kinds of rows than are kept in a table."""
    names = [f"m{m}" for m in range(10)]
    cases = ["+".join(names), "m0+m1", *names]
    torch.manual_seed(0)
    head = DecoupledPrototypeHead(dict.fromkeys(names, 4), 3, cases=cases, dtype=torch.float64).eval()
    present = torch.rand(40, 10) < 0.3
    rows = [torch.randn(40, 4, dtype=torch.float64) for _ in names]
    for a in (head, head.train()):
        torch.testing.assert_close(a._grouped(rows, present, None), a._every_block(rows, present, None))


def test_plans_of_small_batches_follow_what_they_depend_on():
    head = make(2)
    features, present = every_case(head, rows=1)
    for change in (
        lambda: head.eval(),
        lambda: head.seen.copy_(torch.tensor([[True], [False], [False]])),
        lambda: head.scale.fill_(3),
        lambda: head.train(),
        lambda: head.margin.fill_(0.3),
        lambda: head.float(),
        lambda: head.double(),
    ):
        change()
        dtype = head.prototypes["a"].dtype
        labels, rows = torch.arange(len(present)) % 4, [x.to(dtype) for x in features.values()]
        seen = head.seen.clone()
        for _ in range(2):
            found = head._grouped(rows, present, labels)
            head.seen.copy_(seen)
            torch.testing.assert_close(found, head._every_block(rows, present, labels))
            head.seen.copy_(seen)


def test_no_more_plans_are_remembered_than_said(monkeypatch):
    monkeypatch.setattr("protohead.plan.PLANS", 2)
    head = make(2).eval()
    features, present = every_case(head, rows=1)
    for order in ([0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2]):
        rows = [x[order] for x in features.values()]
        found, expected = head._grouped(rows, present[order], None), head._every_block(rows, present[order], None)
        torch.testing.assert_close(found, expected)
        assert len(head._planner._known[False][4]) <= 2


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
    head = DecoupledPrototypeHead({"image": 6, "text": 6}, 5, dtype=torch.float64, shared_space=True)
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


@pytest.mark.parametrize("shared_space", [False, True])
def test_prototype_loss_in_chunks(monkeypatch, shared_space):
    prototypes, seen = contrast_inputs()
    expected = prototype_contrast(prototypes, seen, shared_space, 0.5)
    gradients = torch.autograd.grad(expected, prototypes)
    monkeypatch.setattr("protohead.functional.CHUNK", 100)  # 3 to 6 anchors of 15 or 30 at a time.
    held = []
    inner = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, dim: held.append(x.numel()) or inner(x, dim))
    loss = prototype_contrast(prototypes, seen, shared_space, 0.5)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(loss, prototypes), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert len(held) >= 6
    assert max(held) <= 100


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


def test_gradients_by_torch_func():
    head = make(2)
    features, present = every_case(head, rows=1)
    labels = torch.arange(len(present)) % 4
    head(features, present)
    head.eval()  # In training a forward marks its cases as seen, which a function of torch.func may not.

    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(head, parameters, (features, present, labels)), labels)

    parameters = dict(head.named_parameters())
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for grad, name in zip(expected, parameters, strict=True):
        torch.testing.assert_close(torch.func.grad(loss)(parameters)[name], grad, rtol=0, atol=1e-12)
