"""Prompts under DDP and FSDP2: two processes (gloo), whose rows have other cases, against one with the whole batch."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_prompts import batch, prompted, tiny
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

# Rank 0 has the first half of the rows. "apart": one has only images, the other only texts.
PRESENT = {
    "apart": torch.tensor([[1, 0]] * 3 + [[0, 1]] * 3).bool(),
    "mixed": torch.tensor([[1, 1]] * 3 + [[0, 1]] * 2 + [[1, 0]]).bool(),
}
HALVES = {None: slice(6), 0: slice(3), 1: slice(3, 6)}
CASES = [(s, k, p) for s in ("ddp", "root", "towers", "blocks") for k, p in (("dcp", "apart"), ("map", "mixed"))]
CASES += [("ddp", "dcp", "mixed"), ("root", "dcp", "mixed"), ("blocks", "map", "apart")]


def wrap(model, strategy):
    if strategy == "ddp":
        return DistributedDataParallel(model)
    (towers,) = model.encoders.values()
    clip = towers.towers.clip
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    parts = {
        "towers": [clip.visual, clip.transformer],
        "blocks": [*clip.visual.transformer.resblocks, *clip.transformer.resblocks],
        "prompts": [towers.prompts],
    }.get(strategy, [])
    for part in parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params={clip.logit_scale})  # FSDP2 shards no scalars.


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def build(kind, strategy):
    trainable = "visual.*" if strategy == "blocks" else None  # Blocks that train are collectives in backward, too.
    return prompted(kind, tiny().double(), trainable=trainable, dtype=torch.float64).double()


def train(rank, strategy, kind, present, folder=None):
    """The state after some steps and the gradients of each."""
    model = build(kind, strategy)
    wrapped = model if rank is None else wrap(model, strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for step in range(2):
        mask, labels = PRESENT[present][HALVES[rank]], torch.arange(6)[HALVES[rank]] % 5
        inputs = {name: x[HALVES[rank]] for name, x in batch(seed=step).items()}
        inputs["image"] = inputs["image"].double()
        loss = wrapped(inputs, mask, labels, {})
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    if folder is not None:
        model.save(folder / f"{strategy}.safetensors")
        dist.barrier()
    return {name: whole(x).clone() for name, x in model.state_dict().items()}, gradients


def refused(rank):
    model = build("dcp", "prompts")
    wrap(model, "prompts")
    inputs = batch()
    inputs["image"] = inputs["image"].double()
    try:
        model(inputs, PRESENT["mixed"])
    except RuntimeError as error:
        return str(error)


def work(rank, folder):
    torch.set_num_threads(1)
    results = {}
    jobs = {case: (train, (*case, folder if case[1] == "dcp" else None)) for case in CASES} | {"refused": (refused, ())}
    for number, (name, (function, arguments)) in enumerate(jobs.items()):
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

    def get(name):
        for rank in ranks:
            if isinstance(rank[name], Exception):
                raise rank[name]
        return [rank[name] for rank in ranks]

    return get


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_two_ranks_equal_one_process(results, case):
    state, gradients = train(None, *case)
    for got_state, got_gradients in results(case):
        for expected, got in zip(gradients, got_gradients, strict=True):
            assert expected.keys() <= got.keys()  # Of cases that no rank has, the ranks have zeros.
            for name, grad in got.items():
                wanted = expected.get(name, torch.zeros_like(grad))
                torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-9, msg=name)
        torch.testing.assert_close(got_state, state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("strategy", ["ddp", "root", "towers"])
def test_files_of_all_ranks(results, folder, strategy):
    case = [case for case in CASES if case[:2] == (strategy, "dcp")][-1]
    state = results(case)[0][0]
    model = build("dcp", strategy)
    model.load(folder / f"{strategy}.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_prompts_that_are_sharded_alone_are_refused(results):
    for error in results("refused"):
        assert error.startswith("Expected `fully_shard` on the model, not on its prompts alone")
