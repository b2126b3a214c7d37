"""Owns memory spread over ranks: every row has one owner, rows move by one exchange and are saved by virtual shard."""

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
    """Rows of some columns, spread over ranks: each has one owner, of which everybody reads and to which all write.

    What is read and written depends on nothing but rows and positions, so R ranks hold what one rank holds. Memory is
    taken at the first use.

    What is written waits on the rank that wrote it and goes to its owner with the next request to read, one message
    for both: every read sees every write before it. `flush` delivers it without one, and whoever saves a bank calls
    it, on all ranks alike.

    See `HeldRows` for what it is made of.
    """

    is_by_sample: ClassVar[bool] = False  # a row is a sample's, by its index in the split

    _room: comm.Room | None = None  # of the rows that are written next, if they are those read last

    def read(self, index: Tensor) -> dict[str, Tensor]:
        """Rows, wherever they are kept.

        Args:
            index: (n,) int64 in [0, num_rows), n free on each rank; a row may be asked for more than once.

        Returns:
            (n, *shape) by column, on the CPU, in the order asked for.

        Raises:
            BankError: an index outside the bank, or what `WritableBank.write` says of the rows that waited; on all
                ranks, of a replicated bank on the one that asked.

        Collective: all ranks; the indices with what was written since the last read, then the rows, one
        `comm.exchange_messages` each. Nothing moves if replicated.
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
        """As `WritableBank.write`; `error` is what else this rank found wrong."""
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
        """Deliver what waits, if anything does; afterwards every rank holds what its rows were given.

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
            owned: who owns them.
            error: what this rank found wrong with what it asks for.

        Returns:
            (n_r,) rows that each rank asks of this one.

        Collective: all ranks, one `comm.exchange_messages`, with room for as many rows as were last read.
        """
        asked, written = Section(index[owned.order], owned.spans), self._waiting(self._written)
        with self._delivery(error) as error:
            _, (wishes, parts) = exchange_records([asked, written], name=self.name, error=error)
        self._put(parts)
        return wishes

    def _fetch(self, index: Integers, error: BankError | None) -> dict[str, Tensor]:
        """Every column of rows, from the ranks that own them; see `read`.

        The rows read are taken for those that will be written next: `_room` is made for them.
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
        """Write rows that this rank holds, the last by position, then by part, where there are several."""
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
        """Floating values in the column's floating type; anything else as it is, to be refused if it does not fit."""
        dtype, _ = self._kinds.get(name, (value.dtype, ()))
        return value.to(dtype) if dtype.is_floating_point and value.is_floating_point() else value


class WritableBank(Bank):
    """A bank whose rows are replaced as they are; others take in features or maps, each by a verb of its own."""

    def write(self, index: Tensor, values: Mapping[str, Tensor], *, position: Tensor | None = None) -> None:
        """Replace rows; of several writes of one row the one with the highest position stays.

        Args:
            index: (n,) int64 in [0, num_rows), n free on each rank.
            values: (n, *shape) for every column; floating ones are cast to the column's type. They are copied.
            position: (n,) int64, the order of writes over all ranks, a sample's place in the epoch say. None where no
                row is written twice; of equal positions the later row of the higher rank stays.

        Raises:
            BankError: an index outside the bank, values that do not fit or are not finite; on all ranks, and nothing
                of this write is ever stored. On several ranks it is raised by the call that would deliver the rows,
                the next `read`, `write` or `flush`: the ranks do not meet before. On the owner alone: a row that is
                not its own.

        Collective: all ranks; nothing moves before the next `read`, or `flush`, unless rows of an earlier call still
        wait: they are delivered first.
        """
        self._replace(index, values, position)
