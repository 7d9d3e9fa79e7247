"""torch.compile without a graph break, and torch.export."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from test_formula import every_case, make

BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")),
]


@pytest.mark.filterwarnings("ignore")  # torch's own, from inside the compiler
@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_step_with_a_dynamic_batch(backend, modalities):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    head, twin = make(modalities, torch.float32), make(modalities, torch.float32)

    def step(features, present, labels, head):
        logits = head(features, present, labels)
        return F.cross_entropy(logits, labels) + 0.9 * head.prototype_loss()

    compiled = torch.compile(lambda *batch: step(*batch, head), fullgraph=True, dynamic=True, backend=backend)
    for rows in (1, 2, 3):
        features, present = every_case(head, rows)
        leaves = [{name: x.clone().requires_grad_() for name, x in features.items()} for _ in range(2)]
        labels = torch.arange(len(present)) % 4
        losses = compiled(leaves[0], present, labels), step(leaves[1], present, labels, twin)
        for loss, model in zip(losses, (head, twin), strict=True):
            model.zero_grad()
            loss.backward()
        torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
        for a, b in zip(
            [*leaves[0].values(), *head.parameters()], [*leaves[1].values(), *twin.parameters()], strict=True
        ):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert head.seen_cases == twin.seen_cases == head.cases
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore")
def test_compiled_forms_of_the_input():
    torch._dynamo.reset()
    head = make(2, torch.float32).eval()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    features, present = every_case(head)
    concatenated = torch.cat(list(features.values()), dim=1)
    multi_hot = torch.rand(len(present), 4)
    for batch in ((concatenated,), (concatenated, present), ({"a": features["a"]},), (features, present, multi_hot)):
        torch.testing.assert_close(compiled(*batch), head(*batch), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(features, present), head(features, present), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_graph_follows_the_mask_of_each_batch():
    head = make(2, torch.float32).eval().requires_grad_(False)
    features, present = every_case(head)
    traced = torch.jit.trace(lambda a, b, present: head({"a": a, "b": b}, present), (*features.values(), present))
    for mask in (present, present.flip(0), ~present):
        expected = head(features, mask)
        torch.testing.assert_close(traced(*features.values(), mask), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_export_of_the_eval_forward():
    head = make(2, torch.float32)
    features, present = every_case(head)
    head(features, present[:1].repeat(8, 1))  # One seen case: the fall-back is exported as well.
    head.eval()
    batch = torch.export.Dim("batch")
    shapes = ({"a": {0: batch}, "b": {0: batch}}, {0: batch})
    program = torch.export.export(head, (features, present), dynamic_shapes=shapes)
    for rows in (1, 3):
        features, present = every_case(head, rows)
        torch.testing.assert_close(program.module()(features, present), head(features, present), rtol=0, atol=1e-5)
