"""Owns the class lists of Open Images: one machine id (MID) per line, or a CSV file of MIDs and names."""

from __future__ import annotations

import csv
import io
import re

from dist_mlpl.data.manifest import MAX_CLASSES, ClassEntry
from dist_mlpl.errors import DataError
from shards.sources.files import LabelFile, read_file

MID = re.compile(r"/[a-z]/[0-9a-z_]+")
MID_MEANING = "a machine id such as /m/04hgtk"

_HEADER = "LabelName"


def read_classes(url: str, descriptions: str | None) -> tuple[tuple[ClassEntry, ...], dict[str, str]]:
    """Read the classes to keep, sorted by MID whatever the order of the file.

    Args:
        url: a list of MIDs, optionally with names, of the classes to keep.
        descriptions: names by MID, of these and possibly other classes; None for the names in `url`. A class without a
            name is named by its MID. Names may repeat.

    Returns:
        The classes, and digests of the files by option.

    Raises:
        DataError: not CSV in UTF-8, a line without a MID, a MID twice, or more classes than the index can hold.
        StorageError: a file is missing or cannot be read.
    """
    listed = read_file(url, what="the list of classes", option="classes")
    names = _read_names(listed)
    if len(names) > MAX_CLASSES:
        raise listed.fault("", f"{len(names)} classes", f"1 to {MAX_CLASSES}")
    digests = {"classes": listed.sha256}
    if descriptions is not None:
        described = read_file(descriptions, what="the file of class names", option="descriptions")
        names |= {mid: name for mid, name in _read_names(described).items() if mid in names and name}
        digests["descriptions"] = described.sha256
    return tuple(ClassEntry(id=mid, name=names[mid] or mid) for mid in sorted(names)), digests


def _read_names(file: LabelFile) -> dict[str, str]:
    """Names by MID, "" where the file has none; the header line is optional."""
    names: dict[str, str] = {}
    text = io.StringIO(file.text(), newline="")
    reader = csv.reader(text, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells and not (line == 1 and cells[0] == _HEADER):
                _add(file, line, cells, names)
            line = reader.line_num + 1
    except csv.Error as error:
        found = f"a row that does not read as CSV: {error}"
        raise file.fault(f"line {line}", found, "a MID, or MID,NAME with quotes closed") from error
    if not names:
        raise file.fault("line 1", "no class", "one class a line")
    return names


def _add(file: LabelFile, line: int, cells: list[str], names: dict[str, str]) -> None:
    def wrong(found: str, expected: str) -> DataError:
        return file.fault(f"line {line}", found, expected)

    mid = cells[0].strip()
    if len(cells) > 2:
        raise wrong(f"{len(cells)} cells", "a MID, or MID,NAME with quotes around a name that has commas")
    if not MID.fullmatch(mid):
        raise wrong(f"class {mid!r}", MID_MEANING)
    if mid in names:
        raise wrong(f"class {mid!r} again", "every class once")
    names[mid] = cells[1].strip() if len(cells) == 2 else ""
