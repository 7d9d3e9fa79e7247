"""replace_module with functions of the batch: masks and labels reach a head deep inside, and no other's ever."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
from roads import UNTRAINED
from standins import AOEPT, MoRA, unzeroed_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from protohead import DecoupledPrototypeHead, present_from_missing_mask, present_from_missing_type, replace_module

pytestmark = UNTRAINED

NAMES = ("image", "text")


def make_head(**options):
    torch.manual_seed(1)
    return DecoupledPrototypeHead({"image": 8, "text": 8}, 3, **{"cases": "all", "centered": False, **options})


def types_of(batch):
    return present_from_missing_type(batch["missing_types"], NAMES)


def label_of(batch):
    return batch["label"]


def masks_of(image, text, missing_masks, labels=None):
    return present_from_missing_mask(missing_masks, ["text", "image"], NAMES)


def labels_of(image, text, missing_masks, labels=None):
    return labels


def mora(**functions):
    torch.manual_seed(0)
    model = MoRA()
    replace_module(model, "cls_head", make_head(), **(functions or {"present": types_of, "labels": label_of}))
    return model


def expected(model, batch, labels=None, part="cls_head"):
    """By a copy of the head that is given the mask by hand."""
    features = model.towers(batch["image"], batch["text"])
    return copy.deepcopy(getattr(model, part).head)(features, types_of(batch), labels)


BATCH = unzeroed_batch()
OTHER = unzeroed_batch((2, 2, 1, 0, 1), seed=1)


# -- other people's forward -------------------------------------------------------------------------------------------


def test_mora():
    model = mora()
    logits = expected(model, BATCH, BATCH["label"])
    assert torch.equal(model(BATCH)["logits"], logits)
    assert model.cls_head.head.seen_cases == ("image+text", "image", "text")
    model.eval()
    assert torch.equal(model(BATCH)["logits"], expected(model, BATCH))
    assert not torch.allclose(model(BATCH)["logits"], logits)  # No margins in eval mode.
    everything = model.cls_head.head(model.towers(BATCH["image"], BATCH["text"]))
    assert not torch.allclose(model(BATCH)["logits"], everything)


@pytest.mark.parametrize("by_name", [True, False])
def test_aoept(by_name):
    model = AOEPT()
    head = make_head()
    replace_module(model, "model.classifier", head, present=masks_of, labels=labels_of)
    arguments = {name: BATCH[name] for name in ("image", "text", "missing_masks")}
    features = model.model["towers"](BATCH["image"], BATCH["text"])
    with_labels = {**arguments, "labels": BATCH["label"]}
    loss = model(**with_labels) if by_name else model(*with_labels.values())
    logits = copy.deepcopy(head)(features, types_of(BATCH), BATCH["label"])
    assert torch.equal(loss, nn.functional.cross_entropy(logits, BATCH["label"]))
    loss.backward()
    assert all(p.grad.any(2).all() for p in head.parameters())  # The block of every case, and all classes.
    model.eval()
    logits = model(**arguments) if by_name else model(*arguments.values())
    assert torch.equal(logits, head(features, types_of(BATCH)))


def test_columns_by_name_and_either_function_alone():
    model = mora(present=lambda batch: {"image": [code != 2 for code in batch["missing_types"]], "text": [True] * 4})
    present = torch.tensor([[True, True], [True, True], [False, True], [True, True]])
    model.eval()
    features = model.towers(BATCH["image"], BATCH["text"])
    assert torch.equal(model(BATCH)["logits"], model.cls_head.head(features, present))
    model = mora(labels=label_of)
    assert torch.equal(model(BATCH)["logits"], model.cls_head.head(features, None, BATCH["label"]))


def test_labels_are_for_training_and_may_be_none():
    called = []
    model = mora(present=types_of, labels=lambda batch: called.append(batch))
    assert torch.equal(model(BATCH)["logits"], expected(model, BATCH))
    assert len(called) == 1
    model.eval()(BATCH)
    assert len(called) == 1


def test_any_head_on_any_device():
    class Head(nn.Module):
        def forward(self, features, present, labels):
            assert {features.device.type, present.device.type, labels.device.type} == {"meta"}
            return features[:, :3]

    model = MoRA().to("meta")
    replace_module(model, "cls_head", Head(), present=types_of, labels=lambda batch: torch.tensor([0, 1, 2, 0]))
    output = model(BATCH | {name: BATCH[name].to("meta") for name in ("image", "text", "label")})
    assert output["logits"].is_meta


def test_the_mask_is_read_before_the_model_runs():
    model = mora()
    calls = []
    model.towers.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(ValueError, match="got 3 in row 1"):
        model(BATCH | {"missing_types": [0, 3, 1, 2]})
    assert not calls

    class Pops(MoRA):
        def forward(self, batch):
            batch.pop("missing_types")
            return super().forward(batch)

    model = Pops()
    replace_module(model, "cls_head", make_head(), present=types_of)
    assert torch.equal(model(dict(BATCH))["logits"], expected(model, BATCH))


# -- one batch and the next -------------------------------------------------------------------------------------------


def test_nothing_of_a_batch_is_left():
    model = mora(present=lambda batch: types_of(batch) if "missing_types" in batch else None)
    model.eval()
    logits = [model(BATCH)["logits"], model(OTHER)["logits"]]
    assert [len(x) for x in logits] == [4, 5]
    assert torch.equal(model(BATCH)["logits"], logits[0])
    features = model.towers(BATCH["image"], BATCH["text"])
    unmasked = {name: x for name, x in BATCH.items() if name != "missing_types"}
    assert torch.equal(model(unmasked)["logits"], model.cls_head.head(features))
    with pytest.raises(RuntimeError, match=r"in the forward of its model.* not running"):
        model.cls_head(features)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_by_a_forward_that_fails(error):
    model = mora().eval()
    features = model.towers(BATCH["image"], BATCH["text"])

    def fail(*args):
        raise error

    handle = model.towers.register_forward_hook(fail)
    with pytest.raises(error):
        model(BATCH)
    handle.remove()
    with pytest.raises(RuntimeError, match="not running"):
        model.cls_head(features)
    with pytest.raises(KeyError):  # That of the function.
        model({})
    assert torch.equal(model(BATCH)["logits"], expected(model, BATCH))


class Twice(MoRA):
    """Calls itself on another batch, before its own classifier and after."""

    def forward(self, batch):
        inner = [super().forward(batch)] if "inner" not in batch else [self(batch["inner"])]
        return inner[0] | {"again": self.cls_head(self.towers(batch["image"], batch["text"]))}


def test_nested_forwards():
    model = Twice().eval()
    replace_module(model, "cls_head", make_head(), present=types_of)
    output = model(BATCH | {"inner": OTHER})
    assert torch.equal(output["logits"], expected(model, OTHER))
    assert torch.equal(output["again"], expected(model, BATCH))


def test_a_model_in_a_model():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = MoRA(), MoRA()
            self.last = nn.Linear(16, 3)

        def forward(self, first, second):
            a, b = self.a(first)["logits"], self.b(second)["logits"]
            return a, b, self.last(self.a.towers(second["image"], second["text"]))

    model = Pair().eval()
    replace_module(model.a, "cls_head", make_head(), present=types_of)
    replace_module(model, "b.cls_head", make_head(), present=lambda first, second: types_of(second))
    replace_module(model, "last", make_head(), present=lambda first, second: types_of(second).flip(1))
    a, b, last = model(BATCH, OTHER)
    assert torch.equal(a, expected(model.a, BATCH))
    assert torch.equal(b, expected(model.b, OTHER))
    features = model.a.towers(OTHER["image"], OTHER["text"])
    assert torch.equal(last, model.last.head(features, types_of(OTHER).flip(1)))


def test_threads_have_their_own_batches():
    model = mora().eval()
    both = threading.Barrier(2, timeout=30)
    results = {}

    def meet(*args):
        both.wait()

    # Before either has found its mask, and after both have.
    handles = model.towers.register_forward_hook(meet), model.cls_head.head.register_forward_pre_hook(meet)

    def run(name, batch):
        results[name] = model(batch)["logits"]

    threads = [threading.Thread(target=run, args=item) for item in (("a", BATCH), ("b", OTHER))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    [handle.remove() for handle in handles]
    assert torch.equal(results["a"], expected(model, BATCH))
    assert torch.equal(results["b"], expected(model, OTHER))


def test_activation_checkpoints():
    model = mora()
    checkpoint(model, BATCH, use_reentrant=False)["loss"].backward()
    grad = model.towers.image.weight.grad.clone()
    model.zero_grad()
    model(BATCH)["loss"].backward()
    torch.testing.assert_close(model.towers.image.weight.grad, grad)

    class Inside(MoRA):
        def forward(self, batch):
            features = self.towers(batch["image"], batch["text"])
            return checkpoint(self.cls_head, features, use_reentrant=False)

    model = Inside()
    replace_module(model, "cls_head", make_head(), present=types_of)
    with pytest.raises(RuntimeError, match="not running"):  # Never another mask, or none.
        model(BATCH).sum().backward()


# -- copies -----------------------------------------------------------------------------------------------------------

TWINS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "protocol 0": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "twice": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "replica": lambda model: model._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("twin", TWINS)
def test_copies_use_their_own_head(twin):
    model = mora().eval()
    other = TWINS[twin](model)
    assert isinstance(other, MoRA)
    if twin == "replica":  # As DataParallel makes them: without parameters, and with the original's attributes.
        other._modules = {"towers": model.towers, "cls_head": copy.deepcopy(model.cls_head)}
    assert other.cls_head.head is not model.cls_head.head
    with torch.no_grad():
        for p in other.cls_head.parameters():
            p.add_(torch.randn_like(p))
    assert torch.equal(model(BATCH)["logits"], expected(model, BATCH))
    assert torch.equal(other(OTHER)["logits"], expected(other, OTHER))
    assert not torch.allclose(other(BATCH)["logits"], model(BATCH)["logits"])
    other.cls_head = nn.Identity()  # The original does not notice.
    assert torch.equal(model(BATCH)["logits"], expected(model, BATCH))
    assert other(BATCH)["logits"].shape == (4, 16)


def test_a_copy_of_a_model_with_a_state_of_its_own():
    class Own(MoRA):
        def __getstate__(self):
            return {name: value for name, value in vars(self).items() if name != "trainer"}

    model = Own()
    replace_module(model, "cls_head", make_head(), present=types_of)
    model.trainer = lambda: None
    other = copy.deepcopy(model.eval())
    assert not hasattr(other, "trainer")
    assert torch.equal(other(BATCH)["logits"], model(BATCH)["logits"])


def test_another_model_of_its_class_is_a_plain_one():
    """As a `__deepcopy__` of one's own may make."""
    model = mora()
    other = type(model)()
    assert other(BATCH)["logits"].shape == (4, 3)
    replace_module(other, "cls_head", make_head(), present=types_of)
    assert torch.equal(other(BATCH)["logits"], expected(other, BATCH))


