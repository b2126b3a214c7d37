"""Owns partial-label views: their interface, and views drawn in memory, which hide some known labels of a split.

A view is drawn once, in source order (the order of the data set, which defines a benchmark), then addressed in
manifest order. It changes known labels only and is the same on every rank. Views on disk, which may also replace
labels, belong to `dist_mlpl.data.stored_view`; where both exist, their digests are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Final, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from dist_mlpl.errors import ConfigError, ManifestError, nearest_names
from dist_mlpl.labels import PRESENT, UNKNOWN, Targets

KnownRule = Literal["bernoulli", "single_positive", "dense_subset", "exact_count"]
DEFAULT_SEEDS: Final[dict[str, int]] = {"bernoulli": 0, "single_positive": 0, "dense_subset": 0, "exact_count": 1}
MAX_ENTRIES: Final = 1_000_000_000  # largest N * C of a view in memory: 125 MB of bits
_BLOCK_ENTRIES: Final = 4_000_000  # labels worked on at once: 32 MB of float64

TargetsOf = Callable[[int, int], Targets]  # (start, stop) in manifest order -> (stop - start, C) int8
Bits = npt.NDArray[np.uint8]  # (n, ceil(C / 8)), one bit per class


class LabelView(Protocol):
    """The interface of a view, for a run and for code that measures its beliefs."""

    @property
    def digest(self) -> str:
        """Digest of everything that the view changes: equal digests mean equal labels."""
        ...

    def hidden(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which entries of samples `indices` (n,) in [0, N) are known and hidden, (n, C) bool."""
        ...

    def apply(self, targets: Targets, indices: npt.NDArray[np.int64]) -> Targets:
        """Human labels (n, C) of samples `indices` (n,) in [0, N) as the view shows them: (n, C) int8, a new array."""
        ...


