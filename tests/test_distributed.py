"""DDP and FSDP2 over two processes (gloo), whose batches lack modalities, against one process with the whole batch.

The two processes start once and run every scenario; a test reads what both got.
"""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from protohead import DecoupledPrototypeHead, PrototypeClassifier

# Many of these heads are trained through their logits.
pytestmark = pytest.mark.filterwarnings("ignore:This head is trained through its logits")

STEPS = 3
WEIGHT = 0.9
# Rank 0 has the first half of the rows. "apart": it only sees rows without text, rank 1 only rows without an image.
PRESENT = {
    "apart": torch.tensor([[1, 0]] * 4 + [[0, 1]] * 4).bool(),
    "nothing": torch.tensor([[1, 1]] * 3 + [[0, 1]] + [[0, 0]] * 4).bool(),
    "mixed": torch.tensor([[1, 1]] * 2 + [[1, 0]] * 2 + [[0, 1]] * 3 + [[1, 1]]).bool(),
}
PRESENT["objective"] = PRESENT["mixed"]
HALVES = {None: slice(8), 0: slice(4), 1: slice(4, 8)}


class Tower(nn.Module):
    def __init__(self, stem, width, recompute):
        super().__init__()
        self.stem, self.recompute = stem, recompute
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.out = nn.Linear(6, width)

    def forward(self, x):
        x = self.stem(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return self.out(x)


class TwoTowers(nn.Module):
    """Like a CLIP: one module, two methods."""

    def __init__(self, recompute):
        super().__init__()
        self.visual = Tower(nn.Linear(5, 6), 4, recompute)
        self.language = Tower(nn.EmbeddingBag(9, 6), 3, recompute)

    def encode_image(self, x):
        return self.visual(x)

    def encode_text(self, x):
        return self.language(x)


def build(kind="plain", **options):
    torch.manual_seed(0)
    two = TwoTowers(kind == "checkpoint").double()
    head = DecoupledPrototypeHead({"image": 4, "text": 3}, 3, dtype=torch.float64, **{"cases": "all", **options})
    if kind == "frozen":
        for part in (two.visual.stem, two.language):
            part.requires_grad_(False)
    shared = {"image": two.encode_image, "text": two.encode_text}
    apart = {"image": two.visual, "text": two.language}
    return PrototypeClassifier(shared if kind in ("shared", "frozen") else apart, head), two


def data(form, present, step, half):
    generator = torch.Generator().manual_seed(step)
    present = PRESENT[present][half]
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)[half]
    t = torch.randint(1, 9, (8, 4), generator=generator)[half]
    labels = (torch.arange(8) % 3)[half]
    if form == "list":
        image, text = (
            [row if p else None for row, p in zip(z, mask, strict=True)]
            for z, mask in zip((x, t), present.T, strict=True)
        )
        return {"image": image, "text": text}, None, labels
    inputs = {"image": torch.where(present[:, :1], x, torch.nan), "text": torch.where(present[:, 1:], t, 99)}
    if form == "absent":
        inputs = {name: z for m, (name, z) in enumerate(inputs.items()) if present[:, m].any()}
    return inputs, present, labels


def wrap(model, two, strategy):
    if strategy == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    parts = {
        "blocks": [two.visual.block, two.language.block],
        "towers": [two.visual, two.language],
        "head": [two.visual, model.head],
    }.get(strategy, [])
    for part in parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True if strategy == "reshard" else None)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def state(model):
    return {name: whole(x).clone() for name, x in model.state_dict().items()}


