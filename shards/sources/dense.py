"""Owns making class lists (from a label matrix, empty, joined), and records for sources with few classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dist_mlpl.data.shard_index import ClassLists
from dist_mlpl.errors import DataError
from dist_mlpl.labels import ABSENT, PRESENT, Targets, Unlisted
from shards.sources.base import Records

MAX_SPLITS = 256  # records store a split as one byte


def dense_records(
    images: Sequence[str],
    splits: Sequence[str],
    targets: Targets,
    *,
    unlisted: Unlisted,
    is_kept: npt.NDArray[np.bool_] | None = None,
) -> Records:
    """Make records from a label matrix.

    Args:
        images: n paths.
        splits: n split names.
        targets: (n, C) int8: -1 absent, 0 unknown, +1 present; no 0 where `unlisted` is `absent`.
        unlisted: with `unknown`, absent classes are listed as negatives; with `absent`, only present ones are listed.
        is_kept: (n,) bool, images to keep; None for all. `source_row` counts over all images, kept or not.

    Returns:
        Records of the kept images.

    Raises:
        DataError: more than 256 splits.
    """
    rows = np.arange(len(images)) if is_kept is None else np.flatnonzero(is_kept)
    chosen = rows.tolist()
    names = tuple(dict.fromkeys(splits))
    if len(names) > MAX_SPLITS:
        raise DataError(
            f"{len(names)} splits: {', '.join(names[:3])}, ...", expected=f"at most {MAX_SPLITS}",
            where="the splits of the images", next_step="give the file or column that names splits",
        )  # fmt: skip
    places = {name: place for place, name in enumerate(names)}
    kept = targets[rows]
    return Records(
        images=pa.array([images[row] for row in chosen], pa.string()),
        split_names=names,
        splits=np.array([places[splits[row]] for row in chosen], dtype=np.uint8),
        source_rows=rows.astype(np.uint64),
        positives=class_lists(kept == PRESENT),
        negatives=class_lists(kept == ABSENT) if unlisted == "unknown" else no_lists(len(rows)),
    )


def class_lists(is_listed: npt.NDArray[np.bool_]) -> ClassLists:
    """Lists of the True columns in each row of an (n, C) matrix."""
    offsets = np.zeros(len(is_listed) + 1, dtype=np.int64)
    np.cumsum(is_listed.sum(axis=1), out=offsets[1:])
    return ClassLists(np.nonzero(is_listed)[1].astype(np.uint16), offsets)


def no_lists(num_rows: int) -> ClassLists:
    """Empty lists, one per row."""
    return ClassLists(np.empty(0, dtype=np.uint16), np.zeros(num_rows + 1, dtype=np.int64))


def join_lists(parts: Sequence[ClassLists]) -> ClassLists:
    """Concatenate the rows of all parts."""
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return ClassLists(np.concatenate([part.values for part in parts]), offsets)
