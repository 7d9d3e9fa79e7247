"""What the constructor of a head accepts."""

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ["check_constants", "check_count", "check_names", "check_widths", "read_constants"]

MANY = 2**7  # Cases; the prototype loss of those of eight modalities takes a second.


def check_widths(in_features: Mapping[str, int], shared_space: bool) -> dict[str, int]:
    """The widths by modality, which a shared space needs to be equal."""
    if not isinstance(in_features, Mapping):
        raise TypeError(f"Expected argument `in_features` to map names to widths, but got {in_features!r}.")
    widths = {name: check_count(f"in_features[{name!r}]", width) for name, width in in_features.items()}
    if shared_space and len(set(widths.values())) > 1:
        raise ValueError(f"Expected equal widths with `shared_space=True`, but got {widths}.")
    return widths


def read_constants(
    scale: float | Mapping[str, float],
    margin: float | Mapping[str, float] | None,
    cases: Sequence[str],
    modalities: Sequence[str],
) -> tuple[list[float], list[float]]:
    """The scales and margins by case; those of the paper where there is no margin."""
    if len(cases) > MANY:
        what = "with prototypes of their own are slow; list those that occur, or share them"
        warnings.warn(f"{len(cases)} cases {what}.", stacklevel=3)
    if margin is None:
        margin = {case: 0.10 if case == "+".join(modalities) else 0.15 for case in cases}
    scales, margins = _by_case("scale", scale, cases), _by_case("margin", margin, cases)
    check_constants(scales, margins, cases)
    return scales, margins


def _by_case(argument: str, value: float | Mapping[str, float], cases: Sequence[str]) -> list[float]:
    """One number per case, from one for all or from a mapping that names them all."""
    if not isinstance(value, Mapping):
        value = dict.fromkeys(cases, value)
    if set(value) != set(cases):
        raise ValueError(f"Expected argument `{argument}` to name exactly the cases {cases}, but got {tuple(value)}.")
    for number in value.values():
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"Expected argument `{argument}` to be a number, or numbers by case, but got {number!r}.")
    return [float(value[case]) for case in cases]


def check_constants(scale: Sequence[float], margin: Sequence[float], cases: Sequence[str]) -> None:
    """One of each for each case: as the constructor was given them, or as they have been changed since."""
    if len(scale) != len(cases) or not all(0 < value < math.inf for value in scale):
        raise ValueError(f"Expected `scale` to be positive, for each of the cases {cases}, but got {scale}.")
    if len(margin) != len(cases) or not all(0 <= value < math.pi for value in margin):
        wanted = f"in [0, pi) radians, for each of the cases {cases}"
        raise ValueError(f"Expected `margin` to be {wanted}, but got {margin}.")


def check_count(argument: str, value: Any) -> int:
    """A positive integer, NumPy's included."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"Expected argument `{argument}` to be a positive integer, but got {value!r}.")
    return int(value)


def check_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """K class names, none twice; or None."""
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"Expected `class_names` to be a list of strings, but got {names!r}.")
    if len(names) != num_classes or len(set(names)) < len(names):
        raise ValueError(f"Expected {num_classes} different `class_names`, but got {len(names)}: {list(names)[:5]} ...")
    return tuple(names)
