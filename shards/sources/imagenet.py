"""Owns reading ImageNet: a folder for each class, and the reassessed (ReaL) labels of the validation images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from dist_mlpl import storage
from dist_mlpl.data.manifest import ClassEntry
from dist_mlpl.data.shard_index import ClassLists
from dist_mlpl.errors import ConfigError, DataError, nearest_names
from dist_mlpl.labels import Unlisted
from dist_mlpl.settings import Settings
from shards.sources.base import Records, Source
from shards.sources.dense import class_lists, join_lists, no_lists
from shards.sources.files import ImagePaths, LabelFile, class_entries, list_images, read_file

_REAL_CLASSES = 1000  # numbers in real.json are positions among this many sorted class ids
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(_n\d{8})?\.JPEG")


class ImageNetSettings(Settings):
    """Files and options of ImageNet, and of data sets with a folder for each class."""

    images: str = Field(description="folder that holds the folders of the splits")
    folders: dict[str, str] = Field(
        {"train": "train"}, min_length=1, description="folder of a split below `images`, with a folder for each class"
    )
    classes: str | None = Field(
        None, description="class ids and names, `n01440764 tench, Tinca tinca` a line; without it the folders' names"
    )
    unlisted: Unlisted = Field("absent", description="what the classes are that an image is not filed under")
    real: str | None = Field(None, description="ReaL labels of the 50,000 validation images: real.json")
    real_split: str = Field("val", description="the split of `folders` that `real` labels, filed by class or not")
    real_empty: Literal["drop", "keep"] = Field("drop", description="images for which `real` lists no class")


class _Part(NamedTuple):
    """The images of one split that are kept."""

    paths: list[str]
    rows: npt.NDArray[np.int64]  # their positions among all images of the split
    positives: ClassLists
    negatives: ClassLists
    num_images: int  # number of all images of the split, kept or not


def read_imagenet(settings: ImageNetSettings) -> Source:
    """Read ImageNet: one present class per image; with `real`, the validation images' reassessed labels.

    With `unlisted` = `unknown`, images labelled by `real` list every other class as absent, as those labels are for
    evaluation.

    Returns:
        Images sorted by path, one split after the other; classes in the order of `classes`, else sorted.

    Raises:
        DataError: an image outside the class folders, an unknown class, a validation image that `real` does not
            number, or, with `real`, other than 1,000 classes; the message names file or folder.
        ConfigError: `real` without its split in `folders`.
        StorageError: a file or folder is missing.
    """
    if settings.real is not None and settings.real_split not in settings.folders:
        raise ConfigError(
            f"real_split {settings.real_split!r}", expected=nearest_names(settings.real_split, settings.folders),
            where="source imagenet", next_step="give `folders.NAME` of that split",
        )  # fmt: skip
    names: dict[str, list[str]] = {}
    num_other = 0
    for split, folder in settings.folders.items():
        names[split], others = list_images(storage.join(settings.images, folder), option=f"folders.{split}")
        num_other += others
    digests: dict[str, str] = {}
    classes = _classes(settings, names, digests)
    parts = {split: _part(settings, split, names[split], classes, digests) for split in settings.folders}
    num_empty = sum(part.num_images - len(part.paths) for part in parts.values())
    dropped = {"images_without_real_labels": num_empty, "other_files": num_other}
    return Source(
        name="imagenet",
        images=storage.absolute(settings.images),
        classes=classes,
        unlisted=settings.unlisted,
        arguments={
            **digests,
            "real_empty": settings.real_empty,
            "dropped": {reason: count for reason, count in dropped.items() if count},
        },
        records=_records(parts),
    )


def _classes(
    settings: ImageNetSettings, names: dict[str, list[str]], digests: dict[str, str]
) -> tuple[ClassEntry, ...]:
    if settings.classes is None:
        filed = [name for split in names for name in names[split] if not _is_real(settings, split)]
        ids = sorted({name.partition("/")[0] for name in filed or names[settings.real_split] if "/" in name})
        return class_entries(ids, ids, settings.images)
    file = read_file(settings.classes, what="the list of classes", option="classes")
    digests["classes_sha256"] = file.sha256
    cells = [line.split(maxsplit=1) for _, line in file.lines()]
    return class_entries([cell[0] for cell in cells], [cell[-1] for cell in cells], file.url)


def _is_real(settings: ImageNetSettings, split: str) -> bool:
    return settings.real is not None and split == settings.real_split


def _part(
    settings: ImageNetSettings,
    split: str,
    names: Sequence[str],
    classes: tuple[ClassEntry, ...],
    digests: dict[str, str],
) -> _Part:
    folder = settings.folders[split].strip("/")
    url, places = storage.join(settings.images, folder), ImagePaths()
    paths = [places.add(f"{folder}/{name}" if folder else name, url, name) for name in names]
    if not _is_real(settings, split):
        positives = ClassLists.of(_filed(names, classes, url))
        return _Part(paths, np.arange(len(paths)), positives, no_lists(len(paths)), len(paths))
    file = read_file(settings.real or "", what="the ReaL labels", option="real")
    digests["real_sha256"] = file.sha256
    is_present = _reassessed(file, names, classes, url)
    rows = np.flatnonzero(is_present.any(axis=1) | (settings.real_empty == "keep"))
    is_present = is_present[rows]
    negatives = class_lists(~is_present) if settings.unlisted == "unknown" else no_lists(len(rows))
    return _Part([paths[row] for row in rows], rows, class_lists(is_present), negatives, len(paths))


def _filed(names: Sequence[str], classes: tuple[ClassEntry, ...], url: str) -> list[tuple[int, ...]]:
    """The class column of each image, by its first folder."""
    columns = {entry.id: (column,) for column, entry in enumerate(classes)}
    found: list[tuple[int, ...]] = []
    for name in names:
        key, slash, _ = name.partition("/")
        if not slash or key not in columns:
            raise DataError(
                f"class {key!r}" if slash else "an image in no folder",
                expected=nearest_names(key, columns) if slash else "every image in the folder of its class",
                where=f"{storage.shown(url)}, {name}",
                next_step="move it, or list its class",
            )
        found.append(columns[key])
    return found


def _reassessed(
    file: LabelFile, names: Sequence[str], classes: tuple[ClassEntry, ...], url: str
) -> npt.NDArray[np.bool_]:
    """The classes that the file lists for each image, (n, C) bool."""
    if len(classes) != _REAL_CLASSES:
        raise file.fault("", f"{len(classes)} classes", f"{_REAL_CLASSES}: give `classes`, and a mapping to take fewer")
    order = np.array(sorted(range(len(classes)), key=lambda column: classes[column].id))  # number in the file -> column
    lists = file.json()
    if not isinstance(lists, list):
        raise file.fault("", f"a JSON {type(lists).__name__}", "a list of class numbers for each validation image")
    is_present = np.zeros((len(names), len(classes)), dtype=bool)
    for row, name in enumerate(names):
        match = _VALIDATION_NAME.fullmatch(name.rpartition("/")[2])
        if match is None or not 0 < int(match[1]) <= len(lists):
            raise DataError(
                f"image {name!r}",
                expected=f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(lists):08d}.JPEG",
                where=storage.shown(url),
                next_step="leave `real` out, or move the image",
            )
        number = int(match[1]) - 1
        numbers = lists[number]
        is_list = isinstance(numbers, list) and all(type(value) is int for value in numbers)
        if not is_list or not all(0 <= value < _REAL_CLASSES for value in numbers):
            raise file.fault(f"list {number}", f"{str(numbers)[:80]}", f"class numbers from 0 to {_REAL_CLASSES - 1}")
        is_present[row, order[np.array(numbers, dtype=np.int64)]] = True
    return is_present


def _records(parts: dict[str, _Part]) -> Records:
    first_rows = np.cumsum([0, *(part.num_images for part in parts.values())])[:-1]
    return Records(
        images=pa.array([path for part in parts.values() for path in part.paths], pa.string()),
        split_names=tuple(parts),
        splits=np.repeat(np.arange(len(parts), dtype=np.uint8), [len(part.paths) for part in parts.values()]),
        source_rows=np.concatenate(
            [first + part.rows for first, part in zip(first_rows, parts.values(), strict=True)]
        ).astype(np.uint64),
        positives=join_lists([part.positives for part in parts.values()]),
        negatives=join_lists([part.negatives for part in parts.values()]),
    )
