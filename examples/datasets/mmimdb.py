"""MM-IMDb as its authors distribute it: `split.json`, and `dataset/` with a .json and a .jpeg for each film.

The text is the film's first plot. The labels are those of the 23 genres that the field classifies; the four rare ones
are left out, and a film that has only such stays, as a row without any label. The split's dev validates.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import InputError, reading

GENRES = (
    *("Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary", "Mystery"),
    *("Sci-Fi", "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical", "Western"),
    *("Sport", "Short", "Film-Noir"),
)
RARE = ("News", "Adult", "Talk-Show", "Reality-TV")
SPLITS = {"train": "train", "dev": "val", "test": "test"}


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each film stands, and its fields."""
    path = folder / "split.json"
    with reading(path):
        films = json.loads(path.read_text("utf-8"))
    if not isinstance(films, dict) or not all(is_texts(films.get(name)) for name in SPLITS):
        raise InputError(f"Expected lists of film ids, as texts, for {', '.join(SPLITS)}, but {path} has other things.")
    for name, split in SPLITS.items():
        for film in films[name]:
            where = f"film {film} of {name}, {folder / 'dataset' / film}.json,"
            with reading(where):
                about = json.loads((folder / "dataset" / f"{film}.json").read_text("utf-8"))
            if not isinstance(about, dict) or not is_texts(about.get("genres")) or not is_texts(about.get("plot")):
                raise InputError(f"Expected lists of texts for genres and plot, but {where} has other things.")
            if unknown := [genre for genre in about["genres"] if genre not in GENRES + RARE]:
                raise InputError(f"Expected genres of MM-IMDb, but {where} has {unknown}.")
            label = [genre for genre in about["genres"] if genre in GENRES]
            text = next(iter(about["plot"]), None)
            yield where, {"id": film, "image": f"dataset/{film}.jpeg", "text": text, "label": label, "split": split}


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
