"""Owns repairing a packed set: damaged or missing shards are packed again, to the same bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, ShardEntry
from dist_mlpl.errors import DataError, ManifestError
from shards.assemble import sync_shards
from shards.extend import source_to_add
from shards.pack import OnProgress, write_shard
from shards.plan import Plan, make_plan
from shards.processes import Mapper, on_processes
from shards.sources.base import Source
from shards.verify import Fault, verify, verify_shard
from shards.work import setting_of


@dataclass(frozen=True, slots=True)
class RepairSummary:
    """The result of a repair.

    Args:
        manifest: the set's manifest, which a repair never changes.
        rewritten: tars that were rewritten, with their indexes.
        faults: faults that are left.
    """

    manifest: Manifest
    rewritten: tuple[str, ...]
    faults: tuple[Fault, ...]


def repair(
    url: str,
    source: Source,
    *,
    workers: int | None = None,
    mapper: Mapper | None = None,
    on_progress: OnProgress | None = None,
) -> RepairSummary:
    """Verify a set, and repack its faulty shards from the source that they were made from.

    A shard is written only if it has the digests in the manifest. In an extended set, shards of other sources are left
    as they are: repair those with their own source, the earliest first.

    Args:
        url: folder, or manifest.json.
        source: the source, as it was packed.
        workers, mapper, on_progress: see `build`.

    Raises:
        DataError: the source, its image files or the encoding of images have changed.
        ManifestError: no manifest, or that of tars indexed in place.
        StorageError: reading or writing failed.
    """
    mapper, tell = mapper or on_processes(workers), on_progress or (lambda *_: None)
    report = verify(url, mapper=mapper, on_progress=tell)
    manifest, files = report.manifest, {fault.file for fault in report.faults}
    bad = [entry for split in manifest.splits.values() for entry in split.shards if files & {entry.file, entry.index}]
    if not bad:
        return RepairSummary(manifest, (), report.faults)
    plan, part = _plan_of(manifest, source, tell)
    rewritten = rewrite(plan, part, bad, mapper, tell)
    again = {file for entry in bad if entry.file in rewritten for file in (entry.file, entry.index)}
    left = [fault for fault in report.faults if fault.file not in again]
    for entry in bad:
        if entry.file in rewritten:
            left += verify_shard(manifest, entry, False)
    return RepairSummary(manifest, tuple(rewritten), tuple(left))


def _plan_of(manifest: Manifest, source: Source, tell: OnProgress) -> tuple[Plan, Manifest]:
    """The plan by which the set, or an extension of it, was packed from this source; and the manifest at that time."""
    if manifest.packing is None:
        raise ManifestError(
            "tars that were indexed where they lie",
            expected="a set that `shards build` packed",
            where=storage.shown(manifest.url),
            next_step="fetch the tars again from where they came, then run `dist-mlpl shards index`",
        )
    plan = make_plan(source, manifest.packing, tell=tell)
    if plan.digest == manifest.source.digest:
        return plan, manifest.before(0)
    for number, extension in enumerate(manifest.extensions):
        if extension.name != source.name:
            continue
        added = source_to_add(source, manifest.before(number))
        if added is None:
            continue
        plan = make_plan(added.source, manifest.packing, first_numbers=added.first_numbers, tell=tell)
        if plan.digest == extension.digest:
            return plan, manifest.before(number + 1)
    digests = ", ".join(f"{entry.digest[:16]}..." for entry in (manifest.source, *manifest.extensions))
    raise DataError(
        f"inputs that changed since the set was packed: digest {plan.digest[:16]}...",
        expected=f"{digests}: the same records, and files of the same sizes",
        where=storage.shown(source.images),
        next_step="restore labels, images and options as they were; `dist-mlpl shards build` packs a new set",
    )


def rewrite(
    plan: Plan, manifest: Manifest, entries: Iterable[ShardEntry], mapper: Mapper, tell: OnProgress
) -> list[str]:
    """Repack some shards of a finished set.

    Args:
        plan: the plan by which the set, or its last extension in `manifest`, was packed.
        manifest: the set's manifest at that time.
        entries: the shards to repack; those of other plans are ignored.
        mapper: runs the work.
        tell: called after each shard.

    Returns:
        The tars that were written.

    Raises:
        DataError: a shard came out with other bytes; it is then left as it was.
    """
    own = {entry for split in manifest.splits.values() for entry in split.shards}
    wanted = {entry.file: entry for entry in entries if entry in own}
    planned = [(shard, wanted[f"{shard.stem}.tar"]) for shard in plan.shards if f"{shard.stem}.tar" in wanted]
    setting = dataclasses.replace(setting_of(plan, manifest.url), scratch=storage.join(manifest.url, "repair"))
    total, done = sum(entry.num_samples for _, entry in planned), 0
    try:
        calls = ((plan.job(shard), entry) for shard, entry in planned)
        for _, packed in mapper(partial(write_shard, setting), calls):
            done += packed.entry.num_samples if packed.entry else 0
            tell("packing again", done, total)
        sync_shards(manifest.url, [entry for _, entry in planned], tell)
    finally:
        storage.remove_folder(setting.scratch)
    return [entry.file for _, entry in planned]
