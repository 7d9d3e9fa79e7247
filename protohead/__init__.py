"""protohead: a classification head that keeps multimodal models working when modalities are missing."""

from protohead.adapters import attach, replace_module
from protohead.checkpoint import load_head
from protohead.classifier import PrototypeClassifier
from protohead.head import DecoupledPrototypeHead
from protohead.present import (
    present_from_flags,
    present_from_missing_mask,
    present_from_missing_type,
    present_from_ragpt,
)

__version__ = "0.1.0"

__all__ = [
    "DecoupledPrototypeHead",
    "PrototypeClassifier",
    "attach",
    "load_head",
    "present_from_flags",
    "present_from_missing_mask",
    "present_from_missing_type",
    "present_from_ragpt",
    "replace_module",
]