def test_weight_averaging():
    model = mora()
    average = torch.optim.swa_utils.AveragedModel(model)
    model(BATCH)["loss"].backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    average.update_parameters(model)
    average.eval()
    assert torch.equal(average(BATCH)["logits"], expected(average.module, BATCH))


def test_the_model_is_still_what_it_was():
    model = mora()
    assert isinstance(model, MoRA)
    assert (type(model).__name__, type(model).__module__) == ("MoRA", "standins")
    assert type(model) is type(mora())
    assert list(inspect.signature(model.forward).parameters) == ["batch"]  # By which Trainer chooses columns.
    assert type(MoRA()) is MoRA
    names = {name for name in model.state_dict() if name.startswith("cls_head")}
    assert "cls_head.head.prototypes.image" in names
    other = mora()
    with torch.no_grad():
        other.cls_head.head.prototypes["image"].zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.cls_head.head.prototypes["image"], model.cls_head.head.prototypes["image"])


def test_replaced_again():
    model = mora().eval()
    first = model.cls_head
    assert replace_module(model, "cls_head", make_head(scale=3.0), present=types_of) is first
    assert not model.cls_head.training
    assert torch.equal(model(BATCH)["logits"], expected(model, BATCH))
    head = make_head()
    replace_module(model, "cls_head", head)
    assert model.cls_head is head
    features = model.towers(BATCH["image"], BATCH["text"])
    with pytest.warns(UserWarning, match="takes every row for complete"):
        assert torch.equal(model(BATCH)["logits"], head(features))


