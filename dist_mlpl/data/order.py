"""Owns the order of samples: a pure function of (seed, epoch) that any rank evaluates at any position.

An epoch's shards are permuted, laid end to end into one track and rotated by a keyed offset. The track is cut into
lanes, each lane into windows, and each window is permuted. Positions are dealt to lanes in groups:

    position g  ->  group j = g // group_size  ->  lane j % num_lanes, group j // num_lanes of that lane

so a step reads a little from every lane while each lane reads its shards from front to back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dist_mlpl import keyed
from dist_mlpl.data.last_used import LastUsed
from dist_mlpl.errors import ConfigError

Indices = npt.NDArray[np.int64]

Parts = Sequence[tuple[int, float]]  # (number of shards, weight > 0) of each data set of a mixture

PADDING = -1  # the index of a row without a sample


class EpochOrder:
    """One epoch's order over one split.

    Lanes are about as long as a window or longer: with few samples there are fewer lanes, down to one whose single
    window is a full shuffle. Nothing depends on ranks, workers or the global batch.

    Args:
        shard_sizes: number of samples in each shard, in manifest order; they sum to N without `parts`.
        seed: the run's seed.
        epoch: counted from 0.
        num_lanes: most lanes, >= 1.
        window_samples: most samples that are permuted together, >= 1.
        group_size: number of consecutive positions, >= 1, that come from one lane and stay together on one rank.
        parts: (number of shards, weight) of each data set that is mixed, in the order of the shards; None for one
            data set of weight 1. N is then `epoch_length`.

    Raises:
        ConfigError: num_lanes, window_samples or group_size below 1.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        epoch: int,
        num_lanes: int = 64,
        window_samples: int = 4096,
        group_size: int = 8,
        parts: Parts | None = None,
    ) -> None:
        if min(num_lanes, window_samples, group_size) < 1:
            raise ConfigError(
                f"num_lanes {num_lanes}, window_samples {window_samples}, group_size {group_size}",
                expected="all at least 1",
                where="data.num_lanes, data.window_samples, group_size",
                next_step="leave them at their defaults (64, 4096, 8) unless you measured otherwise",
            )
        first_index, sizes = _runs(np.asarray(shard_sizes, dtype=np.int64), parts, seed=seed, epoch=epoch)
        self.num_samples = int(sizes.sum())
        self.num_lanes = max(1, min(num_lanes, self.num_samples // window_samples))
        self.window_samples = window_samples
        self.group_size = group_size
        self._key = keyed.key("order", seed, epoch)

        shard_order = keyed.permutation(keyed.key(self._key, "shards"), len(sizes))
        self._first_index = first_index[shard_order]  # manifest index of the first sample of each shard on the track
        self._track_start = np.concatenate([[0], np.cumsum(sizes[shard_order])])[:-1]  # where it lies on the track
        turn = keyed.uniform(keyed.key(self._key, "turn"), 1)[0]
        self._turn = int(turn * self.num_samples)

        num_groups = -(-self.num_samples // group_size)
        lanes = np.arange(self.num_lanes)
        groups_of_lane = (num_groups - lanes + self.num_lanes - 1) // self.num_lanes
        lane_sizes = groups_of_lane * group_size
        if num_groups:
            lane_sizes[(num_groups - 1) % self.num_lanes] -= num_groups * group_size - self.num_samples
        self._lane_start = np.concatenate([[0], np.cumsum(lane_sizes)])
        self._permutations = LastUsed(self._permutation_of, limit=2 * self.num_lanes)

    def indices(self, start: int, stop: int) -> Indices:
        """Samples at positions [start, stop).

        Args:
            start, stop: 0 <= start <= stop <= N.

        Returns:
            (stop - start,) int64, sample indices in the split's manifest order. Over the whole epoch each sample
            appears once (in a mixture, as often as `epoch_length` says).

        Raises:
            IndexError: a position outside the epoch.
        """
        if not 0 <= start <= stop:
            raise IndexError(f"positions [{start}, {stop}) of {self.num_samples}")
        return self.at(np.arange(start, stop, dtype=np.int64))

    def at(self, positions: Indices) -> Indices:
        """Samples at any positions; PADDING stays PADDING.

        Args:
            positions: (n,) int64 in [0, N), or PADDING.

        Returns:
            (n,) int64 sample indices in manifest order, or PADDING.

        Raises:
            IndexError: any other position.
        """
        if positions.size and not (positions.min() >= PADDING and positions.max() < self.num_samples):
            raise IndexError(f"positions {int(positions.min())} .. {int(positions.max())} of {self.num_samples}")
        real = positions[positions != PADDING]
        lane, entry, window = self._places(real)
        track = np.empty_like(real)
        pairs = lane * (int(window.max()) + 1 if real.size else 1) + window
        order = np.argsort(pairs, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(pairs[order])) + 1) if real.size else []:
            first = rows[0]
            begin, permuted = self._window(int(lane[first]), int(window[first]))
            track[rows] = self._lane_start[lane[first]] + begin + permuted[entry[rows] - begin]

        place = (track + self._turn) % max(1, self.num_samples)
        shard = np.searchsorted(self._track_start, place, side="right") - 1
        found = np.full(positions.shape, PADDING, dtype=np.int64)
        found[positions != PADDING] = self._first_index[shard] + place - self._track_start[shard]
        return found

    def window_at(self, position: int) -> tuple[int, float]:
        """The window of its lane that a position falls into, and the fraction of that window before the position.

        All lanes go through their windows side by side, so the answer holds for every lane, give or take a group.

        Args:
            position: in [0, N).

        Returns:
            The window's number, counted from 0, and a fraction in [0, 1).
        """
        lane, entry, window = (int(part[0]) for part in self._places(np.array([position], dtype=np.int64)))
        begin, end = self._window_bounds(lane, window)
        return window, (entry - begin) / (end - begin)

    def num_windows(self, lane: int) -> int:
        """Number of windows in one lane, at least 1."""
        lane_size = int(self._lane_start[lane + 1] - self._lane_start[lane])
        return max(1, -(-lane_size // self.window_samples))

    def spans(self, lane: int, window: int) -> list[tuple[int, int]]:
        """The samples of one window as runs in manifest order, for prefetching.

        Args:
            lane: in [0, self.num_lanes).
            window: in [0, self.num_windows(lane)).

        Returns:
            (first, stop) sample indices, each run within one shard, in the order of the track.
        """
        begin, end = self._window_bounds(lane, window)
        start = int(self._lane_start[lane]) + begin
        stop = int(self._lane_start[lane]) + end
        found: list[tuple[int, int]] = []
        while start < stop:
            place = (start + self._turn) % self.num_samples
            shard = int(np.searchsorted(self._track_start, place, side="right")) - 1
            shard_end = int(self._track_start[shard + 1]) if shard + 1 < len(self._track_start) else self.num_samples
            length = min(stop - start, shard_end - place)
            first = int(self._first_index[shard]) + place - int(self._track_start[shard])
            found.append((first, first + length))
            start += length
        return found

    def lanes_read(self, start: int, global_batch: int, *, ranks: range, size: int) -> list[int]:
        """Lanes that some ranks read from `start` on, ascending; near the end of an epoch, possibly a few too many.

        Args:
            start: first position, a multiple of group_size.
            global_batch: G, a multiple of group_size.
            ranks: the ranks in question, for example those of one node, within [0, R).
            size: R.
        """
        num_groups = global_batch // self.group_size
        num_steps = self.num_lanes // math.gcd(num_groups, self.num_lanes)  # after which the lanes of a step repeat
        lanes: set[int] = set()
        for rank in ranks:
            for begin in range(start, start + num_steps * global_batch, global_batch):
                positions = self.share(begin, global_batch, rank=rank, size=size)
                lanes.update((positions[positions != PADDING] // self.group_size % self.num_lanes).tolist())
        return sorted(lanes)

    def _places(self, positions: Indices) -> tuple[Indices, Indices, Indices]:
        """Lane, place within the lane, and window of the lane, of each position in [0, N); three (n,) int64."""
        group, within = np.divmod(positions, self.group_size)
        turn, lane = np.divmod(group, self.num_lanes)
        entry = turn * self.group_size + within
        lane_sizes = np.diff(self._lane_start)[lane]
        num_windows = np.maximum(1, -(-lane_sizes // self.window_samples))
        return lane, entry, ((entry + 1) * num_windows - 1) // np.maximum(1, lane_sizes)

    def _window_bounds(self, lane: int, window: int) -> tuple[int, int]:
        """Positions in its lane at which a window begins and ends."""
        lane_size, num_windows = int(self._lane_start[lane + 1] - self._lane_start[lane]), self.num_windows(lane)
        return window * lane_size // num_windows, (window + 1) * lane_size // num_windows

    def _window(self, lane: int, window: int) -> tuple[int, npt.NDArray[np.int32]]:
        """The position in its lane at which a window begins, and the permutation of its samples."""
        return self._window_bounds(lane, window)[0], self._permutations[lane, window]

    def _permutation_of(self, window: tuple[int, int]) -> npt.NDArray[np.int32]:
        begin, end = self._window_bounds(*window)
        return keyed.permutation(keyed.key(self._key, "window", *window), end - begin).astype(np.int32)

    def share(self, start: int, global_batch: int, *, rank: int, size: int) -> Indices:
        """Positions of one rank in the step that begins at `start`.

        The step's groups, sorted by lane, are cut into R contiguous parts whose lengths differ by at most one group.
        With as many groups as lanes (or a multiple) every step is cut at the same places: lane l goes to rank
        l * R // num_lanes, and to the ranks after it where a cut runs through the lane. A rank always holds whole
        groups, and short ranks are padded, so every rank runs the same shapes.

        Differs:
            The plan gave lane l to rank l * R // num_lanes outright; a step of fewer groups than lanes would then
            use only a few ranks.

        Args:
            start: first position of the step, a multiple of group_size.
            global_batch: G, a multiple of group_size.
            rank: in [0, R).
            size: R, the number of ranks, at least 1.

        Returns:
            (ceil(G / group_size / R) * group_size,) int64 with PADDING at the end of a short share.
        """
        groups = np.arange(start // self.group_size, (start + global_batch) // self.group_size)
        groups = groups[np.argsort(groups % self.num_lanes, kind="stable")]
        first, last = (-(-r * len(groups) // size) for r in (rank, rank + 1))
        mine = groups[first:last]
        positions = np.full((-(-len(groups) // size), self.group_size), PADDING, dtype=np.int64)
        positions[: len(mine)] = mine[:, None] * self.group_size + np.arange(self.group_size)
        return positions.reshape(-1)


def epoch_length(shard_sizes: Sequence[int], parts: Parts | None) -> int:
    """Number of positions in an epoch, N.

    A data set of weight w gives floor(w) copies of each sample, and round((w - floor(w)) * n) of its n samples once
    more: in each epoch the samples that follow those of the epoch before, so that all take their turn.

    Args:
        shard_sizes: number of samples in each shard, in manifest order.
        parts: (number of shards, weight > 0) of each data set of a mixture; None for one data set of weight 1.
    """
    ends = np.concatenate([[0], np.cumsum(np.asarray(shard_sizes, dtype=np.int64))])
    total = first = 0
    for num_shards, weight in parts or [(len(shard_sizes), 1.0)]:
        size = int(ends[first + num_shards] - ends[first])
        total += int(weight) * size + round((weight - int(weight)) * size)
        first += num_shards
    return total


def _runs(sizes: Indices, parts: Parts | None, *, seed: int, epoch: int) -> tuple[Indices, Indices]:
    """The runs within shards that an epoch reads, before permutation: (k,) first samples and (k,) lengths."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    firsts, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    begin = 0
    for number, (num_shards, weight) in enumerate(parts or [(len(sizes), 1.0)]):
        own = np.arange(begin, begin + num_shards)
        begin += num_shards
        copies = np.tile(own, int(weight))
        firsts.append(ends[copies])
        lengths.append(sizes[copies])
        size = int(sizes[own].sum())
        count = round((weight - int(weight)) * size)
        if count:  # samples [start, start + count) of the data set's shards, laid in a circle in a fixed order
            circle = own[keyed.permutation(keyed.key("part", seed, number), num_shards)]
            starts = np.concatenate([[0], np.cumsum(sizes[circle])])[:-1]
            start = epoch * count % size
            for offset in (0, size):
                low = np.maximum(starts + offset, start)
                high = np.minimum(starts + offset + sizes[circle], start + count)
                inside = high > low
                firsts.append((ends[circle] + low - starts - offset)[inside])
                lengths.append((high - low)[inside])
    return np.concatenate(firsts), np.concatenate(lengths)


def check_global_batch(global_batch: int, *, group_size: int, world_size: int, num_samples: int) -> None:
    """Refuse a global batch that cannot be split into whole groups with at least one group per rank.

    Args:
        global_batch: G, samples of a step over all ranks.
        group_size: consecutive positions that stay on one rank, at least 1.
        world_size: R, the largest number of ranks that may take part.
        num_samples: N, positions of an epoch.

    Raises:
        ConfigError: G is not a multiple of group_size, below group_size * R or above N; the message names the nearest
            value that works, or what else to change.
    """
    least = group_size * world_size
    if global_batch % group_size == 0 and least <= global_batch <= num_samples:
        return
    nearest = max(least, round(global_batch / group_size) * group_size)
    if nearest > num_samples:
        nearest = num_samples // group_size * group_size
    if nearest >= least:
        advice = f"set global_batch to {nearest}"
    elif num_samples >= group_size:
        advice = f"use at most {num_samples // group_size} ranks, or a smaller group_size"
    else:
        advice = f"set group_size to {num_samples} or less, or use more images"
    raise ConfigError(
        f"global_batch {global_batch} on {world_size} ranks over {num_samples} samples",
        expected=f"a multiple of group_size {group_size}, at least {least} (one group a rank), at most {num_samples}",
        where="global_batch, group_size, cluster.num_workers",
        next_step=advice,
    )


def last_position(start: int, *, global_batch: int, num_samples: int) -> int:
    """Position at which the epoch ends: a whole number of global batches after `start`; the rest is not read.

    Args:
        start: first position, in [0, num_samples].
        global_batch: G.
        num_samples: N, positions of the epoch.
    """
    return start + (num_samples - start) // global_batch * global_batch
