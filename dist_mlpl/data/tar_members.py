"""Owns the format of webdataset tars from elsewhere: where they lie, how members are named, how labels are written.

The convention is webdataset's: a member's key is its path up to the first dot of the file name, the rest is its
ending, and members with one key make one sample. Labels are read from

    KEY.json    {"positives": [id], "negatives": [id]} ("negatives" is optional), or {"labels": [id]}; other fields are
                ignored; an id is a string, or a whole number, which stands for its decimal text
    KEY.cls     one class id, or a whole number: the class with that id if there is one, else a column number

in this order: if the JSON has none of these fields, KEY.cls is read.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from dist_mlpl import storage
from dist_mlpl.data.manifest import MAX_CLASSES
from dist_mlpl.errors import DataError, ShardError, nearest_names

IMAGE_ENDINGS: Final = ("jpg", "jpeg")
JPEG_START: Final = b"\xff\xd8"
LABEL_ENDINGS: Final = ("json", "cls")
MAX_LABEL_BYTES: Final = 1 << 20  # largest label member
MAX_PADDING_BYTES: Final = 1 << 20  # GNU tar's largest usual record

_FORMS = 'KEY.json with "positives" and "negatives" or with "labels", or KEY.cls'
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's own rule
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
_BRACES = re.compile(r"\{([^{}]*)\}")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def expand_tars(pattern: str) -> list[str]:
    """URLs of the tars that a pattern names.

    Args:
        pattern: a folder, which stands for its `*.tar`; or tars, with braces anywhere (`train-{000000..000099}.tar`,
            `{a,b}`) and wildcards (`*`, `?`, `[...]`) in the last part. Only folders and wildcards need a listing.

    Returns:
        Absolute URLs without duplicates, in the order of the braces; those from a folder or wildcard are sorted.

    Raises:
        DataError: the pattern matches no tar.
        StorageError: a folder could not be listed.
    """
    found: list[str] = []
    for url in _expand_braces(pattern):
        last = storage.name(url)
        if re.search(r"[*?\[]", last):
            folder = url.rstrip("/").rpartition("/")[0] or "."
            found += [storage.join(folder, name) for name in fnmatch.filter(storage.list_names(folder), last)]
        elif re.search(r"\.(tar|tgz|tar\.\w+)$", last):
            found.append(url)
        else:
            found += [storage.join(url, name) for name in storage.list_names(url) if name.endswith(".tar")]
    if not found:
        raise DataError(
            "no tar", expected="a folder of tars, or a pattern that fits some", where=storage.shown(pattern),
            next_step="check the URL; quote the pattern so that the shell leaves it alone",
        )  # fmt: skip
    return list(dict.fromkeys(storage.absolute(url) for url in found))


def _expand_braces(pattern: str) -> list[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    parts = braces[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        is_padded = any(len(text) > 1 and text.startswith("0") for text in numbers.groups())
        width = max(map(len, numbers.groups())) if is_padded else 0
        parts = [str(number).zfill(width) for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    return [url for part in parts for url in _expand_braces(pattern[: braces.start()] + part + pattern[braces.end() :])]


def split_name(member: str) -> tuple[str, str] | None:
    """Key and lower-case ending of a member's name; None for a name that belongs to no sample."""
    found = None if _META.match(member) else _NAME.fullmatch(member)
    return None if found is None else (found[1], found[2].lower())


class SampleLabels(NamedTuple):
    """The human labels of one image, as class ids."""

    positives: tuple[str, ...]  # without duplicates
    negatives: tuple[str, ...]  # without duplicates
    is_number: bool = False  # `positives` is one whole number from a KEY.cls


