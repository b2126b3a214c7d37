"""Owns Open Images' class hierarchy: which class is a kind of which, and what a label implies about others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from dist_mlpl.data.shard_index import ClassLists
from dist_mlpl.errors import DataError
from shards.sources.files import LabelFile, read_file

_NAME, _KINDS, _PARTS = "LabelName", "Subcategory", "Part"


@dataclass(frozen=True, slots=True)
class Closure:
    """The implications of labels, by class column.

    Args:
        ancestors: for each class, all classes that it is a kind of, directly or not: its presence implies theirs.
        descendants: for each class, all classes that are a kind of it, directly or not: its absence implies theirs.
    """

    ancestors: ClassLists
    descendants: ClassLists


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The classes as an acyclic graph, with one node per MID even if the file repeats it.

    Args:
        root: the node at the top, which is not a class.
        parents: by MID, the MIDs of which it is a kind, possibly the root.
        wholes: by MID, the MIDs of which it is a part. Parts imply nothing: a visible wheel does not make a verified
            car, and an image without a car may show a wheel.
        sha256: digest of the file.
    """

    root: str
    parents: Mapping[str, frozenset[str]]
    wholes: Mapping[str, frozenset[str]]
    sha256: str

    def closure(self, mids: Sequence[str]) -> Closure:
        """The implications among some classes; intermediate classes need not be among them.

        Args:
            mids: MIDs of the classes, in column order.
        """
        above: dict[str, frozenset[str]] = {}
        for mid in TopologicalSorter(self.parents).static_order():  # parents first
            parents = self.parents.get(mid, frozenset()) - {self.root}
            above[mid] = parents.union(*(above[parent] for parent in parents))
        columns = {mid: column for column, mid in enumerate(mids)}
        ancestors = [
            sorted(columns[parent] for parent in above.get(mid, frozenset()) if parent in columns) for mid in mids
        ]
        descendants: list[list[int]] = [[] for _ in mids]
        for column, higher in enumerate(ancestors):
            for ancestor in higher:
                descendants[ancestor].append(column)
        return Closure(ClassLists.of(ancestors), ClassLists.of(descendants))


def read_hierarchy(url: str) -> Hierarchy:
    """Read a hierarchy as published by Open Images: nested objects with LabelName, Subcategory and Part.

    Raises:
        DataError: not JSON, another structure, or a class that is a kind of itself.
        StorageError: the file is missing or cannot be read.
    """
    file = read_file(url, what="the hierarchy", option="hierarchy")
    document = file.json()
    parents: dict[str, set[str]] = {}
    wholes: dict[str, set[str]] = {}
    for mid, kind, above in _edges(file, document):
        (parents if kind == _KINDS else wholes).setdefault(mid, set()).add(above)
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        circle = " in ".join(reversed(error.args[1]))
        raise file.fault("", f"classes in a circle: {circle}", "no class that is a kind of itself") from error
    return Hierarchy(
        root=document[_NAME],
        parents={mid: frozenset(above) for mid, above in parents.items()},
        wholes={mid: frozenset(above) for mid, above in wholes.items()},
        sha256=file.sha256,
    )


def _edges(file: LabelFile, document: Any) -> Iterator[tuple[str, str, str]]:
    """(MID, relation, MID of its parent) for every nested pair."""
    name = _name(file, document, "the root")
    waiting = [(document, name)]
    while waiting:
        node, above = waiting.pop()
        for kind in (_KINDS, _PARTS):
            below = node.get(kind, [])
            if not isinstance(below, list):
                raise _wrong(file, f"{kind} of {above} is no list")
            for child in below:
                mid = _name(file, child, f"an entry in {kind} of {above}")
                yield mid, kind, above
                waiting.append((child, mid))


def _name(file: LabelFile, node: Any, which: str) -> str:
    if not isinstance(node, dict) or not isinstance(node.get(_NAME), str) or not node[_NAME]:
        raise _wrong(file, f"{which} has no {_NAME}")
    return str(node[_NAME])


def _wrong(file: LabelFile, found: str) -> DataError:
    return file.fault("", found, f"objects with {_NAME}, {_KINDS} and {_PARTS}, as in bbox_labels_600_hierarchy.json")
