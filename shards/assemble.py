"""Owns carrying out a plan: pack it unless too many images are unfit, list skipped images, write the manifest last."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, ShardEntry, load_manifest, write_manifest
from dist_mlpl.environment import installed_version
from dist_mlpl.errors import ConfigError, DataError, StorageError
from shards.images import NOT_JPEG
from shards.ledger import Ledger
from shards.pack import OnProgress, PackedShard, Skipped
from shards.plan import Plan, input_digest
from shards.processes import Mapper
from shards.work import TooManySkippedError, pack_all, still_holds

SKIPPED_FILE = "skipped.csv"
_SYNCERS = 4  # threads that wait for the disk


def check_fraction(max_bad_fraction: float) -> None:
    """Refuse a value that is not a fraction.

    Raises:
        ConfigError: outside [0, 1].
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(
            f"max_bad_fraction {max_bad_fraction}", expected="a fraction in [0, 1]", where="max_bad_fraction",
            next_step="correct the option",
        )  # fmt: skip


def plan_document(plan: Plan, *, base: str = "") -> dict[str, Any]:
    """The document by which builders check that they follow the same plan.

    Args:
        plan: the plan.
        base: digest of the manifest that is extended; empty for a new set.
    """
    makes_images = plan.packing.max_side or plan.packing.convert or plan.source.records.rotations is not None
    return {
        "source": plan.source.name,
        "images": len(plan.source.records),
        "digest": plan.digest,
        "records": input_digest(plan.source, None),
        "packing": plan.packing.model_dump(),
        "base": base,
        "version": installed_version("dist-mlpl"),
        "pillow": installed_version("pillow") if makes_images else "",
    }


def pack_plan(
    plan: Plan,
    ledger: Ledger,
    mapper: Mapper,
    about: dict[str, Any],
    *,
    max_bad_fraction: float,
    folder: str,
    num_images: int | None = None,
    known: Iterable[str] = (),
    tell: OnProgress,
) -> dict[str, PackedShard]:
    """Pack all shards of a plan, unless too many images are unfit or a split has no usable image.

    Args:
        plan: the plan.
        ledger: the output's ledger.
        mapper: runs the work.
        about: `plan_document` of the plan.
        max_bad_fraction: share of images that may be unfit, in [0, 1].
        folder: where skipped.csv goes if packing is refused.
        num_images: number of images that the fraction refers to; None for those of the plan. An extension counts those
            of the whole source, so that a second call tolerates as much as the first.
        known: files of shards that may be in the output already; their splits may stay without new images.
        tell: called with progress.

    Returns:
        The outcome of each shard, by stem.

    Raises:
        FinishedElsewhereError: another builder has written the manifest.
        DataError, ManifestError, StorageError: see `build`.
    """
    max_skipped = max_bad_fraction * (num_images or len(plan.source.records))
    known = set(known)
    filled = {name.rpartition("-")[0] for name in known}
    allowed = f"at most {int(max_skipped):,} (--max-bad-fraction {max_bad_fraction:g})"
    expected = f"{allowed}, and an image that can be packed in every split"
    if len(plan.skipped) > max_skipped or set(plan.splits) - filled - {shard.split for shard in plan.shards}:
        raise refusal(plan, plan.skipped, folder, expected=expected)
    shards = {shard.stem: shard for shard in plan.shards}
    is_first = ledger.begin(about, known=known, keeps=lambda stem, packed: still_holds(plan, shards.get(stem), packed))
    try:
        packed = pack_all(plan, ledger, mapper, is_first=is_first, max_skipped=max_skipped, tell=tell)
    except TooManySkippedError as stop:
        raise refusal(plan, stop.skipped, folder, expected=expected) from None
    if set(plan.splits) - filled - entries_by_split(plan, packed).keys():
        skipped = [*plan.skipped, *(image for shard in packed.values() for image in shard.skipped)]
        raise refusal(plan, skipped, folder, expected=expected, is_all=True)
    return packed


def entries_by_split(plan: Plan, packed: dict[str, PackedShard]) -> dict[str, list[ShardEntry]]:
    """Manifest entries of the shards that were written, by split, in the order of the plan."""
    entries: dict[str, list[ShardEntry]] = {}
    for shard in plan.shards:
        if entry := packed[shard.stem].entry:
            entries.setdefault(shard.split, []).append(entry)
    return entries


def finish(manifest: Manifest, skipped: Sequence[tuple[str, str]], ledger: Ledger, tell: OnProgress) -> Manifest:
    """Wait until the disk holds the shards, list skipped images, write the manifest, and remove the ledger.

    Args:
        manifest: the set's manifest.
        skipped: (image, reason) of the skipped images.
        ledger: the output's ledger.
        tell: called with the progress of waiting for the disk.

    Returns:
        The manifest as written, with its `url` and `digest`.
    """
    with ledger.finishing():
        sync_shards(ledger.out, [entry for split in manifest.splits.values() for entry in split.shards], tell)
        try:
            write_skipped(skipped, ledger.out, scratch=ledger.folder)
            written = write_manifest(manifest, ledger.out, scratch=ledger.folder)
        except StorageError:
            if ledger.is_open:
                raise
            # Another builder finished, and removed our temporary files with the ledger.
            written = load_manifest(ledger.out)
    ledger.close()
    return written


def refusal(plan: Plan, skipped: Sequence[Skipped], folder: str, *, expected: str, is_all: bool = False) -> DataError:
    """Write the unfit images to FOLDER/skipped.csv, and make the error that stops a build; the caller raises it.

    Args:
        plan: the build's plan.
        skipped: images known to be unfit.
        folder: folder or URL for skipped.csv.
        expected: what is allowed, for the message.
        is_all: whether every image was looked at; otherwise the message says that there may be more.
    """
    write_skipped([(image, reason) for _, image, reason in sorted(skipped)], folder)
    first = ", ".join(f"{image!r} ({reason})" for _, image, reason in sorted(skipped)[:3]) + " ..." * (len(skipped) > 3)
    num_images, so_far = len(plan.source.records), "" if is_all else " so far (the build stopped there)"
    convert = "add --convert, which makes JPEGs of PNG, TIFF, BMP and WebP; or "
    can_convert = not plan.packing.convert and any(image.reason == NOT_JPEG for image in skipped)
    return DataError(
        f"{len(skipped)} of {num_images} images cannot be packed{so_far}: {first}",
        expected=expected,
        where=f"they are listed in {storage.join(storage.shown(folder), SKIPPED_FILE)}",
        next_step=f"{convert * can_convert}repair them; or allow for them with --max-bad-fraction (`dist-mlpl shards "
        "extend` adds them later, once repaired): the same command then goes on",
    )


def write_skipped(rows: Sequence[tuple[str, str]], folder: str, *, scratch: str | None = None) -> None:
    """Write (image, reason) rows of skipped images to FOLDER/skipped.csv; without any, remove that file."""
    url = storage.join(folder, SKIPPED_FILE)
    if not rows:
        storage.remove(url)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "reason"))
    writer.writerows(rows)
    storage.write_bytes(url, text.getvalue().encode(), scratch=scratch)


def sync_shards(out: str, entries: Sequence[ShardEntry], tell: OnProgress) -> None:
    """Wait until the disk holds these shards, since the manifest written next says that they exist."""
    if storage.is_remote(out):
        return
    files = [storage.join(out, file) for entry in entries for file in (entry.file, entry.index)]
    with ThreadPoolExecutor(_SYNCERS, "sync") as pool:
        for done, _ in enumerate(pool.map(storage.sync, files), 1):
            tell("waiting for the disk", done, len(files))
