"""What mkdocs needs to make the site of the pages where they stand, so that a link holds here and in the repository."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

PAGES = ("*.md", "docs/*.md", "benchmarks/*.md", "examples/README.md")
FILES = ("CITATION.cff", "LICENSE", "benchmarks/*.csv", "*/*.png")


def on_files(files: Any, config: Any) -> Any:
    """Take the pages from the root of the repository, not from docs alone: called by mkdocs."""
    root = Path(config.config_file_path).parent
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for pattern in (*PAGES, *FILES):
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


class Docstrings(griffe.Extension):
    """Links in the place of roles, such as :func:`on_files`, and examples as code: called by mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: D102
        if obj.docstring:
            text = re.sub(r":[a-z]+:`~?([\w.]+)`", r"[`\1`][\1]", obj.docstring.value)
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