def train(rank, strategy, kind, form, present):
    """State after some steps, gradients of each, and logits; the same whether two ranks share the rows or not."""
    model, two = build(kind)
    wrapped = model if rank is None else wrap(model, two, strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    gradients = []
    for step in range(STEPS):
        inputs, mask, labels = data(form, present, step, HALVES[rank])
        if present == "objective":
            loss = wrapped(inputs, mask, labels, {"prototype_weight": WEIGHT})
        else:
            loss = F.cross_entropy(wrapped(inputs, mask, labels), labels) + WEIGHT * model.head.prototype_loss()
        optimizer.zero_grad()
        loss.backward()
        gradients.append([whole(p.grad).clone() for p in model.parameters() if p.requires_grad])
        optimizer.step()
    with torch.no_grad():
        model.eval()
        inputs, mask, _ = data(form, present, 0, HALVES[rank])
        logits = (wrapped if strategy != "ddp" else model)(inputs, mask)
    return state(model), gradients, [logits if rank is not None else logits[HALVES[r]] for r in range(2)]


EQUAL = [("ddp", kind, "tensor", "apart") for kind in ("plain", "shared", "frozen", "checkpoint")]
EQUAL += [("ddp", "shared", form, present) for form in ("list", "absent") for present in ("apart", "nothing")]
EQUAL += [(s, "plain", "tensor", "apart") for s in ("root", "blocks", "towers", "head", "reshard")]
EQUAL += [("blocks", "frozen", "tensor", "nothing"), ("root", "checkpoint", "list", "apart")]
EQUAL += [("root", "shared", "absent", "nothing"), ("towers", "checkpoint", "tensor", "nothing")]
EQUAL += [(s, "plain", "tensor", "objective") for s in ("ddp", "root", "head")]


def head_alone(rank, strategy):
    torch.manual_seed(0)
    # Two blocks of images and one of texts: the second rank has no shard of the texts.
    head = DecoupledPrototypeHead({"image": 6, "text": 5}, 3, cases=("image+text", "image"), dtype=torch.float64)
    model = head
    if rank is not None:
        model = DistributedDataParallel(head) if strategy == "ddp" else fully_shard(head)
    # What weighs the loss may be another number on each rank: the mean counts.
    weight = {None: 1.5, 0: 1.0, 1: 2.0}[rank]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(STEPS):
        x = torch.randn(8, 11, dtype=torch.float64)[HALVES[rank]]
        present = torch.tensor([[1, 1]] * 4 + [[1, 0]] * 4).bool()[HALVES[rank]]
        labels = (torch.arange(8) % 3)[HALVES[rank]]
        loss = F.cross_entropy(model(x, present, labels), labels)
        (loss + weight * head.prototype_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(head)


def rank_weights(rank):
    """A prototype loss of sharded prototypes, weighted otherwise on each rank, after its own backward pass."""
    model, two = build(cases=("image+text", "image", "text"))
    if rank is not None:
        wrap(model, two, "head")
    inputs, mask, labels = data("tensor", "mixed", 0, HALVES[rank])
    F.cross_entropy(model(inputs, mask, labels), labels).backward()
    ({None: 1.5, 0: 1.0, 1: 2.0}[rank] * model.head.prototype_loss()).backward()
    return [whole(p.grad) for p in model.head.parameters()]


def accumulate(rank, strategy):
    model, two = build()
    if rank is not None:
        wrap(model, two, strategy)
    for step in range(2):
        if rank is not None:
            model.set_requires_gradient_sync(step == 1)
        inputs, mask, labels = data("tensor", "mixed", step, HALVES[rank])
        (F.cross_entropy(model(inputs, mask, labels), labels) + WEIGHT * model.head.prototype_loss()).backward()
    return [whole(p.grad) for p in model.parameters()]


def checkpoints(rank, strategy, folder):
    """Train, save on every rank, and load into a wrapped model of other prototypes: the logits of all rows."""
    inputs, mask, labels = data("tensor", "mixed", 0, slice(8))
    model, two = build("frozen")
    wrapped = wrap(model, two, strategy)
    mine = {name: x[HALVES[rank]] for name, x in inputs.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    F.cross_entropy(wrapped(mine, mask[HALVES[rank]], labels[HALVES[rank]]), labels[HALVES[rank]]).backward()
    optimizer.step()
    model.save(folder / f"{strategy}.safetensors")
    dist.barrier()
    again, two = build("frozen")
    nn.init.zeros_(again.head.prototypes["image"])
    wrap(again, two, strategy)
    again.load(folder / f"{strategy}.safetensors")
    with torch.no_grad():
        return [(model.eval()(inputs, mask), again.eval()(inputs, mask)), again.head.seen_cases]


def refused(rank):
    """Error messages, by what was tried."""
    errors = {}

    def attempt(name, call, *args):
        try:
            call(*args)
        except (RuntimeError, ValueError) as error:
            errors[name] = str(error)

    for strategy in ("head", "root"):
        model, two = build()
        wrap(model, two, strategy).eval()
        inputs, mask, labels = data("tensor", "mixed", 0, HALVES[rank])
        with torch.no_grad():
            model(inputs, mask)
            assert model.head.prototype_loss() > 0
        features = torch.ones(4, 7, dtype=torch.float64)
        attempt(f"imprint {strategy}", model.head.imprint, features, labels)
        attempt(f"reset {strategy}", model.head.reset, 4)
        attempt(f"reset_parameters {strategy}", model.head.reset_parameters)
    model.train()
    loss = F.cross_entropy(model(inputs, mask, labels), labels)
    prototype_loss = model.head.prototype_loss()
    loss.backward()
    attempt("second backward", prototype_loss.backward)

    model, two = build()
    wrap(model, two, "towers")
    lists, _, _ = data("list", "nothing", 0, HALVES[1])  # On both ranks: neither waits for the other.
    attempt("list", model, lists, None)

    model, two = build()
    two.visual.block.append(nn.SyncBatchNorm(6))  # DDP would take it on a GPU only.
    attempt("synced", model, *data("tensor", "nothing", 0, HALVES[1])[:2])
    return errors


def deferred(rank):
    """Prototypes of a head that was sharded on the meta device."""
    torch.manual_seed(0)
    head = fully_shard(DecoupledPrototypeHead({"image": 400, "text": 300}, 10, cases="all", device="meta"))
    head.to_empty(device="cpu").reset_parameters()
    assert not whole(head.bias).any()
    return [whole(p).detach() for p in head.prototypes.values()]


def closed_form(rank, split):
    """The state of a head that is imprinted, and what comes back; each rank has its share of the rows."""
    torch.manual_seed(0)
    x, labels, present = torch.randn(60, 7).double() + 2, torch.arange(60) % 3, torch.rand(60, 2) < 0.7
    x += torch.eye(7)[labels]
    shares = {"halves": [slice(30), slice(30, 60)], "one": [slice(60), slice(0)], "uneven": [slice(0, 60, 3), None]}
    rows = torch.arange(60)
    mine = rows if rank is None else rows[shares[split][rank] or rows % 3 > 0]
    head = DecoupledPrototypeHead({"image": 4, "text": 3}, 3, cases="all", dtype=torch.float64)
    batches = ((x[i], labels[i], present[i]) for i in mine.split(8) if len(i))
    moments = head.imprint(batches)
    later = head.imprint(x[mine], labels[mine], present[mine], shrinkage=0.3, moments=moments)
    before = state(head)
    head.calibrate((x[i], labels[i], present[i]) for i in mine.split(8) if len(i))
    return before, moments, later, head.temperature


def batch_norm(rank):
    """Running statistics after a batch without images."""
    model, two = build()
    two.visual.block.append(nn.BatchNorm1d(6).double())
    wrap(model, two, "towers").train()
    model(*data("tensor", "nothing", 0, HALVES[1]))
    return two.visual.block[-1].num_batches_tracked, two.visual.block[-1].training


def half_precision(rank):
    model, two = build()
    model.float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for part in (two.visual, two.language.block, model):
        fully_shard(part, mp_policy=policy)
    inputs, mask, labels = data("tensor", "mixed", 0, HALVES[rank])
    inputs["image"] = inputs["image"].float()
    logits = model(inputs, mask, labels)
    (F.cross_entropy(logits, labels) + WEIGHT * model.head.prototype_loss()).backward()
    return logits.detach(), [whole(p.grad) for p in model.parameters()]


def scenarios(folder):
    names = {("train", *case): (train, case) for case in EQUAL}
    names |= {("closed_form", split): (closed_form, (split,)) for split in ("halves", "one", "uneven")}
    names |= {("head", s): (head_alone, (s,)) for s in ("ddp", "fsdp")}
    names |= {("accumulate", s): (accumulate, (s,)) for s in ("root", "head")}
    names |= {("checkpoints", s): (checkpoints, (s, folder)) for s in ("ddp", "root", "head")}
    names |= {(f.__name__,): (f, ()) for f in (rank_weights, refused, deferred, batch_norm, half_precision)}
    return names


def work(rank, folder):
    torch.set_num_threads(1)
    results = {}
    for number, (name, (function, arguments)) in enumerate(scenarios(folder).items()):
        store = f"file://{folder}/store{number}"
        dist.init_process_group("gloo", store, timedelta(seconds=30), world_size=2, rank=rank)
        try:
            results[name] = function(rank, *arguments)
        except Exception as error:
            results[name] = error
        dist.destroy_process_group()
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def results(folder):
    mp.spawn(work, args=(folder,), nprocs=2)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]

    def get(*name):
        for rank in ranks:
            if isinstance(rank[name], Exception):
                raise rank[name]
        return [rank[name] for rank in ranks]

    return get


def assert_same(got, expected, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("case", EQUAL, ids=" ".join)
def test_two_ranks_equal_one_process(results, case):
    expected_state, expected_gradients, expected_logits = train(None, *case)
    for rank, (got, gradients, logits) in enumerate(results("train", *case)):
        assert_same(got, expected_state, atol=1e-11)
        assert_same(gradients, expected_gradients, atol=1e-11)
        assert_same(logits[rank], expected_logits[rank], atol=1e-11)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_head_alone(results, strategy):
    expected = head_alone(None, strategy)
    for got in results("head", strategy):
        assert_same(got, expected)
        assert (got["seen"] > 0).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("strategy", ["root", "head"])
def test_gradients_are_accumulated(results, strategy):
    for got in results("accumulate", strategy):
        assert_same(got, accumulate(None, strategy))


def test_the_prototype_losses_of_all_ranks_are_averaged(results):
    for got in results("rank_weights"):
        assert_same(got, rank_weights(None))


@pytest.mark.parametrize("strategy", ["ddp", "root", "head"])
def test_checkpoints(results, folder, strategy):
    both = results("checkpoints", strategy)
    model, _ = build("frozen")
    nn.init.zeros_(model.head.prototypes["image"])
    model.load(folder / f"{strategy}.safetensors")
    logits = model.eval()(*data("tensor", "mixed", 0, slice(8))[:2]).detach()
    for (trained, loaded), seen in both:
        assert_same(trained, logits)
        assert_same(loaded, logits)
        assert seen == model.head.seen_cases == ("image+text", "image", "text")


def test_what_cannot_be_done_says_so(results):
    for errors in results("refused"):
        for method, strategy in (
            ("imprint", "head"),
            ("imprint", "root"),
            ("reset", "head"),
            ("reset", "root"),
            ("reset_parameters", "root"),
        ):
            assert errors.pop(f"{method} {strategy}").startswith(f"Expected `{method}` before `fully_shard`")
        assert errors.pop("second backward").startswith("Expected one backward pass through the sum")
        assert errors.pop("list").startswith(
            "Expected inputs of 'image' as tensors although no row of this rank has it"
        )
        assert errors.pop("synced").startswith("Expected rows with 'image' on every rank")
        assert not errors


def test_a_head_that_was_sharded_on_the_meta_device_is_drawn_as_any(results):
    first, second = results("deferred")
    assert_same(first, second, atol=0)
    for prototype, width in zip(first, (400, 300), strict=True):
        assert not torch.equal(*prototype)
        assert_same(prototype.std((1, 2)), torch.full((2,), (2 / (width + 10)) ** 0.5), atol=2e-3)


@pytest.mark.parametrize("split", ["halves", "one", "uneven"])
def test_sums_for_the_closed_form_are_those_of_all_ranks(results, split):
    expected = closed_form(None, split)
    for got in results("closed_form", split):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_blank_rows_reach_no_running_statistics(results):
    for batches, training in results("batch_norm"):
        assert batches == 0
        assert training


def test_mixed_precision(results):
    model, _ = build()
    inputs, mask, labels = data("tensor", "mixed", 0, slice(8))
    logits = model(inputs, mask, labels)
    (F.cross_entropy(logits, labels) + WEIGHT * model.head.prototype_loss()).backward()
    expected = [p.grad for p in model.parameters()]
    for rank, (got, gradients) in enumerate(results("half_precision")):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), logits[HALVES[rank]], rtol=0, atol=0.5)
        for gradient, exact in zip(gradients, expected, strict=True):
            assert F.cosine_similarity(gradient.double().flatten(), exact.flatten(), dim=0) > 0.98
