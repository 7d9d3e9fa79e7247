"""Examples and benchmarks are programs, not packages: tests import them by path, after packages of the same name."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path += [str(Path(__file__).parent.parent / folder) for folder in ("examples", "benchmarks")]

if (spec := find_spec("datasets")) and spec.origin is None:
    # The folder in examples; transformers and accelerate would take it for Hugging Face's package, and remember that.
    sys.modules["datasets"] = None
