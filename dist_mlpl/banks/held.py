"""Owns the rows of a bank that one rank holds: their columns, their place in memory, saving and loading by shard."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.rows import ByOwner, Integers, Kind, Records, Section, no_room, numpy_type, record_type
from dist_mlpl.errors import BankError, MlplError
from dist_mlpl.settings import Settings

NUM_SHARDS: Final = 1024  # virtual shards; row i lies in shard i % num_shards, whatever the number of ranks
INTEGER: Final[Kind] = (torch.int64, ())

Dtype = Literal["f64", "f32", "f16", "u8", "i32", "i64"]
DTYPES: Final[dict[str, torch.dtype]] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "u8": torch.uint8, "i32": torch.int32,
    "i64": torch.int64,
}  # fmt: skip


class Column(Settings):
    """One column of a bank: type and shape of its part of a row."""

    dtype: Dtype
    shape: tuple[int, ...] = ()  # shape of one row's part
    fill: int = 0  # value of rows never written

    @property
    def num_bytes(self) -> int:
        """Bytes of one row's part."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


class BankSpec(Settings):
    """Rows, shards and columns of a bank; a saved bank loads only into a bank with an equal spec."""

    num_rows: int
    num_shards: int
    columns: dict[str, Column]


class Staged(NamedTuple):
    """Rows written on this rank and not yet delivered to their owners; until then they are neither read nor saved."""

    records: Records  # (n,) sorted by owner
    rows: ByOwner
    room: comm.Room  # number of rows that their message leaves room for
    error: BankError | None = None  # what is wrong with them; they are then never delivered


