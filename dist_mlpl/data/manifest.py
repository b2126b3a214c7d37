"""Owns `manifest.json`: the classes, splits and shards of a packed data set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from dist_mlpl import storage
from dist_mlpl.errors import ManifestError, nearest_names
from dist_mlpl.labels import Unlisted
from dist_mlpl.settings import Settings

FORMAT = 1
FILE_NAME = "manifest.json"
MAX_CLASSES = 1 << 16  # the index stores class columns as uint16


class ClassEntry(Settings):
    """One class; its position in the list is its column in `targets`."""

    id: str  # the stable key, such as a MID, a COCO id or the name itself
    name: str  # for display; may repeat


class ShardEntry(Settings):
    """One shard, in the manifest's folder or in `Manifest.tars`, and its index, always in the manifest's folder."""

    file: str = Field(pattern=r"^[\w-]+(\.[\w-]+)+$")  # a plain name, which cannot point outside the folder
    index: str = Field(pattern=r"^[\w-]+(\.[\w-]+)+$")
    num_samples: int = Field(ge=1)
    num_bytes: int = Field(ge=1)  # size of the tar
    sha256: str = ""  # digest of the tar; empty if it was indexed in place and never read whole
    index_sha256: str
    folder: str = Field(default="", exclude=True)  # folder URL of the index, where sets are mixed in memory
    tars: str = Field(default="", exclude=True)  # folder URL of the tar, likewise


class Split(Settings):
    """The shards of one split, in the order over which a sample's `index` counts."""

    num_samples: int
    num_bytes: int
    shards: tuple[ShardEntry, ...]

    @classmethod
    def of(cls, shards: Iterable[ShardEntry]) -> Split:
        """A split of these shards, with its totals computed."""
        listed = tuple(shards)
        return cls(
            num_samples=sum(entry.num_samples for entry in listed),
            num_bytes=sum(entry.num_bytes for entry in listed),
            shards=listed,
        )


class SourceEntry(Settings):
    """The inputs that the shards were made from; nothing here depends on where those lay."""

    name: str
    arguments: dict[str, Any]
    digest: str  # sha256 over the classes, records and image sizes


class Extension(SourceEntry):
    """An addition to a finished set."""

    version: str  # version of dist-mlpl that added it
    num_samples: int
    first_source_row: int  # source row, in the extended set, of the extension's own row 0
    first_shards: dict[str, int]  # by split, position of its first shard in the list


class Packing(Settings):
    """How the shards were made."""

    seed: int
    max_side: int | None = Field(None, ge=1)  # in pixels; larger images were resized; None: no resizing
    quality: int = Field(90, ge=1, le=100)  # JPEG quality of images that were resized, turned or converted
    convert: bool = False  # whether images in other formats became JPEGs; otherwise they were left out
    decode: bool = True  # whether undecodable images were left out; otherwise only JPEG markers were checked
    target_shard_bytes: int = Field(ge=1)


class Manifest(Settings):
    """A packed data set: classes, splits, shards.

    `url` (the folder) and `digest` (sha256 of the bytes of manifest.json) are set by `load_manifest` and
    `write_manifest` and are not part of the document.
    """

    format: Literal[1] = 1
    version: str  # version of dist-mlpl that packed it
    classes: tuple[ClassEntry, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    classes_sha256: str
    unlisted: Unlisted  # what a class in neither list of a sample means
    group_size_hint: int = 8
    splits: dict[str, Split]
    source: SourceEntry
    extensions: tuple[Extension, ...] = ()  # added later, in this order; left out of the document when empty
    packing: Packing | None  # None: existing tars, indexed as they are
    tars: str = ""  # folder URL of the tars if it is not the manifest's own; left out of the document when empty
    skipped: dict[str, int] = Field(default_factory=dict)  # number of unreadable images by reason
    url: str = Field(default="", exclude=True)
    digest: str = Field(default="", exclude=True)
    # By split, (number of shards, weight) of each set of a mixture; empty for a set by itself.
    parts: dict[str, tuple[tuple[int, float], ...]] = Field(default_factory=dict, exclude=True)

    @property
    def tars_url(self) -> str:
        """Folder URL of the tars."""
        return self.tars or self.url

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.classes)

    @property
    def class_ids(self) -> tuple[str, ...]:
        """The C class ids in column order."""
        return tuple(entry.id for entry in self.classes)

    @property
    def place(self) -> str:
        """The manifest's URL for messages, without secrets."""
        return ", ".join(storage.shown(url) for url in self.url.split(", "))

    def split(self, name: str) -> Split:
        """The split of this name.

        Raises:
            ManifestError: no such split; the message lists the nearest names.
        """
        if name not in self.splits:
            raise ManifestError(
                f"no split named {name!r}",
                expected=nearest_names(name, self.splits),
                where=self.place or "manifest",
                next_step="correct the split's name, pack the data set with that split, or judge on a part of train: "
                "data.held_out_fraction 0.2 and data.eval_split held_out",
            )
        return self.splits[name]

    def shard_sizes(self, split: str) -> list[int]:
        """Number of samples in each shard of a split, in manifest order."""
        return [entry.num_samples for entry in self.split(split).shards]

    def before(self, number: int) -> Manifest:
        """The set as it was before extension `number` was added: its splits and extensions, with today's classes."""
        later = self.extensions[number:]
        splits = {}
        for name, split in self.splits.items():
            ends = [extension.first_shards[name] for extension in later if name in extension.first_shards]
            if kept := split.shards[: min(ends, default=len(split.shards))]:
                splits[name] = Split.of(kept)
        return self.model_copy(update={"splits": splits, "extensions": self.extensions[:number]})

    def shard_url(self, entry: ShardEntry) -> str:
        """URL of the tar."""
        return storage.join(entry.tars or self.tars_url, entry.file)

    def index_url(self, entry: ShardEntry) -> str:
        """URL of the tar's index."""
        return storage.join(entry.folder or self.url, entry.index)


