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
from dist_mlpl.banks.rows import Kind, as_bytes, from_bytes, no_rows
from dist_mlpl.errors import BankError
from dist_mlpl.settings import Settings

NUM_SHARDS: Final = 1024  # virtual; row i lies in shard i % num_shards whatever the number of ranks

Dtype = Literal["f64", "f32", "f16", "u8", "i32", "i64"]
DTYPES: Final[dict[str, torch.dtype]] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "u8": torch.uint8, "i32": torch.int32,
    "i64": torch.int64,
}  # fmt: skip
_NUMPY: Final[dict[str, type]] = {
    "f64": np.float64, "f32": np.float32, "f16": np.float16, "u8": np.uint8, "i32": np.int32, "i64": np.int64,
}  # fmt: skip
INTEGER: Final[Kind] = (torch.int64, ())


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
        num_shards: virtual shards, never a function of the number of ranks. With fewer rows than shards the first
            ranks would own them all: a bank of few and large rows has as many shards as rows.
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
        self._kinds: list[Kind] = [(DTYPES[column.dtype], column.shape) for column in columns.values()]
        rank, size = comm.rank(), comm.world_size()
        self._owned = range(-(-rank * num_shards // size), -(-(rank + 1) * num_shards // size))
        self._held = range(num_shards) if is_replicated else self._owned
        sizes = [self._shard_rows(shard) for shard in self._held]
        self._starts = torch.tensor([0, *sizes]).cumsum(0)  # (shards + 1,) first local row of each held shard
        self._changed = torch.zeros(len(self._held), dtype=torch.bool)
        self._columns: dict[str, Tensor] | None = None
        self._room: comm.Room | None = None  # of the next `_send`, once it is known

    @property
    def is_replicated(self) -> bool:
        """True where every rank holds all rows."""
        return self._is_replicated

    @property
    def held_shards(self) -> range:
        """Virtual shards that this rank holds and must load."""
        return self._held

    def held_rows(self) -> Tensor:
        """(n,) int64 rows that this rank holds, in the order in which they lie in its memory."""
        size, step = self.spec.num_rows, self.spec.num_shards
        rows = [torch.arange(min(shard, size), size, step) for shard in self._held]
        return torch.cat([torch.empty(0, dtype=torch.int64), *rows])

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """Rows, wherever they are kept.

        Args:
            index: (n,) int64 in [0, num_rows), n free on each rank; a row may be asked for more than once.

        Returns:
            (n, *shape) by column, on the CPU, in the order asked for.

        Raises:
            BankError: an index outside the bank; on all ranks.

        Collective: all ranks; the indices, then the rows, one `comm.exchange` each. Nothing moves if replicated.
        """
        index = index.cpu()
        if self._is_replicated:
            error = self._index_error(index)
            if error is not None:
                raise error
            places = self._places(index)
            return {name: column.index_select(0, places) for name, column in self._memory().items()}
        return dict(zip(self.spec.columns, self._fetch(index), strict=True))

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

        Collective: all ranks, one `comm.exchange` of the rows, with room for as many as were last read. Nothing moves
        if replicated.
        """
        self._replace(index, values, position)

    def _replace(
        self, index: Tensor, values: Mapping[str, Tensor], position: Tensor | None, error: BankError | None = None
    ) -> None:
        """As `write`; `error` is what else this rank found wrong."""
        index = index.cpu()
        position = torch.zeros_like(index) if position is None else position.cpu()
        parts = {name: _cast(values[name].detach().cpu(), column) for name, column in self.spec.columns.items()
                 if name in values}  # fmt: skip
        error = error or self._index_error(index) or self._value_error(len(index), values.keys(), parts)
        if self._is_replicated:
            if error is not None:
                raise error
            self._put(index, position, parts)
            return
        kinds = [INTEGER, INTEGER, *self._kinds]
        index, position, *rows = self._send(index, [index, position, *parts.values()], kinds, error)
        self._put(index, position, dict(zip(self.spec.columns, rows, strict=True)))

    # Moving rows between ranks ---------------------------------------------------------------------------------------

    def _send(
        self, index: Tensor, parts: Sequence[Tensor], kinds: Sequence[Kind], error: BankError | None
    ) -> list[Tensor]:
        """Hand each row to the rank that owns it.

        Args:
            index: (n,) rows of the bank that the parts are about.
            parts: (n, *shape) each.
            kinds: of the parts, the same on every rank whatever is wrong.
            error: what this rank found wrong; raised on all ranks in place of moving anything.

        Returns:
            The parts of the rows that this rank owns, in order of source rank.

        Collective: all ranks, one `comm.exchange`, with room for what `_room` foretells.
        """
        room, self._room = self._room, None
        order, counts = self._by_owner(index, error)
        rows = no_rows(kinds) if error is not None else as_bytes(parts).index_select(0, order)
        arrived, _ = comm.exchange(rows, counts, expected=room, error=error)
        return from_bytes(arrived, kinds)

    def _fetch(self, index: Tensor) -> list[Tensor]:
        """Every column of rows, from the ranks that own them; see `read`.

        The rows read are taken for those that will be written next: `_room` is made for them.
        """
        error = self._index_error(index)
        order, counts = self._by_owner(index, error)
        asked, counts_back = comm.exchange(index.index_select(0, order), counts, error=error)
        fault = None
        try:
            places = self._places(asked)
            rows = as_bytes([column.index_select(0, places) for column in self._memory().values()])
        except BankError as found:
            fault, rows = found, no_rows(self._kinds)  # travels with the rows, so that all ranks stop together
        answers, _ = comm.exchange(rows, counts_back, expected=comm.Room(counts_back, counts), error=fault)
        self._room = comm.Room(counts, counts_back)
        return from_bytes(answers.index_select(0, order.argsort()), self._kinds)

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

        Within shard s the rows are s, s + num_shards, s + 2 num_shards and so on.
        """
        slices = [self._slice(shard) for shard in shards]
        packed = {name: torch.cat([column[part] for part in slices]) for name, column in self._memory().items()}
        return {"shards": torch.tensor(list(shards), dtype=torch.int64)} | packed

    def mark_loaded(self) -> None:
        """All shards that this rank holds were unpacked; what ranks know of each other's rows is made anew.

        Collective: allowed, on all ranks alike. Nothing moves by default.
        """

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
        return max(0, -(-(self.spec.num_rows - shard) // self.spec.num_shards))

    def _slice(self, shard: int) -> slice:
        place = shard - self._held.start
        return slice(int(self._starts[place]), int(self._starts[place + 1]))

    def _by_owner(self, index: Tensor, error: BankError | None) -> tuple[Tensor, list[int]]:
        """(n,) order of the rows by owner, and how many go to each rank; nothing with an error."""
        size = comm.world_size()
        if error is not None:
            return torch.arange(len(index)), [0] * size
        owner = self._owners(index.numpy())
        return torch.from_numpy(owner.argsort(kind="stable")), np.bincount(owner, minlength=size).tolist()

    def _owners(self, index: np.ndarray) -> np.ndarray:
        """(n,) ranks that own the rows (n,)."""
        return index % self.spec.num_shards * comm.world_size() // self.spec.num_shards

    def _places(self, index: Tensor) -> Tensor:
        """(n,) local rows.

        Raises:
            BankError: a row that another rank owns.
        """
        rows = index.numpy()
        shard = rows % self.spec.num_shards - self._held.start
        is_foreign = (shard < 0) | (shard >= len(self._held))
        if is_foreign.any():
            raise self._error(
                f"row {rows[is_foreign][0]} asked of rank {comm.rank()}",
                expected=f"a row of its own: index % {self.spec.num_shards} in {self._held}",
                next_step="all ranks must agree on who owns what: stop the run and report it",
            )
        return torch.from_numpy(self._starts.numpy()[shard] + rows // self.spec.num_shards)

    def _put(self, index: Tensor, position: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Write rows that this rank holds, the last by position where there are several."""
        order = np.lexsort((position.numpy(), index.numpy()))  # by row, then by position; stable
        row = index.numpy()[order]
        is_last = np.append(row[1:] != row[:-1], True) if len(row) else np.empty(0, dtype=bool)
        kept = torch.from_numpy(order[is_last])
        places = self._places(index[kept]).numpy()
        for name, column in self._memory().items():
            column.numpy()[places] = parts[name].index_select(0, kept).numpy()
        self._mark(index[kept])

    def _mark(self, index: Tensor) -> None:
        """Rows that this rank holds have changed: they are to be saved."""
        self._changed[index % self.spec.num_shards - self._held.start] = True

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

    # Faults ----------------------------------------------------------------------------------------------------------

    def _index_error(self, index: Tensor) -> BankError | None:
        rows = index.numpy()
        is_outside = (rows < 0) | (rows >= self.spec.num_rows)
        if not is_outside.any():
            return None
        return self._error(
            f"row {rows[is_outside][0]}",
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
            if part.is_floating_point() and not np.isfinite(part.numpy()).all():
                return self._error(
                    f"column {name!r} would hold a number that is not finite",
                    expected="finite numbers; nothing was written",
                    next_step="lower the learning rate; if the column is f16, keep values below 65,504",
                )
        return None

    def _feature_error(self, class_id: Tensor, features: Tensor, position: Tensor, *, width: int) -> BankError | None:
        """What is wrong with features (n, width) and positions (n,) for (n,) classes, cast already."""
        n = len(class_id)
        if tuple(features.shape) != (n, width) or tuple(position.shape) != (n,):
            return self._error(
                f"features {tuple(features.shape)} and positions {tuple(position.shape)} for {n} classes",
                expected=f"({n}, {width}) and ({n},)",
                next_step="hand in one feature and one position for each class id",
            )
        if not np.isfinite(features.numpy()).all():
            return self._error(
                "a feature that is not finite",
                expected="finite numbers; nothing was taken in",
                next_step="lower the learning rate; if the bank is f16, keep features below 65,504",
            )
        return None

    def _error(self, found: str, *, expected: str, next_step: str) -> BankError:
        return BankError(found, expected=expected, where=f"bank {self.name!r}, rank {comm.rank()}", next_step=next_step)


def _cast(part: Tensor, column: Column) -> Tensor:
    """Floating values in the column's floating type; anything else stays as it is, to be refused if it does not fit."""
    dtype = DTYPES[column.dtype]
    return part.to(dtype) if dtype.is_floating_point and part.is_floating_point() else part
