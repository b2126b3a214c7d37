"""Owns what every source of the sharding tool hands over: classes, and one record an image, in the source's order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_mlpl.data.manifest import ClassEntry
from dist_mlpl.labels import Unlisted


class Record(NamedTuple):
    """One image and what people said about it."""

    image: str  # path below the source's `images` folder
    split: str
    positives: tuple[int, ...]  # class columns present, ascending
    negatives: tuple[int, ...]  # class columns absent, ascending; none of them in `positives`
    source_row: int  # 0-based place in the source's own order, which label masks are drawn in
    key: str  # name in the shard; no two records share one


@dataclass(frozen=True, slots=True)
class Source:
    """A data set as it lies on disk or in a bucket. One file in this room makes one kind of it.

    Args:
        name: of the kind of source, for the manifest.
        images: folder or URL that every `Record.image` is relative to. It is no part of the output.
        classes: in column order.
        unlisted: what a class in neither list of a record means.
        arguments: what the manifest should say about the labels' origin (digests of the files they were read
            from, options), in JSON types; no paths, because the output depends on the input's content alone.
        records: in the source's order, ascending in `source_row`.
    """

    name: str
    images: str
    classes: tuple[ClassEntry, ...]
    unlisted: Unlisted
    arguments: dict[str, Any]
    records: Sequence[Record]


def key_of(image: str) -> str:
    """An image's path as a key: without its .jpg or .jpeg, and with `%`, `.` and `/` as %25, %2E and %2F.

    WebDataset cuts a member's name at its first dot and reads slashes as folders, so neither may stay.
    `urllib.parse.unquote` undoes the escapes. Two names that differ only in the ending give the same key;
    sources refuse them.
    """
    stem = re.sub(r"(?<=[^/])\.jpe?g$", "", image, flags=re.IGNORECASE)
    return stem.replace("%", "%25").replace(".", "%2E").replace("/", "%2F")
