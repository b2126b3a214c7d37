"""Owns the build of a packed data set: check every input, plan, write the shards, write the manifest last."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

from dist_mlpl import storage
from dist_mlpl.data.manifest import (
    Manifest,
    Packing,
    ShardEntry,
    SourceEntry,
    Split,
    classes_digest,
    load_manifest,
    manifest_url,
    write_manifest,
)
from dist_mlpl.errors import ConfigError, DataError, ManifestError
from shards.pack import (
    CheckedImage,
    OnProgress,
    bytes_in_tar,
    check_images,
    cut_shards,
    packing_order,
    record_json,
    run_tasks,
    write_shard,
)
from shards.sources.base import Record, Source
from shards.verify import verify

Plan = dict[str, list[npt.NDArray[np.int64]]]  # by split, for each shard, positions in `source.records` in tar order

SKIPPED_FILE = "skipped.csv"
_IMAGES_PER_TASK = 64
_MAX_KEY_BYTES = 100 - len(".json")  # a USTAR header has 100 bytes for a name without folders


@dataclass(frozen=True, slots=True)
class BuildSummary:
    """What a build left behind.

    Args:
        manifest: as written, with its `url` and `digest`; sizes and skipped images are in it.
        was_complete: True when the folder already held this data set, whole and verified, and nothing was written.
    """

    manifest: Manifest
    was_complete: bool


def build(
    source: Source,
    out: str,
    *,
    seed: int = 0,
    target_shard_bytes: int = 256 << 20,
    workers: int | None = None,
    max_bad_fraction: float = 0.0,
    decode: bool = True,
    on_progress: OnProgress | None = None,
) -> BuildSummary:
    """Pack a data set. Equal inputs, seed and target give equal bytes, whatever the workers, the run and the storage.

    Every image is read twice: once to check it, once to pack it, with its digest compared in between. Unreadable
    images are listed in OUT/skipped.csv and left out.

    Args:
        source: what to pack.
        out: folder or URL to pack into.
        seed: of the shuffle.
        target_shard_bytes: upper bound of the shards' mean size.
        workers: processes; None: one for each core.
        max_bad_fraction: of images that may be unreadable, in [0, 1].
        decode: decode every image when checking it.
        on_progress: called after each finished task.

    Raises:
        ConfigError: an argument out of range.
        DataError: records that cannot be packed, too many unreadable images, an image that changed meanwhile.
        ManifestError: `out` holds another data set.
        StorageError: reading or writing failed.
    """
    out, workers = storage.absolute(out), os.cpu_count() or 1 if workers is None else workers
    _check_arguments(target_shard_bytes, workers, max_bad_fraction)
    _check_records(source)
    tell = on_progress or (lambda *_: None)
    packing = Packing(seed=seed, target_shard_bytes=target_shard_bytes)

    checked = _check_all(source, decode, workers, tell)
    origin = SourceEntry(name=source.name, arguments=source.arguments, digest=_input_digest(source, checked))
    existing = _existing(out, origin, packing)
    if existing and not verify(out, workers=workers, on_progress=on_progress).faults:
        return BuildSummary(existing, was_complete=True)
    _report_skipped(source, checked, out, max_bad_fraction)

    plan = _plan(source, checked, seed, target_shard_bytes)
    entries = _write_all(source, checked, plan, out, workers, tell)
    manifest = Manifest(
        version=version("dist-mlpl"),
        classes=source.classes,
        classes_sha256=classes_digest(source.classes),
        unlisted=source.unlisted,
        splits={name: _split(shards) for name, shards in entries.items()},
        source=origin,
        packing=packing,
        skipped=dict(sorted(Counter(image.fault for image in checked if image.fault).items())),
    )
    return BuildSummary(write_manifest(manifest, out), was_complete=False)


def _check_arguments(target_shard_bytes: int, workers: int, max_bad_fraction: float) -> None:
    for name, value, is_good, expected in (
        ("target_shard_bytes", target_shard_bytes, target_shard_bytes > 0, "a positive number of bytes"),
        ("workers", workers, workers > 0, "at least 1"),
        ("max_bad_fraction", max_bad_fraction, 0 <= max_bad_fraction <= 1, "a fraction in [0, 1]"),
    ):
        if not is_good:
            raise ConfigError(f"{name} {value}", expected=expected, where=name, next_step="correct the option")


def _check_records(source: Source) -> None:
    """What the format asks of records, whatever source they come from."""
    image_of: dict[str, str] = {}
    for record in source.records:
        fault = _record_fault(record, len(source.classes))
        if record.key in image_of:
            fault = f"key {record.key!r} is also that of {image_of[record.key]!r}", "a key of its own"
        if fault:
            raise DataError(
                fault[0],
                expected=fault[1],
                where=f"image {record.image!r}, row {record.source_row} of source {source.name!r}",
                next_step="rename the image or split, or correct its labels, in the source",
            )
        image_of[record.key] = record.image
    if not image_of:
        raise DataError(
            "no image", expected="at least one", where=f"source {source.name!r}", next_step="check the source's files"
        )


def _record_fault(record: Record, num_classes: int) -> tuple[str, str] | None:
    """What was found and what was expected, or None."""
    if not 0 < len(record.key.encode()) <= _MAX_KEY_BYTES or "." in record.key or "/" in record.key:
        return f"key {record.key!r}", f"1 to {_MAX_KEY_BYTES} bytes, escaped as `key_of` does"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", record.split):
        return f"split {record.split!r}", "letters, digits, `_` and `-`: it names files"
    for columns in (record.positives, record.negatives):
        if list(columns) != sorted(set(columns)) or (columns and not 0 <= columns[0] <= columns[-1] < num_classes):
            return f"class columns {columns}", f"strictly ascending, in [0, {num_classes})"
    if set(record.positives) & set(record.negatives):
        return "a class both present and absent", "one of the two"
    return None


def _check_all(source: Source, decode: bool, workers: int, tell: OnProgress) -> list[CheckedImage]:
    """Read and check every image, in the order of the records."""
    names = [record.image for record in source.records]
    starts = range(0, len(names), _IMAGES_PER_TASK)
    calls = [(source.images, names[start : start + _IMAGES_PER_TASK], decode) for start in starts]
    parts: list[list[CheckedImage]] = [[] for _ in calls]
    done = 0
    for number, part in run_tasks(check_images, calls, workers):
        parts[number] = part
        done += len(part)
        tell("checking", done, len(names))
    return [image for part in parts for image in part]


def _input_digest(source: Source, checked: Sequence[CheckedImage]) -> str:
    """sha256 over all that the output depends on, seed and target apart."""
    classes = [(entry.id, entry.name) for entry in source.classes]
    digest = hashlib.sha256(json.dumps([source.name, source.arguments, classes, source.unlisted]).encode())
    for record, image in zip(source.records, checked, strict=True):
        digest.update(json.dumps([*record, image.sha256.hex(), image.fault]).encode())
    return digest.hexdigest()


def _existing(out: str, origin: SourceEntry, packing: Packing) -> Manifest | None:
    """The manifest already in the folder, None without one.

    Raises:
        ManifestError: it is that of another data set, or does not read.
    """
    if not storage.exists(manifest_url(out)):
        return None
    manifest = load_manifest(out)
    if (manifest.source, manifest.packing) != (origin, packing):
        raise ManifestError(
            f"another data set: inputs {manifest.source.digest[:16]}..., {manifest.packing}",
            expected=f"no manifest, or that of inputs {origin.digest[:16]}..., {packing}",
            where=manifest_url(out),
            next_step="pack into a new folder: a packed set is never changed",
        )
    return manifest


def _report_skipped(source: Source, checked: Sequence[CheckedImage], out: str, max_bad_fraction: float) -> None:
    """Write skipped.csv; refuse to go on with too many unreadable images or a split without any readable one."""
    bad = [
        (record.image, image.fault)
        for record, image in zip(source.records, checked, strict=True)
        if image.fault is not None
    ]
    url = storage.join(out, SKIPPED_FILE)
    if not bad:
        storage.remove(url)  # of an earlier try, when the inputs were worse
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "reason"))
    writer.writerows(bad)
    storage.write_bytes(url, text.getvalue().encode())
    readable = {record.split for record, image in zip(source.records, checked, strict=True) if image.fault is None}
    bare = sorted({record.split for record in source.records} - readable)
    if bare or len(bad) > max_bad_fraction * len(checked):
        first = ", ".join(f"{image!r} ({fault})" for image, fault in bad[:3])
        raise DataError(
            f"{len(bad)} of {len(checked)} images cannot be packed: {first}" + " ..." * (len(bad) > 3),
            expected=f"a fraction of at most {max_bad_fraction}, and a readable image in every split",
            where=f"all are listed in {url}",
            next_step="repair or remove them, or allow for them with --max-bad-fraction",
        )


def _plan(source: Source, checked: Sequence[CheckedImage], seed: int, target_shard_bytes: int) -> Plan:
    """Who lies where: fixed before the first byte is written, so that workers cannot matter."""
    rows_of: dict[str, list[int]] = {}
    for row, (record, image) in enumerate(zip(source.records, checked, strict=True)):
        if image.fault is None:
            rows_of.setdefault(record.split, []).append(row)
    class_ids = [entry.id for entry in source.classes]
    plan: Plan = {}
    for split, rows in rows_of.items():
        source_rows = np.array([source.records[row].source_row for row in rows])
        order = np.array(rows)[packing_order(seed, split, source_rows)]
        sizes = np.array(
            [bytes_in_tar(checked[row].num_bytes, len(record_json(source.records[row], class_ids))) for row in order]
        )
        plan[split] = [order[part] for part in cut_shards(sizes, target_shard_bytes)]
    return plan


def _write_all(
    source: Source, checked: Sequence[CheckedImage], plan: Plan, out: str, workers: int, tell: OnProgress
) -> dict[str, list[ShardEntry]]:
    """Write every shard; returns their entries by split, in shard order."""
    places = [(split, number) for split, shards in plan.items() for number in range(len(shards))]
    class_ids = [entry.id for entry in source.classes]
    calls = []
    for split, number in places:
        rows = plan[split][number]
        records, digests = [source.records[row] for row in rows], [checked[row].sha256 for row in rows]
        calls.append((source.images, out, f"{split}-{number:06d}", records, digests, class_ids))
    entries: dict[tuple[str, int], ShardEntry] = {}
    num_samples = sum(len(rows) for shards in plan.values() for rows in shards)
    done = 0
    for call, entry in run_tasks(write_shard, calls, workers):
        entries[places[call]] = entry
        done += entry.num_samples
        tell("writing", done, num_samples)
    return {split: [entries[split, number] for number in range(len(shards))] for split, shards in plan.items()}


def _split(entries: Sequence[ShardEntry]) -> Split:
    return Split(
        num_samples=sum(entry.num_samples for entry in entries),
        num_bytes=sum(entry.num_bytes for entry in entries),
        shards=tuple(entries),
    )
