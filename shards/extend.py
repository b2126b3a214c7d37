"""Owns extending a packed set: images that it lacks become new shards after the existing ones, which do not change."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_mlpl import storage
from dist_mlpl.data.manifest import Extension, Manifest, ShardEntry, Split, classes_digest, load_manifest
from dist_mlpl.data.shard_index import ShardIndex, read_index
from dist_mlpl.environment import installed_version
from dist_mlpl.errors import DataError, ManifestError
from shards.assemble import (
    SKIPPED_FILE,
    check_fraction,
    entries_by_split,
    finish,
    pack_plan,
    plan_document,
)
from shards.check import check_records
from shards.ledger import Ledger
from shards.pack import OnProgress, Skipped
from shards.plan import Plan, make_plan
from shards.processes import Mapper, on_processes
from shards.sources.base import Source, key_of, keys_of
from shards.work import FinishedElsewhereError

_READERS = 16


@dataclass(frozen=True, slots=True)
class ExtendSummary:
    """The result of an extension.

    Args:
        manifest: the present manifest, with its `url` and `digest`.
        num_added: number of images added; 0 when the set held all of them, or none of the others could be packed.
    """

    manifest: Manifest
    num_added: int


class Addition(NamedTuple):
    """The part of a source that a set lacks."""

    source: Source  # only the missing images, with source rows after the set's
    first_numbers: dict[str, int]  # number of the first new shard, by split
    first_row: int  # source row, in the extended set, of the source's own row 0


def extend(
    source: Source,
    out: str,
    *,
    max_bad_fraction: float = 0.0,
    workers: int | None = None,
    mapper: Mapper | None = None,
    on_progress: OnProgress | None = None,
) -> ExtendSummary:
    """Add the images of a source that a packed set lacks, by key, as new shards after the existing ones.

    No shard is rewritten, and new ones are packed like the others. The manifest is replaced last. A killed extension
    resumes when called again. Indices of old samples stay, but the set's digest changes, so runs and views of the old
    manifest do not continue on it.

    Args:
        source: its classes are the set's, optionally followed by more if the set's unlisted classes are unknown.
        out: folder or URL of the set.
        max_bad_fraction: share of the source's images that may be skipped, in [0, 1].
        workers, mapper, on_progress: see `shards.build.build`.

    Raises:
        ConfigError: an argument out of range.
        DataError: other classes, another meaning of unlisted ones, too many unfit images, or invalid records.
        ManifestError: no set, a set of tars indexed in place, or another extension in progress.
        StorageError: reading or writing failed.
        RunError: a worker died.
    """
    out, tell = storage.absolute(out), on_progress or (lambda *_: None)
    check_fraction(max_bad_fraction)
    mapper, manifest = mapper or on_processes(workers), load_manifest(out)
    if manifest.packing is None:
        raise ManifestError(
            "tars that were indexed where they lie",
            expected="a set that `shards build` packed",
            where=storage.shown(out),
            next_step="add tars beside the others, and index them all into another folder",
        )
    _check_classes(source, manifest)
    ledger = Ledger(out)
    ledger.sweep(manifest.digest)
    added = source_to_add(source, manifest)
    if added is None:
        return ExtendSummary(manifest, 0)
    plan = make_plan(added.source, manifest.packing, first_numbers=added.first_numbers, tell=tell)
    files = [file for split in manifest.splits.values() for entry in split.shards for file in (entry.file, entry.index)]
    try:
        packed = pack_plan(
            plan, ledger, mapper, plan_document(plan, base=manifest.digest),
            max_bad_fraction=max_bad_fraction, folder=ledger.folder, num_images=len(source.records), known=files,
            tell=tell,
        )  # fmt: skip
    except FinishedElsewhereError:
        manifest = load_manifest(out)
        ledger.sweep(manifest.digest)
        return ExtendSummary(manifest, manifest.extensions[-1].num_samples)
    entries = entries_by_split(plan, packed)
    if not entries:
        ledger.close()
        return ExtendSummary(manifest, 0)
    skipped = sorted({*plan.skipped, *(image for shard in packed.values() for image in shard.skipped)})
    rows = _skipped_rows(out, plan, skipped)
    extended = _extended(manifest, source, plan, added, entries, Counter(reason for _, reason in rows))
    num_added = sum(entry.num_samples for part in entries.values() for entry in part)
    return ExtendSummary(finish(extended, rows, ledger, tell), num_added)


def _check_classes(source: Source, manifest: Manifest) -> None:
    """Refuse a source whose labels would mean something else than the set's."""

    def wrong(found: str, expected: str, next_step: str) -> DataError:
        return DataError(found, expected=expected, where=f"source {source.name!r}", next_step=next_step)

    if source.unlisted != manifest.unlisted:
        raise wrong(
            f"classes that an image does not list are {source.unlisted}",
            f"{manifest.unlisted}, as in {manifest.url}",
            "give the source's labels as positives and negatives, or pack a set of their own",
        )
    ids = tuple(entry.id for entry in source.classes)
    if ids[: manifest.num_classes] != manifest.class_ids:
        place = next(
            (at for at, pair in enumerate(zip(ids, manifest.class_ids, strict=False)) if pair[0] != pair[1]), 0
        )
        raise wrong(
            f"{len(ids)} classes, {ids[place]!r} in column {place}",
            f"the set's {manifest.num_classes} in their order, {manifest.class_ids[place]!r} in that column",
            "map the source's classes to the set's: --mapping and --order",
        )
    if len(ids) > manifest.num_classes and manifest.unlisted == "absent":
        raise wrong(
            f"{len(ids) - manifest.num_classes} further classes",
            "the same classes: in this set a class that an image does not list is absent, and nobody looked for those",
            "leave the further classes out with --mapping, or pack a set of their own",
        )


