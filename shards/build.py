"""Owns the build of a packed data set: plan, pack, and write the manifest last."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from pydantic import ValidationError

from dist_mlpl import storage
from dist_mlpl.data.manifest import (
    Manifest,
    Packing,
    SourceEntry,
    Split,
    classes_digest,
    load_manifest,
    manifest_url,
)
from dist_mlpl.errors import ConfigError, ManifestError
from shards.assemble import check_fraction, entries_by_split, finish, pack_plan, plan_document
from shards.ledger import Ledger
from shards.pack import OnProgress
from shards.plan import Plan, differences, make_plan
from shards.processes import Mapper, on_processes
from shards.repair import rewrite
from shards.sources.base import Source
from shards.work import FinishedElsewhereError, sizes_in

TARGET_SHARD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class BuildSummary:
    """The result of a build.

    Args:
        manifest: as written, with its `url` and `digest`, sizes and numbers of skipped images.
        was_complete: True when the folder already held this data set, every file with its size, and nothing was
            written.
        notes: what a person should know of the set, in whole sentences.
    """

    manifest: Manifest
    was_complete: bool
    notes: tuple[str, ...] = ()


def build(
    source: Source,
    out: str,
    *,
    seed: int = 0,
    target_shard_bytes: int = TARGET_SHARD_BYTES,
    max_side: int | None = None,
    quality: int = 90,
    convert: bool = False,
    decode: bool = True,
    max_bad_fraction: float = 0.0,
    workers: int | None = None,
    mapper: Mapper | None = None,
    on_progress: OnProgress | None = None,
) -> BuildSummary:
    """Pack a data set. Equal records, files and settings give equal bytes, whatever the workers, kills and storage.

    Every image is read once, when its shard is packed. A killed build resumes when called again; several calls on one
    `out`, on any machines, share the work. Images that cannot be packed are skipped and listed in OUT/skipped.csv. If
    `out` holds the set already, only file sizes are checked: missing or truncated files are written again (`repair`
    finds other damage).

    Args:
        source: the data set to pack.
        out: folder or URL to pack into.
        seed: seed of the shuffle.
        target_shard_bytes: upper bound of the shards' mean size, > 0; only approximate where images are resized.
        max_side, quality, convert, decode: see `Packing`.
        max_bad_fraction: share of images that may be skipped, in [0, 1].
        workers: number of processes on this machine; None for one per core.
        mapper: runs the work elsewhere; None for `workers`.
        on_progress: called with what is being done, how much is done, the total, and bytes where known.

    Raises:
        ConfigError: an argument out of range, or an `out` that is the folder of the images.
        DataError: records that cannot be packed, too many unfit images, or an image that changed meanwhile.
        ManifestError: `out` holds another data set, or an unfinished build of another.
        StorageError: reading or writing failed.
        RunError: a worker died.
    """
    out, tell = storage.absolute(out), on_progress or (lambda *_: None)
    packing = _packing(
        seed=seed, target_shard_bytes=target_shard_bytes, max_side=max_side, quality=quality, convert=convert,
        decode=decode,
    )  # fmt: skip
    check_fraction(max_bad_fraction)
    ledger = Ledger(out)
    _check_place(source, ledger)
    mapper = mapper or on_processes(workers)
    plan = make_plan(source, packing, tell=tell)
    notes = (*source.notes, *_split_notes(source))
    if existing := _existing(out, plan):
        ledger.sweep(existing.digest)
        return _made_whole(plan, existing, notes, mapper, tell)
    try:
        packed = pack_plan(
            plan, ledger, mapper, plan_document(plan), max_bad_fraction=max_bad_fraction, folder=out, tell=tell
        )
    except FinishedElsewhereError:
        existing = load_manifest(out)
        ledger.sweep(existing.digest)
        return BuildSummary(existing, was_complete=False, notes=notes)
    skipped = sorted({*plan.skipped, *(image for shard in packed.values() for image in shard.skipped)})
    manifest = Manifest(
        version=version("dist-mlpl"),
        classes=source.classes,
        classes_sha256=classes_digest(source.classes),
        unlisted=source.unlisted,
        splits={name: Split.of(entries) for name, entries in entries_by_split(plan, packed).items()},
        source=SourceEntry(name=source.name, arguments=source.arguments, digest=plan.digest),
        packing=packing,
        skipped=dict(sorted(Counter(image.reason for image in skipped).items())),
    )
    left_out = [(image.image, image.reason) for image in skipped]
    notes += _orientation_notes(sum(shard.num_oriented for shard in packed.values()))
    return BuildSummary(finish(manifest, left_out, ledger, tell), was_complete=False, notes=notes)


def _check_place(source: Source, ledger: Ledger) -> None:
    """Refuse to write shards among the images, or to take their folder for that of the build's records.

    Raises:
        ConfigError: the images lie in `out` itself, or below OUT/build, which is removed at the end.
    """
    images, out, records = (_real(url) for url in (source.images, ledger.out, ledger.folder))
    if images == out and not storage.exists(manifest_url(ledger.out)):
        raise ConfigError(
            "the folder of the images as --out",
            expected="a folder of its own for tars, indexes and manifest",
            where=storage.shown(ledger.out),
            next_step=f"give another, such as --out {storage.shown(ledger.out.rstrip('/'))}-shards",
        )
    if f"{images}/".startswith(f"{records}/"):
        raise ConfigError(
            "images in the folder that a build keeps its records in, and removes at its end",
            expected=f"images elsewhere than in {storage.shown(ledger.folder)}",
            where=storage.shown(source.images),
            next_step="give another --out",
        )


def _real(url: str) -> str:
    """A URL without trailing slashes, on a local disk also without links."""
    return url.rstrip("/") if storage.is_remote(url) else os.path.realpath(url.removeprefix("file://"))


def _split_notes(source: Source) -> tuple[str, ...]:
    """A note on each split that holds a single image beside larger ones."""
    counts = np.bincount(source.records.splits, minlength=len(source.records.split_names)).tolist()
    sizes = {name: count for name, count in zip(source.records.split_names, counts, strict=True) if count}
    return tuple(
        f"split {name!r} is of a single image; the others: {', '.join(repr(other) for other in sizes if other != name)}"
        for name, count in sizes.items()
        if count == 1 < max(sizes.values())
    )


def _orientation_notes(num_oriented: int) -> tuple[str, ...]:
    if not num_oriented:
        return ()
    carry, it = ("1 image carries", "it") if num_oriented == 1 else (f"{num_oriented:,} images carry", "them")
    kept = f"kept as stored, and training does not turn {it}; --max-side N makes {it} upright"
    return (f"{carry} an EXIF orientation: {kept}",)


def _packing(**settings: Any) -> Packing:
    try:
        return Packing(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(
            f"{name} {first['input']}", expected=first["msg"], where=name, next_step="correct the option"
        ) from error


def _existing(out: str, plan: Plan) -> Manifest | None:
    """The manifest already in the folder; None without one.

    Raises:
        ManifestError: it belongs to another data set, or is damaged.
    """
    if not storage.exists(manifest_url(out)):
        return None
    manifest = load_manifest(out)
    packing = manifest.packing.model_dump() if manifest.packing else "none: tars indexed where they lie"
    there = {"source": manifest.source.name, "inputs": manifest.source.digest, "packing": packing}
    here = {"source": plan.source.name, "inputs": plan.digest, "packing": plan.packing.model_dump()}
    if there != here:
        raise ManifestError(
            f"another data set: {differences(there, here)}",
            expected="the same inputs and options, or a folder without a set",
            where=storage.shown(manifest_url(out)),
            next_step="pack into a new folder: what a packed set holds is never changed (`shards extend` adds to it)",
        )
    return manifest


def _made_whole(
    plan: Plan, manifest: Manifest, notes: tuple[str, ...], mapper: Mapper, tell: OnProgress
) -> BuildSummary:
    """Rewrite the missing or truncated files of a finished set.

    Raises:
        ManifestError: some of them do not come from this source.
    """
    sizes = sizes_in(manifest.url)
    bad = [
        entry
        for split in manifest.splits.values()
        for entry in split.shards
        if sizes.get(entry.file) != entry.num_bytes or not sizes.get(entry.index)
    ]
    if not bad:
        return BuildSummary(manifest, was_complete=True, notes=notes)
    written = rewrite(plan, manifest.before(0), bad, mapper, tell)
    if left := [entry.file for entry in bad if entry.file not in written]:
        raise ManifestError(
            f"{len(left)} shards are damaged that are not of this source: {', '.join(left[:3])}",
            expected="whole shards",
            where=storage.shown(manifest.url),
            next_step="run `dist-mlpl shards repair` with the source that they were added from",
        )
    return BuildSummary(manifest, was_complete=False, notes=notes)
