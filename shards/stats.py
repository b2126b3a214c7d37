"""Owns the statistics of a packed set: labels by class, image and pair, image sizes; one pass over the indexes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_mlpl.data.entries import Entries, known_entries, positive_entries
from dist_mlpl.data.manifest import Manifest, load_manifest
from dist_mlpl.data.shard_index import ShardIndex
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stored_view import StoredView
from dist_mlpl.data.view_files import ViewDocument, load_view, view_url
from dist_mlpl.errors import ConfigError
from dist_mlpl.labels import PRESENT
from shards.pack import OnProgress
from shards.pairs import PairCounts, Pairs, counted_classes
from shards.sample import choose, every, image_sizes

Counts = npt.NDArray[np.int64]

CONFIDENCE_BINS = 20  # equal bins of machine labels' confidence over [0, 1]
BYTE_BINS = 64  # half powers of two: bin b counts images of 2**(b / 2) bytes up to the next bin
TOP_PAIRS = 200  # pairs in a document
_SEED = 0  # seed of the sample of images, fixed so that a set always shows the same sizes


@dataclass(frozen=True, eq=False, slots=True)
class SplitStatistics:
    """The statistics of a split, as seen through the view if there is one.

    Args:
        name: name of the split.
        num_samples: N.
        num_shards, num_bytes: number and total size of its tars.
        positives, negatives: (C,) number of images where a class is present, absent; in the others it is unknown.
        positives_per_image, known_per_image: number of images by their number of such labels, counted from 0.
        machine: (C,) number of images where only a machine calls a class present; None without machine labels.
        confidences: (CONFIDENCE_BINS,) number of machine labels by confidence; None if `machine` is None.
        bytes_per_image: (BYTE_BINS,) number of images by size.
        sizes: (s, 2) width and height in pixels of the sampled images with a readable header.
        num_unreadable: number of sampled images without a readable header.
        pairs: pairs of classes present together.
    """

    name: str
    num_samples: int
    num_shards: int
    num_bytes: int
    positives: Counts
    negatives: Counts
    positives_per_image: Counts
    known_per_image: Counts
    machine: Counts | None
    confidences: Counts | None
    bytes_per_image: Counts
    sizes: npt.NDArray[np.int32]
    num_unreadable: int
    pairs: Pairs

    @property
    def num_known(self) -> int:
        """Number of known labels."""
        return int(self.positives.sum() + self.negatives.sum())

    @property
    def density(self) -> float:
        """Share of known labels among all N C, in [0, 1]."""
        return self.num_known / max(1, self.num_samples * len(self.positives))

    @property
    def rate(self) -> npt.NDArray[np.float64]:
        """(C,) share of positives among the known labels of each class; NaN where none is known."""
        known = self.positives + self.negatives
        return np.divide(self.positives, known, out=np.full(len(known), np.nan), where=known > 0)


@dataclass(frozen=True, eq=False, slots=True)
class Statistics:
    """The statistics of a whole set.

    Args:
        manifest: the set's manifest.
        view: the view through which its split was seen; None without one.
        splits: by name, in the manifest's order.
    """

    manifest: Manifest
    view: ViewDocument | None
    splits: dict[str, SplitStatistics]


def stats(
    url: str, *, view: str | None = None, sample: int = 2000, on_progress: OnProgress | None = None
) -> Statistics:
    """Compute statistics of a packed data set from its indexes; images are opened only to read their sizes.

    Memory: a few shards' labels, and the counts of pairs (`PairCounts`): 740 MB for 9,605 classes, 50 kB for 80.

    Args:
        url: folder of the shards.
        view: name or URL of a view on disk, through which its split is seen; None for all labels.
        sample: number of images of each split whose header is read; 0 for none.
        on_progress: called after each shard.

    Raises:
        ConfigError: a negative sample.
        ManifestError: no such set or view, or a view of another set.
        ShardError: an index or a view's file is missing or damaged.
        StorageError: reading failed.
    """
    if sample < 0:
        raise ConfigError(f"sample {sample}", expected="0 or more", where="--sample", next_step="correct the option")
    manifest = load_manifest(url)
    document = None if view is None else load_view(view_url(manifest.url, view))
    if document is not None:
        manifest.split(document.split)  # a view of another set is refused before any work
    total, done, counted = sum(split.num_samples for split in manifest.splits.values()), 0, {}
    for name in manifest.splits:
        index = SplitIndex(manifest, name)
        through = StoredView(document.url, index) if document is not None and document.split == name else None
        count = _Count(index, through)
        for num_samples in count.run():
            done += num_samples
            if on_progress is not None:
                on_progress("counting", done, total)
        counted[name] = count.finish(sample)
    return Statistics(manifest, document, counted)


class _Count:
    """The counts of one split in progress."""

    def __init__(self, index: SplitIndex, view: StoredView | None) -> None:
        self._index, self._view = index, view
        manifest = index.manifest
        num_classes = manifest.num_classes
        self._is_all_known = manifest.unlisted == "absent" and view is None
        self._positives, self._negatives = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
        self._positives_per_image = np.zeros(num_classes + 1, np.int64)
        self._known_per_image = np.zeros(num_classes + 1, np.int64)
        self._machine = np.zeros(num_classes, np.int64)
        self._confidences = np.zeros(CONFIDENCE_BINS, np.int64)
        self._has_machine = False
        self._bytes_per_image = np.zeros(BYTE_BINS, np.int64)
        self._pairs = PairCounts(self._pair_classes(), num_classes, is_all_known=self._is_all_known)

    def _pair_classes(self) -> Counts:
        """Classes to count in pairs: all, or if too many those with the most positives, after one more pass."""
        positives = np.zeros(self._index.manifest.num_classes, np.int64)
        if len(counted_classes(positives)) < len(positives):
            for shard in self._index.shard_indexes():
                positives += np.bincount(shard.positives.values, minlength=len(positives))
        return counted_classes(positives)

    def run(self) -> Iterator[int]:
        """Count one shard after the other; yields the number of samples in each."""
        for number, shard in enumerate(self._index.shard_indexes()):
            for entries in self._seen(number, shard):
                self._add(entries)
                self._pairs.add(entries)
            self._add_images(shard)
            yield shard.num_samples

    def _seen(self, number: int, shard: ShardIndex) -> Iterator[Entries]:
        """Known labels after the view, in blocks of whole rows; if all labels are known, only the present ones."""
        manifest = self._index.manifest
        if self._is_all_known:
            yield positive_entries(shard)
            return
        blocks = known_entries(shard, num_classes=manifest.num_classes, unlisted=manifest.unlisted)
        if self._view is None:
            yield from blocks
            return
        changes = self._view.changes(number)
        codes = changes.codes
        for entries in blocks:
            at = np.searchsorted(codes, entries.codes)
            is_changed = np.append(codes, -1)[at] == entries.codes
            values = np.where(is_changed, np.append(changes.values, 0)[at], entries.values).astype(np.int8)
            yield entries._replace(values=values).where(values != 0)

    def _add(self, entries: Entries) -> None:
        num_classes = len(self._positives)
        present = entries.values == PRESENT
        self._positives += np.bincount(entries.classes[present], minlength=num_classes)
        self._negatives += np.bincount(entries.classes[~present], minlength=num_classes)
        # Rows without any such label are counted in `finish`, as the rest.
        for histogram, rows in (
            (self._positives_per_image, entries.rows[present]),
            (self._known_per_image, entries.rows),
        ):
            sizes = np.unique(rows, return_counts=True)[1]
            histogram += np.bincount(sizes, minlength=len(histogram))

    def _add_images(self, shard: ShardIndex) -> None:
        bins = np.floor(2 * np.log2(np.maximum(1, shard.num_bytes.astype(np.float64)))).astype(np.int64)
        self._bytes_per_image += np.bincount(bins, minlength=BYTE_BINS)
        if shard.machine is not None and shard.confidences is not None:
            self._has_machine = True
            self._machine += np.bincount(shard.machine.values, minlength=len(self._machine))
            bins = np.minimum(shard.confidences.astype(np.float64) * CONFIDENCE_BINS, CONFIDENCE_BINS - 1)
            self._confidences += np.bincount(bins.astype(np.int64), minlength=CONFIDENCE_BINS)

    def finish(self, sample: int) -> SplitStatistics:
        """The final statistics, with the sizes of up to `sample` images."""
        index = self._index
        num_samples = index.num_samples
        if self._is_all_known:
            self._negatives = num_samples - self._positives
            self._known_per_image = np.zeros_like(self._known_per_image)
            self._known_per_image[-1] = num_samples
        for histogram in (self._positives_per_image, self._known_per_image):
            histogram[0] = num_samples - histogram[1:].sum()
        chosen = choose(every(num_samples), sample, seed=_SEED, split=index.split)
        sizes = image_sizes(index, chosen)
        is_read = sizes[:, 0] > 0
        return SplitStatistics(
            name=index.split,
            num_samples=num_samples,
            num_shards=len(index.shards),
            num_bytes=index.num_bytes,
            positives=self._positives,
            negatives=self._negatives,
            positives_per_image=np.trim_zeros(self._positives_per_image, "b"),
            known_per_image=np.trim_zeros(self._known_per_image, "b"),
            machine=self._machine if self._has_machine else None,
            confidences=self._confidences if self._has_machine else None,
            bytes_per_image=self._bytes_per_image,
            sizes=sizes[is_read],
            num_unreadable=int((~is_read).sum()),
            pairs=self._pairs.finish(num_samples, self._positives),
        )


def stats_document(statistics: Statistics) -> dict[str, Any]:
    """Statistics as a dict for JSON: all classes and histograms, and the 200 pairs most often present together."""
    manifest, view = statistics.manifest, statistics.view
    return {
        "url": manifest.url,
        "manifest_digest": manifest.digest,
        "unlisted": manifest.unlisted,
        "classes": [entry.model_dump() for entry in manifest.classes],
        "view": None if view is None else view.model_dump(mode="json", exclude={"shards"}),
        "splits": {name: _split_document(split, manifest) for name, split in statistics.splits.items()},
    }


def _split_document(split: SplitStatistics, manifest: Manifest) -> dict[str, Any]:
    ids, pairs = manifest.class_ids, split.pairs
    lift = pairs.lift(split.rate)
    top = [
        {
            "first": ids[pairs.first[place]],
            "second": ids[pairs.second[place]],
            "both": int(pairs.both[place]),
            "first_and_second_known": int(pairs.first_known[place]),
            "second_and_first_known": int(pairs.second_known[place]),
            "known": int(pairs.known[place]),
            "lift": float(lift[place]),
        }
        for place in pairs.top(TOP_PAIRS)
    ]
    return {
        "num_samples": split.num_samples,
        "num_shards": split.num_shards,
        "num_bytes": split.num_bytes,
        "num_known": split.num_known,
        "density": split.density,
        "positives": split.positives.tolist(),
        "negatives": split.negatives.tolist(),
        "unknown": (split.num_samples - split.positives - split.negatives).tolist(),
        "positives_per_image": split.positives_per_image.tolist(),
        "known_per_image": {
            str(count): int(split.known_per_image[count]) for count in np.flatnonzero(split.known_per_image)
        },
        "machine": None if split.machine is None else split.machine.tolist(),
        "machine_confidences": None if split.confidences is None else split.confidences.tolist(),
        "bytes_per_image": {
            str(round(2 ** (place / 2))): int(split.bytes_per_image[place])
            for place in np.flatnonzero(split.bytes_per_image)
        },
        "image_sizes": {
            "num_read": len(split.sizes),
            "num_unreadable": split.num_unreadable,
            "width": _quantiles(split.sizes[:, 0]),
            "height": _quantiles(split.sizes[:, 1]),
        },
        "pairs": {
            "num_classes": len(pairs.classes),
            "num_known": pairs.num_known,
            "num_present": len(pairs.both),
            "top": top,
        },
    }


def _quantiles(values: npt.NDArray[np.int32]) -> dict[str, int]:
    """Minimum, quartiles and maximum; empty without values."""
    if not len(values):
        return {}
    names = ("min", "quarter", "median", "three_quarters", "max")
    found = np.quantile(values, (0, 0.25, 0.5, 0.75, 1), method="nearest")
    return {name: int(value) for name, value in zip(names, found, strict=True)}
