"""Owns the images of Open Images: their order, splits and rotations, from image lists or else from label files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dist_mlpl import storage
from dist_mlpl.errors import ConfigError, DataError, nearest_names
from shards.sources.csv_blocks import Block, CsvFile, Wrong
from shards.sources.files import fault
from shards.sources.image_ids import COLUMN, Ids, IdSet, format_id, format_ids, read_rows, repeated_id, wrong_id
from shards.sources.openimages_labels import LabelKind, needed_columns, read_ids

SPLITS = ("train", "validation", "test")
_SPLIT_OF = {**{name: name for name in SPLITS}, "val": "validation"}

_SUBSET, _ROTATION = "Subset", "Rotation"
_QUARTER_TURNS = (0, 90, 180, 270)


class Images(NamedTuple):
    """Images in the source's order."""

    ids: Ids
    splits: npt.NDArray[np.uint8]  # positions in SPLITS
    rotations: npt.NDArray[np.uint16]  # degrees counter-clockwise that turn an image upright

    def take(self, rows: npt.NDArray[np.int64]) -> Images:
        """The images of some rows."""
        return Images(self.ids[rows], self.splits[rows], self.rotations[rows])

    def paths(self, pattern: str) -> pa.StringArray:
        """Paths of the images.

        Args:
            pattern: contains {id} once, and {split} any number of times.
        """
        around = [pa.array([text.replace("{split}", name) for name in SPLITS]) for text in pattern.split("{id}")]
        before, after = (texts.take(pa.array(self.splits)) for texts in around)
        return pc.binary_join_element_wise(before, format_ids(self.ids), after, "")


def read_image_lists(urls: Sequence[str]) -> tuple[Images, list[str]]:
    """Read image lists with columns ImageID, Subset and optionally Rotation, one list after the other.

    Returns:
        The images, and the digests of the lists.

    Raises:
        DataError: a missing column, broken quoting, an id that is not 16 hexadecimal digits, an invalid subset or
            rotation, or an image listed twice; the message names file and line.
        StorageError: a list is missing or cannot be read.
    """
    files = [CsvFile(url, (COLUMN, _SUBSET), what="the image list", option="image_lists") for url in urls]
    parts = [part for file in files for part in file.map(_read_images)]
    images = Images(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    if (repeated := repeated_id(images.ids)) is not None:
        raise _listed_twice(urls, format_id(repeated))
    return images, [file.sha256 for file in files]


def images_of_labels(files: Iterable[tuple[LabelKind, str]]) -> Images:
    """Images named in label files, by ascending id, with splits from the files' names and rotation 0.

    Raises:
        ConfigError: a file whose name tells no split.
        DataError: an id that is not 16 hexadecimal digits, an image in files of two splits.
        StorageError: a file is missing or cannot be read.
    """
    sets = [IdSet() for _ in SPLITS]
    for kind, url in files:
        split = SPLITS.index(_split_told_by(url))
        file = CsvFile(url, needed_columns(kind), what=f"the file of {kind.what}", option=kind.option)
        for ids in file.map(partial(read_ids, kind=kind)):
            sets[split].add(ids)
    by_split = [found.sorted() for found in sets]
    ids = np.concatenate(by_split)
    splits = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), [len(found) for found in by_split])
    if (repeated := repeated_id(ids)) is not None:
        raise DataError(
            f"image {format_id(repeated)} has labels in several splits",
            expected="every image in one split",
            where="the label files",
            next_step="name the image lists with option `image_lists`: they tell the split of every image",
        )
    order = np.argsort(ids)
    return Images(ids[order], splits[order], np.zeros(len(ids), dtype=np.uint16))


def _read_images(block: Block) -> Images:
    types = {_SUBSET: pa.dictionary(pa.int32(), pa.string())}
    if has_rotation := _ROTATION in block.columns:
        types[_ROTATION] = pa.float64()
    table, rows = read_rows(block, types, _check, may_be_empty=_ROTATION)
    subsets = pa.concat_arrays(table[_SUBSET].chunks)
    names = subsets.dictionary.to_pylist()
    if not set(names) <= _SPLIT_OF.keys():
        raise block.fault(_check, "an unknown subset")
    places = np.array([SPLITS.index(_SPLIT_OF[name]) for name in names], dtype=np.uint8)
    rotations = np.zeros(len(table))
    if has_rotation:
        rotations = table[_ROTATION].to_numpy()
        rotations = np.where(np.isnan(rotations), 0, rotations)  # unknown counts as 0
    if not np.isin(rotations, _QUARTER_TURNS).all():
        raise block.fault(_check, "a rotation that is no quarter turn")
    return Images(rows.ids[rows.runs], places[subsets.indices.to_numpy()], rotations.astype(np.uint16))


def _check(cells: Mapping[str, str]) -> Wrong | None:
    subset, rotation = cells[_SUBSET], cells.get(_ROTATION, "")
    if wrong := wrong_id(cells):
        return wrong
    if subset not in _SPLIT_OF:
        return Wrong(f"subset {subset!r}", nearest_names(subset, _SPLIT_OF))
    if not re.fullmatch(r"(\s*|nan|(0|90|180|270)(\.0*)?)", rotation, re.IGNORECASE):
        return Wrong(f"rotation {rotation!r}", "0, 90, 180 or 270 degrees, or nothing")
    return None


def _split_told_by(url: str) -> str:
    """The split that a file's name tells, or else the name of its folder."""
    folder, _, name = storage.absolute(url).rpartition("/")
    words = re.split(r"[^a-z]+", name.lower())
    words = [word for word in words if word in _SPLIT_OF] or [storage.name(folder)]
    found = {_SPLIT_OF.get(word, "") for word in words}
    if len(found) == 1 and (split := found.pop()):
        return split
    raise ConfigError(
        f"file name {storage.name(url)!r}, which tells no one split",
        expected=f"one of the words {', '.join(_SPLIT_OF)} in it, or as the name of its folder",
        where=storage.shown(url),
        next_step="name the image lists with option `image_lists`, or rename the file",
    )


def _listed_twice(urls: Sequence[str], image: str) -> DataError:
    """The error for an image listed twice, naming its second line; the lists are read again to find it."""
    first = ""
    for url in urls:
        with storage.open_read(url) as stream:
            for line, content in enumerate(stream, 1):
                if content.partition(b",")[0].strip(b'"') == image.encode():
                    if first:
                        return fault(url, f"line {line}", f"image {image} again, listed in {first}", "every image once")
                    first = f"{storage.name(url)}, line {line}"
    return fault(", ".join(urls), "", f"image {image} twice", "every image once")
