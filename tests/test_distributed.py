"""DDP over two processes (gloo), whose batches lack cases, against one process with the whole batch."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from protohead import DecoupledPrototypeHead

STEPS = 3
# Rank 0 only ever sees rows without text, rank 1 only rows without an image.
PRESENT = torch.tensor([[True, False]] * 4 + [[False, True]] * 4)


def build():
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"image": 6, "text": 5}, 3, dtype=torch.float64)
    return head, torch.randn(STEPS, 8, 11, dtype=torch.float64), torch.arange(8) % 3


def train(model, head, x, present, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        loss = F.cross_entropy(model(x[step], present, labels), labels) + 0.9 * head.prototype_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    head, x, labels = build()
    mine = slice(4 * rank, 4 * rank + 4)
    model = DistributedDataParallel(head, find_unused_parameters=False)
    train(model, head, x[:, mine], PRESENT[mine], labels[mine])
    torch.save(head.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_ddp_equals_one_process(tmp_path):
    mp.spawn(work, args=(tmp_path,), nprocs=2)
    head, x, labels = build()
    expected = train(head, head, x, PRESENT, labels).state_dict()
    assert head.seen_cases == ("image", "text")
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=0, atol=1e-12)
