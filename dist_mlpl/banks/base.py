"""Owns memory spread over ranks: every row has one owner, rows move by one exchange and are saved by virtual shard."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.errors import BankError
from dist_mlpl.settings import Settings

NUM_SHARDS: Final = 1024  # virtual; row i lies in shard i % NUM_SHARDS whatever the number of ranks

Dtype = Literal["f32", "f16", "u8", "i32", "i64"]
DTYPES: Final[dict[str, torch.dtype]] = {
    "f32": torch.float32, "f16": torch.float16, "u8": torch.uint8, "i32": torch.int32, "i64": torch.int64,
}  # fmt: skip
_NUMPY: Final[dict[str, type]] = {
    "f32": np.float32, "f16": np.float16, "u8": np.uint8, "i32": np.int32, "i64": np.int64,
}  # fmt: skip
_KEYS = 2  # int64 numbers that travel with a written row: its index and its position


class Column(Settings):
    """One part of every row."""

    dtype: Dtype
    shape: tuple[int, ...] = ()  # of one row's part
    fill: int = 0  # what a row holds that was never written

    @property
    def num_bytes(self) -> int:
        """Bytes of one row's part."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


class BankSpec(Settings):
    """What a bank is made of; a saved bank loads only into one of the same make."""

    num_rows: int
    num_shards: int
    columns: dict[str, Column]


