"""Owns prototypes of each class over all images and ranks: exact means of features by slot, or k-means centres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm, keyed
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.checks import feature_error
from dist_mlpl.banks.held import INTEGER, NUM_SHARDS, Column, Staged
from dist_mlpl.banks.nearest import SMALLEST_NORM, Centres, edges, nearest_centre, roughly_nearest
from dist_mlpl.banks.replica import Replica
from dist_mlpl.banks.rows import Integers, Records, by_owner, exchange_records, record_type
from dist_mlpl.errors import BankError, MlplError

Metric = Literal["euclidean", "cosine"]
Vectors = npt.NDArray[np.float32]

_NEAREST: Final = -1  # the slot of a feature that goes to the nearest centre
_BLOCK_NUMBERS: Final = 1 << 16  # float64 numbers processed at once: half a megabyte, which caches hold
_SHARED_BYTES: Final = 1 << 24  # bytes of the table per message when it is shared


class Prototypes(Bank):
    """P prototypes of each class, one row per class; the features added become prototypes at `renew`.

    Columns: `prototypes` (P, D) float32; `counts` (P,) int64, the features behind each, 0 for a class without
    prototypes; `sums` (P, D) float64 and `num_added` (P,) int64 of the features added since the last `renew`.

    Features go to a given slot, or to the nearest centre of their class. While a class has no prototypes, its first P
    features each open a slot and later ones go to the nearest running mean: mini-batch k-means, a batch being one
    `add`. Once it has prototypes, these are the centres, and a renewal is one step of Lloyd's algorithm over all that
    was added. A class's features are added in an order fixed by seed and positions, in float64, on the one rank that
    owns the class: any number of ranks gives the same bits.

    Features wait on the rank that found them until the next `add`, whose message also announces how many will follow
    in the one after it: one message per step, of exactly the size needed. Reading, renewing and `flush` deliver them
    first.

    Source: SARB (Pu et al., AAAI 2022) for centres of known positives; DSRB (Pu et al., ESWA 2024) for means by slot;
        Sculley, WWW 2010, for mini-batches; Dhillon and Modha, Machine Learning 2001, for the cosine.
    Differs: no separate pass over the data set; features are gathered during training. A class with fewer features
        than slots fills the others with its mean (the papers' codes crash).

    Args:
        name: the bank's name.
        num_classes: C.
        num_prototypes: P.
        width: D.
        seed: the run's seed; with positions it fixes which features open slots.
        metric: `euclidean`, or `cosine`: unit vectors are summed, nearest means largest cosine, and prototypes are
            unit vectors.
        folder: see `HeldRows`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        num_prototypes: int,
        width: int,
        *,
        seed: int,
        metric: Metric = "euclidean",
        folder: str | None = None,
    ) -> None:
        columns = {
            "prototypes": Column(dtype="f32", shape=(num_prototypes, width)),
            "counts": Column(dtype="i64", shape=(num_prototypes,)),
            "sums": Column(dtype="f64", shape=(num_prototypes, width)),
            "num_added": Column(dtype="i64", shape=(num_prototypes,)),
        }
        super().__init__(name, num_classes, columns, folder=folder, num_shards=min(NUM_SHARDS, num_classes))
        self._num_prototypes, self._width, self._metric = num_prototypes, width, metric
        self._key = keyed.key("prototypes", seed)
        self._added = record_type(
            {"index": INTEGER, "slot": INTEGER, "position": INTEGER, "features": (torch.float32, (width,))}
        )
        self._table = Replica(num_classes, {name: self._kinds[name] for name in ("prototypes", "counts")}, name=name)
        self._known: Centres | None = None  # prototypes of own classes, until they are renewed

    @property
    def table_bytes(self) -> int:
        """Bytes of the table of prototypes and counts that every rank holds."""
        return self.spec.num_rows * self._num_prototypes * (4 * self._width + 8)

    # Gathering -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, class_id: Tensor, features: Tensor, *, slot: Tensor | None = None, position: Tensor) -> None:
        """Add features to the sums of their slots.

        Args:
            class_id: (n,) int64 in [0, C), n free on each rank.
            features: (n, D), any floating type and device.
            slot: (n,) int64 in [0, P); None: the nearest centre of the class.
            position: (n,) int64, a sample's place in the step, or its index; equal ones of a class are ordered by rank,
                then row.

        Raises:
            BankError: a class or slot out of range, features of the wrong shape or not finite; on all ranks, and
                nothing is added.

        Collective: all ranks, one `comm.exchange_messages` of 8 bytes and the features of the previous call: n rows of
        D float32 and 24 bytes each.
        """
        class_id, position = class_id.cpu(), position.cpu()
        features = features.detach().cpu().float()
        classes, slots = class_id.numpy(), None if slot is None else slot.cpu()
        error = self._index_error(classes) or feature_error(
            class_id, features, position, width=self._width, where=self._where
        )
        if slots is not None:
            error = error or self._slot_error(class_id, slots)
        owned = by_owner(self._owners(classes if error is None else classes[:0]), self._num_ranks)
        records, places = np.empty(len(owned.order), dtype=self._added), owned.places()
        if error is None:
            records["index"][places], records["position"][places] = classes, position.numpy()
            records["slot"][places] = _NEAREST if slots is None else slots.numpy()
            records["features"][places] = features.numpy()
        if self._num_ranks == 1:
            if error is not None:
                raise error
            self._take([records])
            return
        told = self._pass_on(np.array(owned.counts, dtype=np.int64), error)
        self._staged = Staged(records, owned, comm.Room(owned.counts, told))

    def flush(self) -> None:
        """Deliver waiting features: their owners add them to the sums. See `Bank.flush`."""
        if self._staged is not None:
            self._pass_on(np.zeros(self._num_ranks, dtype=np.int64), None)

    def _fetch(self, index: Integers, error: BankError | None) -> dict[str, Tensor]:
        self.flush()
        return super()._fetch(index, error)

    def _pass_on(self, numbers: Integers, error: MlplError | None) -> list[int]:
        """Deliver waiting features to their owners.

        Args:
            numbers: (R,) how many features the next message will have for each rank.
            error: raised on all ranks instead of delivering; waiting features go on waiting.

        Returns:
            R numbers: how many features the next message from each rank will have.

        Collective: all ranks, one `comm.exchange_messages`.
        """
        notes = numbers[:, None].view(np.uint8)
        with self._delivery(error) as error:
            told, (parts,) = exchange_records([self._waiting(self._added)], name=self.name, notes=notes, error=error)
        self._take(parts)
        return [int(note.view(np.int64)[0]) for note in told]

    def _take(self, parts: Sequence[Records]) -> None:
        """Add the features of one `add`, from each rank, to the sums of the classes that this rank owns."""
        classes, slot, position, given = (
            np.concatenate([part[name] for part in parts]) for name in ("index", "slot", "position", "features")
        )
        if len(classes) == 0:
            return
        hashes = keyed.hash_integers(self._key, position.astype(np.uint64))  # samples close in order may look alike
        order = np.lexsort((hashes, classes))
        classes, features = classes[order], given[order]
        places = self._places(classes)
        if slot[0] == _NEAREST:  # all features of a call have it, or none
            self._add_to_nearest(places, features)
        else:
            self._add_to(places, slot[order], features)
        self._mark(classes)

    def _add_to(self, places: Integers, slots: Integers, features: Vectors) -> None:
        """Add features to the sums of their slots, in the order given.

        Args:
            places: (n,) local rows of their classes.
            slots: (n,) in [0, P).
            features: (n, D) float32, not normalised.
        """
        memory = self._memory()
        sums, flat = memory["sums"].view(-1, self._width), places * self._num_prototypes + slots
        np.add.at(memory["num_added"].view(-1).numpy(), flat, 1)
        for part, to in zip(self._blocks(features), self._blocks(flat), strict=True):
            sums.index_add_(0, torch.from_numpy(to), self._exact(part))

    def _add_to_nearest(self, places: Integers, features: Vectors) -> None:
        """Open empty slots of classes without prototypes, then add the rest to the nearest centres.

        Args:
            places: (n,) local rows of their classes, those of a class side by side.
            features: (n, D) float32.
        """
        memory = self._columns_here()
        is_empty = (memory["num_added"][places] == 0) & (memory["counts"][places] == 0)  # (n, P)
        if is_empty.any():
            first = edges(places)
            rank_in_class = np.arange(len(places)) - np.repeat(first[:-1], np.diff(first))
            opens = rank_in_class < is_empty.sum(axis=1)
            slots = np.argsort(~is_empty[opens], axis=1, kind="stable")  # (m, P), empty ones first
            self._add_to(places[opens], slots[np.arange(len(slots)), rank_in_class[opens]], features[opens])
            places, features = places[~opens], features[~opens]
        if len(places):
            self._add_to(places, self._nearest(places, features), features)

    def _nearest(self, places: Integers, features: Vectors) -> Integers:
        """(n,) the slot of the nearest centre; of equally near ones the first.

        Products in float32 decide only where rounding cannot change the answer, float64 elsewhere: so it does not
        depend on the order of summation.
        """
        memory = self._columns_here()
        is_cosine = self._metric == "cosine"
        if self._known is None:
            self._known = Centres.of(memory["prototypes"])
        given = features
        if is_cosine:
            given = np.concatenate([self._exact(part).float() for part in self._blocks(features)])
        found, is_sure = roughly_nearest(given, places, self._known, is_cosine=is_cosine)
        doubtful = np.flatnonzero(~is_sure | (memory["counts"][places] == 0).any(axis=1))
        step = max(1, _BLOCK_NUMBERS // (self._num_prototypes * self._width))
        for first in range(0, len(doubtful), step):
            part = doubtful[first : first + step]
            centres, exists = self._centres(torch.from_numpy(places[part]))
            found[part] = nearest_centre(self._exact(features[part]), centres, exists, is_cosine=is_cosine).numpy()
        return found

    def _centres(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """(n, P, D) float64 centres, running means for classes without prototypes; (n, P) bool, which of them exist."""
        memory = self._memory()
        counts, num_added = memory["counts"][places], memory["num_added"][places]  # (n, P)
        centres = memory["prototypes"][places].double()  # (n, P, D)
        is_new = (counts == 0).any(dim=1)
        centres[is_new] = memory["sums"][places[is_new]] / num_added[is_new].clamp(min=1)[..., None]
        return centres, (counts > 0) | (num_added > 0)

    def _blocks(self, rows: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Views of rows (n, ...) in blocks, small enough for caches to hold their features in float64."""
        step = max(1, _BLOCK_NUMBERS // self._width)
        return [rows[first : first + step] for first in range(0, len(rows), step)]

    def _exact(self, features: Vectors) -> Tensor:
        """(n, D) float64 features as they are added to sums: scaled to unit length if the metric is cosine."""
        return self._vectors(torch.from_numpy(features).double())

    def _vectors(self, vectors: Tensor) -> Tensor:
        """Scale vectors (..., D) to unit length if the metric is cosine."""
        if self._metric == "euclidean":
            return vectors
        return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)

    # Renewing and reading --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def renew(self, *, momentum: float | None = None) -> None:
        """Make prototypes of the features added since the last renewal, and reset the sums.

        A slot to which nothing was added takes the mean of all that was added to its class. A class to which nothing
        was added keeps its prototypes.

        Args:
            momentum: in [0, 1), the old prototype's weight in the new one, where there is an old one; None: 0.

        Raises:
            BankError: the rows cannot be allocated on some rank; on all ranks.

        Collective: all ranks; first `flush`; one gather of errors; then P D float32 and 8 P bytes for each class
        renewed, to every rank.
        """
        self.flush()
        with comm.shared_errors():
            memory = self._memory()
        rows = (memory["num_added"] > 0).any(dim=1).nonzero().squeeze(1)
        for part in rows.split(max(1, _BLOCK_NUMBERS // (self._num_prototypes * self._width))):
            added, sums = memory["num_added"][part], memory["sums"][part]  # (u, P), (u, P, D)
            total = added.sum(dim=1, keepdim=True)
            whole = sums.sum(dim=1, keepdim=True) / total[..., None]
            new = torch.where((added > 0)[..., None], sums / added.clamp(min=1)[..., None], whole)
            new = self._vectors(new)
            if momentum is not None:
                old = memory["prototypes"][part].double()
                is_old = (memory["counts"][part] > 0)[..., None]
                new = self._vectors(torch.where(is_old, momentum * old + (1.0 - momentum) * new, new))
            memory["prototypes"][part] = new.float()
            memory["counts"][part] = torch.where(added > 0, added, total)
            memory["sums"][part] = 0.0
            memory["num_added"][part] = 0
        classes = self.held_rows()[rows]
        self._mark(classes.numpy())
        self._share(classes)

    def _share(self, classes: Tensor) -> None:
        """Send the prototypes of own classes (n,) to all ranks, a block at a time.

        Collective: all ranks.
        """
        self._known = None
        for part in classes.tensor_split(-(-self.table_bytes // _SHARED_BYTES)):
            index, memory = part.numpy(), self._columns_here()
            places = self._places(index)
            records, made = self._table.records(index)
            for name, column in made.items():
                column[:] = memory[name][places]
            self._table.share(records)

    def counts(self) -> Tensor:
        """The number of features behind each prototype.

        Returns:
            (C, P) int64 on the CPU; all 0 for a class without prototypes, none 0 for the others. A slot filled with its
            class's mean has the count of the class. This is the bank's own table: a renewal changes it.
        """
        return self._table.columns[1]

    @overload
    def read(self, index: Tensor) -> dict[str, Tensor]: ...

    @overload
    def read(self, index: Tensor, slot: Tensor) -> Tensor: ...

    def read(self, index: Tensor, slot: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Read prototypes; zeros for classes that have none. Every rank holds all, so nothing moves.

        Without `slot`, read whole rows, sums included, from their owners: see `Bank.read`.

        Args:
            index: (n,) int64 class ids in [0, C), n free on each rank.
            slot: (n,) int64 in [0, P).

        Returns:
            (n, D) float32 on the CPU, in the order of `index`.

        Raises:
            BankError: a class or slot out of range.
        """
        if slot is None:
            return super().read(index)
        index, slot = index.cpu(), slot.cpu()
        error = self._index_error(index.numpy()) or self._slot_error(index, slot)
        if error is not None:
            raise error
        return self._table.columns[0].view(-1, self._width).index_select(0, index * self._num_prototypes + slot)

    def table(self) -> tuple[Tensor, Tensor]:
        """Copies on the CPU of all prototypes (C, P, D) float32, zeros where a class has none, and `counts`."""
        prototypes, counts = self._table.columns
        return prototypes.clone(), counts.clone()

    def mark_loaded(self) -> None:
        """See `HeldRows.mark_loaded`: all prototypes are shared again.

        Collective: all ranks; P D float32 and 8 P bytes for each class, to every rank.
        """
        super().mark_loaded()
        self._share(self.held_rows())

    # Faults ----------------------------------------------------------------------------------------------------------

    def _slot_error(self, class_id: Tensor, slot: Tensor) -> BankError | None:
        if tuple(slot.shape) != tuple(class_id.shape):
            return self._error(
                f"slots {tuple(slot.shape)} for {len(class_id)} classes",
                expected="as many slots as classes",
                next_step="hand in one slot for each class id",
            )
        is_outside = (slot < 0) | (slot >= self._num_prototypes)
        if not bool(is_outside.any()):
            return None
        return self._error(
            f"slot {int(slot[is_outside][0])}",
            expected=f"a slot in [0, {self._num_prototypes})",
            next_step="this is a fault of the method: keep the log and report it",
        )
