"""Owns the files that a scoring pass writes: their URLs, which are missing, and how scored blocks become files."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from dist_mlpl import storage
from dist_mlpl.banks.neighbours import unit_vectors
from dist_mlpl.batch import Batch
from dist_mlpl.curriculum.parts import PartMaker, encode_part
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.select import check_scores, rounded
from dist_mlpl.curriculum.votes import EmbeddedMaker, encode_embedded
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import RunError
from dist_mlpl.rounds.commit import Piece, part_url, pieces_of


class Place(NamedTuple):
    """Where the files of a round's scoring pass lie."""

    run: str
    number: int  # number of the round
    origin: str  # hexadecimal digest of its plan

    def part(self, piece: Piece) -> str:
        """URL of a piece's part."""
        return part_url(self.run, self.number, self.origin, piece)

    def embedded(self, piece: Piece) -> str:
        """URL of a piece's embeddings."""
        return self.part(piece).removesuffix(".safetensors") + ".embedded.safetensors"


def missing(index: SplitIndex, url_of: Callable[[Piece], str]) -> list[Piece]:
    """Pieces of a split that have no file yet.

    Args:
        index: the split.
        url_of: URL of a piece's file; all lie in one folder.
    """
    urls = {piece: url_of(piece) for piece in pieces_of(index)}
    folders = {url.rpartition("/")[0] for url in urls.values()}  # one, or none for an empty split
    done = {name for folder in folders for name in storage.list_names(folder)}
    return [piece for piece, url in urls.items() if storage.name(url) not in done]


class Scores(NamedTuple):
    """The models' scores of a block."""

    mean: Tensor  # (B, C) logits, or (B, D) embeddings under neighbours
    variance: Tensor | None  # (B, C) variance over passes with dropout; None under other strategies


class Writer(Protocol):
    """Collects scored blocks and writes a file when its piece is complete. Used by one thread.

    If a block is refused, its piece gets no file, and blocks of it that follow are ignored.
    """

    def add(self, batch: Batch, scores: Scores, piece: Piece, row: int) -> None:
        """Add the next block of a piece.

        Args:
            batch: the block.
            scores: its scores.
            piece: the piece it belongs to.
            row: row of the piece's shard at which the block begins.

        Raises:
            RunError: a score is not finite.
        """


class PartWriter:
    """Writes scores as parts.

    Args:
        place: where the files go.
        settings: the curriculum's settings.
        index: the split.
    """

    def __init__(self, place: Place, settings: CurriculumSettings, index: SplitIndex) -> None:
        self._place, self._settings, self._index = place, settings, index
        self._maker: PartMaker | None = None

    def add(self, batch: Batch, scores: Scores, piece: Piece, row: int) -> None:
        """See `Writer`."""
        valid, targets = batch.valid.cpu(), batch.targets.cpu().numpy()
        mean = scores.mean.cpu()
        variance = None if scores.variance is None else scores.variance.cpu()
        bad = check_scores(mean if variance is None else mean + variance, valid)
        if bad is not None:
            self._maker = None
            what = f"{float(mean[bad])} for class {self._index.manifest.class_ids[bad[1]]!r}"
            raise _not_finite(what, self._index, piece, row + bad[0])
        if row == piece.first:
            self._maker = PartMaker(self._settings, self._index.manifest.num_classes, first_row=row)
        if self._maker is None:
            return
        variances = None if variance is None else rounded(variance)
        self._maker.add(rounded(mean), variances, targets, valid.numpy(), batch.num_images)
        if row + batch.num_images == piece.stop:
            content = encode_part(self._maker.part(), origin=self._place.origin)
            # Another process with the same plan may have been faster; its part is equal.
            storage.create_exclusive(self._place.part(piece), content)


class EmbeddingWriter:
    """Writes embeddings as float16 unit vectors, with the known labels of their images.

    Args:
        place: where the files go.
        index: the split.
    """

    def __init__(self, place: Place, index: SplitIndex) -> None:
        self._place, self._index = place, index
        self._maker: EmbeddedMaker | None = None

    def add(self, batch: Batch, scores: Scores, piece: Piece, row: int) -> None:
        """See `Writer`."""
        valid, embeddings = batch.valid.cpu(), scores.mean.cpu()
        bad = check_scores(embeddings, valid)
        if bad is not None:
            self._maker = None
            what = f"{float(embeddings[bad])} in an embedding"
            raise _not_finite(what, self._index, piece, row + bad[0])
        if row == piece.first:
            self._maker = EmbeddedMaker(first_row=row)
        if self._maker is None:
            return
        halves = unit_vectors(embeddings).half().numpy()
        self._maker.add(halves, batch.targets.cpu().numpy(), valid.numpy(), batch.num_images)
        if row + batch.num_images == piece.stop:
            content = encode_embedded(self._maker.embedded(), origin=self._place.origin)
            storage.create_exclusive(self._place.embedded(piece), content)  # unless another process was faster


def _not_finite(what: str, index: SplitIndex, piece: Piece, row: int) -> RunError:
    sample = int(index.starts[piece.shard]) + row
    return RunError(
        f"the model answers {what}",
        expected="finite numbers",
        where=f"sample {sample}, {index.name(sample)}",
        next_step="the model has diverged, or half precision overflows: go back to an earlier commit, or set "
        "engine.precision to fp32",
    )
