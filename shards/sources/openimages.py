"""Owns reading Open Images V2 to V7 as published: human-verified labels, machine labels, boxes, images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from dist_mlpl import storage
from dist_mlpl.data.shard_index import ClassLists
from dist_mlpl.errors import DataError
from dist_mlpl.settings import Settings
from shards.sources.base import Records, Source
from shards.sources.csv_blocks import CsvFile
from shards.sources.hierarchy import Closure, read_hierarchy
from shards.sources.image_ids import IdPlaces
from shards.sources.label_entries import EntryList, LabelLists, join_labels
from shards.sources.openimages_classes import read_classes
from shards.sources.openimages_images import SPLITS, Images, images_of_labels, read_image_lists
from shards.sources.openimages_labels import BOXES, HUMAN, MACHINE, LabelKind, LabelReader, needed_columns
from shards.sources.options import Names


class OpenImagesSettings(Settings):
    """Which files of Open Images to read, and how."""

    images: str = Field(description="folder of the images")
    classes: str = Field(description="the classes to keep: MIDs one a line, or MID,NAME; columns follow sorted MIDs")
    human: Names = Field((), description="files of human-verified image labels, of any splits")
    machine: Names = Field((), description="files of machine-generated image labels, kept apart with their confidence")
    boxes: Names = Field((), description="files of boxes; a box makes its class verified present")
    image_lists: Names = Field((), description="files of images, which give order, split and rotation")
    descriptions: str | None = Field(None, description="class names as MID,NAME")
    hierarchy: str | None = Field(None, description="JSON hierarchy; labels then imply others along its is-a edges")
    min_confidence: float = Field(0.0, ge=0, le=1, description="machine labels below it are dropped")
    unlabelled: Literal["drop", "keep"] = Field("drop", description="images without any label, machine labels included")
    use_rotation: bool = Field(True, description="take the images' rotation from the lists; false: they are upright")
    image_pattern: str = Field("{split}/{id}.jpg", description="an image's path below the folder")

    @field_validator("image_pattern")
    @classmethod
    def _is_path(cls, pattern: str) -> str:
        shown = pattern.replace("{split}", "train").replace("{id}", "0", 1)
        if "{id}" not in pattern or any(mark in shown for mark in ("{", "}", "\\", "://")):
            raise ValueError("{id} must stand in it once, and beside it no other field than {split}")
        if any(part in ("", ".", "..") for part in shown.split("/")) or not shown.lower().endswith((".jpg", ".jpeg")):
            raise ValueError("a path below the image folder that ends in .jpg")
        return pattern

    @model_validator(mode="after")
    def _has_labels(self) -> OpenImagesSettings:
        if not (self.human or self.machine or self.boxes):
            raise ValueError("one of human, machine and boxes must name a file")
        return self


class _Log:
    """What has been read so far, for the manifest."""

    def __init__(self) -> None:
        self.digests: dict[str, str | list[str]] = {}
        self.rows: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.strangers: set[str] = set()


def read_openimages(settings: OpenImagesSettings) -> Source:
    """Read Open Images as published in its releases V2 to V7.

    Human labels (1 verified present, 0 verified absent; all else unknown) come from `human` and `boxes`. Professionals'
    claims take precedence over the crowd's; if the claims that count disagree, the class stays unknown. Machine labels
    are kept apart, and only where no person judged the same class. Rows of other classes, and of images that are not
    listed, are dropped and counted.

    The source's order is that of `image_lists`, one file after the other. Without them it is that of sorted ids, the
    label files are read twice, and an image's split is the word in the name of its file, or of the file's folder:
    train, validation, val or test.

    Peak memory is about 15 bytes per label row, images included: some 3.5 GB for all of V6.

    Returns:
        The source. Its `arguments` has digests, options, rows read, labels implied, and rows dropped, by reason. For
        human labels and boxes together, and for machine labels, the rows read equal the labels kept (without those
        implied by the hierarchy) plus the rows dropped.

    Raises:
        ConfigError: without an image list, a label file whose name tells no split.
        DataError: a missing column, broken quoting, an id that is not 16 hexadecimal digits, an unknown source or
            subset, a confidence out of range, a class or an image listed twice (the message names file and line); an
            image with labels in two splits; no image left.
        StorageError: a file is missing or cannot be read.
    """
    log = _Log()
    classes, digests = read_classes(settings.classes, settings.descriptions)
    log.digests |= digests
    closure = None
    if settings.hierarchy is not None:
        hierarchy = read_hierarchy(settings.hierarchy)
        closure = hierarchy.closure([entry.id for entry in classes])
        log.digests["hierarchy"] = hierarchy.sha256
    images = _images(settings, log)
    labels = _labels(settings, images, [entry.id for entry in classes], closure, log)
    records = _records(settings, images, labels, log)
    return Source(
        name="openimages",
        images=storage.absolute(settings.images),
        classes=classes,
        unlisted="unknown",
        arguments=_arguments(settings, log, labels),
        records=records,
    )


def _files(settings: OpenImagesSettings) -> list[tuple[LabelKind, str]]:
    by_kind = ((HUMAN, settings.human), (BOXES, settings.boxes), (MACHINE, settings.machine))
    return [(kind, url) for kind, urls in by_kind for url in urls]


def _images(settings: OpenImagesSettings, log: _Log) -> Images:
    if not settings.image_lists:
        return images_of_labels(_files(settings))
    images, digests = read_image_lists(settings.image_lists)
    log.digests["image_lists"] = digests
    log.rows["images"] = len(images.ids)
    return images


def _labels(
    settings: OpenImagesSettings, images: Images, mids: Sequence[str], closure: Closure | None, log: _Log
) -> LabelLists:
    places = IdPlaces(images.ids)
    verified, machine = EntryList(), EntryList()
    digests: dict[str, list[str]] = {}
    for kind, url in _files(settings):
        entries = machine if kind is MACHINE else verified
        reader = LabelReader(kind, places, mids, min_confidence=settings.min_confidence)
        file = CsvFile(url, needed_columns(kind), what=f"the file of {kind.what}", option=kind.option)
        for part in file.map(reader):
            entries.add(part.entries)
            log.rows[kind.option] += part.num_rows
            log.dropped += part.dropped
            log.strangers |= part.strangers
        digests.setdefault(kind.option, []).append(file.sha256)
    log.digests |= {option: sorted(found) for option, found in digests.items()}  # file order is irrelevant
    labels = join_labels(verified.take_sorted(), machine.take_sorted(), num_images=len(images.ids), closure=closure)
    log.dropped += labels.dropped
    return labels


def _records(settings: OpenImagesSettings, images: Images, labels: LabelLists, log: _Log) -> Records:
    lists = (labels.positives, labels.negatives, labels.machine)
    counts = [np.diff(part.offsets) for part in lists]
    rows = np.arange(len(images.ids))
    if settings.unlabelled == "drop":
        rows = np.flatnonzero(counts[0] + counts[1] + counts[2])
        log.dropped += Counter(image_without_label=len(images.ids) - len(rows))
    if not len(rows):
        raise DataError(
            f"no label on any of {len(images.ids)} images",
            expected="labels of listed images and classes",
            where="; ".join(f"{count} rows are {reason}" for reason, count in log.dropped.items()),
            next_step="check that images, labels and classes are of one release",
        )
    kept = images.take(rows)
    # Rows left out have empty lists, so the values stay the same.
    positives, negatives, machine = (
        ClassLists(part.values, np.concatenate([part.offsets[rows], part.offsets[-1:]])) for part in lists
    )
    used = np.unique(kept.splits)
    return Records(
        images=kept.paths(settings.image_pattern),
        split_names=tuple(SPLITS[split] for split in used),
        splits=np.searchsorted(used, kept.splits).astype(np.uint8),
        source_rows=rows.astype(np.uint64),
        positives=positives,
        negatives=negatives,
        machine=machine if settings.machine else None,
        confidences=labels.confidences if settings.machine else None,
        rotations=kept.rotations if settings.use_rotation and kept.rotations.any() else None,
    )


def _arguments(settings: OpenImagesSettings, log: _Log, labels: LabelLists) -> dict[str, Any]:
    has_verified = np.diff(labels.positives.offsets) + np.diff(labels.negatives.offsets) > 0
    return {
        "sha256": log.digests,
        "options": settings.model_dump(include={"min_confidence", "unlabelled", "use_rotation", "image_pattern"}),
        "rows": dict(sorted(log.rows.items())),
        "labels": {name: len(getattr(labels, name).values) for name in ("positives", "negatives", "machine")},
        "implied": dict(sorted(labels.implied.items())),
        "dropped": dict(sorted(log.dropped.items())),
        "unknown_classes": len(log.strangers),  # distinct MIDs in the label files that are not in the class list
        "images": {"listed": len(has_verified), "with_verified_label": int(has_verified.sum())},
    }
