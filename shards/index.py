"""Owns indexing tars in place: headers are read, indexes and a manifest written, and no tar is copied or changed.

OUT/scans/STEM.arrow    the scan of STEM.tar; valid as long as the tar's size and version stay the same
OUT/STEM.arrow          its index
OUT/manifest.json       written last; `tars` in it names the tars' folder when that is not OUT
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast, get_args

import numpy as np
import pyarrow as pa

from dist_mlpl import storage
from dist_mlpl.data.manifest import (
    ClassEntry,
    Manifest,
    ShardEntry,
    SourceEntry,
    Split,
    classes_digest,
    load_manifest,
    manifest_url,
    write_manifest,
)
from dist_mlpl.data.shard_index import ClassLists, ShardIndex, encode_index
from dist_mlpl.data.tar_members import check_num_classes, expand_tars, read_classes
from dist_mlpl.environment import installed_version
from dist_mlpl.errors import ConfigError, DataError, ManifestError, nearest_names
from dist_mlpl.labels import Unlisted
from shards.pack import OnProgress
from shards.scan import NO_JPEG, NOT_JPEG, TarScan, encode_scan, read_scan, scan_tar

T = TypeVar("T")

SOURCE = "tars"  # name of this source in the manifest
SPLIT_PATTERN = r"(.+)-[^-]*"  # train-000001 -> train
_SCANS = "scans"
_LEFT_OUT = (NO_JPEG, NOT_JPEG)  # kinds of skipped samples, which the manifest counts
_FILE_NAME = re.compile(r"[\w-]+(\.[\w-]+)+")  # as the manifest allows


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """The result of indexing.

    Args:
        manifest: as written, with its `url` and `digest`.
        ignored: number of members that belong to no sample, by kind.
        num_reused: number of tars whose headers were not read again.
        was_complete: True when the folder already held this manifest.
    """

    manifest: Manifest
    ignored: dict[str, int]
    num_reused: int
    was_complete: bool


class _Classes(NamedTuple):
    """A list of classes."""

    url: str
    ids: list[str]  # in column order
    header: str  # first cell of the header line


class _Tar(NamedTuple):
    """One tar, and a summary of its scan."""

    url: str
    num_bytes: int
    version: str
    num_samples: int
    class_ids: frozenset[str]
    has_negatives: bool
    ignored: dict[str, int]
    is_reused: bool


def index_tars(
    tars: str,
    *,
    out: str | None = None,
    classes: str | None = None,
    split: str | None = None,
    split_pattern: str | None = None,
    unlisted: str | None = None,
    workers: int = 16,
    on_progress: OnProgress | None = None,
) -> IndexSummary:
    """Index tars in place, by their headers and label members only. See `dist_mlpl.data.tar_members` for labels.

    The tars' digests stay unknown (`sha256` is empty). An interrupted call resumes when repeated. Equal tars give equal
    indexes; an existing manifest is never changed: the tars must match it, or they are refused.

    Args:
        tars: a folder, or a pattern for `expand_tars`; all tars in one folder.
        out: folder or URL for indexes and manifest; None for the tars' folder.
        classes: CSV whose first column lists the class ids in order; None for the ids found, sorted, by value if all
            are whole numbers.
        split: the split of all tars.
        split_pattern: regular expression that a tar's name without `.tar` must match; its first group is the split.
            If both are None, the split is the name up to its last `-`.
        unlisted: what a class that a sample does not list means; None for `unknown` if some sample lists negatives,
            else `absent`.
        workers: number of threads, at least 1.
        on_progress: called after each tar.

    Raises:
        ConfigError: arguments that do not fit together, tars in several folders, or a name without a split.
        ShardError: an unreadable tar; see `scan_tar`.
        DataError: no tar, an image without labels, an unknown class, more than 65,536 classes.
        ManifestError: `out` holds another data set.
        StorageError: reading or writing failed.
    """
    _check_arguments(split, split_pattern, unlisted, workers)
    urls = expand_tars(tars)
    folder = _one_folder(urls)
    out = folder if out is None else storage.absolute(out)
    splits = [split or _split_of(url, split_pattern or SPLIT_PATTERN) for url in urls]
    listed = None if classes is None else _Classes(classes, read_classes(classes), _first_cell(classes))
    existing = _existing(out)
    tell = on_progress or (lambda *_: None)

    scanned = _each(partial(_scan, out=out, classes=listed), urls, "reading headers", workers, tell)
    ids = listed.ids if listed else _sorted_ids({name for tar in scanned for name in tar.class_ids}, tars)
    unlisted = unlisted or ("unknown" if any(tar.has_negatives for tar in scanned) else "absent")
    starts = np.cumsum([0] + [tar.num_samples for tar in scanned]).tolist()
    write = partial(_write, out=out, class_ids=ids, expected=_entries(existing))
    entries = _each(write, list(zip(scanned, starts, strict=False)), "writing indexes", workers, tell)

    ignored = dict(sorted(sum((Counter(tar.ignored) for tar in scanned), Counter()).items()))
    entry_classes = tuple(ClassEntry(id=name, name=name) for name in ids)
    manifest = Manifest(
        version=installed_version("dist-mlpl"),
        classes=entry_classes,
        classes_sha256=classes_digest(entry_classes),
        unlisted=cast(Unlisted, unlisted),
        splits={name: _split(entries, splits, name) for name in dict.fromkeys(splits)},
        source=SourceEntry(
            name=SOURCE,
            arguments={"ignored": {kind: count for kind, count in ignored.items() if kind not in _LEFT_OUT}},
            digest=_digest(ids, unlisted, entries),
        ),
        packing=None,
        tars="" if out == folder else folder,
        skipped={kind: ignored[kind] for kind in _LEFT_OUT if kind in ignored},
    )
    num_reused = sum(tar.is_reused for tar in scanned)
    if existing:
        _refuse_another(existing, manifest)
        return IndexSummary(existing, ignored, num_reused, was_complete=True)
    return IndexSummary(write_manifest(manifest, out), ignored, num_reused, was_complete=False)


def _check_arguments(split: str | None, pattern: str | None, unlisted: str | None, workers: int) -> None:
    def wrong(found: str, expected: str, where: str) -> ConfigError:
        return ConfigError(found, expected=expected, where=where, next_step="correct the option")

    if split is not None and pattern is not None:
        raise wrong("both a split and a split pattern", "one of them, or none", "split, split_pattern")
    if split == "":
        raise wrong("an empty split", "a name", "split")
    if pattern is not None:
        try:
            num_groups = re.compile(pattern).groups
        except re.error as error:
            raise wrong(f"{pattern!r}: {error}", "a regular expression", "split_pattern") from error
        if not num_groups:
            raise wrong(f"{pattern!r} without a group", r"a group around the split, like `(\w+)-\d+`", "split_pattern")
    if unlisted is not None and unlisted not in get_args(Unlisted):
        raise wrong(f"unlisted {unlisted!r}", nearest_names(unlisted, get_args(Unlisted)), "unlisted")
    if workers < 1:
        raise wrong(f"workers {workers}", "at least 1", "workers")


def _one_folder(urls: Sequence[str]) -> str:
    """The folder of all tars, after checking their URLs and names."""
    folders = list(dict.fromkeys(url.rpartition("/")[0] for url in urls))
    if len(folders) > 1:
        raise ConfigError(
            f"tars in {len(folders)} folders, {folders[0]} and {folders[1]} among them", expected="one folder",
            where="the pattern of the tars", next_step="index each folder by itself, into an --out of its own",
        )  # fmt: skip
    for url in urls:
        if storage.shown(url) != url:
            raise ConfigError(
                "a URL with a password or a query", expected="one without: the manifest will hold it",
                where=storage.shown(url), next_step="hand secrets over in the environment or in the storage options",
            )  # fmt: skip
        if not _FILE_NAME.fullmatch(storage.name(url)):
            raise ConfigError(
                f"a tar named {storage.name(url)!r}", expected="letters, digits, `_`, `-` and single dots", where=url,
                next_step="copy it to another name",
            )  # fmt: skip
    return folders[0]


def _stem(url: str) -> str:
    return storage.name(url).removesuffix(".tar")


def _split_of(url: str, pattern: str) -> str:
    found = re.fullmatch(pattern, _stem(url))
    if found is None or not found[1]:
        raise ConfigError(
            f"no split in the name {_stem(url)!r}", expected=f"a name that fits {pattern!r}", where=url,
            next_step="name the split of all tars with --split, or its place in the names with --split-pattern",
        )  # fmt: skip
    return found[1]


def _existing(out: str) -> Manifest | None:
    if not storage.exists(manifest_url(out)):
        return None
    manifest = load_manifest(out)
    if manifest.source.name != SOURCE:
        raise ManifestError(
            f"a set packed from source {manifest.source.name!r}", expected="no manifest, or that of these tars",
            where=manifest_url(out), next_step="it has its indexes already; to index other tars, give another --out",
        )  # fmt: skip
    return manifest


def _entries(existing: Manifest | None) -> frozenset[ShardEntry] | None:
    if existing is None:
        return None
    return frozenset(entry for split in existing.splits.values() for entry in split.shards)


def _each(task: Callable[[Any], T], items: Sequence[Any], doing: str, workers: int, tell: OnProgress) -> list[T]:
    """Run a task on every item in threads; results are in order.

    An error cancels what has not begun. Items begin in their order, so the first that is faulty has begun by then: once
    all that run have ended, its error is raised.
    """
    pool = ThreadPoolExecutor(min(workers, len(items)), "index")
    try:
        futures = [pool.submit(task, item) for item in items]
        for done, future in enumerate(as_completed(futures), 1):
            if future.exception() is not None:
                break
            tell(doing, done, len(items))
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _first_cell(url: str) -> str:
    """The first cell of a CSV file that `read_classes` accepts."""
    text = storage.read_bytes(url).decode("utf-8-sig")
    return (next(csv.reader(io.StringIO(text)), []) or [""])[0]


def _scan(url: str, *, out: str, classes: _Classes | None) -> _Tar:
    """Scan one tar, or reuse its earlier scan; refuses unlisted classes early, if `classes` is given."""
    try:
        num_bytes, tag = storage.size(url), storage.version(url)
    except FileNotFoundError as error:
        raise storage.missing(url, what="the tar", next_step="correct the pattern, or restore the tar") from error
    where = _scan_url(out, url)
    scan = read_scan(where, num_bytes=num_bytes, version=tag) if tag else None
    is_reused = scan is not None
    if scan is None:
        scan = scan_tar(url, num_bytes)
        storage.write_bytes(where, encode_scan(scan, num_bytes=num_bytes, version=tag))
    if classes is not None:
        _refuse_lost_header(scan, classes, url)
        scan.columns(classes.ids, url)
    return _Tar(
        url=url,
        num_bytes=num_bytes,
        version=tag,
        num_samples=len(scan.keys),
        class_ids=frozenset(scan.class_ids if classes is None else ()),
        has_negatives=any(labels.negatives for labels in scan.labels),
        ignored=scan.ignored,
        is_reused=is_reused,
    )


def _refuse_lost_header(scan: TarScan, classes: _Classes, where: str) -> None:
    """Refuse a list of classes whose first line, taken for its header, is a class of the tar."""
    if classes.header in classes.ids or classes.header not in scan.class_ids:
        return
    shown = storage.shown(classes.url)
    raise DataError(
        f"unknown class {classes.header!r}: the first line of {shown}, {classes.header!r}, was taken for the header",
        expected="a list of classes that begins with a header line, such as `class`",
        where=storage.shown(where),
        next_step=f"add a header line to {shown} and run again",
    )


def _scan_url(out: str, url: str) -> str:
    return storage.join(out, _SCANS, f"{_stem(url)}.arrow")


def _sorted_ids(ids: set[str], where: str) -> list[str]:
    check_num_classes(len(ids), where)
    are_numbers = all(name.isascii() and name.isdecimal() for name in ids)
    return sorted(ids, key=lambda name: (int(name) if are_numbers else 0, name))


def _write(
    call: tuple[_Tar, int], *, out: str, class_ids: Sequence[str], expected: frozenset[ShardEntry] | None
) -> ShardEntry:
    """Write the index of one tar; `call` is the tar and the source row of its first sample."""
    tar, first_row = call
    scan = read_scan(_scan_url(out, tar.url), num_bytes=tar.num_bytes, version=tar.version)
    if scan is None:  # the scan was removed by another process
        scan = scan_tar(tar.url, tar.num_bytes)
    lists = scan.columns(class_ids, tar.url)
    index = ShardIndex(
        keys=pa.array(scan.keys, pa.string()),
        offsets=np.array(scan.offsets, dtype=np.uint64),
        num_bytes=np.array(scan.num_bytes, dtype=np.uint32),
        source_rows=np.arange(first_row, first_row + len(scan.keys), dtype=np.uint64),
        positives=ClassLists.of([positives for positives, _ in lists]),
        negatives=ClassLists.of([negatives for _, negatives in lists]),
    )
    content = encode_index(index)
    entry = ShardEntry(
        file=storage.name(tar.url),
        index=f"{_stem(tar.url)}.arrow",
        num_samples=len(scan.keys),
        num_bytes=tar.num_bytes,
        index_sha256=storage.sha256_of_bytes(content),
    )
    if expected is not None and entry not in expected:
        raise _another(out, f"{entry.file} is not as the manifest says: another tar, other labels or classes")
    storage.write_bytes(storage.join(out, entry.index), content)
    return entry


def _split(entries: Sequence[ShardEntry], splits: Sequence[str], name: str) -> Split:
    own = tuple(entry for entry, split in zip(entries, splits, strict=True) if split == name)
    return Split(
        num_samples=sum(entry.num_samples for entry in own),
        num_bytes=sum(entry.num_bytes for entry in own),
        shards=own,
    )


def _digest(class_ids: Sequence[str], unlisted: str, entries: Sequence[ShardEntry]) -> str:
    """sha256 over the classes, `unlisted`, and all tars' names, sizes and index digests."""
    rows = [[entry.file, entry.num_bytes, entry.index_sha256] for entry in entries]
    return hashlib.sha256(json.dumps([list(class_ids), unlisted, rows]).encode()).hexdigest()


def _refuse_another(existing: Manifest, manifest: Manifest) -> None:
    same = {"url": existing.url, "digest": existing.digest, "version": existing.version}
    if existing != manifest.model_copy(update=same):
        raise _another(existing.url, "other tars, splits, classes or another meaning of unlisted classes")


def _another(out: str, found: str) -> ManifestError:
    return ManifestError(
        found, expected="the set that is there", where=manifest_url(out),
        next_step="give another --out: runs rely on a manifest that never changes",
    )  # fmt: skip
