"""The examples are programs, not a package: tests import them by path, after the packages that they are named for."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "examples"))
