"""Owns views on disk as a run sees them: read shard by shard on first use, a bounded part kept in memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dist_mlpl import storage
from dist_mlpl.data.entries import Entries
from dist_mlpl.data.last_used import LastUsed
from dist_mlpl.data.shard_index import ClassLists
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.view_files import FILE_NAME, ViewDocument, decode_view_file, load_view
from dist_mlpl.errors import ManifestError, ShardError
from dist_mlpl.labels import UNKNOWN, Targets

KEPT_BYTES = 256 << 20  # bytes of a view kept in memory: enough to hide 50 million labels of 9 million images

_Lists = dict[int, ClassLists]  # new label value -> for each row of a shard, the class columns that take it


class StoredView:
    """A view on disk, read shard by shard on first use. Safe to use from many threads.

    It equals the in-memory view of the same digest; views whose rule replaces labels exist on disk only.

    Args:
        url: folder of the view.
        index: the split whose labels it changes.

    Raises:
        ManifestError: no view there, or a view of another split or other shards.
    """

    def __init__(self, url: str, index: SplitIndex) -> None:
        self.document = load_view(url)
        self._index = index
        _check_belongs(self.document, index)
        self._lists = LastUsed(self._lists_of, limit=KEPT_BYTES, cost=_num_bytes)

    @property
    def digest(self) -> str:
        """sha256 over the digests of its shards; see `dist_mlpl.data.views.view_digest`."""
        return self.document.digest

    @property
    def kept_bytes(self) -> int:
        """Bytes of the view that are in memory now."""
        return self._lists.total_cost

    def hidden(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which entries of some samples are known and hidden; replaced labels do not count as hidden.

        Args:
            indices: (n,) int64 in [0, N).

        Returns:
            (n, C) bool.

        Raises:
            ShardError: a file of the view is missing or damaged.
        """
        found = np.zeros((len(indices), self._index.manifest.num_classes), dtype=bool)
        for place, (shard, row) in enumerate(self._index.rows(indices)):
            if UNKNOWN in (lists := self._lists[shard]):
                found[place, lists[UNKNOWN].row(row)] = True
        return found

    def apply(self, targets: Targets, indices: npt.NDArray[np.int64]) -> Targets:
        """Set hidden labels to unknown, and replaced labels to their replacement.

        Args:
            targets: (n, C) int8, human labels.
            indices: (n,) int64 in [0, N), the samples they belong to.

        Returns:
            (n, C) int8, a new array.

        Raises:
            ShardError: a file of the view is missing or damaged.
        """
        seen = targets.copy()
        for place, (shard, row) in enumerate(self._index.rows(indices)):
            for value, lists in self._lists[shard].items():
                seen[place, lists.row(row)] = value
        return seen

    def changes(self, shard: int) -> Entries:
        """The view's changes to one shard, read from disk each time; for tools.

        Raises:
            ShardError: the file is missing, damaged, or not the one that view.json lists.
        """
        listed, entry = self.document.shards[shard], self._index.shards[shard]
        where = storage.join(self.document.url, listed.file)
        try:
            content = storage.read_bytes(where)
        except FileNotFoundError as error:
            raise ShardError(
                "a view's file is not there",
                expected=f"what view.json lists for {entry.file}",
                where=storage.shown(where),
                next_step="restore it, or remove the view's view.json and draw it again: what is whole is kept",
            ) from error
        num_classes = self._index.manifest.num_classes
        file = decode_view_file(content, num_samples=entry.num_samples, num_classes=num_classes, where=where)
        if file.digest != listed.digest:
            raise ShardError(
                f"digest {file.digest}",
                expected=f"{listed.digest}, from view.json",
                where=storage.shown(where),
                next_step="two views were drawn under one name: remove view.json and draw it again",
            )
        return file.changes

    def _lists_of(self, shard: int) -> _Lists:
        changes, found = self.changes(shard), {}
        ends = np.arange(self._index.shards[shard].num_samples + 1)
        for value in np.unique(changes.values).tolist():
            some = changes.where(changes.values == value)
            found[value] = ClassLists(some.classes, np.searchsorted(some.rows, ends))
        return found


def _num_bytes(lists: _Lists) -> int:
    return sum(part.values.nbytes + part.offsets.nbytes for part in lists.values())


def _check_belongs(document: ViewDocument, index: SplitIndex) -> None:
    manifest = index.manifest
    found, expected = f"a view of split {document.split!r}", f"one of split {index.split!r}"
    is_good = document.split == index.split
    if is_good:
        found = f"a view of the manifest {document.manifest_digest[:16]}..."
        expected = f"one of {manifest.digest[:16]}..., {manifest.place}"
        files = [entry.index for entry in index.shards]
        is_good = document.manifest_digest == manifest.digest and [shard.file for shard in document.shards] == files
    if not is_good:
        raise ManifestError(
            found,
            expected=expected,
            where=storage.shown(storage.join(document.url, FILE_NAME)),
            next_step="name a view of these shards, or draw one: `dist-mlpl shards simulate`",
        )