class View:
    """A view drawn in memory, which hides known labels from a run.

    Rules, with r the fraction and numpy's legacy generator `RandomState(seed)`, whose streams are frozen:
      bernoulli        every entry is kept with probability r: uniform draws (N, C) row by row < r. Nested over r.
                       Source: the HCP family's reference code.
      exact_count      every image loses floor((1 - r) C) entries: `choice(C, size, replace=False)` per image.
                       Nested over r: `choice` takes the first entries of a permutation. Source: lcalem's code
                       for Durand et al. 2019. Differs: that code draws its ten fractions in turn from one
                       generator, so they are not nested; here each fraction has its own generator. Only the counts
                       agree.
      dense_subset     round(r N) images, the first of `permutation(N)`, keep all labels, the others none.
                       Nested over r. Source: Durand et al. 2019, the "dense" strategy.
      single_positive  every image keeps one positive, the `randint(number of positives)`-th in class order, and
                       nothing else; an image without one keeps nothing and draws nothing.
                       Source: Cole et al. 2021.

    Args:
        rule: how labels are hidden.
        fraction: r in (0, 1]; None for single_positive.
        seed: seed of the draws; None for the rule's customary one in `DEFAULT_SEEDS`.
        shard_sizes: number of samples in each shard, in manifest order.
        source_rows: (N,) uint64 in manifest order, all different; their order decides which draws a sample gets.
        targets_of: human labels by position in the manifest; each may be read up to three times.
        num_classes: C.

    Raises:
        ConfigError: an unknown rule, a fraction the rule cannot take, or more than MAX_ENTRIES entries.
        ManifestError: `source_rows` do not fit `shard_sizes`, or repeat.
    """

    def __init__(
        self,
        rule: str,
        fraction: float | None,
        seed: int | None,
        *,
        shard_sizes: Sequence[int],
        source_rows: npt.NDArray[np.uint64],
        targets_of: TargetsOf,
        num_classes: int,
    ) -> None:
        check_rule(rule, fraction)
        check_size(sum(shard_sizes), num_classes)
        self.rule, self.fraction = rule, fraction
        self.seed = DEFAULT_SEEDS[rule] if seed is None else seed
        self.num_classes = num_classes
        order = source_order(source_rows, sum(shard_sizes))
        self._bits = _draw(rule, fraction, self.seed, order, num_classes, targets_of)
        self.num_hidden = 0
        digests, start = [], 0
        for size in shard_sizes:
            digests.append(self._settle_shard(start, start + size, targets_of))
            start += size
        self.digest = view_digest(digests)

    def _settle_shard(self, first: int, end: int, targets_of: TargetsOf) -> str:
        """Clear the hidden bits of unknown labels, count the others, and return the shard's digest."""
        rows, classes = [np.empty(0, np.int32)], [np.empty(0, np.uint16)]  # the narrow types bound a shard's memory
        for start, stop in _row_blocks(first, end, self.num_classes):
            hidden = _unpack(self._bits[start:stop], self.num_classes)
            hidden &= targets_of(start, stop) != UNKNOWN
            self._bits[start:stop] = np.packbits(hidden, axis=1)
            block_rows, block_classes = np.nonzero(hidden)
            rows.append((block_rows + (start - first)).astype(np.int32))
            classes.append(block_classes.astype(np.uint16))
            self.num_hidden += len(block_rows)
        return shard_digest(np.concatenate(rows), np.concatenate(classes))

    def hidden(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which entries of some samples are known and hidden.

        Args:
            indices: (n,) int64 in [0, N).

        Returns:
            (n, C) bool.
        """
        return _unpack(self._bits[indices], self.num_classes)

    def hidden_entries(
        self, indices: npt.NDArray[np.integer], classes: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.bool_]:
        """Which of k single entries are known and hidden.

        Args:
            indices: (k,) integers in [0, N).
            classes: (k,) integers in [0, C).

        Returns:
            (k,) bool.
        """
        places = np.asarray(classes, dtype=np.int64)
        return (self._bits[indices, places >> 3] & (0x80 >> (places & 7))) != 0

    def apply(self, targets: Targets, indices: npt.NDArray[np.int64]) -> Targets:
        """Set hidden labels to unknown.

        Args:
            targets: (n, C) int8, human labels.
            indices: (n,) int64 in [0, N), the samples they belong to.

        Returns:
            (n, C) int8, a new array.
        """
        return np.where(self.hidden(indices), np.int8(UNKNOWN), targets)


def shard_digest(rows: npt.NDArray, classes: npt.NDArray, values: npt.NDArray | None = None) -> str:
    """Digest of a view's changes to one shard.

    It is the sha256 over all rows as little-endian int32, then all classes as little-endian uint16, then all values as
    int8.

    Args:
        rows: (n,) integers, row of the shard; entries are in row-major order.
        classes: (n,) integers, class column.
        values: (n,) -1, 0 or +1, what each label becomes; None for a rule that only hides.

    Returns:
        64 hexadecimal digits, equal to those of the columns of a view's file.
    """
    digest = hashlib.sha256(rows.astype("<i4", copy=False).data)
    digest.update(classes.astype("<u2", copy=False).data)
    if values is not None:
        digest.update(values.astype(np.int8, copy=False).data)
    return digest.hexdigest()


def view_digest(shard_digests: Iterable[str]) -> str:
    """Digest of a view: sha256 over the concatenated hexadecimal digests of its shards, in manifest order."""
    return hashlib.sha256("".join(shard_digests).encode()).hexdigest()


def check_rule(rule: str, fraction: float | None) -> None:
    """Refuse a rule that does not exist, or a fraction that it cannot take.

    Raises:
        ConfigError: the message names what the rule takes.
    """
    if rule not in get_args(KnownRule):
        raise ConfigError(
            f"unknown rule {rule!r}",
            expected=nearest_names(rule, get_args(KnownRule)),
            where="data.known_rule",
            next_step="correct the name",
        )
    if rule == "single_positive":
        good, expected = fraction is None, "no fraction: one label an image is known"
    else:
        good, expected = fraction is not None and 0.0 < fraction <= 1.0, "a fraction in (0, 1]"
    if not good:
        raise ConfigError(
            f"known_fraction {fraction} with rule {rule}",
            expected=expected,
            where="data.known_fraction",
            next_step="set data.known_fraction to what the rule takes, or choose another data.known_rule",
        )


def check_size(num_samples: int, num_classes: int) -> None:
    """Refuse a view too large to draw in memory.

    Raises:
        ConfigError: more than MAX_ENTRIES entries.
    """
    if num_samples * num_classes > MAX_ENTRIES:
        raise ConfigError(
            f"a view in memory of {num_samples:,} samples and {num_classes:,} classes",
            expected=f"at most {MAX_ENTRIES:,} entries",
            where="data.known_fraction and data.known_rule",
            next_step="draw it on disk, `dist-mlpl shards simulate`, and name it in data.view; or take a smaller split",
        )


def source_order(source_rows: npt.NDArray[np.uint64], num_samples: int) -> npt.NDArray[np.int64]:
    """Manifest position of each sample in source order, (N,) int64.

    Raises:
        ManifestError: source rows repeat, or their number is not `num_samples`.
    """
    order = np.argsort(source_rows, kind="stable")
    in_order = np.asarray(source_rows)[order]
    repeated = in_order[1:][in_order[1:] == in_order[:-1]]
    if len(source_rows) != num_samples or len(repeated):
        found = f"source_row {repeated[0]} twice" if len(repeated) else f"{len(source_rows)} source rows"
        raise ManifestError(
            found,
            expected=f"{num_samples} different source rows, one a sample",
            where="source_row in the shards' indexes",
            next_step="run `dist-mlpl shards verify`, then build the shards again",
        )
    return order


def _draw(
    rule: str, fraction: float | None, seed: int, order: npt.NDArray[np.int64], num_classes: int, targets_of: TargetsOf
) -> Bits:
    """Draw which entries to hide, known or not: bits in manifest order, (N, ceil(C / 8))."""
    if fraction is None:
        return _draw_single_positive(seed, order, num_classes, targets_of)
    bits = np.empty((len(order), -(-num_classes // 8)), dtype=np.uint8)
    if rule == "dense_subset":
        bits[:] = np.where(dense_rows(fraction, seed, order), 0, 0xFF)[:, None]
        return bits
    random = np.random.RandomState(seed)
    draw = _draw_bernoulli if rule == "bernoulli" else _draw_exact_count
    for start, stop in _row_blocks(0, len(order), num_classes):
        bits[order[start:stop]] = np.packbits(draw(random, fraction, stop - start, num_classes), axis=1)
    return bits


def dense_rows(fraction: float, seed: int, order: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which samples keep their labels under `dense_subset`.

    Args:
        fraction: r in (0, 1].
        seed: seed of the draw.
        order: (N,) int64, manifest position of each sample in source order.

    Returns:
        (N,) bool in manifest order.
    """
    is_kept = np.zeros(len(order), dtype=bool)
    is_kept[order[np.random.RandomState(seed).permutation(len(order))[: round(fraction * len(order))]]] = True
    return is_kept


def single_positive_places(
    seed: int, order: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Which of its positives each sample keeps under `single_positive`.

    Args:
        seed: seed of the draw.
        order: (N,) int64, manifest position of each sample in source order.
        counts: (N,) int64, number of positives of each sample in manifest order.

    Returns:
        (N,) int64 in manifest order: position among the sample's positives, -1 for a sample without any.
    """
    drawers = order[counts[order] > 0]  # in source order
    kept = np.full(len(order), -1, dtype=np.int64)
    kept[drawers] = np.random.RandomState(seed).randint(0, counts[drawers])
    return kept


def num_dropped(fraction: float, num_labels: int) -> int:
    """floor((1 - r) n), the number of labels to drop out of n, computed without binary rounding error."""
    # In decimals, 0.1 of 20 classes is 2, while (1 - 0.9) * 20 in binary is 1.9999999999999996.
    return int((1 - Decimal(str(fraction))) * num_labels)


def _draw_bernoulli(
    random: np.random.RandomState, fraction: float, num_rows: int, num_classes: int
) -> npt.NDArray[np.bool_]:
    """Hide each entry whose draw is not below the fraction, (n, C) bool; drawing in blocks gives the same matrix."""
    return random.random_sample((num_rows, num_classes)) >= fraction


def _draw_exact_count(
    random: np.random.RandomState, fraction: float, num_rows: int, num_classes: int
) -> npt.NDArray[np.bool_]:
    """Hide the same number of entries in every row, (n, C) bool."""
    size = num_dropped(fraction, num_classes)
    hidden = np.zeros((num_rows, num_classes), dtype=bool)
    for row in hidden:
        row[random.choice(num_classes, size, replace=False)] = True
    return hidden


def _draw_single_positive(seed: int, order: npt.NDArray[np.int64], num_classes: int, targets_of: TargetsOf) -> Bits:
    """Hide all but one random positive of each row; besides blocks of labels, only N counts are in memory."""
    blocks = list(_row_blocks(0, len(order), num_classes))
    counts = np.zeros(len(order), dtype=np.int64)
    for start, stop in blocks:
        counts[start:stop] = np.count_nonzero(targets_of(start, stop) == PRESENT, axis=1)
    kept = single_positive_places(seed, order, counts)
    bits = np.empty((len(order), -(-num_classes // 8)), dtype=np.uint8)
    for start, stop in blocks:
        positive = targets_of(start, stop) == PRESENT
        place = np.cumsum(positive, axis=1, dtype=np.int32) - 1  # position of a positive among those of its row
        bits[start:stop] = np.packbits(~(positive & (place == kept[start:stop, None])), axis=1)
    return bits


def _row_blocks(start: int, stop: int, num_classes: int) -> Iterator[tuple[int, int]]:
    """Cut rows [start, stop) into blocks of bounded memory."""
    step = max(1, _BLOCK_ENTRIES // max(1, num_classes))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _unpack(bits: Bits, num_classes: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(bits, axis=1, count=num_classes).view(np.bool_)
