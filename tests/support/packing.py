"""Owns a small data set of tests with labels of every kind, and how it is packed and compared."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from dist_mlpl import storage
from shards.build import BuildSummary, build
from shards.sources.base import Record, Source
from shards.sources.table import read_table
from tests.support.images import write_images

NAMES = [f"{'abc'[i % 3]}/image.{i:03d}.jpg" for i in range(30)]
CLASS_NAMES = ["sky", "tree", "car", "dog", "house"]
TARGET = 40_000


def write_tables(folder: Path) -> None:
    """Labels that differ from image to image, an image without any; 24 of split train, 6 of val."""
    with open(folder / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "positives", "negatives"))
        for i, name in enumerate(NAMES):
            present = [CLASS_NAMES[c] for c in range(5) if (i >> c) & 1]
            absent = [CLASS_NAMES[c] for c in range(5) if not (i >> c) & 1 and (i + c) % 2]
            rows.writerow((name, "|".join(present), "|".join(absent)))
    (folder / "classes.csv").write_text("class\n" + "\n".join(CLASS_NAMES) + "\n")
    splits = [f"{name},{'val' if i % 5 == 0 else 'train'}" for i, name in enumerate(NAMES)]
    (folder / "splits.csv").write_text("image,split\n" + "\n".join(splits) + "\n")


def source_at(url: str) -> Source:
    tables = {name: storage.join(url, f"{name}.csv") for name in ("labels", "classes", "splits")}
    return read_table(storage.join(url, "images"), tables["labels"], classes=tables["classes"], splits=tables["splits"])


def records_at(folder: Path) -> list[Record]:
    records = source_at(str(folder)).records
    return records.rows(range(len(records)))


def packed(folder: Path, out: str | Path, **options: Any) -> BuildSummary:
    return build(
        source_at(str(folder)), str(out), **{"target_shard_bytes": TARGET, "workers": 1, "decode": False, **options}
    )


def contents(url: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(url, name)) for name in storage.list_names(url)}


def write_inputs(folder: Path) -> Path:
    """Images and tables. Returns the folder."""
    write_images(folder / "images", NAMES)
    write_tables(folder)
    return folder


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
