"""examples/distributed.py on a tiny CLIP, as torchrun starts it, and then in one process."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("open_clip")

import distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments: a model that open_clip loads from a folder, and the data."""
    import open_clip

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    # 151 test rows: the second of two ranks repeats one, which must not count.
    return ["--model", f"local-dir:{folder}", "--rows", "302"]


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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_it_learns_on_two_ranks_and_its_file_loads_on_one(tiny, one_process, tmp_path, strategy):
    path = tmp_path / "model.safetensors"
    options = [
        "--strategy",
        strategy,
        "--epochs",
        "12",
        "--batch-size",
        "16",
        "--trainable",
        "*",
        "--output",
        str(path),
    ]
    command, environment = [*TORCHRUN, distributed.__file__, *tiny, *options], {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    got = scores(result.stdout)
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
def test_what_is_wrong_is_said(tiny, one_process, capsys, arguments, message):
    with pytest.raises(SystemExit):
        one_process(*tiny, *arguments)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"distributed.py: error: {message}")
    assert not torch.distributed.is_initialized()
