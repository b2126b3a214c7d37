"""Owns reading VG-200 and VG-500: lists of Visual Genome images and a JSON file of the classes present."""

from __future__ import annotations

from pydantic import Field

from dist_mlpl import storage
from dist_mlpl.data.manifest import MAX_CLASSES, ClassEntry
from dist_mlpl.settings import Settings
from shards.sources.base import Record, Records, Source
from shards.sources.files import ImagePaths, LabelFile, read_class_names, read_file
from shards.sources.options import Names


class VgSettings(Settings):
    """Files and options of the multi-label subsets of Visual Genome."""

    images: str = Field(description="folder of the images, or of `folders`")
    labels: str = Field(description="JSON of class numbers for each image: vg_category_200_labels_index.json")
    lists: dict[str, str] = Field(min_length=1, description="a split's images, one name a line: train_list_500.txt")
    folders: Names = Field((), description="folders below `images` that share the images: VG_100K,VG_100K_2")
    num_classes: int = Field(200, ge=1, le=MAX_CLASSES, description="classes, numbered from 0")
    classes: str | None = Field(None, description="class names, one a line; without it a class is named by its number")


def read_vg(settings: VgSettings) -> Source:
    """Read the labels of VG-200 or VG-500: a class is present where the JSON lists its number, else absent.

    Returns:
        Images in the order of the lists, one split after the other; classes by number.

    Raises:
        DataError: an image twice, without labels or in none of the folders, a class number out of range, or a number of
            names other than `num_classes`; the message names file and place.
        StorageError: a file or folder is missing.
    """
    names = [str(number) for number in range(settings.num_classes)]
    classes = tuple(ClassEntry(id=name, name=name) for name in names)
    digests: dict[str, str] = {}
    if settings.classes is not None:
        classes, file = read_class_names(settings.classes, option="classes")
        digests["classes_sha256"] = file.sha256
        if len(classes) != settings.num_classes:
            raise file.fault("", f"{len(classes)} names", f"{settings.num_classes}, the option `num_classes`")
    labels = read_file(settings.labels, what="the labels", option="labels")
    present = _present(labels, settings.num_classes)
    folder_of = _folders(settings)
    paths = ImagePaths()
    records: list[Record] = []
    list_digests = {}
    for split, url in settings.lists.items():
        file = read_file(url, what="the list of images", option=f"lists.{split}")
        list_digests[split] = file.sha256
        for number, name in file.lines():
            if name not in present:
                raise file.fault(f"line {number}", f"image {name!r}", f"one with labels in {storage.name(labels.url)}")
            if folder_of is not None and name not in folder_of:
                where = f"one in {', '.join(settings.folders)}"
                raise file.fault(f"line {number}", f"image {name!r}", where)
            path = name if folder_of is None else f"{folder_of[name]}/{name}"
            paths.add(path, url, f"line {number}")
            records.append(Record(path, split, present[name], (), source_row=len(records)))
    return Source(
        name="vg",
        images=storage.absolute(settings.images),
        classes=classes,
        unlisted="absent",
        arguments={**digests, "labels_sha256": labels.sha256, "lists_sha256": list_digests, "dropped": {}},
        records=Records.of(records),
    )


def _present(file: LabelFile, num_classes: int) -> dict[str, tuple[int, ...]]:
    document = file.json()
    if not isinstance(document, dict):
        raise file.fault("", f"a JSON {type(document).__name__}", "a list of class numbers for each image name")
    present = {}
    for name, numbers in document.items():
        is_list = isinstance(numbers, list) and all(type(number) is int for number in numbers)
        if not is_list or not all(0 <= number < num_classes for number in numbers):
            expected = f"class numbers from 0 to {num_classes - 1}"
            raise file.fault(f"image {name!r}", f"{str(numbers)[:80]}", expected)
        present[name] = tuple(sorted(set(numbers)))
    return present


def _folders(settings: VgSettings) -> dict[str, str] | None:
    """The folder of every image by name; None if all images are in one folder."""
    if not settings.folders:
        return None
    folder_of: dict[str, str] = {}
    for folder in settings.folders:
        place = storage.join(settings.images, folder)
        names = storage.list_names(place)
        if not names:
            raise storage.missing(place, what="the folder", next_step="correct `folders`")
        folder_of |= {name: folder.strip("/") for name in names if name not in folder_of}
    return folder_of