class Bank:
    """Rows of some columns, in host memory or memory-mapped, owned by ranks in contiguous ranges of virtual shards.

    What is read and written depends on nothing but rows and positions, so R ranks hold what one rank holds. Memory is
    taken at the first use.

    Args:
        name: of the bank, for files and messages.
        num_rows: samples of the split, or classes.
        columns: by name, at least one.
        folder: a local folder for memory-mapped columns, the files vanish with the process; None: host memory.
        is_replicated: every rank holds all rows; for tables so small that this costs nothing. Reading and writing
            then move nothing, and what is written must be the same on every rank.
    """

    def __init__(
        self,
        name: str,
        num_rows: int,
        columns: Mapping[str, Column],
        *,
        folder: str | None = None,
        is_replicated: bool = False,
    ) -> None:
        self.name, self._folder, self._is_replicated = name, folder, is_replicated
        self.spec = BankSpec(num_rows=num_rows, num_shards=NUM_SHARDS, columns=dict(columns))
        rank, size = comm.rank(), comm.world_size()
        self._owned = range(-(-rank * NUM_SHARDS // size), -(-(rank + 1) * NUM_SHARDS // size))
        self._held = range(NUM_SHARDS) if is_replicated else self._owned
        sizes = [self._shard_rows(shard) for shard in self._held]
        self._starts = torch.tensor([0, *sizes]).cumsum(0)  # (shards + 1,) first local row of each held shard
        self._changed = torch.zeros(len(self._held), dtype=torch.bool)
        self._columns: dict[str, Tensor] | None = None

    @property
    def held_shards(self) -> range:
        """Virtual shards that this rank holds and must load."""
        return self._held

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """Rows, wherever they are kept.

        Args:
            index: (n,) int64 in [0, num_rows), n free on each rank; a row may be asked for more than once.

        Returns:
            (n, *shape) by column, on the CPU, in the order asked for.

        Raises:
            BankError: an index outside the bank; on all ranks.

        Collective: all ranks; the indices, then the rows, one uneven all-to-all each. Nothing moves if replicated.
        """
        index = index.cpu()
        error = self._index_error(index)
        if self._is_replicated:
            if error is not None:
                raise error
            places = self._places(index)
            return {name: column[places] for name, column in self._memory().items()}
        order, counts = self._by_owner(index, error)
        asked, counts_back = comm.exchange(index[order], counts, error=error)
        error, rows = None, torch.empty(0, self._row_bytes, dtype=torch.uint8)
        try:
            places = self._places(asked)
            rows = _as_bytes([column[places] for column in self._memory().values()])
        except BankError as fault:
            error = fault  # travels with the rows, so that all ranks stop together
        answers, _ = comm.exchange(rows, counts_back, error=error)
        in_order = torch.empty_like(answers)
        in_order[order] = answers
        return self._from_bytes(in_order)

    def write(self, index: Tensor, values: Mapping[str, Tensor], *, position: Tensor | None = None) -> None:
        """Replace rows; of several writes of one row the one with the highest position stays.

        Args:
            index: (n,) int64 in [0, num_rows), n free on each rank.
            values: (n, *shape) for every column; floating ones are cast to the column's type.
            position: (n,) int64, the order of writes over all ranks, a sample's place in the epoch say. None where no
                row is written twice; of equal positions the later row of the higher rank stays.

        Raises:
            BankError: an index outside the bank, values that do not fit or are not finite; on all ranks, and nothing
                is written. On the owner alone: a row that is not its own.

        Collective: all ranks, one uneven all-to-all of the rows. Nothing moves if replicated.
        """
        index = index.cpu()
        position = torch.zeros_like(index) if position is None else position.cpu()
        parts = {name: _cast(values[name].detach().cpu(), column) for name, column in self.spec.columns.items()
                 if name in values}  # fmt: skip
        error = self._index_error(index) or self._value_error(len(index), values.keys(), parts)
        if self._is_replicated:
            if error is not None:
                raise error
            self._put(index, position, parts)
            return
        order, counts = self._by_owner(index, error)
        keys = torch.stack([index, position], dim=1)
        rows = torch.empty(0, 8 * _KEYS + self._row_bytes, dtype=torch.uint8)
        if error is None:
            rows = _as_bytes([keys, *parts.values()])[order]
        arrived, _ = comm.exchange(rows, counts, error=error)
        keys = _copied(arrived[:, : 8 * _KEYS]).view(torch.int64)
        self._put(keys[:, 0], keys[:, 1], self._from_bytes(arrived[:, 8 * _KEYS :]))

    # Saving and loading ----------------------------------------------------------------------------------------------

    def changed_shards(self) -> list[int]:
        """Own shards written since `mark_saved`."""
        return [shard for shard in self._owned if self._changed[shard - self._held.start]]

    def mark_saved(self) -> None:
        """From now on, nothing has changed."""
        self._changed.fill_(False)

    def mark_changed(self) -> None:
        """Whatever was written or loaded, it is saved nowhere that counts."""
        self._changed.fill_(True)

    def shard_bytes(self, shard: int) -> int:
        """Bytes that a shard takes in a file."""
        return self._shard_rows(shard) * self._row_bytes

    def pack(self, shards: Sequence[int]) -> dict[str, Tensor]:
        """Held shards as tensors for a file: `shards` (s,) int64, and each column's rows, shard after shard.

        Within shard s the rows are s, s + NUM_SHARDS, s + 2 NUM_SHARDS and so on.
        """
        slices = [self._slice(shard) for shard in shards]
        packed = {name: torch.cat([column[part] for part in slices]) for name, column in self._memory().items()}
        return {"shards": torch.tensor(list(shards), dtype=torch.int64)} | packed

    def unpack(self, packed: Mapping[str, Tensor], wanted: Iterable[int]) -> None:
        """Take over what `pack` made, on any number of ranks, as rows that are saved already.

        Args:
            packed: of one file.
            wanted: shards of it to take; those that this rank does not hold are left.

        Raises:
            BankError: the file holds other rows than it says.
        """
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
        return max(0, -(-(self.spec.num_rows - shard) // NUM_SHARDS))

    def _slice(self, shard: int) -> slice:
        place = shard - self._held.start
        return slice(int(self._starts[place]), int(self._starts[place + 1]))

    def _by_owner(self, index: Tensor, error: BankError | None) -> tuple[Tensor, list[int]]:
        """(n,) order of the rows by owner, and how many go to each rank; nothing with an error."""
        size = comm.world_size()
        if error is not None:
            return torch.arange(len(index)), [0] * size
        owner = (index % NUM_SHARDS) * size // NUM_SHARDS
        return owner.argsort(stable=True), torch.bincount(owner, minlength=size).tolist()

    def _places(self, index: Tensor) -> Tensor:
        """(n,) local rows.

        Raises:
            BankError: a row that another rank owns.
        """
        shard = index % NUM_SHARDS - self._held.start
        is_foreign = (shard < 0) | (shard >= len(self._held))
        if bool(is_foreign.any()):
            raise self._error(
                f"row {int(index[is_foreign][0])} asked of rank {comm.rank()}",
                expected=f"a row of its own: index % {NUM_SHARDS} in {self._held}",
                next_step="all ranks must agree on who owns what: stop the run and report it",
            )
        return self._starts[shard] + index // NUM_SHARDS

    def _put(self, index: Tensor, position: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Write rows that this rank holds, the last by position where there are several."""
        order = np.lexsort((position.numpy(), index.numpy()))  # by row, then by position; stable
        row = index.numpy()[order]
        is_last = np.append(row[1:] != row[:-1], True) if len(row) else np.empty(0, dtype=bool)
        kept = torch.from_numpy(order[is_last])
        places = self._places(index[kept])
        for name, column in self._memory().items():
            column[places] = parts[name][kept]
        self._changed[(index[kept] % NUM_SHARDS) - self._held.start] = True

    # Memory ----------------------------------------------------------------------------------------------------------

    @property
    def _row_bytes(self) -> int:
        return sum(column.num_bytes for column in self.spec.columns.values())

    def _memory(self) -> dict[str, Tensor]:
        if self._columns is None:
            self._columns = {name: self._make(column) for name, column in self.spec.columns.items()}
        return self._columns

    def _make(self, column: Column) -> Tensor:
        shape = (int(self._starts[-1]), *column.shape)
        if self._folder is None or 0 in shape:
            made = torch.zeros(shape, dtype=DTYPES[column.dtype])
        else:
            made = torch.from_numpy(self._map(shape, column))
        return made if column.fill == 0 else made.fill_(column.fill)

    def _map(self, shape: tuple[int, ...], column: Column) -> np.ndarray:
        """Zeros in a file that nobody else sees; its space is taken now, or a full disk would kill the process later.

        Raises:
            BankError: no such folder, or no space in it.
        """
        num_bytes = shape[0] * column.num_bytes
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                return np.memmap(file, dtype=_NUMPY[column.dtype], mode="r+", shape=shape)
        except OSError as error:
            raise self._error(
                f"{num_bytes:,} bytes cannot be mapped in {self._folder!r}: {error.strerror}",
                expected="a local folder with that much space",
                next_step="set method.bank_folder to a larger disk, or to null for host memory",
            ) from error

    def _from_bytes(self, rows: Tensor) -> dict[str, Tensor]:
        """Columns of (n, row bytes) uint8."""
        parts, start = {}, 0
        for name, column in self.spec.columns.items():
            part = _copied(rows[:, start : start + column.num_bytes]).view(DTYPES[column.dtype])
            parts[name] = part.reshape(len(rows), *column.shape)
            start += column.num_bytes
        return parts

    # Faults ----------------------------------------------------------------------------------------------------------

    def _index_error(self, index: Tensor) -> BankError | None:
        is_outside = (index < 0) | (index >= self.spec.num_rows)
        if not bool(is_outside.any()):
            return None
        return self._error(
            f"row {int(index[is_outside][0])}",
            expected=f"an index in [0, {self.spec.num_rows}), the rows of the manifest's split or its classes",
            next_step="hand in rows that are `valid` alone; padding has index -1",
        )

    def _value_error(self, num_rows: int, names: Iterable[str], parts: Mapping[str, Tensor]) -> BankError | None:
        """What is wrong with values, cast already."""
        columns = self.spec.columns
        found = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
        wanted = {name: (DTYPES[column.dtype], (num_rows, *column.shape)) for name, column in columns.items()}
        if found != wanted or set(names) != set(columns):
            return self._error(
                f"values {found or list(names)}", expected=f"{wanted}", next_step="hand in every column, one row each"
            )
        for name, part in parts.items():
            if part.is_floating_point() and not bool(part.isfinite().all()):
                return self._error(
                    f"column {name!r} would hold a number that is not finite",
                    expected="finite numbers; nothing was written",
                    next_step="lower the learning rate; if the column is f16, keep values below 65,504",
                )
        return None

    def _error(self, found: str, *, expected: str, next_step: str) -> BankError:
        return BankError(found, expected=expected, where=f"bank {self.name!r}, rank {comm.rank()}", next_step=next_step)


def _cast(part: Tensor, column: Column) -> Tensor:
    """Floating values in the column's floating type; anything else stays as it is, to be refused if it does not fit."""
    dtype = DTYPES[column.dtype]
    return part.to(dtype) if dtype.is_floating_point and part.is_floating_point() else part


def _as_bytes(parts: Sequence[Tensor]) -> Tensor:
    """(n, row bytes) uint8 of tensors with n rows each."""
    flat = [part.reshape(len(part), int(np.prod(part.shape[1:]))) for part in parts]
    return torch.cat([_copied(part).view(torch.uint8) for part in flat], dim=1)


def _copied(rows: Tensor) -> Tensor:
    """In memory of its own: bytes are seen as another type only from an aligned start."""
    return rows.clone(memory_format=torch.contiguous_format)
