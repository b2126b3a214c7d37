"""Owns class lists made whole: from a matrix of labels, empty, joined; and the records of sources of few classes."""

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
    """Records of a matrix.

    Args:
        images: n paths.
        splits: n names.
        targets: (n, C) int8: -1 absent, 0 unknown, +1 present; no 0 where `unlisted` is `absent`.
        unlisted: `unknown` lists what is absent, `absent` lists nothing but what is present.
        is_kept: (n,) images to keep, None for all. `source_row` counts over all of them, kept or not.

    Returns:
        Records of the kept images.

    Raises:
        DataError: more splits than records can tell apart.
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
    """The True columns of every row of an (n, C) matrix."""
    offsets = np.zeros(len(is_listed) + 1, dtype=np.int64)
    np.cumsum(is_listed.sum(axis=1), out=offsets[1:])
    return ClassLists(np.nonzero(is_listed)[1].astype(np.uint16), offsets)


def no_lists(num_rows: int) -> ClassLists:
    """An empty list for every row."""
    return ClassLists(np.empty(0, dtype=np.uint16), np.zeros(num_rows + 1, dtype=np.int64))


def join_lists(parts: Sequence[ClassLists]) -> ClassLists:
    """The rows of all parts, one part after the other."""
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return ClassLists(np.concatenate([part.values for part in parts]), offsets)
