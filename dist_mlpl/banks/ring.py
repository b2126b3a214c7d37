"""Owns the newest features of each class over all images and ranks, and the mean of their unit vectors beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.base import DTYPES, INTEGER, NUM_SHARDS, Bank, Column
from dist_mlpl.banks.replica import Replica

SMALLEST_NORM: Final = 1e-9  # a feature shorter than this is divided by it
_ONE: Final = 2.0**40  # unit vectors are summed as whole numbers of 2**-40, so that sums never drift
_NOTED: Final = 8  # bytes of the number with which a note begins


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
        self._means = Replica(num_classes, [(torch.float32, (width,)), (torch.int64, ())])
        self._is_stale = np.zeros(num_classes, dtype=np.bool_)  # own classes of which the others have old means
        # What all ranks know of each other, so that messages have the right room:
        self._is_foretold = np.zeros(num_classes, dtype=np.bool_)  # classes of which the next push brings features
        self._is_touched = np.zeros(num_classes, dtype=np.bool_)  # those that were pushed since means were shared

    @property
    def note_bytes(self) -> int:
        """What a rank tells each other one about the next push."""
        return _NOTED + -(-self.spec.num_rows // 8)

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

        Collective: all ranks, one `comm.exchange` of n rows of D numbers and 16 bytes, with room for what `means` was
        told.
        """
        class_id, position = class_id.cpu(), position.cpu()
        kind = DTYPES[self.spec.columns["features"].dtype], (self._width,)
        features = features.detach().cpu().to(kind[0])
        error = self._index_error(class_id) or self._feature_error(class_id, features, position, width=self._width)
        parts = [class_id, position, features]
        self._take(*self._send(class_id, parts, [INTEGER, INTEGER, kind], error))
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
        error = self._index_error(coming)
        to_ranks, notes = self._foretell(coming.numpy() if error is None else np.empty(0, dtype=np.int64))
        index = torch.from_numpy(np.flatnonzero(self._is_stale))
        places, memory = self._places(index), self._memory()
        counts = memory["num_pushed"][places].clamp(max=self._capacity)
        sums = memory["sums"].index_select(0, places).double()
        means = (sums / (counts.clamp(min=1).double() * _ONE)[:, None]).float()
        touched = np.bincount(self._owners(np.flatnonzero(self._is_touched)), minlength=comm.world_size())
        told = self._means.share(index, [means, counts], notes=notes, expected=touched.tolist(), error=error).numpy()
        self._room = comm.Room(to_ranks, told[:, :_NOTED].copy().view(np.int64)[:, 0].tolist())
        self._is_foretold[:] = np.unpackbits(told[:, _NOTED:], axis=1, count=self.spec.num_rows).any(axis=0)
        self._is_stale[:] = self._is_touched[:] = False
        shared, filled = self._means.columns
        return shared, filled

    def _foretell(self, class_id: np.ndarray) -> tuple[list[int], Tensor]:
        """How many features of classes (n,) go to each rank, and a note for each: its number, and a bit a class."""
        numbers = np.bincount(self._owners(class_id), minlength=comm.world_size())
        is_coming = np.zeros(self.spec.num_rows, dtype=np.bool_)
        is_coming[class_id] = True
        bits = np.broadcast_to(np.packbits(is_coming), (len(numbers), -(-len(is_coming) // 8)))
        notes = np.concatenate([numbers.astype(np.int64)[:, None].view(np.uint8), bits], axis=1)
        return numbers.tolist(), torch.from_numpy(notes)

    def unpack(self, packed: Mapping[str, Tensor], wanted: Iterable[int]) -> None:
        """See `Bank`."""
        super().unpack(packed, wanted)
        self._is_stale[self.held_rows().numpy()] = True

    def _take(self, class_id: Tensor, position: Tensor, features: Tensor) -> None:
        """Put features of own classes in their places."""
        if len(class_id) == 0:
            return
        by_class = np.lexsort((position.numpy(), class_id.numpy()))  # of each the oldest first
        classes, sizes = np.unique(class_id.numpy(), return_counts=True)  # (u,)
        places = self._places(torch.from_numpy(classes)).numpy()
        memory = self._memory()
        num_pushed = memory["num_pushed"].numpy()
        # Of more than K features of a class the oldest are gone at once.
        from_first = _from_first(sizes)
        is_kept = np.repeat(sizes, sizes) - from_first <= self._capacity
        rows, order = np.repeat(places, sizes)[is_kept], torch.from_numpy(by_class[is_kept])
        slots = (num_pushed[rows] + from_first[is_kept]) % self._capacity
        entries = torch.from_numpy(rows * self._capacity + slots)
        stored, scales = memory["features"].view(-1, self._width), memory["scales"].view(-1)
        arriving = features.index_select(0, order)
        exact = arriving.double()
        new_scales = 1.0 / exact.norm(dim=1).clamp(min=SMALLEST_NORM)
        change = _whole(exact, new_scales)
        change -= _whole(stored.index_select(0, entries).double(), scales[entries])  # an empty entry is zeros
        memory["sums"].index_add_(0, torch.from_numpy(rows), change)
        stored.numpy()[entries.numpy()] = arriving.numpy()
        scales[entries] = new_scales
        memory["stamps"].view(-1)[entries] = position[order]
        num_pushed[places] += sizes
        self._mark(torch.from_numpy(classes))
        self._is_stale[classes] = True


def _from_first(sizes: np.ndarray) -> np.ndarray:
    """Of runs of these sizes end to end, each entry's place in its run."""
    return np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)


def _whole(features: Tensor, scales: Tensor) -> Tensor:
    """Unit vectors as whole numbers of 2**-40, the same ones whenever and wherever they are computed.

    Args:
        features: (n, D) float64, overwritten.
        scales: (n,) float64.
    """
    return features.mul_((scales * _ONE)[:, None]).round_().long()
