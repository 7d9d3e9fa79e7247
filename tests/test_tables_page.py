"""What docs/tables.md says runs, and its tables are those of the code."""

import re
from pathlib import Path

import files
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "tables.md").read_text()


def test_code_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 6
    torch.manual_seed(0)
    names = {}
    for block in blocks:
        exec(block, names)
    assert all(p.grad is not None for p in names["mlp"].parameters())
    assert not any(p.requires_grad for p in names["clip"].parameters())


def test_columns_and_data_sets_are_those_of_the_code():
    for field, known in files.COLUMNS.items():
        (others,) = re.findall(rf"^\| `{field}` \| ([^|]*)\|", PAGE, re.MULTILINE)
        for name in re.findall(r"\w+", others.replace("and their plurals", "")):
            assert name in known.split()
    assert re.findall(r"^\| `(\w+)` \| (?=.*`)", PAGE.split("## Published")[1], re.MULTILINE) == sorted(
        files.READERS, key=["hatememes", "mmimdb", "food101"].index
    )
