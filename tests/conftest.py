"""The examples are programs, not a package: tests import them by path, after the packages that they are named for."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "examples"))

if (spec := find_spec("datasets")) and spec.origin is None:
    # The folder in examples; transformers and accelerate would take it for Hugging Face's package, and remember that.
    sys.modules["datasets"] = None
