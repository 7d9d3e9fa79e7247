"""What the pages in docs say runs."""

import re
from pathlib import Path

import clip_finetune
from roads import UNTRAINED

pytestmark = UNTRAINED

DOCS = Path(__file__).parent.parent / "docs"


def test_prompts():
    page = (DOCS / "prompts.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (4, 5)
    own = next(iter(names["model"].encoders.values())).prompts
    assert {name for name, p in own.named_parameters() if p.grad.any()} == {
        f"{part}.{modality}" for part in ("tokens", "missing") for modality in ("image", "text")
    }
    (example,) = re.findall(r"class Shallow.*?\n\n\n", page, re.DOTALL)
    assert len(example.strip().splitlines()) <= 25
    for command in re.findall(r"^python examples/clip_finetune.py (.*)$", page, re.MULTILINE):
        clip_finetune.options().parse_args(command.replace("...", "--data data.csv").split())
    # In the text.
    line = re.search(r"`(attach\(clip, 5, prompts=DcpPrompts.*?\))`", page)[1]
    exec(f"from protohead.prompts import DcpPrompts\nother = {line}", names)
    assert next(iter(names["other"].encoders.values())).prompts.length == 12
    compiling = re.search(r"`(for block in .*?compile\(\))`", page)[1]
    assert hasattr(names["clip"].visual.transformer.resblocks[0], "compile")
    assert compiling.endswith("block.compile()")


def test_closed_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "closed_form.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["head"].num_classes == 6
    new = names["head"](names["new"])
    assert (new.argmax(1) == 5).all()
    assert names["moments"]["image"]["rows"].tolist() == [*(names["kept"]["image"]["rows"][:5]).tolist(), 20]
