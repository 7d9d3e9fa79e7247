"""What the README and the pages in docs say runs, and their tables are those of the code."""

import re
from pathlib import Path
from types import SimpleNamespace

import clip_finetune
import files
import pytest
import test_attach
import torch
from roads import UNTRAINED
from standins import CLIPransformerSS, MoRA, ViLTransformerSS, config, map_batch, unzeroed_batch

import protohead
from protohead import attach

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
MARKS = dict.fromkeys(["prompts", "closed_form", "research_code", "serving"], UNTRAINED)


def blocks(page):
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


# -- what a page needs, and what it leaves ------------------------------------------------------------------------


def before_research_code():
    torch.save({"state_dict": attach(ViLTransformerSS(config("hatememes")), 2).state_dict(), "epoch": 3}, "last.ckpt")
    names = {"ViLTransformerSS": ViLTransformerSS, "config": config("hatememes")}
    names |= {"dcp": with_dynamic_prompts(), "other": with_dynamic_prompts()}
    return names | {"mora": MoRA(width=512), "batch": unzeroed_batch()}


def with_dynamic_prompts():
    """A stand-in of DCP with what its state_dict lacks."""
    dcp = CLIPransformerSS(config("hatememes"))
    for tower in (dcp.model.image_encoder, dcp.model.text_encoder):
        prompts = {f"prompts_dynamic_{case}": torch.randn(2, 3) for case in ("complete", "image", "text")}
        tower.transformer = SimpleNamespace(resblocks=[SimpleNamespace(**prompts)])
    return dcp


def after_research_code(names):
    trained = attach(ViLTransformerSS(config("hatememes")), 2)
    trained.load_state_dict(torch.load("last.ckpt")["state_dict"])
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


def after_readme(names):
    assert names["predicted"].shape == (130,)
    torch.testing.assert_close(names["probabilities"].sum(1), torch.ones(130))
    names["loss"].backward()


def after_serving(names):
    assert Path("model.onnx").exists()
    torch.testing.assert_close(names["probabilities"].sum(1), torch.ones(1))


def after_guide(names):
    assert (names["logits"].argmax(1) == names["labels"])[names["present"][:, 0]].float().mean() > 0.4  # Chance is 0.2.
    names["loss"].backward()
    assert names["paper"].seen_cases == ("image+text", "image", "text")


def after_models(names):
    assert names["predicted"].shape == (4,)
    assert isinstance(names["old"], torch.nn.Linear)
    assert names["yours"].classifier.seen_cases == ("image+text",)
    assert Path("model.safetensors").exists()


def after_training(names):
    assert names["hub_head"].num_classes == 13


def after_experiments(names):
    assert list(names["report"].cases) == ["image+text", "image", "text"]
    assert names["report"].all_rows["accuracy"] > 0.5


def after_tables(names):
    assert all(p.grad is not None for p in names["mlp"].parameters())
    assert not any(p.requires_grad for p in names["clip"].parameters())


def after_prompts(names):
    assert names["logits"].shape == (4, 5)
    own = next(iter(names["model"].encoders.values())).prompts
    assert {name for name, p in own.named_parameters() if p.grad.any()} == {
        f"{part}.{modality}" for part in ("tokens", "missing") for modality in ("image", "text")
    }
    # In the text.
    line = re.search(r"`(attach\(clip, 5, prompts=DcpPrompts.*?\))`", PAGES["prompts"])[1]
    exec(f"from protohead.prompts import DcpPrompts\nother = {line}", names)
    assert next(iter(names["other"].encoders.values())).prompts.length == 12
    compiling = re.search(r"`(for block in .*?compile\(\))`", PAGES["prompts"])[1]
    assert hasattr(names["clip"].visual.transformer.resblocks[0], "compile")
    assert compiling.endswith("block.compile()")


def after_closed_form(names):
    assert names["head"].num_classes == 6
    new = names["head"](names["new"])
    assert (new.argmax(1) == 5).all()
    assert names["moments"]["image"]["rows"].tolist() == [*(names["kept"]["image"]["rows"][:5]).tolist(), 20]


@pytest.mark.parametrize("page", [pytest.param(page, marks=MARKS.get(page, ())) for page in PAGES if blocks(page)])
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = globals().get(f"before_{page}", dict)()
    for block in blocks(page):
        exec(block, names)
    globals().get(f"after_{page.lower()}", lambda _: None)(names)


# -- tables and names in the text ---------------------------------------------------------------------------------


def test_the_models_are_those_of_the_tests():
    table = PAGES["models"].split("<!-- models -->\n")[1].split("\n\n")[0]
    rows = dict(line.strip("| ").split(" | ")[::-1] for line in table.splitlines()[2:])
    shown = re.split("[,;] ", rows["`tests/test_attach.py::test_open_clip`"].removeprefix("open_clip: "))
    assert shown == list(test_attach.OPEN_CLIP)
    shown = re.split(
        "[,;] ", rows["`tests/test_attach.py::test_transformers`"].replace("; 5 only:", ",").split(": ")[1]
    )
    assert shown == list(test_attach.TOWERS)
    for name in re.findall(r"`(tests/\w+\.py)", table):
        assert (ROOT / name).exists()


def test_the_functions_of_the_method_exist():
    found = re.findall(r"`(cases|functional|objective|DecoupledPrototypeHead)\.(\w+)`", PAGES["method"])
    assert len(found) == 11
    for module, name in found:
        owner = protohead.DecoupledPrototypeHead if module[0] == "D" else getattr(protohead, module)
        assert callable(getattr(owner, name))


def test_columns_and_data_sets_are_those_of_the_code():
    page = PAGES["tables"]
    for field, known in files.COLUMNS.items():
        (others,) = re.findall(rf"^\| `{field}` \| ([^|]*)\|", page, re.MULTILINE)
        for name in re.findall(r"\w+", others.replace("and their plurals", "")):
            assert name in known.split()
    assert re.findall(r"^\| `(\w+)` \| (?=.*`)", page.split("## Published")[1], re.MULTILINE) == sorted(
        files.READERS, key=["hatememes", "mmimdb", "food101"].index
    )


def test_the_commands_of_prompts_are_those_of_the_program():
    commands = re.findall(r"^python examples/clip_finetune.py (.*)$", PAGES["prompts"], re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        clip_finetune.options().parse_args(command.replace("...", "--data data.csv").split())


def test_a_prompt_module_is_short():
    (example,) = re.findall(r"class Shallow.*?\n\n\n", PAGES["prompts"], re.DOTALL)
    assert len(example.strip().splitlines()) <= 25


def test_files_import_from_the_layers_above():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| layer |")[1].split("\n\n")[0]
    layers = [re.findall(r"`(\w+)(?:\.py|/)`", line.split("|")[2]) for line in table.splitlines()[2:]]
    level = {name: number for number, names in enumerate(layers) for name in names}
    known = {path.stem for path in (ROOT / "protohead").iterdir() if path.suffix == ".py" and path.stem != "__init__"}
    assert set(level) == known | {"adapters"}
    for path in (ROOT / "protohead").glob("*.py"):
        for name in re.findall(r"^from protohead\.(\w+)", path.read_text(), re.MULTILINE):
            assert path.stem == "__init__" or level[name] <= level[path.stem], (path.name, name)
