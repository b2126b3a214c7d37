"""Owns the newest features of each class over all images and ranks, and the mean of their unit vectors beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.checks import feature_error
from dist_mlpl.banks.held import DTYPES, INTEGER, NUM_SHARDS, NUMBER_BYTES, Column
from dist_mlpl.banks.nearest import SMALLEST_NORM, edges
from dist_mlpl.banks.replica import Replica
from dist_mlpl.banks.rows import Integers, Records, by_owner, exchange_records, record_type

_ONE: Final = 2.0**40  # unit vectors are summed as whole numbers of 2**-40, so that sums never drift
_BLOCK_NUMBERS: Final = 1 << 14  # of features in float64 at once: an eighth of a megabyte, which caches hold
_MOST_ROWS: Final = 1 << 11  # of a block: sums of whole numbers up to 2**40 must stay below the 2**53 of float64


class Ring(Bank):
    """The K newest features of each class, one row a class.

    A class lives on one rank whatever image its features came from. Columns: `features` (K, D); `scales` (K,) float64,
    1 / |feature|; `stamps` (K,) int64, the position that each was pushed with, -1 where there is none yet;
    `num_pushed` () int64, of which the next write position is the rest modulo K; `sums` (D,) int64, the filled
    entries' unit vectors in steps of 2**-40.

    The sum is kept by adding what comes and taking away what goes. In whole numbers that is exact: after any number of
    steps it equals the sum over the ring, and R ranks hold the bits that one rank holds.

    Source: SST (Chen et al., AAAI 2022), the bank of known positives' features; the mean of an image's cosines with
        K features is its product with the mean of their unit vectors.
    Differs: means are over the entries that are filled (the code divides by K); saved and restored (the code's is not).

    Args:
        name: of the bank.
        num_classes: C.
        capacity: K, at most 2**20.
        width: D.
        dtype: of stored features, `f32` or `f16`.
        folder: see `Bank`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        capacity: int,
        width: int,
        *,
        dtype: Literal["f32", "f16"] = "f32",
        folder: str | None = None,
    ) -> None:
        columns = {
            "features": Column(dtype=dtype, shape=(capacity, width)),
            "scales": Column(dtype="f64", shape=(capacity,)),
            "stamps": Column(dtype="i64", shape=(capacity,), fill=-1),
            "num_pushed": Column(dtype="i64"),
            "sums": Column(dtype="i64", shape=(width,)),
        }
        super().__init__(name, num_classes, columns, folder=folder, num_shards=min(NUM_SHARDS, num_classes))
        self._capacity, self._width = capacity, width
        self._pushed = record_type({"index": INTEGER, "position": INTEGER, "features": (DTYPES[dtype], (width,))})
        self._means = Replica(num_classes, {"means": (torch.float32, (width,)), "counts": INTEGER}, name=name)
        self._is_stale = np.zeros(num_classes, dtype=np.bool_)  # own classes of which the others have old means
        # What all ranks know of each other, so that messages have the right room:
        self._is_foretold = np.zeros(num_classes, dtype=np.bool_)  # classes of which the next push brings features
        self._is_touched = np.zeros(num_classes, dtype=np.bool_)  # those that were pushed since means were shared
        self._coming: comm.Room | None = None  # features of the next push
        self._block_rows = min(_MOST_ROWS, max(1, _BLOCK_NUMBERS // width))
        self._scratch: list[Tensor] | None = None

    @property
    def note_bytes(self) -> int:
        """What a rank tells each other one about the next push."""
        return NUMBER_BYTES + -(-self.spec.num_rows // 8)

    @torch.no_grad()
    def push(self, class_id: Tensor, features: Tensor, position: Tensor) -> None:
        """Take in features; the oldest go.

        What is pushed in one call is newer than all before it; within the call the order is that of positions over all
        ranks.

        Args:
            class_id: (n,) int64 in [0, C), n free on each rank.
            features: (n, D), any floating type and device.
            position: (n,) int64 >= 0, different for any two features of one class: a sample's place in the step, or
                its index.

        Raises:
            BankError: a class that is none, features that do not fit or are not finite; on all ranks, and nothing is
                taken in.

        Collective: all ranks, one `comm.exchange_messages` of n rows of D numbers and 16 bytes, with room for what
        `means` was told.
        """
        class_id, position = class_id.cpu(), position.cpu()
        features = features.detach().cpu().to(DTYPES[self.spec.columns["features"].dtype])
        classes = class_id.numpy()
        error = self._index_error(classes) or feature_error(
            class_id, features, position, width=self._width, where=self._where
        )
        owned = by_owner(self._owners(classes if error is None else classes[:0]), self._num_ranks)
        records, places = np.empty(len(owned.order), dtype=self._pushed), owned.places()
        if error is None:
            records["index"][places], records["position"][places] = classes, position.numpy()
            records["features"][places] = features.numpy()
        room, self._coming = self._coming, None
        _, parts = exchange_records(records, owned.spans, name=self.name, room=room, error=error)
        self._take(parts)
        self._is_touched |= self._is_foretold
        self._is_foretold[:] = False

    def means(self, coming: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean unit vectors of all classes.

        Args:
            coming: (n,) int64 class ids of the features that this rank will hand to the next `push`, as far as known:
                it saves a message there and at the next call.

        Returns:
            (C, D) float32, the mean over a class's filled entries of feature / |feature|, zeros without entries; and
            (C,) int64, how many entries are filled. On the CPU, the bank's own tables: the next call changes them.

        Raises:
            BankError: a class that is none; on all ranks.

        Collective: all ranks; what was pushed to or loaded since the last call, D numbers and 16 bytes a class, and to
        each rank C / 8 + 8 bytes about what is coming.
        """
        coming = torch.empty(0, dtype=torch.int64) if coming is None else coming.cpu()
        error = self._index_error(coming.numpy())
        to_ranks, notes = self._foretell(coming.numpy() if error is None else np.empty(0, dtype=np.int64))
        index, memory = np.flatnonzero(self._is_stale), self._columns_here()
        places = self._places(index)
        records, made = self._means.records(index)
        made["counts"][:] = filled = memory["num_pushed"][places].clip(max=self._capacity)
        divisors = (filled.clip(min=1) * _ONE)[:, None]
        for first in range(0, len(places), self._block_rows):
            rows = slice(first, first + self._block_rows)
            made["means"][rows] = memory["sums"][places[rows]] / divisors[rows]
        touched = np.bincount(self._owners(np.flatnonzero(self._is_touched)), minlength=self._num_ranks)
        told = self._means.share(records, notes=notes, expected=touched.tolist(), error=error)
        self._coming = comm.Room(to_ranks, [int(note[:NUMBER_BYTES].view(np.int64)[0]) for note in told])
        bits = np.bitwise_or.reduce([note[NUMBER_BYTES:] for note in told])
        self._is_foretold[:] = np.unpackbits(bits, count=self.spec.num_rows)
        self._is_stale[:] = self._is_touched[:] = False
        shared, counts = self._means.columns
        return shared, counts

    def _foretell(self, class_id: Integers) -> tuple[list[int], comm.Bytes]:
        """How many features of classes (n,) go to each rank, and a note for each: its number, and a bit a class."""
        numbers = np.bincount(self._owners(class_id), minlength=self._num_ranks)
        is_coming = np.zeros(self.spec.num_rows, dtype=np.bool_)
        is_coming[class_id] = True
        notes = np.empty((len(numbers), self.note_bytes), dtype=np.uint8)
        notes[:, :NUMBER_BYTES] = numbers.astype(np.int64)[:, None].view(np.uint8)
        notes[:, NUMBER_BYTES:] = np.packbits(is_coming)
        return numbers.tolist(), notes

    def unpack(self, packed: Mapping[str, Tensor], wanted: Iterable[int]) -> None:
        """See `Bank`."""
        super().unpack(packed, wanted)
        self._is_stale[self.held_rows().numpy()] = True

    def _take(self, parts: Sequence[Records]) -> None:
        """Put features of own classes in their places."""
        class_id, position = (np.concatenate([part[name] for part in parts]) for name in ("index", "position"))
        if len(class_id) == 0:
            return
        by_class = np.lexsort((position, class_id))  # of each the oldest first
        runs = edges(class_id[by_class])
        classes, sizes = class_id[by_class][runs[:-1]], np.diff(runs)  # (u,)
        places, memory = self._places(classes), self._columns_here()
        # Of more than K features of a class the oldest are gone at once.
        from_first = _from_first(sizes)
        is_kept = np.repeat(sizes, sizes) - from_first <= self._capacity
        number = np.repeat(np.arange(len(classes)), sizes)[is_kept]  # of each row's class among them
        order = by_class[is_kept]
        slots = (memory["num_pushed"][places][number] + from_first[is_kept]) % self._capacity
        entries = places[number] * self._capacity + slots
        features = np.concatenate([part["features"] for part in parts])
        for first in range(0, len(order), self._block_rows):
            rows = slice(first, first + self._block_rows)
            self._replace_entries(entries[rows], features[order[rows]], number[rows], places)
        memory["stamps"].reshape(-1)[entries] = position[order]
        memory["num_pushed"][places] += sizes
        self._mark(classes)
        self._is_stale[classes] = True

    def _replace_entries(
        self, entries: Integers, features: npt.NDArray[Any], number: Integers, places: Integers
    ) -> None:
        """Store a block of features, and let the sums of their classes follow.

        Args:
            entries: (n,) where to, no two alike.
            features: (n, D).
            number: (n,) the class of each, as a place in the next; rising.
            places: (u,) local rows of classes.
        """
        memory, n = self._columns_here(), len(entries)
        stored, scales = memory["features"].reshape(-1, self._width), memory["scales"].reshape(-1)
        if self._scratch is None:
            self._scratch = [torch.empty(self._block_rows, self._width, dtype=torch.float64) for _ in range(3)]
        arriving, leaving, change = (scratch[:n] for scratch in self._scratch)
        leaving.numpy()[:] = stored[entries]
        _to_whole(leaving.numpy(), scales[entries])  # an empty entry is zeros
        arriving.numpy()[:] = features
        stored[entries] = features
        scales[entries] = 1.0 / arriving.norm(dim=1).clamp(min=SMALLEST_NORM).numpy()
        _to_whole(arriving.numpy(), scales[entries])
        touched = change[: int(number[-1] - number[0]) + 1].zero_()  # a class each
        touched.index_add_(0, torch.from_numpy(number - number[0]), arriving.sub_(leaving))
        memory["sums"][places[number[0] : number[-1] + 1]] += touched.numpy().astype(np.int64)


def _from_first(sizes: Integers) -> Integers:
    """Of runs of these sizes end to end, each entry's place in its run."""
    return np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)


def _to_whole(features: npt.NDArray[np.float64], scales: npt.NDArray[np.float64]) -> None:
    """Unit vectors as whole numbers of 2**-40, in place: the same ones whenever and wherever they are computed.

    Args:
        features: (n, D).
        scales: (n,), 1 / |feature|.
    """
    features *= (scales * _ONE)[:, None]
    np.rint(features, out=features)
