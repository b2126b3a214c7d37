"""Owns memory spread over ranks: each row has one owner; rows move in one exchange and are saved by virtual shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.checks import index_error, value_error
from dist_mlpl.banks.held import HeldRows, Staged
from dist_mlpl.banks.rows import ByOwner, Integers, Records, Section, by_owner, exchange_records, no_room
from dist_mlpl.errors import BankError, MlplError


class Bank(HeldRows):
    """A table of rows and columns spread over ranks: each row has one owner, which all ranks read from and write to.

    What is read and written depends only on rows and positions, so R ranks hold what one rank holds. Memory is
    allocated at the first use.

    A written row waits on the rank that wrote it and travels to its owner with the next read request, one message
    for both: every read sees every write before it. `flush` delivers waiting rows without a read; call it on all
    ranks before saving a bank.

    See `HeldRows` for the arguments.
    """

    is_by_sample: ClassVar[bool] = False  # True: row i belongs to sample i of the split

    _room: comm.Room | None = None  # message space for the next write, if it writes the rows last read

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """Read rows, whichever ranks own them.

        Args:
            index: (n,) int64 in [0, num_rows), n free on each rank; a row may be asked for more than once.

        Returns:
            (n, *shape) by column name, on the CPU, in the order of `index`.

        Raises:
            BankError: an index outside the bank, or an error of `WritableBank.write` about rows that waited; on all
                ranks, for a replicated bank only on the rank that asked.

        Collective: all ranks; two `comm.exchange_messages`: the indices with what was written since the last read,
        then the rows. Nothing moves if replicated.
        """
        asked = index.cpu().numpy()
        error = self._index_error(asked)
        if self._is_replicated or self._num_ranks == 1:
            if error is not None:
                raise error
            places = torch.from_numpy(self._places(asked))
            return {name: column.index_select(0, places) for name, column in self._memory().items()}
        return self._fetch(asked, error)

    def _replace(
        self, index: Tensor, values: Mapping[str, Tensor], position: Tensor | None, error: BankError | None = None
    ) -> None:
        """Do what `WritableBank.write` documents; `error` is a fault that this rank has found already."""
        self.flush()
        rows = index.cpu().numpy()
        cast = {name: self._cast(name, value.detach().cpu()) for name, value in values.items()}
        error = error or self._index_error(rows)
        error = error or value_error(cast, self._kinds, num_rows=len(rows), where=self._where)
        is_here = self._is_replicated or self._num_ranks == 1
        if error is not None and is_here:
            raise error
        if error is not None:  # travels with the next message, so that all ranks stop together
            rows, cast, position = rows[:0], {}, None
        owned = by_owner(np.zeros_like(rows) if is_here else self._owners(rows), self._num_ranks)
        records, places = np.empty(len(rows), dtype=self._written), owned.places()
        records["index"][places] = rows
        records["position"][places] = 0 if position is None else position.cpu().numpy()
        for name, value in cast.items():
            records["values"][name][places] = value.numpy()
        if is_here:
            self._put([records])
        else:
            self._staged, self._room = Staged(records, owned, self._room or no_room(self._num_ranks), error), None

    def flush(self) -> None:
        """Deliver waiting rows, if there are any; afterwards every owner holds all that was written to its rows.

        Raises:
            BankError: see `WritableBank.write`; on all ranks.

        Collective: all ranks; one `comm.exchange_messages`, or nothing where nothing waits.
        """
        if self._staged is not None:
            nothing = np.empty(0, dtype=np.int64)
            self._deliver(nothing, by_owner(nothing, self._num_ranks), None)

    # Moving rows between ranks ---------------------------------------------------------------------------------------

    def _deliver(self, index: Integers, owned: ByOwner, error: MlplError | None) -> list[Integers]:
        """Hand staged rows to their owners, and ask owners for rows.

        Args:
            index: (n,) rows asked for.
            owned: the owners of these rows.
            error: what this rank found wrong with its request; raised on all ranks.

        Returns:
            R arrays (n_r,), the rows that each rank asks of this one.

        Collective: all ranks, one `comm.exchange_messages`; staged rows have room for as many as were last read.
        """
        asked, written = Section(index[owned.order], owned.spans), self._waiting(self._written)
        with self._delivery(error) as error:
            _, (wishes, parts) = exchange_records([asked, written], name=self.name, error=error)
        self._put(parts)
        return wishes

    def _fetch(self, index: Integers, error: BankError | None) -> dict[str, Tensor]:
        """Fetch every column of the rows (n,) from the ranks that own them; see `read`.

        The next write is expected to be of the same rows: `_room` is set for them.
        """
        owned = by_owner(self._owners(index if error is None else index[:0]), self._num_ranks)
        wishes = self._deliver(index, owned, error)
        numbers = [len(wish) for wish in wishes]
        records, fault = np.empty(sum(numbers), dtype=self._stored), None
        try:
            places = self._places(np.concatenate(wishes))
            for name, held in self._columns_here().items():
                records[name] = held[places]
        except BankError as found:
            fault = found  # travels with the rows, so that all ranks stop together
        room = comm.Room(numbers, owned.counts)
        spans = ByOwner(owned.order, numbers).spans
        _, (answers,) = exchange_records([Section(records, spans, room)], name=self.name, error=fault)
        self._room = comm.Room(owned.counts, numbers)
        read = {name: torch.empty(len(index), *shape, dtype=dtype) for name, (dtype, shape) in self._kinds.items()}
        for (first, stop), answer in zip(owned.spans, answers, strict=True):
            for name, column in read.items():
                column.numpy()[owned.order[first:stop]] = answer[name]
        return read

    def _put(self, parts: Sequence[Records]) -> None:
        """Store rows that this rank holds; of several writes of a row the last by position, then by part, stays."""
        index = np.concatenate([part["index"] for part in parts])
        if not len(index):
            return
        order = np.lexsort((np.concatenate([part["position"] for part in parts]), index))  # by row first; stable
        row = index[order]
        is_kept = np.ones(len(index), dtype=np.bool_)
        is_kept[order[:-1]] = row[1:] != row[:-1]
        places, start = self._places(index), 0
        for part in parts:
            own = slice(start, start + len(part))
            kept = slice(None) if is_kept[own].all() else is_kept[own]
            for name, column in self._columns_here().items():
                column[places[own][kept]] = part["values"][name][kept]
            start = own.stop
        self._mark(index)

    def _index_error(self, index: Integers) -> BankError | None:
        return index_error(index, num_rows=self.spec.num_rows, where=self._where)

    def _cast(self, name: str, value: Tensor) -> Tensor:
        """Cast floating values to the column's floating type; leave others as they are, for `value_error` to check."""
        dtype, _ = self._kinds.get(name, (value.dtype, ()))
        return value.to(dtype) if dtype.is_floating_point and value.is_floating_point() else value


class WritableBank(Bank):
    """A bank whose rows `write` replaces whole; the other banks have methods of their own to take in features."""

    def write(self, index: Tensor, values: Mapping[str, Tensor], *, position: Tensor | None = None) -> None:
        """Replace rows; of several writes of one row the one with the highest position stays.

        Args:
            index: (n,) int64 in [0, num_rows), n free on each rank.
            values: (n, *shape) for every column; floating ones are cast to the column's type. They are copied.
            position: (n,) int64, the order of writes over all ranks, for example a sample's place in the epoch; at
                equal positions the later row of the highest rank stays. None: no row is written twice.

        Raises:
            BankError: an index outside the bank, values of the wrong shape or type, or not finite; on all ranks, and
                nothing of this write is ever stored. With several ranks it is raised by the call that would deliver
                the rows, the next `read`, `write` or `flush`: the ranks do not meet before. On the owner alone: a row
                that is not its own.

        Collective: all ranks; nothing moves before the next `read` or `flush`, unless rows of an earlier call still
        wait: they are delivered first.
        """
        self._replace(index, values, position)