# -- surroundings -----------------------------------------------------------------------------------------------------


def tensors(seed, codes=(0, 1, 2, 0)):
    batch = unzeroed_batch(codes, seed)
    return {name: batch[name] for name in ("image", "text", "label", "missing_masks")}


def inverted(batch):
    return ~batch["missing_masks"].flip(1)


@pytest.mark.filterwarnings("ignore")  # torch's own, from inside the compiler
@pytest.mark.parametrize("functions", [{"present": inverted, "labels": label_of}, {}], ids=["present", "zeros"])
def test_graphs(functions):
    model = MoRA()
    replace_module(model, "cls_head", make_head(), **functions)
    first, second = tensors(0), tensors(1, (2, 1, 1, 0))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch in (first, second, first):
        torch.testing.assert_close(compiled(batch)["logits"], model(batch)["logits"])
    model.eval()
    for strict in (True, False):
        program = torch.export.export(model, (first,), strict=strict).module()
        torch.testing.assert_close(program(second)["logits"], model(second)["logits"])


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(one_process):
    model = mora()
    wrapped = DistributedDataParallel(model)
    logits = [wrapped(batch)["logits"] for batch in (BATCH, OTHER)]
    assert torch.equal(logits[0], expected(model, BATCH, BATCH["label"]))
    assert torch.equal(logits[1], expected(model, OTHER, OTHER["label"]))
    wrapped(BATCH)["loss"].backward()
    assert model.cls_head.head.prototypes["image"].grad.any()
    assert pickle.loads(pickle.dumps(model)).cls_head.head.prototypes["image"].shape == (2, 3, 8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_lightning_calls_the_model_twice(strategy, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Mine(lightning.LightningModule, MoRA):
        def training_step(self, batch, batch_idx):
            outputs = [self(batch), self(OTHER)]
            for x, y in zip(outputs, (batch, OTHER), strict=True):
                seen.append((x["logits"], expected(self, y, y["label"])))
            return sum(output["loss"] for output in outputs)

        def validation_step(self, batch, batch_idx):
            seen.append((self(batch)["logits"], expected(self, batch)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    model, seen = Mine(), []
    replace_module(model, "cls_head", make_head(), present=types_of, labels=label_of)
    batches = torch.utils.data.DataLoader([BATCH, OTHER], batch_size=None)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, batches, batches)
    if dist.is_initialized():
        dist.destroy_process_group()
    assert len(seen) == 8  # Two sanity checks, four in training, two of validation.
    for got, wanted in seen:
        assert torch.equal(got, wanted)
    assert copy.deepcopy(model).cls_head.head.seen_cases == ("image+text", "image", "text")


# -- without a mask, where the batches have one -----------------------------------------------------------------------


def unmasked(model_class=MoRA, path="cls_head"):
    model = model_class()
    replace_module(model, path, make_head())
    return model


WARNING = "takes every row for complete: .* batches have 'missing_{}', .* a function `present` that reads the mask"


def test_a_model_that_never_zeroes_is_warned_of_once():
    model = unmasked()
    with pytest.warns(UserWarning, match=WARNING.format("types")):
        model(BATCH)
    model(OTHER)
    model.eval()(BATCH)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_mask_among_the_arguments(by_name):
    model = unmasked(AOEPT, "model.classifier")
    arguments = [BATCH["image"], BATCH["text"], BATCH["missing_masks"]]
    with pytest.warns(UserWarning, match=WARNING.format("masks")):
        model(**dict(zip(("image", "text", "missing_masks"), arguments, strict=True))) if by_name else model(*arguments)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_single_rows_and_copies(twin):
    model = unmasked()
    model(unzeroed_batch([0]))
    model(unzeroed_batch([0, 0], seed=1))
    other = twin(model)
    for each in (model, other):
        with pytest.warns(UserWarning, match=WARNING.format("types")):
            each(unzeroed_batch([2], seed=2))
        each(BATCH)


def test_no_warning_where_there_is_no_need():
    class Zeroes(MoRA):
        def forward(self, batch):
            there = types_of(batch)
            batch = batch | {name: batch[name] * there[:, m, None] for m, name in enumerate(NAMES)}
            return super().forward(batch)

    def no_bias(model):
        model.towers.image.bias, model.towers.text.bias = None, None
        return model

    zeroed = no_bias(unmasked(Zeroes))
    zeroed(unzeroed_batch([0, 0]))  # A batch without a gap proves nothing.
    zeroed(BATCH)
    alike = unmasked()
    alike(unzeroed_batch([0, 0, 0]))
    alike(unzeroed_batch([0, 0], seed=1))
    others = unmasked()
    others({name: BATCH[name] for name in ("image", "text", "label")} | {"missing_types": 0.7, "missing": [0, 1, 2, 0]})
    model = unmasked()
    model.cls_head = nn.Linear(16, 3)  # The head is gone.
    model(BATCH)
    mora()(BATCH)


# -- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"present": "missing_types"}, TypeError, "`present` to be a function of .* forward, but got str"),
        ({"labels": torch.ones(3)}, TypeError, "`labels` to be a function"),
        ({"path": "head", "present": types_of}, ValueError, "nearest: .*'cls_head'"),
        ({"head": DecoupledPrototypeHead({"image": 8}, 3), "present": types_of}, ValueError, "a head of 16 features"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(arguments, error, match):
    model = MoRA()
    before = repr(model), set(vars(model))
    with pytest.raises(error, match=match):
        replace_module(**{"model": model, "path": "cls_head", "head": make_head(), **arguments})
    assert (repr(model), set(vars(model)), type(model)) == (*before, MoRA)
    assert not model._forward_pre_hooks


def test_a_forward_of_the_instance_is_refused():
    model = MoRA()
    model.forward = model.forward  # As accelerate leaves it.
    with pytest.raises(ValueError, match="`forward` to be a method of MoRA, but this one has its own"):
        replace_module(model, "cls_head", make_head(), present=types_of)
    assert isinstance(model.cls_head, nn.Linear)


def test_a_mask_of_another_batch_size():
    with pytest.raises(ValueError, match="one batch size"):
        mora()(BATCH | {"missing_types": [0]})
