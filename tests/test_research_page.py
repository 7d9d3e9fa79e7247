"""What docs/research_code.md says runs, on stand-ins."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch
from roads import UNTRAINED
from standins import CLIPransformerSS, MoRA, ViLTransformerSS, config, map_batch, unzeroed_batch

from protohead import attach

pytestmark = UNTRAINED

PAGE = (Path(__file__).parent.parent / "docs" / "research_code.md").read_text()


def with_dynamic_prompts():
    """A stand-in of DCP with what its state_dict lacks."""
    dcp = CLIPransformerSS(config("hatememes"))
    for tower in (dcp.model.image_encoder, dcp.model.text_encoder):
        prompts = {f"prompts_dynamic_{case}": torch.randn(2, 3) for case in ("complete", "image", "text")}
        tower.transformer = SimpleNamespace(resblocks=[SimpleNamespace(**prompts)])
    return dcp


def test_code_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
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
