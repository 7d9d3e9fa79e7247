"""The roads of the formulas: rows by block on the CPU in eager mode; every block on devices and in graphs."""

import sys
from contextlib import contextmanager, nullcontext

import pytest

# Heads that are scored before they are trained, or trained through their logits, on purpose.
UNTRAINED = [
    pytest.mark.filterwarnings("ignore:This head is in eval mode and has seen no"),
    pytest.mark.filterwarnings("ignore:This head is trained through its logits, but its center"),
]


@contextmanager
def every_block():
    """Multiply every block, and read no values."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("protohead.") and hasattr(module, "is_readable"):
                patch.setattr(module, "is_readable", lambda _: False)
        yield


BOTH_ROADS = pytest.mark.parametrize("road", [nullcontext, every_block], ids=["rows by block", "every block"])