def read_labels(ending: str, content: bytes, where: str) -> SampleLabels | None:
    """Read the labels in a label member; None for a JSON without labels.

    Args:
        ending: `json` or `cls`.
        content: bytes of the member.
        where: the tar and the key, for messages.

    Raises:
        DataError: not UTF-8, not JSON, a field that is not a list of ids, or an empty KEY.cls.
    """
    try:
        return _from_json(json.loads(content)) if ending == "json" else _from_cls(content.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise _labels_fault(f"labels in KEY.{ending} that do not read: {error}", where) from error


def _from_json(document: Any) -> SampleLabels | None:
    if not isinstance(document, dict):
        return None
    if "positives" in document:
        return SampleLabels(_ids(document["positives"]), _ids(document.get("negatives", [])))
    return SampleLabels(_ids(document["labels"]), ()) if "labels" in document else None


def _ids(values: Any) -> tuple[str, ...]:
    is_list = isinstance(values, list)
    if not is_list or not all(isinstance(v, (str, int)) and not isinstance(v, bool) and v != "" for v in values):
        raise ValueError(f"{str(values)[:100]!r} is no list of class ids")
    return tuple(dict.fromkeys(map(str, values)))  # lists made from detections name a class once per object


def _from_cls(text: str) -> SampleLabels:
    text = text.strip()
    if not text:
        raise ValueError("it is empty")
    is_number = text.isascii() and text.isdecimal()
    return SampleLabels((str(int(text)) if is_number else text,), (), is_number)


def missing_labels(where: str) -> DataError:
    """The error for an image without labels; the caller raises it."""
    return _labels_fault("an image without labels", where)


def _labels_fault(found: str, where: str) -> DataError:
    return DataError(found, expected=_FORMS, where=where, next_step="correct the tar, or convert the labels")


def class_columns(
    labels: SampleLabels, columns: Mapping[str, int], where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Class columns of positives and negatives, each ascending.

    Args:
        labels: labels of one sample.
        columns: class id to column, in column order.
        where: the tar and the key, for messages.

    Raises:
        DataError: an unknown class, or one both present and absent.
    """
    known = columns
    if labels.is_number and labels.positives[0] not in columns and int(labels.positives[0]) < len(columns):
        known = {labels.positives[0]: int(labels.positives[0])}
    for name in (*labels.positives, *labels.negatives):
        if name not in known:
            number = f", or a number below {len(columns)}" if labels.is_number else ""
            raise DataError(
                f"unknown class {name!r}", expected=nearest_names(name, columns) + number, where=where,
                next_step="correct the list of classes, or leave it out to take every id that the tars hold",
            )  # fmt: skip
    positives, negatives = ({known[name] for name in names} for names in labels[:2])
    if both := positives & negatives:
        name = list(columns)[min(both)]
        raise _labels_fault(f"class {name!r} both present and absent", where)
    return tuple(sorted(positives)), tuple(sorted(negatives))


def read_classes(url: str) -> list[str]:
    """Read class ids in column order from the first column of a CSV file with a header line.

    Raises:
        DataError: not CSV in UTF-8, no class, an empty or repeated id, or more than 65,536 of them.
        StorageError: the file is missing or could not be read.
    """

    def fault(found: str, expected: str) -> DataError:
        return DataError(found, expected=expected, where=storage.shown(url), next_step="correct the file and run again")

    try:
        rows = list(csv.reader(io.StringIO(storage.read_bytes(url).decode("utf-8-sig")), strict=True))
    except FileNotFoundError as error:
        raise storage.missing(url, what="the list of classes", next_step="correct the path or URL") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise fault(f"classes that do not read: {error}", "a CSV file in UTF-8 with a header line") from error
    ids = [row[0] for row in rows[1:] if row]
    wrong = [name for name, count in Counter(ids).items() if count > 1 or not name]
    if wrong:
        raise fault(f"class {wrong[0]!r}", "names that are not empty, each once")
    check_num_classes(len(ids), url)
    return ids


def check_num_classes(num_classes: int, where: str) -> None:
    """Refuse a number of classes that the index cannot hold.

    Raises:
        DataError: no class, or more than 65,536.
    """
    if not 0 < num_classes <= MAX_CLASSES:
        raise DataError(
            f"{num_classes:,} classes", expected=f"1 to {MAX_CLASSES:,}", where=where,
            next_step="name fewer classes; labels that are free text are not classes",
        )  # fmt: skip


def refuse_compressed(head: bytes, where: str) -> None:
    """Refuse a compressed file.

    Args:
        head: the file's first bytes, six or more.
        where: its URL, for messages.

    Raises:
        ShardError: the file is compressed by gzip, bzip2, xz or zstd.
    """
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(
                f"a file compressed by {name}", expected="a plain tar: JPEGs do not get smaller", where=where,
                next_step="decompress it",
            )  # fmt: skip


def is_padding(rest: bytes) -> bool:
    """Whether the bytes after the place where a tar reader stopped are only zeros, MAX_PADDING_BYTES at most.

    Python's tarfile takes a damaged header for the end of the tar; this tells the two apart.
    """
    return len(rest) <= MAX_PADDING_BYTES and not any(rest)
