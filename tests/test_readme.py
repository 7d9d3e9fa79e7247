"""What the README says runs, and what it shows is what the programs print."""

import re
from pathlib import Path

import quickstart
import test_attach
import torch
from test_quickstart import saved_scores

import protohead

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_code_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 6
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["predicted"].shape == (4,)
    assert names["head"].cases == names["head"].seen_cases == ("image+text",)
    assert names["hub_head"].num_classes == 13
    assert (tmp_path / "model.safetensors").exists()


def test_the_models_are_those_of_the_tests():
    table = README.split("<!-- models -->\n")[1].split("\n\n")[0]
    rows = dict(line.strip("| ").split(" | ")[::-1] for line in table.splitlines()[2:])
    shown = re.split("[,;] ", rows["`tests/test_attach.py::test_open_clip`"].removeprefix("open_clip: "))
    assert shown == list(test_attach.OPEN_CLIP)
    shown = re.split(
        "[,;] ", rows["`tests/test_attach.py::test_transformers`"].replace("; 5 only:", ",").split(": ")[1]
    )
    assert shown == list(test_attach.TOWERS)
    for name in re.findall(r"`(tests/\w+\.py)", table):
        assert (ROOT / name).exists()


def test_named_functions_exist():
    for module, name in re.findall(r"`(cases|functional|objective|DecoupledPrototypeHead)\.(\w+)`", README):
        owner = protohead.DecoupledPrototypeHead if module[0] == "D" else getattr(protohead, module)
        assert callable(getattr(owner, name))


def test_two_commands():
    (block,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert ["quickstart" in block.splitlines()[0], "pytest" in block.splitlines()[1]] == [True, True]


def test_table_is_what_the_quickstart_prints():
    scores = saved_scores(ROOT / "examples" / "quickstart.csv")
    assert all(len(values) == 5 for values in scores.values())
    shown = README.split("<!-- quickstart -->\n")[1]
    assert " ".join(shown.split()).startswith(" ".join(quickstart.table(scores).split()))
    assert " ".join(quickstart.verdict(scores).split()) in " ".join(shown.split())  # However its lines are broken.


def test_version_stands_in_one_place():
    assert f"version: {protohead.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {protohead.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
