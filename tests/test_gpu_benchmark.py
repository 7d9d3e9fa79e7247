"""The report for a GPU is whole at small sizes on the CPU; how fast anything is, no test asks."""

import sys

import gpu
import prompt_cost
import pytest
import speed_methods
import torch
from speed_methods import Mode, Size
from torch import nn

CPU = torch.device("cpu")
SIZE = Size(8, 4, 3, 2, 0.7)


def test_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(prompt_cost, "DEVICE", "cpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "gpu.md")])
    monkeypatch.setattr(gpu, "QUICK", gpu.QUICK[:1])
    gpu.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "gpu.md").read_text("utf-8").strip() == printed.strip()
    parts = printed.strip().split("\n\n")
    assert f"torch {torch.__version__}" in parts[0]
    assert parts[1].startswith("No GPU was found")
    prompts, eager, losses, captured = ([line.strip("| ").split(" | ") for line in p.splitlines()] for p in parts[2:])
    assert [row[0] for row in prompts[2:]] == ["plain tokens", "DCP", "no prompts"]
    assert eager[0][5:] == captured[0][5:] == ["nn.Linear", "head", "head, each case"]
    assert [row[0] for row in losses[2:]] == ["23", "101"]
    for modes, rows in ((gpu.EAGER, eager), (gpu.CAPTURED, captured)):
        kinds = "forward", "forward + backward"
        wanted = [(str(size), mode.name, kind) for mode in modes for size in gpu.QUICK for kind in kinds]
        assert [(row[0], row[3], row[4]) for row in rows[2:]] == wanted
        assert all(float(ratio) > 0 for row in rows[2:] for ratio in row[6:])


def test_a_card_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    assert next(gpu.report(torch.device("cuda"), True, 0.0)) == f"A card, torch {torch.__version__}"


def test_nothing_is_begun_late():
    said = gpu.heads([SIZE, SIZE._replace(classes=4)], gpu.EAGER[:1], CPU, 0.0, end=0.0)
    wanted = "Left out for lack of time: eager, float32 (8, 4, 3), M = 2; eager, float32 (8, 4, 4), M = 2."
    assert said == wanted


@pytest.mark.parametrize("half", [False, True])
def test_a_step_is_one_of_training(monkeypatch, half):
    """Autocast is left after each, so that the next one sees, and casts, new weights."""
    layer, found = nn.Linear(8, 3, bias=False), []

    def call(module, x, y):
        found.append(module(x))
        return found[-1]

    monkeypatch.setattr(speed_methods, "method", lambda *_: (layer, call))
    functions = speed_methods.steps("nn.Linear", SIZE, CPU, Mode("any", half))
    nn.init.zeros_(layer.weight)
    for name in ("forward", "forward + backward", "forward"):
        functions[name]()
    assert [bool(x.any()) for x in found] == [True, False, False, False]
    assert {x.dtype for x in found} == {torch.bfloat16 if half else torch.float32}
    assert layer.weight.grad.any()


def test_prompts_run_in_half_precision(monkeypatch):
    seen = []
    model = nn.Linear(2, 2)
    model.loss = lambda inputs, *_, **__: seen.append(torch.is_autocast_enabled("cpu")) or model(inputs).sum()
    model.head = model
    monkeypatch.setattr(prompt_cost, "DEVICE", "cpu")
    for half in (False, True):
        prompt_cost.Run(model, torch.ones(1, 2), torch.ones(1, 2), half=half).step()
    assert seen == [False, True]
