"""MM-IMDb as its authors distribute it: `split.json`, and `dataset/` with a .json and a .jpeg for each film.

Or, as MAP lays it out, with `images/` and `labels/`.

The text is the film's first plot. The labels are those of the 23 genres that the field classifies; the four rare ones
are left out, and a film that has only such stays, as a row without any label. The split's dev validates.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from files import InputError, decoded

GENRES = (
    *("Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery"),
    *("Sci-Fi", "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical", "Western"),
    *("Sport", "Short", "Film-Noir"),
)
RARE = ("News", "Adult", "Talk-Show", "Reality-TV")
LAYOUTS = (("dataset", "dataset"), ("images", "labels"))
SPLITS = {"train": "train", "dev": "val", "test": "test"}


def records(folder: Path, labelled: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each film stands, and its fields."""
    layouts = [(images, about) for images, about in LAYOUTS if (folder / images).is_dir() and (folder / about).is_dir()]
    films = order(folder)
    if not layouts:
        raise InputError(f"Expected the folder dataset/, or images/ and labels/, in {folder}, but got neither.")
    images, texts = layouts[0]
    for split in SPLITS.values():
        for film in films[split]:
            path = folder / texts / f"{film}.json"
            where = f"film {film} of {split}, {path},"
            about = content(path, where)
            if not isinstance(about, dict) or not is_texts(about.get("genres")) or not is_texts(about.get("plot")):
                raise InputError(f"Expected lists of texts for genres and plot, but {where} has other things.")
            if unknown := [genre for genre in about["genres"] if genre not in GENRES + RARE]:
                raise InputError(f"Expected genres of MM-IMDb, but {where} has {unknown}.")
            # A genre that a film names twice is one label.
            label = [genre for genre in dict.fromkeys(about["genres"]) if genre in GENRES]
            text = next(iter(about["plot"]), None)
            yield where, {"id": film, "image": f"{images}/{film}.jpeg", "text": text, "label": label, "split": split}


def order(folder: Path) -> dict[str, list[str]]:
    """The ids of the films by split, in the order of split.json, which is that of MAP's tables."""
    path = folder / "split.json"
    films = content(path, str(path))
    if not isinstance(films, dict) or not all(is_texts(films.get(name)) for name in SPLITS):
        raise InputError(f"Expected lists of film ids, as texts, for {', '.join(SPLITS)}, but {path} has other things.")
    return {split: films[name] for name, split in SPLITS.items()}


def content(path: Path, where: str) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(decoded(path))
    except json.JSONDecodeError as error:
        raise InputError(f"Expected {where} to be readable, but got: {error}.") from None


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
