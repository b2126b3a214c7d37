"""Owns the votes of a round under `neighbours`: it turns all images' embeddings into parts, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl import comm, storage
from dist_mlpl.banks.neighbours import NOBODY, Neighbours
from dist_mlpl.banks.rows import as_bytes, from_bytes, kind_of
from dist_mlpl.curriculum.parts import Part, PartMaker, encode_part
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.select import rounded
from dist_mlpl.curriculum.votes import Embedded, Known, Voters, decode_embedded, join_known
from dist_mlpl.data.label_store import Labels
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import MlplError
from dist_mlpl.rounds.commit import Piece, deal, dropped, pieces_of
from dist_mlpl.rounds.parts import Place, missing

_DENSE_ENTRIES = 4_000_000  # dense scores in memory at once


def vote(
    place: Place,
    settings: CurriculumSettings,
    labels: Labels,
    index: SplitIndex,
    *,
    device: torch.device,
    is_asked: Callable[[], bool],
) -> bool:
    """Make the missing parts of a round from the embeddings of all its pieces.

    Args:
        place: where the round's files lie.
        settings: the curriculum's settings.
        labels: labels of the train split as the run sees them, without beliefs.
        index: the split.
        device: where embeddings are multiplied.
        is_asked: whether this rank was asked to stop.

    Returns:
        False when a rank was asked to stop; parts written by then are kept.

    Raises:
        MlplError: embeddings are missing or damaged, or a part cannot be written; on all ranks.

    Collective: all ranks.
    """
    todo = comm.on_first_rank(lambda: missing(index, place.part))
    if not todo:
        return True
    election = Election(place, settings, labels, index, device=device)
    dealt = deal(todo, [piece.num_samples for piece in todo], world_size=comm.world_size())
    own, num_turns = dealt[comm.rank()], max(map(len, dealt))
    failure: MlplError | None = None
    turn = 0
    while True:
        if comm.is_stop_asked(is_asked(), failure) or turn == num_turns:
            return turn == num_turns
        piece = own[turn] if turn < len(own) else None
        ballot = election.ballot(piece)
        try:
            if piece is not None:
                election.write(piece, ballot)
        except MlplError as error:
            failure = error
        turn += 1


class Ballot(NamedTuple):
    """The voters of n consecutive images."""

    indices: npt.NDArray[np.int64]  # (n,) sample indices
    valid: npt.NDArray[np.bool_]  # (n,) False for images that could not be decoded
    voters: npt.NDArray[np.int64]  # (n, k) sample indices, nearest first; NOBODY where there are fewer than k


class Election:
    """Embeddings and known labels of all images, from the files of the scoring pass.

    The embeddings are spread over the ranks; every rank holds all known labels. Memory per rank: its share of N D
    float16, the same in float32 on the device, and 11 bytes for every known label of the split.

    Args:
        place, settings, labels, index, device: see `vote`.

    Raises:
        MlplError: a file is missing or damaged; on all ranks.

    Collective: all ranks; every embedding is sent once, known labels go to all.
    """

    def __init__(
        self,
        place: Place,
        settings: CurriculumSettings,
        labels: Labels,
        index: SplitIndex,
        *,
        device: torch.device,
    ) -> None:
        self._place, self._settings, self._labels, self._index = place, settings, labels, index
        self._device = device
        pieces = pieces_of(index)
        width = comm.on_first_rank(lambda: self._read(pieces[0]).embeddings.shape[1])
        self._bank = Neighbours("embeddings", index.num_samples, width, dtype="f16")
        self._voters = self._gather(pieces, width)

    def ballot(self, piece: Piece | None) -> Ballot:
        """Find the voters of a piece.

        Args:
            piece: None on a rank that has no piece left while others have; its ballot is empty.

        Collective: all ranks, see `Bank.read` and `Neighbours.search`.
        """
        start = 0 if piece is None else int(self._index.starts[piece.shard])
        first, stop = (0, 0) if piece is None else (start + piece.first, start + piece.stop)
        indices = torch.arange(first, stop)
        read = self._bank.read(indices)
        valid = read["stamps"] >= 0
        k = self._settings.num_neighbours
        _, found = self._bank.search(read["rows"][valid], k + 1, device=self._device)
        voters = torch.full((len(indices), k), NOBODY)
        voters[valid] = others(found, indices[valid])
        return Ballot(indices.numpy(), valid.numpy(), voters.numpy())

    def write(self, piece: Piece, ballot: Ballot) -> None:
        """Count the votes on a piece and write its part.

        Raises:
            StorageError: the part cannot be written.
        """
        content = encode_part(self._part(piece, ballot), origin=self._place.origin)
        # Another process with the same plan may have been faster; its part is equal.
        storage.create_exclusive(self._place.part(piece), content)

    def _part(self, piece: Piece, ballot: Ballot) -> Part:
        num_classes = self._index.manifest.num_classes
        maker = PartMaker(self._settings, num_classes, first_row=piece.first)
        step = max(1, _DENSE_ENTRIES // num_classes)
        for first in range(0, piece.num_samples, step):
            rows = slice(first, first + step)
            indices, valid = ballot.indices[rows], ballot.valid[rows]
            scores = rounded(torch.from_numpy(self._voters.scores(ballot.voters[rows])))
            maker.add(scores, None, self._labels.targets(indices), valid, len(indices))
        return maker.part()

    def _gather(self, pieces: list[Piece], width: int) -> Voters:
        """Fill the bank from this rank's share of the files, and gather their known labels on all ranks."""
        dealt = deal(pieces, [piece.num_samples for piece in pieces], world_size=comm.world_size())
        own, known = dealt[comm.rank()], []
        failure: MlplError | None = None
        for turn in range(max(map(len, dealt))):
            rows, embeddings = torch.empty(0, dtype=torch.int64), torch.empty(0, width, dtype=torch.float16)
            try:
                if turn < len(own) and failure is None:
                    embedded, start = self._read(own[turn]), int(self._index.starts[own[turn].shard])
                    rows = torch.from_numpy(embedded.rows + start)
                    embeddings = torch.from_numpy(embedded.embeddings)
                    known.append(embedded.known._replace(rows=embedded.known.rows + start))
            except MlplError as error:
                failure = error
            self._bank.write(rows, {"rows": embeddings, "stamps": torch.ones(len(rows), dtype=torch.int32)})
        for fault in comm.gather_objects(failure):
            if fault is not None:
                raise fault
        num_samples, num_classes = self._index.num_samples, self._index.manifest.num_classes
        return Voters(_gathered(join_known(known)), num_samples=num_samples, num_classes=num_classes)

    def _read(self, piece: Piece) -> Embedded:
        url = self._place.embedded(piece)
        try:
            content = storage.read_bytes(url)
        except FileNotFoundError:
            raise dropped(self._place.run, self._place.number) from None
        return decode_embedded(content, origin=self._place.origin, where=url)


def others(found: Tensor, own: Tensor) -> Tensor:
    """Remove each query image from its own nearest images.

    Args:
        found: (q, k + 1) int64 sample indices, nearest first.
        own: (q,) int64, the queries' own indices. A query may be missing from its row when more than k images are
            equal to it; then the last one is removed.

    Returns:
        (q, k) int64.
    """
    is_own = found == own[:, None]
    is_own[:, -1] |= ~is_own.any(dim=1)
    return found[~is_own].view(len(found), found.shape[1] - 1)


def _gathered(known: Known) -> Known:
    """Gather the known labels of all ranks on every rank."""
    rows = [
        torch.from_numpy(known.rows),
        torch.from_numpy(known.classes.astype(np.int32)),
        torch.from_numpy(known.values),
    ]
    gathered = from_bytes(comm.gather_rows(as_bytes(rows)), [kind_of(row) for row in rows])
    index, classes, values = (column.numpy() for column in gathered)
    return Known(index, classes.astype(np.uint16), values)
