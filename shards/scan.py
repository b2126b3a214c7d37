"""Owns scanning the headers of one tar for keys, JPEG offsets and labels, and the file that stores the scan."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from dist_mlpl import storage
from dist_mlpl.data.tar_members import (
    IMAGE_ENDINGS,
    JPEG_START,
    LABEL_ENDINGS,
    MAX_LABEL_BYTES,
    MAX_PADDING_BYTES,
    SampleLabels,
    class_columns,
    is_padding,
    missing_labels,
    read_labels,
    refuse_compressed,
    split_name,
)
from dist_mlpl.errors import ShardError

# Usually covers a label member and the headers around it, with long names, and little of a JPEG.
READ_AHEAD_BYTES = 8 << 10
_MAX_READ_BYTES = 1 + max(MAX_LABEL_BYTES, MAX_PADDING_BYTES)  # more than any sound header needs
_MAX_IMAGE_BYTES = (1 << 32) - 1  # the index stores lengths as uint32
_FORMAT = 2

FOLDER, LINK, OTHER, NO_JPEG = "folder", "link or device", "other member", "labels without a JPEG"
NOT_JPEG = "image that is no JPEG"


class RangedFile:
    """A seekable file over an object: ranges are fetched when read, and skipped bytes are not fetched.

    Every range is retried separately. Not safe for use from several threads.

    Args:
        url: the object.
        num_bytes: its size.
        block_bytes: smallest range fetched: larger ones mean fewer requests and more unneeded bytes.
    """

    def __init__(self, url: str, num_bytes: int, *, block_bytes: int) -> None:
        self.url, self.num_bytes = url, num_bytes
        self._block_bytes = block_bytes
        self._place = 0
        self._start, self._block = 0, b""

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._place

    def seek(self, offset: int) -> int:
        """Move to an offset from the start, and return it."""
        self._place = offset
        return offset

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes, fewer only at the end of the object.

        Raises:
            tarfile.ReadError: `size` is out of range, because a damaged header asked for it.
            StorageError: the storage failed.
        """
        if not 0 <= size <= _MAX_READ_BYTES:
            raise tarfile.ReadError(f"a header that asks for {size:,} bytes")
        end = min(self._place + size, self.num_bytes)
        if end <= self._place:
            return b""
        if not self._start <= self._place <= end <= self._start + len(self._block):
            stop = min(max(end, self._place + self._block_bytes), self.num_bytes)
            self._start, self._block = self._place, storage.read_bytes(self.url, self._place, stop)
        content = self._block[self._place - self._start : end - self._start]
        self._place = end
        return content


class TarScan(NamedTuple):
    """The samples of one tar, in the order of their JPEGs."""

    keys: list[str]
    offsets: list[int]  # offset of each JPEG's first byte in the tar
    num_bytes: list[int]  # length of each JPEG
    labels: list[SampleLabels]
    ignored: dict[str, int]  # number of members that belong to no sample, by kind

    @property
    def class_ids(self) -> set[str]:
        """All class ids that any sample lists."""
        return {name for labels in self.labels for names in (labels.positives, labels.negatives) for name in names}

    def columns(self, class_ids: Sequence[str], where: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Class columns of every sample, positives and negatives; see `class_columns` for what it raises."""
        columns = {name: column for column, name in enumerate(class_ids)}
        return [
            class_columns(labels, columns, f"{where}: {key}")
            for key, labels in zip(self.keys, self.labels, strict=True)
        ]


def scan_tar(url: str, num_bytes: int) -> TarScan:
    """Scan a plain tar: its headers, label members and the first bytes of JPEGs, about one 8 KiB request per sample.

    Members named like a JPEG that do not begin like one are skipped and counted. The members of a sample may come in
    any order. GNU and pax long names are supported.

    Args:
        url: the tar.
        num_bytes: its size.

    Raises:
        ShardError: not a tar, compressed, truncated or damaged; no JPEG inside; a key with two images, or twice.
        DataError: an image without labels, or labels that do not read.
        StorageError: the storage failed.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, dict[str, SampleLabels | None]] = {}
    ignored: Counter[str] = Counter()
    strangers: set[str] = set()  # keys whose image is no JPEG
    file, place = RangedFile(url, num_bytes, block_bytes=READ_AHEAD_BYTES), storage.shown(url)
    for member in _members(file):
        name = split_name(member.name)
        if not member.isreg() or name is None or name[1] not in IMAGE_ENDINGS + LABEL_ENDINGS:
            ignored[FOLDER if member.isdir() else OTHER if member.isreg() else LINK] += 1
            continue
        key, ending = name
        where = f"{place}: {key}"
        _check_member(member, ending, where)
        if ending in IMAGE_ENDINGS:
            if key in images or key in strangers:
                raise _fault("two samples of one key", "every key once", where)
            file.seek(member.offset_data)
            if file.read(len(JPEG_START)) != JPEG_START:
                strangers.add(key)
                continue
            images[key] = member
            continue
        if ending in labels.setdefault(key, {}):
            raise _fault(f"two members {key}.{ending}", "every key once", where)
        file.seek(member.offset_data)
        content = file.read(member.size)
        if len(content) < member.size:
            raise _fault(f"a truncated tar: it ends inside {key}.{ending}", "a whole tar", where)
        labels[key][ending] = read_labels(ending, content, where)
    if not images:
        raise _fault(f"no JPEG inside {num_bytes:,} bytes", "members KEY.jpg or KEY.jpeg", place)
    if strangers:
        ignored[NOT_JPEG] = len(strangers)
    if without := len(labels.keys() - images.keys() - strangers):
        ignored[NO_JPEG] = without
    return TarScan(
        keys=list(images),
        offsets=[member.offset_data for member in images.values()],
        num_bytes=[member.size for member in images.values()],
        labels=[_chosen(labels.get(key, {}), f"{place}: {key}") for key in images],
        ignored=dict(sorted(ignored.items())),
    )