class HeldRows:
    """The rows of the virtual shards that this rank owns, in host memory or memory-mapped files.

    Ranks own contiguous ranges of shards. Memory is allocated at the first use.

    Args:
        name: the bank's name, for files and messages.
        num_rows: number of samples in the split, or of classes.
        columns: by name, at least one.
        folder: a local folder for memory-mapped columns, whose files vanish with the process; None: host memory.
        is_replicated: every rank holds all rows; for tables small enough that this costs nothing. Reading and writing
            then move nothing, and what is written must be the same on every rank.
        num_shards: virtual shards, never a function of the number of ranks. With fewer rows than shards the first
            ranks would own all rows, so a bank of few, large rows has as many shards as rows.
    """

    def __init__(
        self,
        name: str,
        num_rows: int,
        columns: Mapping[str, Column],
        *,
        folder: str | None = None,
        is_replicated: bool = False,
        num_shards: int = NUM_SHARDS,
    ) -> None:
        self.name, self._folder, self._is_replicated = name, folder, is_replicated
        self.spec = BankSpec(num_rows=num_rows, num_shards=num_shards, columns=dict(columns))
        self._kinds: dict[str, Kind] = {name: (DTYPES[part.dtype], part.shape) for name, part in columns.items()}
        self._stored = record_type(self._kinds)
        self._written = np.dtype([("index", np.int64), ("position", np.int64), ("values", self._stored)])
        rank, size = comm.rank(), comm.world_size()
        self._num_ranks = size
        self._where = f"bank {name!r}, rank {rank}"
        self._owned = range(-(-rank * num_shards // size), -(-(rank + 1) * num_shards // size))
        self._held = range(num_shards) if is_replicated else self._owned
        sizes = [self._shard_rows(shard) for shard in self._held]
        self._starts = np.cumsum([0, *sizes], dtype=np.int64)  # (shards + 1,) first local row of each held shard
        self._changed = np.zeros(len(self._held), dtype=np.bool_)
        self._columns: dict[str, Tensor] | None = None
        self._arrays: dict[str, npt.NDArray[Any]] = {}  # NumPy views of `_columns`
        self._staged: Staged | None = None

    @property
    def is_replicated(self) -> bool:
        """True where every rank holds all rows."""
        return self._is_replicated

    @property
    def held_shards(self) -> range:
        """The virtual shards that this rank holds and must load."""
        return self._held

    def held_rows(self) -> Tensor:
        """(n,) int64 indices of the rows that this rank holds, in the order of its memory."""
        size, step = self.spec.num_rows, self.spec.num_shards
        rows = [torch.arange(min(shard, size), size, step) for shard in self._held]
        return torch.cat([torch.empty(0, dtype=torch.int64), *rows])

    # Saving and loading ----------------------------------------------------------------------------------------------

    def changed_shards(self) -> list[int]:
        """The shards this rank owns that were written since `mark_saved`.

        Raises:
            BankError: rows still wait for delivery; call `flush` first.
        """
        self._check_delivered()
        return [shard for shard in self._owned if self._changed[shard - self._held.start]]

    def mark_saved(self) -> None:
        """Mark all shards as saved."""
        self._changed[:] = False

    def mark_changed(self) -> None:
        """Mark all shards as unsaved, whatever was written, loaded or saved before."""
        self._changed[:] = True

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a shard's columns in a file."""
        return self._shard_rows(shard) * self._row_bytes

    def pack(self, shards: Sequence[int]) -> dict[str, Tensor]:
        """Copy held shards into tensors for a file: `shards` (s,) int64, and each column's rows, shard after shard.

        Shard s has the rows s, s + num_shards, s + 2 num_shards and so on.

        Raises:
            BankError: rows still wait for delivery; call `flush` first.
        """
        self._check_delivered()
        slices = [self._slice(shard) for shard in shards]
        packed = {name: torch.cat([column[part] for part in slices]) for name, column in self._memory().items()}
        return {"shards": torch.tensor(list(shards), dtype=torch.int64)} | packed

    def mark_loaded(self) -> None:
        """Rebuild what ranks know of each other's rows; called once all shards that this rank holds are unpacked.

        Collective: all ranks; overrides may communicate. Nothing moves by default.
        """

    def unpack(self, packed: Mapping[str, Tensor], wanted: Iterable[int]) -> None:
        """Load shards that `pack` made, on any number of ranks; they are not marked as changed.

        Args:
            packed: the tensors of one file.
            wanted: shards of the file to load; those that this rank does not hold are skipped.

        Raises:
            BankError: the file's columns do not have the rows of its shards, or rows still wait for delivery; call
                `flush` first.
        """
        self._check_delivered()
        shards = packed["shards"].tolist()
        ends = np.cumsum([self._shard_rows(shard) for shard in shards])
        if any(packed[name].shape[0] != ends[-1] for name in self.spec.columns):
            raise self._error(
                f"a file of {[packed[name].shape[0] for name in self.spec.columns]} rows for {len(shards)} shards",
                expected=f"{int(ends[-1])} rows in every column",
                next_step="restore the file, or go on from an earlier commit",
            )
        chosen = set(wanted).intersection(self._held)
        for shard, end in zip(shards, ends, strict=True):
            if shard in chosen:
                for name, column in self._memory().items():
                    column[self._slice(shard)] = packed[name][end - self._shard_rows(shard) : end]

    # Where rows lie --------------------------------------------------------------------------------------------------

    def _shard_rows(self, shard: int) -> int:
        return max(0, -(-(self.spec.num_rows - shard) // self.spec.num_shards))

    def _slice(self, shard: int) -> slice:
        place = shard - self._held.start
        return slice(int(self._starts[place]), int(self._starts[place + 1]))

    def _owners(self, index: Integers) -> Integers:
        """(n,) the ranks that own the rows (n,)."""
        return index % self.spec.num_shards * self._num_ranks // self.spec.num_shards

    def _places(self, index: Integers) -> Integers:
        """(n,) places of the rows (n,) in this rank's memory.

        Raises:
            BankError: a row that this rank does not hold.
        """
        shard = index % self.spec.num_shards - self._held.start
        if len(shard) and (shard.min() < 0 or shard.max() >= len(self._held)):
            is_foreign = (shard < 0) | (shard >= len(self._held))
            raise self._error(
                f"row {index[is_foreign][0]} asked of rank {comm.rank()}",
                expected=f"a row of its own: index % {self.spec.num_shards} in {self._held}",
                next_step="all ranks must agree on who owns what: stop the run and report it",
            )
        return self._starts[shard] + index // self.spec.num_shards

    def _mark(self, index: Integers) -> None:
        """Mark the shards of rows (n,) that this rank holds as changed, so that they are saved."""
        self._changed[index % self.spec.num_shards - self._held.start] = True

    # Memory ----------------------------------------------------------------------------------------------------------

    @property
    def _row_bytes(self) -> int:
        return sum(column.num_bytes for column in self.spec.columns.values())

    def _memory(self) -> dict[str, Tensor]:
        if self._columns is None:
            self._columns = {name: self._make(column) for name, column in self.spec.columns.items()}
            self._arrays = {name: column.numpy() for name, column in self._columns.items()}
        return self._columns

    def _columns_here(self) -> dict[str, npt.NDArray[Any]]:
        """`_memory` as NumPy arrays, which are much faster to index than tensors."""
        self._memory()
        return self._arrays

    def _make(self, column: Column) -> Tensor:
        shape = (int(self._starts[-1]), *column.shape)
        if self._folder is None or 0 in shape:
            made = torch.zeros(shape, dtype=DTYPES[column.dtype])
        else:
            made = torch.from_numpy(self._map(shape, column))
        return made if column.fill == 0 else made.fill_(column.fill)

    def _map(self, shape: tuple[int, ...], column: Column) -> np.ndarray:
        """Map zeros in an unnamed file; its space is reserved now, or a full disk would kill the process later.

        Raises:
            BankError: the folder does not exist or has no space.
        """
        num_bytes = shape[0] * column.num_bytes
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                return np.memmap(file, dtype=numpy_type(DTYPES[column.dtype]), mode="r+", shape=shape)
        except OSError as error:
            raise self._error(
                f"{num_bytes:,} bytes cannot be mapped in {self._folder!r}: {error.strerror}",
                expected="a local folder with that much space",
                next_step="set method.bank_folder to a larger disk, or to null for host memory",
            ) from error

    # Rows that wait --------------------------------------------------------------------------------------------------

    def _waiting(self, dtype: np.dtype[np.void]) -> Section:
        """The staged rows, or no records of type `dtype`, as a section of a message to their owners."""
        staged = self._staged
        if staged is None:
            return Section(np.empty(0, dtype=dtype), [(0, 0)] * self._num_ranks, no_room(self._num_ranks))
        return Section(staged.records, staged.rows.spans, staged.room)

    @contextmanager
    def _delivery(self, error: MlplError | None) -> Iterator[MlplError | None]:
        """Wrap the exchange that delivers staged rows: afterwards none are staged, unless it fails for another reason.

        Args:
            error: what else this rank found wrong.

        Yields:
            The error to hand to the exchange, or None: that of the staged rows, `error`, or no memory for what will
            arrive.

        Raises:
            MlplError: the error of the staged rows of any rank if there is one, else that of the exchange.

        Collective: all ranks; if the exchange fails and rows are staged, one gather of errors.
        """
        staged = self._staged
        try:
            yield (staged and staged.error) or error or self._memory_error()
        except MlplError as failure:
            faults = [] if staged is None else comm.gather_objects(staged.error)
            refused = next((fault for fault in faults if fault is not None), None)
            if refused is None:
                raise
            self._staged = None
            raise refused from failure
        self._staged = None

    def _memory_error(self) -> BankError | None:
        """Allocate memory for the rows now; return the error if that fails, so that all ranks can stop together."""
        try:
            self._memory()
        except BankError as error:
            return error
        return None

    # Faults ----------------------------------------------------------------------------------------------------------

    def _check_delivered(self) -> None:
        if self._staged is not None:
            raise self._error(
                f"{len(self._staged.records)} rows that wait for their owners",
                expected="none where a bank is saved or loaded",
                next_step="this is a fault of the caller, who has to flush the bank on all ranks: report it",
            )

    def _error(self, found: str, *, expected: str, next_step: str) -> BankError:
        return BankError(found, expected=expected, where=self._where, next_step=next_step)
