"""Owns reading PASCAL VOC: lists of images and one XML file per image, for one or several years."""

from __future__ import annotations

from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from pydantic import Field

from dist_mlpl import storage
from dist_mlpl.data.manifest import ClassEntry
from dist_mlpl.errors import nearest_names
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN, Unlisted
from dist_mlpl.settings import Settings
from shards.sources.base import Source
from shards.sources.dense import dense_records
from shards.sources.files import ImagePaths, LabelFile, read_class_names, read_file, read_many, sha256_of_many
from shards.sources.options import Meaning, Names

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class VocSettings(Settings):
    """Files and options of PASCAL VOC, and of data sets in its format."""

    images: str = Field(description="the folder VOCdevkit, which holds VOC2007/JPEGImages, VOC2007/Annotations, ...")
    lists: dict[str, Names] = Field(
        {"train": ("VOC2007/trainval",), "test": ("VOC2007/test",)},
        min_length=1,
        description="a split's lists, YEAR/LIST for YEAR/ImageSets/Main/LIST.txt: VOC2007/trainval,VOC2012/trainval",
    )
    classes: str | None = Field(None, description="class names, one a line; without it the 20 of VOC")
    difficult: Meaning = Field("absent", description="a class that an image has only as objects marked difficult")


class _Image(NamedTuple):
    path: str
    split: str
    annotation: str  # URL of the XML


def read_voc(settings: VocSettings) -> Source:
    """Read VOC's labels: a class is present where an object of it is annotated, else absent.

    Returns:
        Images in the order of the lists, one split after the other; classes in the order of their list.

    Raises:
        DataError: an image listed twice, a list of a single class, unreadable XML, or an unknown class; the message
            names file and place.
        StorageError: a file is missing.

    Source: the reference code of SST, SARB and DSRB skips difficult objects, so a class with no others is absent.
    """
    classes = tuple(ClassEntry(id=name, name=name) for name in VOC_CLASSES)
    digests = {}
    if settings.classes is not None:
        classes, names = read_class_names(settings.classes, option="classes")
        digests["classes_sha256"] = names.sha256
    images, lists = _listed(settings)
    columns = {entry.id: column for column, entry in enumerate(classes)}
    targets = np.full((len(images), len(classes)), ABSENT, dtype=np.int8)
    num_difficult = 0
    files = []
    for row, file in enumerate(read_many([image.annotation for image in images], what="the labels", option="images")):
        plain, difficult = _objects(file, columns)
        targets[row, sorted(plain)] = PRESENT
        only = sorted(difficult - plain)
        targets[row, only] = {"absent": ABSENT, "unknown": UNKNOWN, "present": PRESENT}[settings.difficult]
        num_difficult += len(only)
        files.append(file)
    unlisted: Unlisted = "unknown" if settings.difficult == "unknown" else "absent"
    dropped = {"difficult_only_labels": num_difficult} if settings.difficult != "present" else {}
    return Source(
        name="voc",
        images=storage.absolute(settings.images),
        classes=classes,
        unlisted=unlisted,
        arguments={
            **digests,
            "lists_sha256": lists,
            "annotations_sha256": sha256_of_many(files),
            "difficult": settings.difficult,
            "dropped": {reason: count for reason, count in dropped.items() if count},
        },
        records=dense_records(
            [image.path for image in images], [image.split for image in images], targets, unlisted=unlisted
        ),
    )


def _listed(settings: VocSettings) -> tuple[list[_Image], dict[str, list[str]]]:
    """The images in order, and the digests of each split's lists."""
    paths, images = ImagePaths(), []
    digests: dict[str, list[str]] = {}
    for split, names in settings.lists.items():
        for name in names:
            year, _, part = name.rpartition("/")
            root = storage.join(settings.images, year) if year else settings.images
            file = read_file(
                storage.join(root, "ImageSets/Main", f"{part}.txt"), what="the list of images", option=f"lists.{split}"
            )
            digests.setdefault(split, []).append(file.sha256)
            for number, line in file.lines():
                if len(line.split()) > 1:
                    raise file.fault(f"line {number}", f"{line!r}", "one image a line: not the list of one class")
                path = f"{year}/JPEGImages/{line}.jpg" if year else f"JPEGImages/{line}.jpg"
                paths.add(path, file.url, f"line {number}")
                images.append(_Image(path, split, storage.join(root, "Annotations", f"{line}.xml")))
    return images, digests


def _objects(file: LabelFile, columns: dict[str, int]) -> tuple[set[int], set[int]]:
    """Class columns of the objects that are not difficult, and of those that are."""
    if b"<!DOCTYPE" in file.content or b"<!ENTITY" in file.content:  # entities can expand a small file without bound
        raise file.fault("", "a document type", "an annotation of VOC, which has none")
    try:
        root = ElementTree.fromstring(file.content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: an unknown encoding
        raise file.fault("", f"not XML: {error}", "an annotation of VOC") from error
    if root.tag != "annotation":
        raise file.fault("", f"a document <{root.tag}>", "<annotation>")
    found: tuple[set[int], set[int]] = (set(), set())
    for number, entry in enumerate(root.findall("object"), 1):
        name = (entry.findtext("name") or "").strip()
        difficult = (entry.findtext("difficult") or "0").strip()
        if name not in columns:
            raise file.fault(f"object {number}", f"unknown class {name!r}", nearest_names(name, columns))
        if difficult not in ("0", "1"):
            raise file.fault(f"object {number}", f"difficult {difficult!r}", "0 or 1")
        found[int(difficult)].add(columns[name])
    return found
