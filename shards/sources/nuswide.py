"""Owns reading NUS-WIDE with its 81 concepts: the official lists, or a CSV of images that can still be downloaded."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from dist_mlpl import storage
from dist_mlpl.data.manifest import ClassEntry
from dist_mlpl.errors import DataError, nearest_names
from dist_mlpl.labels import ABSENT, PRESENT, Targets
from dist_mlpl.settings import Settings
from shards.sources.base import Source
from shards.sources.dense import dense_records
from shards.sources.files import ImagePaths, LabelFile, class_entries, read_class_names, read_file, read_many

_SPLITS = {"train": "Train", "test": "Test"}
_COLUMNS = ("filepath", "label", "split_name")


class NusWideSettings(Settings):
    """Files and options of NUS-WIDE: `annotations` and `classes`, or `labels`."""

    images: str = Field(description="folder of the images: Flickr")
    annotations: str | None = Field(None, description="folder of ImageList and Groundtruth/TrainTestLabels")
    labels: str | None = Field(None, description="instead: a CSV filepath,label,split_name, labels as ['sky', 'sun']")
    classes: str | None = Field(None, description="Concepts81.txt; with `labels`, without it, the names there, sorted")
    without_labels: Literal["keep", "drop"] = Field("keep", description="images with none of the concepts")
    flat: bool = Field(False, description="the images lie in one folder: actor\\0001_2124494179.jpg without actor")

    @model_validator(mode="after")
    def _check(self) -> NusWideSettings:
        if (self.annotations is None) == (self.labels is None):
            raise ValueError("give `annotations` or `labels`, one of the two")
        if self.annotations is not None and self.classes is None:
            raise ValueError("give `classes`, Concepts81.txt, with `annotations`")
        return self


class _Labels(NamedTuple):
    images: list[str]
    splits: list[str]
    classes: tuple[ClassEntry, ...]
    targets: Targets  # (n, C)
    digests: dict[str, Any]


def read_nuswide(settings: NusWideSettings) -> Source:
    """Read NUS-WIDE's labels: a concept is present where it is marked, else absent.

    Returns:
        Images in the order of the lists, train before test, or of the CSV; classes in the order of their list.

    Raises:
        DataError: lists and labels of different lengths, a label that is not 0 or 1, an unknown concept, an image twice
            (the message names file and line), or no image left.
        StorageError: a file is missing.
    """
    found = _from_csv(settings) if settings.labels is not None else _from_lists(settings)
    is_labelled = (found.targets == PRESENT).any(axis=1)
    is_kept = is_labelled | (settings.without_labels == "keep")
    if not is_kept.any():
        raise DataError(
            "no image with a concept", expected="at least one", where="source nuswide",
            next_step="give the labels that belong to these images",
        )  # fmt: skip
    num_dropped = int((~is_kept).sum())
    return Source(
        name="nuswide",
        images=storage.absolute(settings.images),
        classes=found.classes,
        unlisted="absent",
        arguments={
            **found.digests,
            "without_labels": settings.without_labels,
            "dropped": {"images_without_labels": num_dropped} if num_dropped else {},
        },
        records=dense_records(found.images, found.splits, found.targets, unlisted="absent", is_kept=is_kept),
    )


def _path(listed: str, *, flat: bool) -> str:
    path = listed.replace("\\", "/")  # the official lists use backslashes
    return path.rpartition("/")[2] if flat else path


def _from_lists(settings: NusWideSettings) -> _Labels:
    root = settings.annotations or ""
    classes, names = read_class_names(settings.classes or "", option="classes")
    paths, images, splits = ImagePaths(), [], []
    parts, list_digests = [], {}
    for split, part in _SPLITS.items():
        url = storage.join(root, "ImageList", f"{part}Imagelist.txt")
        listed = read_file(url, what="the list of images", option="annotations")
        lines = listed.lines()
        for number, line in lines:
            images.append(paths.add(_path(line, flat=settings.flat), url, f"line {number}"))
        splits += [split] * len(lines)
        places = [
            storage.join(root, "Groundtruth/TrainTestLabels", f"Labels_{entry.id}_{part}.txt") for entry in classes
        ]
        targets = np.empty((len(lines), len(classes)), dtype=np.int8)
        digests = []
        for column, file in enumerate(read_many(places, what="the labels of a concept", option="annotations")):
            targets[:, column] = _marks(file, len(lines), listed)
            digests.append(file.sha256)
        parts.append(targets)
        list_digests[split] = {"list": listed.sha256, "labels": storage.sha256_of_bytes("".join(digests).encode())}
    return _Labels(
        images, splits, classes, np.concatenate(parts), {"classes_sha256": names.sha256, "lists_sha256": list_digests}
    )


def _marks(file: LabelFile, num_images: int, listed: LabelFile) -> Targets:
    """Labels of one concept, (num_images,) int8."""
    cells = file.content.split()
    if set(cells) - {b"0", b"1"}:
        number, cell = next((number, cell) for number, cell in enumerate(cells, 1) if cell not in (b"0", b"1"))
        raise file.fault(f"line {number}", f"{cell.decode(errors='replace')!r}", "0 or 1")
    if len(cells) != num_images:
        raise file.fault("", f"{len(cells)} lines", f"{num_images}, as many as images in {storage.name(listed.url)}")
    return np.where(np.array(cells, dtype="S1") == b"1", PRESENT, ABSENT).astype(np.int8)


def _from_csv(settings: NusWideSettings) -> _Labels:
    url = settings.labels or ""
    file = read_file(url, what="the labels", option="labels")
    rows = file.rows(_COLUMNS)
    labels = [_names(file, line, cells[1]) for line, cells in rows]
    digests = {"labels_sha256": file.sha256}
    if settings.classes is None:
        sorted_names = sorted({name for names in labels for name in names})
        classes = class_entries(sorted_names, sorted_names, url)
    else:
        classes, names_file = read_class_names(settings.classes, option="classes")
        digests["classes_sha256"] = names_file.sha256
    columns = {entry.id: column for column, entry in enumerate(classes)}
    paths = ImagePaths()
    images = [paths.add(_path(cells[0], flat=settings.flat), url, f"line {line}") for line, cells in rows]
    targets = np.full((len(rows), len(classes)), ABSENT, dtype=np.int8)
    for row, ((line, _), names) in enumerate(zip(rows, labels, strict=True)):
        for name in names:
            if name not in columns:
                raise file.fault(f"line {line}", f"unknown concept {name!r}", nearest_names(name, columns))
            targets[row, columns[name]] = PRESENT
    return _Labels(images, [cells[2] for _, cells in rows], classes, targets, digests)


def _names(file: LabelFile, line: int, text: str) -> Sequence[str]:
    """Parse names from a list in Python syntax."""
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise file.fault(f"line {line}", f"label {text[:80]!r}", "a list like ['sky', 'sun']")
    return names
