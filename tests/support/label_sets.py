"""Owns packed sets written from dense labels: indexes and a manifest, and images where a test looks at them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dist_mlpl import storage
from dist_mlpl.data.manifest import ClassEntry, Manifest, ShardEntry, SourceEntry, Split, classes_digest, write_manifest
from dist_mlpl.data.shard_index import ClassLists, ShardIndex, encode_index
from dist_mlpl.labels import Unlisted

Targets = npt.NDArray[np.int8]


class LabelSplit(NamedTuple):
    """Labels of a split in source order, and how they are packed."""

    source: Targets  # (N, C)
    order: npt.NDArray[np.int64]  # (N,) manifest position -> position in the source
    sizes: list[int]  # of shards, none empty
    images: list[bytes] | None = None  # in source order; without them the shards' files do not exist
    machine: npt.NDArray[np.float16] | None = None  # (N, C) confidences in source order; 0 is no label

    @property
    def packed(self) -> Targets:
        """Labels in manifest order."""
        return self.source[self.order]


def label_split(source: Targets, *, num_shards: int, seed: int = 0) -> LabelSplit:
    """Labels packed in a shuffled order, cut at random."""
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.choice(np.arange(1, len(source)), size=num_shards - 1, replace=False))
    return LabelSplit(source, generator.permutation(len(source)), np.diff([0, *cuts, len(source)]).tolist())


def class_lists(targets: Targets, code: int) -> ClassLists:
    """Columns of each row that hold a code."""
    rows, columns = np.nonzero(targets == code)
    return ClassLists(columns.astype(np.uint16), np.searchsorted(rows, np.arange(len(targets) + 1)))


def write_label_set(
    folder: Path, splits: dict[str, LabelSplit], *, unlisted: Unlisted, names: list[str] | None = None
) -> Manifest:
    """Write indexes and manifest. Source rows are spread three apart; a shard's file is its images end to end.

    Args:
        folder: of the set.
        splits: by name.
        unlisted: with `absent`, labels must all be known, and absence is not listed.
        names: of the classes; `class 0` and on by default.
    """
    num_classes = next(iter(splits.values())).source.shape[1]
    entries = {}
    for name, split in splits.items():
        shards, first = [], 0
        for number, size in enumerate(split.sizes):
            rows = split.order[first : first + size]
            shards.append(_write_shard(folder, f"{name}-{number:06d}", split, rows, unlisted))
            first += size
        num_bytes = sum(shard.num_bytes for shard in shards)
        entries[name] = Split(num_samples=len(split.source), num_bytes=num_bytes, shards=tuple(shards))
    classes = tuple(
        ClassEntry(id=f"/m/{column:04d}", name=names[column] if names else f"class {column}")
        for column in range(num_classes)
    )
    manifest = Manifest(
        version="0",
        classes=classes,
        classes_sha256=classes_digest(classes),
        unlisted=unlisted,
        splits=entries,
        source=SourceEntry(name="table", arguments={}, digest=storage.sha256_of_bytes(b"labels")),
        packing=None,
    )
    return write_manifest(manifest, str(folder))


def _write_shard(
    folder: Path, stem: str, split: LabelSplit, rows: npt.NDArray[np.int64], unlisted: Unlisted
) -> ShardEntry:
    folder.mkdir(parents=True, exist_ok=True)
    targets, images = split.source[rows], [split.images[row] for row in rows] if split.images else [b"."] * len(rows)
    if split.images:
        (folder / f"{stem}.tar").write_bytes(b"".join(images))
    sizes = np.array([len(image) for image in images])
    confidences = None if split.machine is None else split.machine[rows]
    nothing = ClassLists(np.empty(0, np.uint16), np.zeros(len(rows) + 1, dtype=np.int64))
    index = ShardIndex(
        keys=pa.array([f"image{row}" for row in rows], pa.string()),
        offsets=(np.cumsum(sizes) - sizes).astype(np.uint64),
        num_bytes=sizes.astype(np.uint32),
        source_rows=(rows * 3 + 5).astype(np.uint64),
        positives=class_lists(targets, 1),
        negatives=nothing if unlisted == "absent" else class_lists(targets, -1),
        machine=None if confidences is None else class_lists((confidences > 0).astype(np.int8), 1),
        confidences=None if confidences is None else confidences[confidences > 0],
    )
    content = encode_index(index)
    (folder / f"{stem}.arrow").write_bytes(content)
    return ShardEntry(
        file=f"{stem}.tar",
        index=f"{stem}.arrow",
        num_samples=len(rows),
        num_bytes=int(sizes.sum()),
        index_sha256=storage.sha256_of_bytes(content),
    )
