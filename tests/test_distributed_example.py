"""examples/distributed.py on a tiny CLIP, on two ranks as torchrun starts them, and then in one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")

import distributed

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
STRATEGIES = ("ddp", "fsdp2")
# Two ranks for each run, with what torchrun tells them; forked, so that they import everything once.
LAUNCHER = """
import json, os, sys
import distributed
import torch.multiprocessing as mp

def rank(number, runs):
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="localhost")
    for port, arguments in runs:
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = ["distributed.py", *arguments]
        distributed.main()

mp.start_processes(rank, (json.loads(sys.argv[1]),), nprocs=2, start_method="fork")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments: a model that open_clip loads from a folder, and the data."""
    import open_clip

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    # 101 test rows: the second of two ranks repeats one, which must not count.
    return ["--model", f"local-dir:{folder}", "--rows", "202"]


@pytest.fixture(scope="module")
def two_ranks(tiny, tmp_path_factory):
    """Strategy to the file of a model trained with it, and what was printed."""
    folder = tmp_path_factory.mktemp("two_ranks")
    files = {strategy: folder / f"{strategy}.safetensors" for strategy in STRATEGIES}
    options = ["--epochs", "5", "--batch-size", "16", "--lr", "0.05", "--encoder-lr", "0.003"]
    options += ["--trainable", "visual.*", "transformer.*", "text_projection"]
    runs = [
        (port, [*tiny, *options, "--strategy", strategy, "--output", str(path)])
        for port, (strategy, path) in zip(free_ports(len(files)), files.items(), strict=True)
    ]
    command = [sys.executable, "-c", LAUNCHER, json.dumps(runs)]
    path = os.pathsep.join([str(Path(distributed.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return dict(zip(STRATEGIES, zip(files.values(), result.stdout.splitlines(), strict=True), strict=True))


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def one_process(monkeypatch, capsys):
    """Run the program here; what it prints."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # So that what the program sets is undone.
        monkeypatch.delenv(name)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["distributed.py", *map(str, arguments)])
        distributed.main()
        return capsys.readouterr().out

    return run


def scores(output):
    cells = (cell.split(": ") for cell in output.strip().splitlines()[-1].split(", "))
    return {name: float(value.removesuffix(" %")) for name, value in cells}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_learns_on_two_ranks_and_its_file_loads_on_one(two_ranks, tiny, one_process, strategy):
    path, printed = two_ranks[strategy]
    got = scores(printed)
    assert list(got) == ["image+text", "image", "text", "all rows"]
    assert got["all rows"] > 50  # Of six classes.
    assert scores(one_process(*tiny, "--evaluate", path)) == got


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "7"], "Expected --rows of 8 or more"),
        (["--output", "/nowhere/model"], "Expected --output in a folder that exists"),
        (["--trainable", "visual.porj"], "Expected `trainable` to name parameters, but 'visual.porj' matches none"),
        (["--model", "ViT-Z"], "Expected --model and --pretrained that open_clip loads"),
        (["--evaluate", "/nowhere/model"], "No such file"),
    ],
)
def test_what_is_wrong_is_said(tiny, one_process, monkeypatch, capsys, arguments, message):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)  # As torchrun does.
    with pytest.raises(SystemExit):
        one_process(*tiny, *arguments)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"distributed.py: error: {message}")
    assert not torch.distributed.is_initialized()


def test_training_without_torchrun_says_what_to_do(tiny, one_process, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "build", lambda _: pytest.fail("It began to work."))
    with pytest.raises(SystemExit):
        one_process(*tiny)
    printed = capsys.readouterr().err
    assert "Expected to be started by torchrun" in printed
    assert "torchrun --nproc-per-node 2 examples/distributed.py" in printed
