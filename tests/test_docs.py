"""What the pages in docs say runs."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch
from roads import UNTRAINED
from standins import CLIPransformerSS, MoRA, ViLTransformerSS, config, map_batch, unzeroed_batch

from protohead import attach

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
    # In the text.
    line = re.search(r"`(attach\(clip, 5, prompts=DcpPrompts.*?\))`", page)[1]
    exec(f"from protohead.prompts import DcpPrompts\nother = {line}", names)
    assert next(iter(names["other"].encoders.values())).prompts.length == 12
    compiling = re.search(r"`(for block in .*?compile\(\))`", page)[1]
    assert hasattr(names["clip"].visual.transformer.resblocks[0], "compile")
    assert compiling.endswith("block.compile()")


def with_dynamic_prompts():
    """A stand-in of DCP with what its state_dict lacks."""
    dcp = CLIPransformerSS(config("hatememes"))
    for tower in (dcp.model.image_encoder, dcp.model.text_encoder):
        prompts = {f"prompts_dynamic_{case}": torch.randn(2, 3) for case in ("complete", "image", "text")}
        tower.transformer = SimpleNamespace(resblocks=[SimpleNamespace(**prompts)])
    return dcp


def test_research_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "research_code.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    torch.manual_seed(0)
    trained = attach(ViLTransformerSS(config("hatememes")), 2)
    torch.save({"state_dict": trained.state_dict(), "epoch": 3}, "last.ckpt")
    names = {"ViLTransformerSS": ViLTransformerSS, "config": config("hatememes")}
    names |= {"dcp": with_dynamic_prompts(), "other": with_dynamic_prompts()}
    names |= {"mora": MoRA(width=512), "batch": unzeroed_batch()}
    for block in blocks:
        exec(block, names)

    for model in (trained, names["model"]):
        model.eval().set_task()
    batch = map_batch()
    close = {"rtol": 1e-4, "atol": 1e-4}  # MAP draws the order of its patches.
    torch.testing.assert_close(names["model"](batch)["hatememes_logits"], trained(batch)["hatememes_logits"], **close)
    prompts = names["dynamic_prompts"]
    assert len(prompts(names["other"])) == 6
    assert all(map(torch.equal, prompts(names["other"]), prompts(names["dcp"])))
    assert isinstance(names["old"], torch.nn.Linear)
    names["loss"].backward()
    assert names["head"].seen_cases == ("image+text", "image", "text")
