"""Owns reading COCO: instances JSON files, one for each split."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dist_mlpl import storage
from dist_mlpl.data.manifest import ClassEntry
from dist_mlpl.errors import ConfigError, DataError, nearest_names
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN, Targets, Unlisted
from dist_mlpl.settings import Settings
from shards.sources.base import Source
from shards.sources.dense import dense_records
from shards.sources.files import ImagePaths, LabelFile, class_entries, read_file
from shards.sources.options import Meaning


class CocoSettings(Settings):
    """Files and options of COCO, and of data sets in its format."""

    images: str = Field(description="folder of the images")
    annotations: dict[str, str] = Field(min_length=1, description="the instances JSON of a split")
    folders: dict[str, str] = Field({}, description="folder of a split's images below `images`, say train2014")
    without_objects: Literal["keep", "drop"] = Field(
        "keep", description="images without any annotation: 82,783 training images with them in 2014, 82,081 without"
    )
    crowd: Meaning = Field("present", description="a class that an image has only as a crowd (iscrowd 1)")


class _Instances(NamedTuple):
    """The parts of one JSON file that are used."""

    file: LabelFile
    images: list[tuple[int, str]]  # (id, file name)
    annotations: list[tuple[int, int, int]]  # (image id, category id, iscrowd)
    categories: dict[int, str]


def read_coco(settings: CocoSettings) -> Source:
    """Read COCO's labels: a class is present where an object of it is annotated, else absent.

    Returns:
        Images in the order of the files' `images`, one split after the other; classes in the order of their ids.

    Raises:
        ConfigError: `folders` names a split without annotations.
        DataError: not the instances format, an id that no image or category has, an image twice, files with different
            categories (the message names file and entry), or no image left.
        StorageError: a file is missing.

    Source: the reference code of SST, SARB and DSRB keeps images without objects and counts crowds.
    """
    _check_folders(settings)
    categories: dict[int, str] = {}
    paths, images, splits = ImagePaths(), [], []
    parts: list[Targets] = []
    crowds_only = 0
    is_annotated: list[npt.NDArray[np.bool_]] = []
    digests = {}
    for split, url in settings.annotations.items():
        part = _read(url, split)
        if categories and part.categories != categories:
            raise part.file.fault("categories", "other categories than in the file before", "the same in every file")
        categories = part.categories
        folder = settings.folders.get(split, "").strip("/")
        for number, (_, name) in enumerate(part.images):
            images.append(paths.add(f"{folder}/{name}" if folder else name, url, f"images[{number}]"))
        splits += [split] * len(part.images)
        targets, is_any, num_crowds = _targets(part, settings.crowd)
        parts.append(targets)
        is_annotated.append(is_any)
        crowds_only += num_crowds
        digests[split] = part.file.sha256
    is_kept = np.concatenate(is_annotated) | (settings.without_objects == "keep")
    if not is_kept.any():
        raise DataError(
            "no image with an object", expected="at least one", where=f"{len(images)} images in {len(parts)} files",
            next_step="give the annotations that belong to these images",
        )  # fmt: skip
    dropped = {
        "images_without_objects": int((~is_kept).sum()),
        "crowd_only_labels": crowds_only,
    }
    unlisted: Unlisted = "unknown" if settings.crowd == "unknown" else "absent"
    return Source(
        name="coco",
        images=storage.absolute(settings.images),
        classes=tuple(ClassEntry(id=str(key), name=categories[key]) for key in sorted(categories)),
        unlisted=unlisted,
        arguments={
            "annotations_sha256": digests,
            "without_objects": settings.without_objects,
            "crowd": settings.crowd,
            "dropped": {reason: count for reason, count in dropped.items() if count},
        },
        records=dense_records(images, splits, np.concatenate(parts), unlisted=unlisted, is_kept=is_kept),
    )


def _check_folders(settings: CocoSettings) -> None:
    for split in settings.folders:
        if split not in settings.annotations:
            raise ConfigError(
                f"folders.{split}", expected=nearest_names(split, settings.annotations), where="source coco",
                next_step="name a split that has annotations",
            )  # fmt: skip


def _slim(entry: dict[str, Any]) -> Any:
    """Drop outlines from parsed objects, which are nearly all of the 450 MB of instances_train2014.json."""
    if "segmentation" in entry or "bbox" in entry:
        return {key: entry[key] for key in ("image_id", "category_id", "iscrowd") if key in entry}
    return entry


def _read(url: str, split: str) -> _Instances:
    file = read_file(url, what="the instances file", option=f"annotations.{split}")
    document = file.json(object_hook=_slim)
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise file.fault("", f"no list `{key}`", "an instances file of COCO: images, annotations, categories")
    if not document["images"]:
        raise file.fault("images", "no image", "at least one")

    def fields(place: str, number: int, keys: tuple[str, ...], kinds: tuple[type, ...]) -> list[Any]:
        entry = document[place][number]
        found = [entry.get(key) if isinstance(entry, dict) else None for key in keys]
        if [type(value) for value in found] != list(kinds):
            told = ", ".join(f"{key} {value!r}" for key, value in zip(keys, found, strict=True))
            names = ", ".join(f"{key} ({kind.__name__})" for key, kind in zip(keys, kinds, strict=True))
            raise file.fault(f"{place}[{number}]", told, names)
        return found

    categories: dict[int, str] = {}
    for number in range(len(document["categories"])):
        key, name = fields("categories", number, ("id", "name"), (int, str))
        if key in categories:
            raise file.fault(f"categories[{number}]", f"id {key} again", "every id once")
        categories[key] = name
    class_entries([str(key) for key in categories], list(categories.values()), url)
    images = [tuple(fields("images", i, ("id", "file_name"), (int, str))) for i in range(len(document["images"]))]
    annotations = []
    for number in range(len(document["annotations"])):
        image, category = fields("annotations", number, ("image_id", "category_id"), (int, int))
        crowd = document["annotations"][number].get("iscrowd", 0)
        if crowd not in (0, 1):
            raise file.fault(f"annotations[{number}]", f"iscrowd {crowd!r}", "0 or 1")
        annotations.append((image, category, int(crowd)))
    return _Instances(file, images, annotations, categories)


def _targets(part: _Instances, crowd: Meaning) -> tuple[Targets, npt.NDArray[np.bool_], int]:
    """(n, C) labels; (n,) bool, whether an image has any annotation; the number of labels based on crowds only.

    The number is 0 if such labels count as present.
    """
    rows: dict[int, int] = {}
    for row, (key, _) in enumerate(part.images):
        if rows.setdefault(key, row) != row:
            raise part.file.fault(f"images[{row}]", f"id {key} again, as in images[{rows[key]}]", "every id once")
    columns = {key: column for column, key in enumerate(sorted(part.categories))}
    has_object = np.zeros((2, len(rows), len(columns)), dtype=bool)  # without crowds, in crowds
    for number, (image, category, is_crowd) in enumerate(part.annotations):
        if image not in rows or category not in columns:
            found = f"image_id {image}" if image not in rows else f"category_id {category}"
            raise part.file.fault(f"annotations[{number}]", found, "an id listed in this file")
        has_object[is_crowd, rows[image], columns[category]] = True
    only_crowd = has_object[1] & ~has_object[0]
    targets = np.where(has_object[0], PRESENT, ABSENT).astype(np.int8)
    targets[only_crowd] = {"absent": ABSENT, "unknown": UNKNOWN, "present": PRESENT}[crowd]
    is_annotated = has_object[0].any(axis=1) | has_object[1].any(axis=1)
    return targets, is_annotated, 0 if crowd == "present" else int(only_crowd.sum())
