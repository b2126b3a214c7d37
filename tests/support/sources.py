"""Owns the view of a source that its tests compare: each image's split and class ids, and the data outside the tree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from shards.sources.base import Source


class Seen(NamedTuple):
    """One image as a source tells it."""

    split: str
    positives: set[str]  # class ids
    negatives: set[str]


def seen(source: Source) -> dict[str, Seen]:
    """By image path, in the source's order."""
    ids = [entry.id for entry in source.classes]
    return {
        row.image: Seen(row.split, {ids[c] for c in row.positives}, {ids[c] for c in row.negatives})
        for row in source.records.rows(range(len(source.records)))
    }


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> str:
    """Write files below a folder; names may hold folders. Returns the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def outside_data(*parts: str) -> Path:
    """A file or folder of MLPL_TEST_DATA; the test skips where it is not."""
    root = Path(os.environ.get("MLPL_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}; set MLPL_TEST_DATA to the folder that holds {parts[0]}")
    return path


def table_labels(folder: Path) -> dict[str, tuple[str, set[str]]]:
    """Split and class names by image, from labels.csv and splits.csv as the outside data sets have them."""
    splits = dict(line.split(",") for line in (folder / "splits.csv").read_text().splitlines()[1:])
    rows = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()[1:]]
    return {image: (splits[image], set(names.split("|")) - {""}) for image, names in rows}
