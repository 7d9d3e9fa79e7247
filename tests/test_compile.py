"""torch.compile without a graph break, and torch.export."""

import shutil

import pytest
import torch
from test_formula import every_case, make

from protohead import DecoupledPrototypeHead
from protohead.objective import Objective

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, from inside the compiler


def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def check_training(objective, sizes, **options):
    """The same losses, gradients and buffers from a compiled head as from its twin."""
    fresh()
    head, twin = make(2, torch.float32), make(2, torch.float32)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", **options)
    for rows in sizes:
        features, present = every_case(head, rows)
        leaves = [{name: x.clone().requires_grad_() for name, x in features.items()} for _ in range(2)]
        labels = torch.arange(len(present)) % 4
        results = compiled(leaves[0], present, labels, objective), twin(leaves[1], present, labels, objective)
        torch.testing.assert_close(*results, rtol=0, atol=1e-5)
        for result, model in zip(results, (head, twin), strict=True):
            model.zero_grad()
            result.sin().sum().backward()
        for a, b in zip(
            [*leaves[0].values(), *head.parameters()], [*leaves[1].values(), *twin.parameters()], strict=True
        ):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(head.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_training_with_a_dynamic_batch():
    check_training(None, (1, 2, 3), dynamic=True)


def test_compiled_objective():
    """Margins, sub-cases, the center, the marks, the prototype loss."""
    check_training(Objective(label_smoothing=0.1), (2,))


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_inductor():
    """One kernel file each way: what it takes is the C++ compiler's time."""
    fresh()
    head = DecoupledPrototypeHead({"a": 5, "b": 3}, 4)
    features, present = every_case(head, rows=2)
    features["a"][~present[:, 0]] = float("nan")
    expected = head(features, present)
    expected_grads = torch.autograd.grad(expected.sin().sum(), list(head.parameters()))
    marks, compiled = head.seen.clone(), torch.compile(head, fullgraph=True)
    logits = compiled(features, present)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for a, b in zip(torch.autograd.grad(logits.sin().sum(), list(head.parameters())), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(head.seen, 2 * marks)


def test_compiled_options_of_the_objective():
    fresh()
    compiled = torch.compile(head := make(2, torch.float32), fullgraph=True, backend="eager")
    features, present = every_case(head)
    labels = torch.arange(len(present)) % 4
    expected = make(2, torch.float32)(features, present, labels, {"subcase_weight": 0.2})
    torch.testing.assert_close(compiled(features, present, labels, {"subcase_weight": 0.2}), expected)


def test_compiled_forms_of_the_input():
    fresh()
    head = make(2, torch.float32).eval()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    features, present = every_case(head)
    concatenated = torch.cat(list(features.values()), dim=1)
    multi_hot = torch.rand(len(present), 4)
    for batch in ((concatenated,), (concatenated, present), ({"a": features["a"]},), (features, present, multi_hot)):
        torch.testing.assert_close(compiled(*batch), head(*batch), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(features, present), head(features, present), rtol=0, atol=1e-5)


def test_a_traced_graph_follows_the_mask_of_each_batch():
    head = make(2, torch.float32).eval().requires_grad_(False)
    features, present = every_case(head)
    traced = torch.jit.trace(lambda a, b, present: head({"a": a, "b": b}, present), (*features.values(), present))
    for mask in (present, present.flip(0), ~present):
        expected = head(features, mask)
        torch.testing.assert_close(traced(*features.values(), mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cases", ["all", "shared"])
def test_export_of_the_eval_forward(cases):
    head = DecoupledPrototypeHead({"a": 5, "b": 3}, 4, cases=cases)
    features, present = every_case(head)
    head(features, present[:1].repeat(8, 1))  # One seen case: the fall-back is exported as well.
    head.eval()
    batch = torch.export.Dim("batch")
    shapes = ({"a": {0: batch}, "b": {0: batch}}, {0: batch})
    program = torch.export.export(head, (features, present), dynamic_shapes=shapes)
    for rows in (1, 3):
        features, present = every_case(head, rows)
        torch.testing.assert_close(program.module()(features, present), head(features, present), rtol=0, atol=1e-5)
