"""Owns the newest features of each class over all images and ranks, and the means of their unit vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.checks import feature_error
from dist_mlpl.banks.held import INTEGER, NUM_SHARDS, Column, Staged
from dist_mlpl.banks.nearest import SMALLEST_NORM, edges
from dist_mlpl.banks.replica import Replica
from dist_mlpl.banks.rows import (
    NUMBER_BYTES,
    Integers,
    Records,
    Section,
    by_owner,
    exchange_records,
    no_room,
    record_type,
)
from dist_mlpl.errors import BankError, MlplError

_ONE: Final = 2.0**29  # a unit vector is stored as multiples of 2**-29; the difference of two still fits an int32
_BLOCK_NUMBERS: Final = 1 << 14  # float64 numbers processed at once: an eighth of a megabyte, which caches hold


class Ring(Bank):
    """The K newest features of each class, one row per class, as unit vectors.

    A class lives on one rank whatever image its features came from. Columns: `units` (K, D) int32, feature / |feature|
    in steps of 2**-29, zeros in empty entries; `stamps` (K,) int64, the position that each was pushed with, -1 in empty
    entries; `num_pushed` () int64, the next write position modulo K; `sums` (D,) float64, the sum of `units`; `means`
    (D,) float32 and `counts` () int64, what the next call of `means` returns.

    The sum is updated by adding what comes and subtracting what goes. In whole numbers that is exact: after any number
    of steps it equals the sum over the ring, and R ranks hold the bits that one rank holds.

    A step takes one message. Features wait on the rank that found them until the next `means`, whose message takes
    them to their owners and brings back the means that the previous message changed. So means are one step late.

    Source: SST (Chen et al., AAAI 2022), the bank of known positives' features; the mean of an image's cosines with
        K features is the product of its unit vector with the mean of theirs.
    Differs: means are over the filled entries (the code divides by K), and one step late; the bank is saved and
        restored (the code's is not). Lengths of features are not stored: no cosine needs them.

    Args:
        name: the bank's name.
        num_classes: C.
        capacity: K, at most 2**20.
        width: D.
        folder: see `HeldRows`.
    """

    def __init__(self, name: str, num_classes: int, capacity: int, width: int, *, folder: str | None = None) -> None:
        columns = {
            "units": Column(dtype="i32", shape=(capacity, width)),
            "stamps": Column(dtype="i64", shape=(capacity,), fill=-1),
            "num_pushed": Column(dtype="i64"),
            "sums": Column(dtype="f64", shape=(width,)),
            "means": Column(dtype="f32", shape=(width,)),
            "counts": Column(dtype="i64"),
        }
        super().__init__(name, num_classes, columns, folder=folder, num_shards=min(NUM_SHARDS, num_classes))
        self._capacity, self._width = capacity, width
        self._pushed = record_type({"index": INTEGER, "position": INTEGER, "units": (torch.int32, (width,))})
        self._replica = Replica(num_classes, {name: self._kinds[name] for name in ("means", "counts")}, name=name)
        # Own classes that took in features since their `means` column was made; own classes whose means other ranks
        # have in an older version.
        self._is_outdated, self._is_stale = (np.zeros(num_classes, dtype=np.bool_) for _ in range(2))
        # The same on all ranks, so that messages have the right room: classes whose features the next message brings,
        # and classes whose means it brings.
        self._brings_features, self._brings_means = (np.zeros(num_classes, dtype=np.bool_) for _ in range(2))
        self._coming: comm.Room | None = None  # how many features the next push will have, by rank
        self._scratch = np.empty((max(1, _BLOCK_NUMBERS // width), width))

    @property
    def note_bytes(self) -> int:
        """Bytes of a message beside features and means: what the rank will push next, and how many means follow."""
        return self._num_noted + NUMBER_BYTES

    @property
    def record_bytes(self) -> int:
        """Bytes of a feature in a message, and of a class's mean: both are the same."""
        return self._pushed.itemsize

    @property
    def _num_noted(self) -> int:
        return NUMBER_BYTES * (1 + -(-self.spec.num_rows // 64))  # a number, and a bit per class

    # Taking in -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def push(self, class_id: Tensor, features: Tensor, position: Tensor) -> None:
        """Take in features; they replace the oldest of their classes.

        The features of one call are newer than all before it; within the call they are ordered by position over all
        ranks.

        Args:
            class_id: (n,) int64 in [0, C), n free on each rank.
            features: (n, D), any floating type and device.
            position: (n,) int64 >= 0, a sample's place in the step, or its index. Of two features of one class at the
                same position (a sample that a mixture has twice in a step) that of the later row, or higher rank, is
                newer; as ranks hold a step in the order of its lanes, the result is the same on any number of them.

        Raises:
            BankError: a class out of range, features of the wrong shape or not finite; on all ranks, and none of the
                call's features is ever taken in. With several ranks it is raised by the call that would deliver them,
                the next `means`, `read`, `push` or `flush`.

        Collective: all ranks; nothing moves before the next `means`, `read` or `flush`, unless features of an earlier
        call still wait: they are delivered first.
        """
        self.flush()
        classes, position = class_id.cpu().numpy(), position.cpu()
        features = features.detach().cpu().float()
        error = self._index_error(classes) or feature_error(
            class_id, features, position, width=self._width, where=self._where
        )
        # An error travels with the next message, so that all ranks stop together.
        owned = by_owner(self._owners(classes if error is None else classes[:0]), self._num_ranks)
        records, places = np.empty(len(owned.order), dtype=self._pushed), owned.places()
        if error is None:
            records["index"][places], records["position"][places] = classes, position.numpy()
            lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float64)
            units = features * (_ONE / lengths.clamp(min=SMALLEST_NORM)).float()
            records["units"][places] = units.round_().numpy()
        room, self._coming = self._coming, None
        if self._num_ranks > 1:
            self._staged = Staged(records, owned, room or no_room(self._num_ranks), error)
        elif error is not None:
            raise error
        else:
            self._take([records])

    def flush(self) -> None:
        """Deliver waiting features to their owners. No mean changes before `means` is called. See `Bank.flush`."""
        if self._staged is not None:
            nothing = np.empty(0, dtype=np.int64)
            self._exchange(nothing, notes=self._notes(nothing), expected=None, error=None)

    def _fetch(self, index: Integers, error: BankError | None) -> dict[str, Tensor]:
        """See `Bank._fetch`; waiting features are delivered first, in a message of their own."""
        self.flush()
        return super()._fetch(index, error)

    def _take(self, parts: Sequence[Records]) -> None:
        """Store features of own classes, from each rank, in the rings."""
        class_id, position = (np.concatenate([part[name] for part in parts]) for name in ("index", "position"))
        if len(class_id) == 0:
            return
        by_class = np.lexsort((position, class_id))  # the oldest of each class first
        runs = edges(class_id[by_class])
        classes, sizes = class_id[by_class][runs[:-1]], np.diff(runs)  # (u,)
        places, memory = self._places(classes), self._columns_here()
        # Of more than K new features of a class only the newest K are stored.
        from_first = np.arange(len(by_class)) - np.repeat(runs[:-1], sizes)
        is_kept = np.repeat(sizes, sizes) - from_first <= self._capacity
        source, place = by_class[is_kept], np.repeat(places, sizes)[is_kept]
        slots = (memory["num_pushed"][place] + from_first[is_kept]) % self._capacity
        entries, start = place * self._capacity + slots, 0
        for part in parts:
            is_of_part = (source >= start) & (source < start + len(part))
            self._replace_entries(entries[is_of_part], part["units"], source[is_of_part] - start, place[is_of_part])
            start += len(part)
        memory["stamps"].reshape(-1)[entries] = position[source]
        memory["num_pushed"][places] += sizes
        self._mark(classes)
        self._is_outdated[classes] = True

    def _replace_entries(
        self, entries: Integers, units: npt.NDArray[np.int32], source: Integers, places: Integers
    ) -> None:
        """Store units, and update the sums of their classes.

        Args:
            entries: (n,) entries to write, counted over all local rows, no two equal.
            units: (m, D) int32.
            source: (n,) the row of `units` for each entry.
            places: (n,) local rows of their classes.
        """
        memory = self._columns_here()
        stored, sums = memory["units"].reshape(-1, self._width), self._memory()["sums"]
        for rows in self._blocks(len(entries)):
            arriving = units[source[rows]]
            change = self._scratch[: len(arriving)]
            change[:] = arriving - stored[entries[rows]]  # an empty entry is zeros
            stored[entries[rows]] = arriving
            sums.index_add_(0, torch.from_numpy(places[rows]), torch.from_numpy(change))

    def _blocks(self, num_rows: int) -> Iterator[slice]:
        """Slices that cut `num_rows` rows into blocks no longer than the scratch memory."""
        return (slice(first, first + len(self._scratch)) for first in range(0, num_rows, len(self._scratch)))

    # Giving out ------------------------------------------------------------------------------------------------------

    def means(self, coming: Tensor | None = None, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Mean unit vectors of all classes, over the features pushed before the previous call.

        Features pushed since then count in the next call's answer. That holds whatever is read, flushed, saved or
        loaded in between.

        Args:
            coming: (n,) int64 class ids of the features that this rank will hand to the next `push`, as far as known;
                this saves a second message for them and for their means. None: unknown.
            device: the device of the answer, the same at every call; only changed means move there. None: the CPU.

        Returns:
            (C, D) float32, the mean of feature / |feature| over a class's filled entries, zeros if it has none; and
            (C,) int64, the number of these entries. They are the bank's own tables: the next call changes them.

        Raises:
            BankError: a class out of range, or an error of `push` about features that waited; on all ranks.

        Collective: all ranks, one `comm.exchange_messages`: the last push, n rows of 4 D + 16 bytes; to each rank the
        means of the classes in the push before it, 4 D + 16 bytes each; and `note_bytes` to each rank. The first call
        after loading brings the means of all classes.
        """
        coming = torch.empty(0, dtype=torch.int64) if coming is None else coming.cpu()
        error = self._index_error(coming.numpy())
        classes = coming.numpy() if error is None else np.empty(0, dtype=np.int64)
        notes, changed = self._notes(classes), np.flatnonzero(self._is_stale)
        owners = self._owners(np.flatnonzero(self._brings_means))
        expected = np.bincount(owners, minlength=self._num_ranks).tolist()
        told = self._exchange(changed, notes=notes, expected=expected, error=error)
        numbers = [int(note[:NUMBER_BYTES].view(np.int64)[0]) for note in told]
        self._coming = comm.Room(self._counts_by_rank(classes), numbers)
        self._brings_means[:] = self._brings_features
        bits = np.bitwise_or.reduce([note[NUMBER_BYTES:] for note in told])
        self._brings_features[:] = np.unpackbits(bits, count=self.spec.num_rows)
        self._is_stale[:] = False
        self._renew_means()
        means, counts = self._replica.columns if device is None else self._replica.on(device)
        return means, counts

    def _exchange(
        self, changed: Integers, *, notes: comm.Bytes, expected: list[int] | None, error: MlplError | None
    ) -> list[comm.Bytes]:
        """Deliver waiting features to their owners, and changed means of own classes to all ranks.

        Args:
            changed: (n,) own classes whose means other ranks have in an older version.
            notes: (R, bytes) uint8, a note for each rank.
            expected: how many means each rank is expected to send, the same list on every rank; None: 0 from each.
            error: what this rank found wrong; raised on all ranks.

        Returns:
            R notes (bytes,), from each rank.

        Collective: all ranks, one `comm.exchange_messages`.
        """
        with self._delivery(error) as error:
            records, made = self._replica.records(changed if error is None else changed[:0])
            if error is None:
                places = self._places(changed)
                for name, column in made.items():
                    column[:] = self._columns_here()[name][places]
            sections: list[Section] = [self._replica.section(records, expected=expected), self._waiting(self._pushed)]
            told, (means, features) = exchange_records(sections, name=self.name, notes=notes, error=error)
        self._replica.take(means)
        self._take(features)
        return told

    def _renew_means(self) -> None:
        """Compute the means of own classes that took in features; the next message sends them."""
        classes = np.flatnonzero(self._is_outdated)
        places, memory = self._places(classes), self._columns_here()
        for rows in self._blocks(len(classes)):
            memory["means"][places[rows]], memory["counts"][places[rows]] = self._made_means(places[rows])
        self._mark(classes)
        self._is_stale[classes] = True
        self._is_outdated[:] = False

    def _made_means(self, places: Integers) -> tuple[npt.NDArray[np.float32], Integers]:
        """Means (n, D) and counts (n,) of local rows, computed from their sums."""
        memory = self._columns_here()
        counts = memory["num_pushed"][places].clip(max=self._capacity)
        return (memory["sums"][places] / (counts.clip(min=1) * _ONE)[:, None]).astype(np.float32), counts

    def _notes(self, classes: Integers) -> comm.Bytes:
        """(R, bytes) a note for each rank: how many of the features of `classes` (n,) go to it, and a bit per class."""
        is_coming = np.zeros(self._num_noted * 8 - 64, dtype=np.bool_)
        is_coming[classes] = True
        notes = np.empty((self._num_ranks, self._num_noted), dtype=np.uint8)
        notes[:, :NUMBER_BYTES] = np.array(self._counts_by_rank(classes))[:, None].view(np.uint8)
        notes[:, NUMBER_BYTES:] = np.packbits(is_coming)
        return notes

    def _counts_by_rank(self, classes: Integers) -> list[int]:
        return np.bincount(self._owners(classes), minlength=self._num_ranks).tolist()

    def mark_loaded(self) -> None:
        """See `HeldRows.mark_loaded`: the next message has the means of all classes that have features."""
        super().mark_loaded()
        self._coming = None
        self._brings_features[:] = self._brings_means[:] = self._is_outdated[:] = False
        self._replica.clear()
        classes, memory = self.held_rows().numpy(), self._columns_here()
        self._is_stale[classes] = memory["counts"][self._places(classes)] > 0
        for rows in self._blocks(len(classes)):
            places = self._places(classes[rows])
            means, counts = self._made_means(places)
            is_as_made = (memory["means"][places] == means).all(axis=1) & (memory["counts"][places] == counts)
            self._is_outdated[classes[rows]] = ~is_as_made
