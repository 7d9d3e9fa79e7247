"""Pictures as people see them: turned upright, on white where they are transparent, and scaled where they are deep."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

DEEP = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # More than eight bits: PIL would cut them off at 255.


def open_picture(path: Path) -> Image.Image:
    """The RGB picture of a file.

    - It is turned as its EXIF data say.
    - Transparent parts are white, not the hidden colours that a file happens to have there.
    - Of 16-bit and floating-point pictures the darkest value becomes black, the brightest white.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode in DEEP:
            return _scaled(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
    except Exception as error:  # PIL raises many kinds for broken files.
        raise ValueError(f"Expected a picture that PIL reads, but {path} is not: {error}") from None


def unreadable(paths: Iterable[Path], workers: int) -> set[Path]:
    """Those of some picture files that cannot be read."""

    def is_broken(path: Path) -> bool:
        try:
            open_picture(path)
        except ValueError:
            return True
        return False

    paths = list(paths)
    with ThreadPoolExecutor(max(1, workers)) as pool:  # PIL decodes without Python's lock.
        return {path for path, broken in zip(paths, pool.map(is_broken, paths), strict=True) if broken}


def _scaled(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("it has no finite value")
    low, high = finite.min(), finite.max()
    if low == high:  # One value tells only whether it is black.
        low, high = min(low, 0), max(high, 1)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low)
    return Image.fromarray((255 * scaled).round().astype(np.uint8)).convert("RGB")
