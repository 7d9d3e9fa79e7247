"""`import protohead` needs torch and einops, and nothing else."""

import subprocess
import sys

SCRIPT = """
import sys

import einops, torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"open_clip", "timm", "torchvision", "transformers", "torchmetrics", "matplotlib"}:
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
before = set(sys.modules)
import protohead
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new == {"protohead"}, new
print(protohead.__version__)
"""


def test_import_is_light_and_works_without_open_clip():
    result = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0.1.0"