def classes_digest(classes: Sequence[ClassEntry]) -> str:
    """sha256 over the ordered class ids as compact JSON: equal digests mean equal columns."""
    return storage.sha256_of_bytes(json.dumps([entry.id for entry in classes], separators=(",", ":")).encode())


def manifest_url(url: str) -> str:
    """URL of manifest.json, given that or its folder."""
    return url if storage.name(url) == FILE_NAME else storage.join(url, FILE_NAME)


def load_manifest(url: str) -> Manifest:
    """Read and check a manifest.

    Args:
        url: the folder, or manifest.json itself.

    Raises:
        ManifestError: missing, not JSON, of another format, or inconsistent.
        StorageError: it could not be read.
    """
    where = storage.absolute(manifest_url(url))
    place = storage.shown(where)
    try:
        content = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise ManifestError(
            "no manifest",
            expected=f"{FILE_NAME}, which `dist-mlpl shards build` writes last",
            where=place,
            next_step="check the URL; if packing was interrupted, run it again",
        ) from error
    document = _parse(content, place)
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise _wrong("; ".join(faults[:3]), expected=f"a manifest of format {FORMAT}", where=place) from error
    _check(manifest, place)
    return manifest.model_copy(update={"url": storage.parent(where), "digest": storage.sha256_of_bytes(content)})


def write_manifest(manifest: Manifest, url: str, *, scratch: str | None = None) -> Manifest:
    """Write manifest.json atomically into a folder; the caller has written every shard that it lists.

    Args:
        manifest: to write.
        url: the folder.
        scratch: see `storage.create_file`.

    Returns:
        The manifest with its `url` and `digest`.

    Raises:
        ManifestError: the manifest is inconsistent.
        StorageError: it could not be written.
    """
    folder = storage.absolute(url)
    where = manifest_url(folder)
    _check(manifest, storage.shown(where))
    unset = {field for field in ("tars", "extensions") if not getattr(manifest, field)}
    document = manifest.model_dump(mode="json", exclude=unset)
    content = (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
    storage.write_bytes(where, content, scratch=scratch)
    return manifest.model_copy(update={"url": folder, "digest": storage.sha256_of_bytes(content)})


def _wrong(found: str, *, expected: str, where: str) -> ManifestError:
    return ManifestError(found, expected=expected, where=where, next_step="restore it, or remove it and pack again")


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise _wrong(f"not JSON: {error}", expected="a JSON object", where=where) from error
    if not isinstance(document, dict):
        raise _wrong(f"a JSON {type(document).__name__}", expected="a JSON object", where=where)
    if document.get("format") != FORMAT:
        raise ManifestError(
            f"format {document.get('format')!r}",
            expected=f"format {FORMAT}",
            where=where,
            next_step="use a dist-mlpl that knows this format, or pack the set again",
        )
    return document


def _check(manifest: Manifest, where: str) -> None:
    """Check what a schema cannot: distinct class ids, their digest, totals, distinct file names."""
    if len(set(manifest.class_ids)) != manifest.num_classes:
        raise _wrong("a class id that occurs twice", expected="distinct class ids", where=where)
    digest = classes_digest(manifest.classes)
    if digest != manifest.classes_sha256:
        raise _wrong(f"classes_sha256 {manifest.classes_sha256}", expected=f"{digest} for these ids", where=where)
    for name, split in manifest.splits.items():
        for count in ("num_samples", "num_bytes"):
            total = sum(getattr(entry, count) for entry in split.shards)
            if getattr(split, count) != total:
                raise _wrong(
                    f"splits.{name}.{count} is {getattr(split, count)}",
                    expected=f"{total}, the sum over its {len(split.shards)} shards",
                    where=where,
                )
    files = [file for split in manifest.splits.values() for entry in split.shards for file in (entry.file, entry.index)]
    if len(set(files)) != len(files):
        repeated = next(file for file in files if files.count(file) > 1)
        raise _wrong(f"{repeated!r} is listed twice", expected="every file once", where=where)