def source_to_add(source: Source, manifest: Manifest) -> Addition | None:
    """The images of a source that a set lacks, by key; None when it has all of them.

    Raises:
        DataError: records that the format cannot hold, or a damaged index.
    """
    check_records(source)
    keys, first_row, first_numbers = _summary(manifest)
    new = pc.invert(pc.is_in(keys_of(source.records.images), value_set=keys)).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(new)
    if not len(rows):
        return None
    records = source.records.take(rows)
    records = dataclasses.replace(records, source_rows=records.source_rows + np.uint64(first_row))
    return Addition(dataclasses.replace(source, records=records), first_numbers, first_row)


def _summary(manifest: Manifest) -> tuple[pa.StringArray, int, dict[str, int]]:
    """All keys of a set, its first free source row, and the first free shard number of each split."""

    def part(entry: ShardEntry) -> tuple[pa.StringArray, int]:
        index: ShardIndex = read_index(manifest, entry)
        return index.keys, int(index.source_rows.max())

    entries = [entry for split in manifest.splits.values() for entry in split.shards]
    with ThreadPoolExecutor(_READERS, "index") as pool:
        parts = list(pool.map(part, entries))
    numbers = {
        name: 1 + max(int(entry.file.removesuffix(".tar").rpartition("-")[2]) for entry in split.shards)
        for name, split in manifest.splits.items()
    }
    return pa.concat_arrays([keys for keys, _ in parts]), 1 + max(row for _, row in parts), numbers


def _skipped_rows(out: str, plan: Plan, skipped: list[Skipped]) -> list[tuple[str, str]]:
    """Rows for skipped.csv: the old ones about images outside this plan, then this plan's."""
    try:
        text = storage.read_bytes(storage.join(out, SKIPPED_FILE)).decode()
    except FileNotFoundError:
        text = ""
    planned = set(keys_of(plan.source.records.images).to_pylist())
    before = [(image, reason) for image, reason in list(csv.reader(io.StringIO(text)))[1:]]
    return [row for row in before if key_of(row[0]) not in planned] + [(image, why) for _, image, why in skipped]


def _extended(
    manifest: Manifest,
    source: Source,
    plan: Plan,
    added: Addition,
    entries: dict[str, list[ShardEntry]],
    skipped: Counter[str],
) -> Manifest:
    """The manifest of the extended set."""
    old = {name: manifest.splits[name].shards if name in manifest.splits else () for name in entries}
    extension = Extension(
        name=source.name,
        arguments=source.arguments,
        digest=plan.digest,
        version=installed_version("dist-mlpl"),
        num_samples=sum(entry.num_samples for part in entries.values() for entry in part),
        first_source_row=added.first_row,
        first_shards={name: len(shards) for name, shards in old.items()},
    )
    classes = (*manifest.classes, *source.classes[manifest.num_classes :])
    return manifest.model_copy(
        update={
            "classes": classes,
            "classes_sha256": classes_digest(classes),
            "splits": {**manifest.splits, **{name: Split.of((*old[name], *entries[name])) for name in entries}},
            "extensions": (*manifest.extensions, extension),
            "skipped": dict(sorted(skipped.items())),
        }
    )
