"""Owns mapping a source's classes: leave out, rename, merge and reorder, by a mapping file and a class list."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl.data.manifest import MAX_CLASSES, ClassEntry
from dist_mlpl.data.shard_index import ClassLists
from dist_mlpl.errors import nearest_names
from shards.sources.base import Records, Source
from shards.sources.dense import join_lists
from shards.sources.files import LabelFile, fault, read_file

Others = Literal["refuse", "drop", "keep"]

_BLOCK_ROWS = 1 << 20  # images processed at once: a block's keys take some 100 MB, those of 9 million several GB
_LEFT_OUT = -1
_LOST = "labels_of_classes_left_out"
_NOT_SHARED = "negatives_that_merged_classes_do_not_share"

Columns = npt.NDArray[np.int64]  # (old C,) new column of each class, -1 where it is left out


class _Target(NamedTuple):
    """A class after the mapping."""

    entry: ClassEntry
    members: list[int]  # old columns


def map_classes(
    source: Source, mapping: str | None = None, *, order: str | None = None, others: Others = "refuse"
) -> Source:
    """Map the classes of a source, and its labels with them.

    Classes may be merged: the new class is present where any of them is, absent where all of them are, else unknown. It
    has a machine label, with the highest confidence, where any of them has one and it is not verified present. All
    images stay, even those without a label left.

    Args:
        source: the source.
        mapping: CSV `id,new_id` or `id,new_id,new_name`, with a row for each class; several may share a `new_id`, and
            an empty one leaves the class out. `id` may be a class's name if it is unique. Without a `new_name`, a class
            keeps its name if it keeps its id or is not merged; otherwise `new_id` is also its name. None: no change.
        order: file with one class per line, by its id, or by its name if unique: the columns in order. Classes not in
            it are left out. None: order of first appearance in `mapping`, then the others.
        others: what to do with classes without a row in `mapping`: refuse, drop or keep them.

    Returns:
        The source with its new classes; `arguments` has the digests and the numbers of labels left out.

    Raises:
        DataError: an unknown class (the message names the nearest), a class twice, one without a row, two names for one
            class (the message names file and line), or no class left.
        StorageError: a file is missing.
    """
    files: dict[str, LabelFile] = {}
    if mapping is None:
        targets = {entry.id: _Target(entry, [column]) for column, entry in enumerate(source.classes)}
    else:
        files["mapping"] = read_file(mapping, what="the mapping", option="mapping")
        targets = _targets(source.classes, files["mapping"], others)
    if order is not None:
        files["order"] = read_file(order, what="the class list", option="order")
        targets = _ordered(targets, files["order"])
    if not 0 < len(targets) <= MAX_CLASSES:
        where = mapping or order or "source"
        raise fault(where, "", f"{len(targets)} classes", f"1 to {MAX_CLASSES}")
    columns = np.full(len(source.classes), _LEFT_OUT, dtype=np.int64)
    for column, target in enumerate(targets.values()):
        columns[target.members] = column
    records, dropped = _mapped(source, columns, len(targets))
    told: dict[str, Any] = {f"{part}_sha256": file.sha256 for part, file in files.items()}
    told |= {"others": others, "classes_before": len(source.classes)}
    counts = Counter(source.arguments.get("dropped", {})) + Counter(dropped)
    arguments = {**source.arguments, "mappings": [*source.arguments.get("mappings", []), told], "dropped": dict(counts)}
    return dataclasses.replace(
        source, classes=tuple(target.entry for target in targets.values()), arguments=arguments, records=records
    )


class _Names:
    """Looks up classes by id, or by name if it is unique."""

    def __init__(self, classes: Sequence[ClassEntry]) -> None:
        self._ids = {entry.id: place for place, entry in enumerate(classes)}
        counts = Counter(entry.name for entry in classes)
        self._names = {entry.name: place for place, entry in enumerate(classes) if counts[entry.name] == 1}
        self._repeated = {name for name, count in counts.items() if count > 1}

    def place(self, name: str, file: LabelFile, line: int) -> int:
        """Position of a class.

        Raises:
            DataError: no such class, or a name that several have.
        """
        place = self._ids.get(name, self._names.get(name))
        if place is not None:
            return place
        if name in self._repeated:
            raise file.fault(f"line {line}", f"class {name!r}, a name of several", "the id of one")
        raise file.fault(f"line {line}", f"unknown class {name!r}", nearest_names(name, {*self._ids, *self._names}))


def _targets(classes: Sequence[ClassEntry], file: LabelFile, others: Others) -> dict[str, _Target]:
    """The new classes by id, in order of first appearance."""
    names = _Names(classes)
    members: dict[str, list[int]] = {}
    new_names: dict[str, str] = {}
    seen: dict[int, int] = {}
    for line, (name, new_id, new_name) in file.rows(("id", "new_id"), optional=("new_name",)):
        column = names.place(name, file, line)
        if column in seen:
            raise file.fault(f"line {line}", f"class {name!r} again, mapped in line {seen[column]}", "every class once")
        seen[column] = line
        if not new_id:
            continue
        members.setdefault(new_id, []).append(column)
        if new_name and new_names.setdefault(new_id, new_name) != new_name:
            raise file.fault(f"line {line}", f"name {new_name!r} of {new_id!r}", f"{new_names[new_id]!r}, as before")
    rest = [column for column in range(len(classes)) if column not in seen]
    if rest and others == "refuse":
        first = ", ".join(repr(classes[column].id) for column in rest[:5]) + " ..." * (len(rest) > 5)
        raise file.fault("", f"no row for {len(rest)} of {len(classes)} classes: {first}", "a row for every class")
    if others == "keep":
        for column in rest:
            members.setdefault(classes[column].id, []).append(column)
    return {
        new_id: _Target(ClassEntry(id=new_id, name=new_names.get(new_id) or _name(classes, new_id, columns)), columns)
        for new_id, columns in members.items()
    }


def _name(classes: Sequence[ClassEntry], new_id: str, columns: Sequence[int]) -> str:
    own = [classes[column].name for column in columns if classes[column].id == new_id or len(columns) == 1]
    return own[0] if own else new_id


def _ordered(targets: Mapping[str, _Target], file: LabelFile) -> dict[str, _Target]:
    found = list(targets.values())
    names = _Names([target.entry for target in found])
    ordered: dict[str, _Target] = {}
    for line, name in file.lines():
        target = found[names.place(name, file, line)]
        if target.entry.id in ordered:
            raise file.fault(f"line {line}", f"class {name!r} again", "every class once")
        ordered[target.entry.id] = target
    return ordered


def _mapped(source: Source, columns: Columns, num_classes: int) -> tuple[Records, dict[str, int]]:
    """Records with the new labels, and the number of labels lost, by reason."""
    records = source.records
    sizes = np.bincount(columns[columns != _LEFT_OUT], minlength=num_classes)  # (C,) classes merged into each
    parts: dict[str, list[ClassLists]] = {"positives": [], "negatives": [], "machine": []}
    confidences: list[npt.NDArray[np.float16]] = []
    dropped: Counter[str] = Counter()
    for start in range(0, max(len(records), 1), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(records))
        positives, stays = _keys(records.positives, start, stop, columns, num_classes)
        dropped[_LOST] += int((~stays).sum())
        positives = np.unique(positives)
        negatives, stays = _keys(records.negatives, start, stop, columns, num_classes)
        dropped[_LOST] += int((~stays).sum())
        negatives, counts = np.unique(negatives, return_counts=True)
        is_shared = counts == sizes[negatives % num_classes]
        if source.unlisted == "unknown":
            is_open = ~is_shared & ~np.isin(negatives, positives, assume_unique=True)
            dropped[_NOT_SHARED] += int(counts[is_open].sum())
        parts["positives"].append(_lists(positives, stop - start, num_classes))
        parts["negatives"].append(_lists(negatives[is_shared], stop - start, num_classes))
        if records.machine is not None and records.confidences is not None:
            keys, stays = _keys(records.machine, start, stop, columns, num_classes)
            dropped[_LOST] += int((~stays).sum())
            keys, highest = _highest(keys, records.confidences[_entries(records.machine, start, stop)][stays])
            is_unverified = ~np.isin(keys, positives, assume_unique=True)
            parts["machine"].append(_lists(keys[is_unverified], stop - start, num_classes))
            confidences.append(highest[is_unverified])
    mapped = dataclasses.replace(
        records,
        positives=join_lists(parts["positives"]),
        negatives=join_lists(parts["negatives"]),
        machine=join_lists(parts["machine"]) if parts["machine"] else None,
        confidences=np.concatenate(confidences) if confidences else None,
    )
    return mapped, {reason: count for reason, count in dropped.items() if count}


def _entries(lists: ClassLists, start: int, stop: int) -> slice:
    """The slice of `values` that holds rows [start, stop)."""
    return slice(int(lists.offsets[start]), int(lists.offsets[stop]))


def _keys(
    lists: ClassLists, start: int, stop: int, columns: Columns, num_classes: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Keys of the labels of rows [start, stop) whose class stays, and which labels those are.

    A key is (row in the block) * C + new column.
    """
    new = columns[lists.values[_entries(lists, start, stop)]]
    places = np.repeat(np.arange(stop - start), np.diff(lists.offsets[start : stop + 1]))
    stays = new != _LEFT_OUT
    return places[stays] * num_classes + new[stays], stays


def _highest(
    keys: npt.NDArray[np.int64], confidences: npt.NDArray[np.float16]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """Distinct keys, ascending, each with its highest confidence."""
    order = np.lexsort((confidences, keys))
    keys, confidences = keys[order], confidences[order]
    is_last = np.ones(len(keys), dtype=bool)
    is_last[:-1] = keys[1:] != keys[:-1]
    return keys[is_last], confidences[is_last]


def _lists(keys: npt.NDArray[np.int64], num_rows: int, num_classes: int) -> ClassLists:
    """Turn distinct ascending keys into class lists."""
    offsets = np.searchsorted(keys, np.arange(num_rows + 1) * num_classes)
    return ClassLists((keys % num_classes).astype(np.uint16), offsets.astype(np.int64))
