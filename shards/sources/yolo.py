"""Owns reading YOLO folders: `images/SPLIT/x.jpg` beside `labels/SPLIT/x.txt`, with classes by number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import yaml
from pydantic import Field

from dist_mlpl import storage
from dist_mlpl.data.manifest import ClassEntry
from dist_mlpl.labels import ABSENT, PRESENT
from dist_mlpl.settings import Settings
from shards.sources.base import Source
from shards.sources.dense import dense_records
from shards.sources.files import (
    ImagePaths,
    LabelFile,
    class_entries,
    list_images,
    read_file,
    read_many,
    sha256_of_many,
)


class YoloSettings(Settings):
    """Files and options of data sets in YOLO's folders."""

    images: str = Field(description="folder of the images, each split in a folder of its own below it")
    labels: str = Field(description="folder of the .txt files, laid out as `images` is")
    classes: str = Field(description="class names: the set's YAML with `names`, or a text file with one a line")
    folders: dict[str, str] = Field(
        {"train": "train", "val": "val"}, min_length=1, description="folder of a split below `images` and `labels`"
    )


def read_yolo(settings: YoloSettings) -> Source:
    """Read YOLO's labels: a class is present where a line of the image's .txt begins with its number, else absent.

    An image without a .txt, or with an empty one, has no object.

    Returns:
        Images sorted by path, one split after the other; classes in the order of their numbers, with names as ids.

    Raises:
        DataError: a class number out of range or a line that is not numbers (the message names file and line), or no
            image.
        StorageError: a file or folder is missing.
    """
    names_file = read_file(settings.classes, what="the class names", option="classes")
    classes = _classes(names_file)
    paths = ImagePaths()
    images: list[str] = []
    splits: list[str] = []
    places: list[tuple[int, str]] = []  # row, URL of its labels
    num_other = num_strangers = 0
    for split, folder in settings.folders.items():
        place = storage.join(settings.images, folder)
        found, others = list_images(place, option=f"folders.{split}")
        labels = _label_files(settings, split)
        num_other += others
        for name in found:
            label = f"{name.rpartition('.')[0]}.txt"
            if label in labels:
                places.append((len(images), storage.join(settings.labels, folder, label)))
            images.append(paths.add("/".join(filter(None, (folder.strip("/"), name))), place, name))
            splits.append(split)
        num_strangers += len(labels - {f"{name.rpartition('.')[0]}.txt" for name in found})
    files = list(read_many([url for _, url in places], what="the labels", option="labels"))
    targets = np.full((len(images), len(classes)), ABSENT, dtype=np.int8)
    for (row, _), file in zip(places, files, strict=True):
        targets[row, _columns(file, len(classes))] = PRESENT
    dropped = {"labels_without_image": num_strangers, "other_files": num_other}
    return Source(
        name="yolo",
        images=storage.absolute(settings.images),
        classes=classes,
        unlisted="absent",
        arguments={
            "classes_sha256": names_file.sha256,
            "labels_sha256": sha256_of_many(files),
            "dropped": {reason: count for reason, count in dropped.items() if count},
        },
        records=dense_records(images, splits, targets, unlisted="absent"),
    )


def _label_files(settings: YoloSettings, split: str) -> set[str]:
    folder = storage.join(settings.labels, settings.folders[split])
    try:
        return {name for name in storage.list_files(folder) if name.endswith(".txt")}
    except FileNotFoundError as error:
        raise storage.missing(folder, what="the folder of labels", next_step="correct `labels`") from error


def _classes(file: LabelFile) -> tuple[ClassEntry, ...]:
    if not file.url.lower().endswith((".yaml", ".yml")):
        names: Sequence[object] = [line for _, line in file.lines()]
        return class_entries([str(name) for name in names], [str(name) for name in names], file.url)
    try:
        document = yaml.safe_load(file.text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two: impossible dates, nested too deep
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else ""
        raise file.fault(place, f"not YAML: {getattr(error, 'problem', error)}", "YAML with `names`") from error
    found = document.get("names") if isinstance(document, dict) else None
    if isinstance(found, dict):
        if sorted(found, key=str) != sorted(range(len(found)), key=str):
            raise file.fault("names", f"numbers {list(found)[:5]} ...", f"0 to {len(found) - 1}, each once")
        found = [found[number] for number in range(len(found))]
    if not isinstance(found, list) or not found:
        raise file.fault("names", f"{found!r}", "a list of class names, or one for each number from 0")
    for number, name in enumerate(found):
        if not isinstance(name, str | int | float) or isinstance(name, bool):  # YAML reads a bare `no` as False
            raise file.fault("names", f"{name!r} for class {number}", "a name; in quotes where YAML takes it otherwise")
    return class_entries([str(name) for name in found], [str(name) for name in found], file.url)


def _columns(file: LabelFile, num_classes: int) -> list[int]:
    """The class columns of one image, ascending; boxes and outlines are only checked to be numbers."""
    columns = set()
    for number, line in enumerate(file.text().split("\n"), 1):
        cells = line.split()
        if not cells:
            continue
        try:
            column, *_ = int(cells[0]), *map(float, cells[1:])
        except ValueError as error:
            raise file.fault(f"line {number}", f"{line.strip()[:80]!r}", "a class number, then numbers") from error
        if not 0 <= column < num_classes:
            raise file.fault(f"line {number}", f"class {column}", f"0 to {num_classes - 1}, as `classes` has names")
        columns.add(column)
    return sorted(columns)