def _members(file: RangedFile) -> Iterator[tarfile.TarInfo]:
    """Headers in tar order; the caller may move the file's position in between."""
    what, place = "not a tar", storage.shown(file.url)
    refuse_compressed(file.read(8), place)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="strict") as tar:  # type: ignore[call-overload]
            what = "a damaged or truncated tar"
            while (member := tar.next()) is not None:
                if member.size < 0:  # tarfile would loop forever
                    raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
                yield member
            end = int(tar.offset)
    except (tarfile.TarError, ValueError, RecursionError) as error:  # names not in UTF-8, damaged pax headers, too many
        raise _fault(f"{what}: {error}", "a whole tar with names in UTF-8", place) from error
    file.seek(end)
    if file.num_bytes - end < tarfile.BLOCKSIZE or not is_padding(file.read(MAX_PADDING_BYTES + 1)):
        found = f"a damaged or truncated tar: no end mark at byte {end:,} of {file.num_bytes:,}"
        raise _fault(found, "zeros after the last member, and nothing else", place)


def _check_member(member: tarfile.TarInfo, ending: str, where: str) -> None:
    limit = _MAX_IMAGE_BYTES if ending in IMAGE_ENDINGS else MAX_LABEL_BYTES
    if member.size > limit or member.issparse():
        found = f"{member.name!r} is stored sparse" if member.issparse() else f"{member.size:,} bytes of {ending}"
        raise _fault(found, f"at most {limit:,} bytes in one piece", where)


def _chosen(found: dict[str, SampleLabels | None], where: str) -> SampleLabels:
    labels = found.get("json") or found.get("cls")
    if labels is None:
        raise missing_labels(where)
    return labels


def _fault(found: str, expected: str, where: str) -> ShardError:
    return ShardError(
        found, expected=expected, where=where, next_step="fetch or write the tar again, or leave it out of the pattern"
    )


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.uint64()),
        ("num_bytes", pa.uint32()),
        ("positives", pa.list_(pa.string())),
        ("negatives", pa.list_(pa.string())),
        ("is_number", pa.bool_()),
    ]
)


def encode_scan(scan: TarScan, *, num_bytes: int, version: str) -> bytes:
    """Encode a scan as an Arrow IPC file, with the size and version of the tar that it describes."""
    about = {"format": _FORMAT, "num_bytes": num_bytes, "version": version, "ignored": scan.ignored}
    schema = _SCHEMA.with_metadata({"tar": json.dumps(about)})
    lists = [[getattr(labels, name) for labels in scan.labels] for name in SampleLabels._fields]
    batch = pa.record_batch(
        [pa.array(column, field.type) for column, field in zip([*scan[:3], *lists], _SCHEMA, strict=True)], schema
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def read_scan(url: str, *, num_bytes: int, version: str) -> TarScan | None:
    """Read a stored scan; None if there is none, it is damaged, or the tar's size or version has changed.

    Raises:
        StorageError: the storage failed.
    """
    try:
        table = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(url))).read_all()
        table.validate(full=True)
        about = json.loads((table.schema.metadata or {}).get(b"tar", b"{}"))
    except (FileNotFoundError, pa.ArrowException, OSError, ValueError):
        return None
    same = {"format": _FORMAT, "num_bytes": num_bytes, "version": version}
    if not table.schema.equals(_SCHEMA) or any(about.get(name) != value for name, value in same.items()):
        return None
    columns = table.to_pydict()
    rows = zip(*(columns[name] for name in SampleLabels._fields), strict=True)
    labels = [SampleLabels(tuple(positives), tuple(negatives), is_number) for positives, negatives, is_number in rows]
    return TarScan(columns["key"], columns["offset"], columns["num_bytes"], labels, about["ignored"])
