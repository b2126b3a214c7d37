"""Owns the end of a relabelling round: it turns the parts of all shards into overlays, then commits the round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dist_mlpl import comm, storage
from dist_mlpl.curriculum import caps
from dist_mlpl.curriculum.parts import Part, decode_part
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.select import (
    NUM_KEYS,
    NUM_SIGNED_BINS,
    Candidates,
    ClassCuts,
    Cut,
    above_class_cuts,
    above_cut,
    agreed,
    class_cuts,
    fraction_cut,
    keys_of,
    value_of,
)
from dist_mlpl.data.overlays import (
    KEPT,
    PREDICTED,
    Overlay,
    OverlayFile,
    RoundCommit,
    RoundPlan,
    codes_of,
    document_bytes,
    encode_overlay,
    overlay_name,
    read_overlay,
    read_plan,
    read_round,
    round_chain,
    round_url,
)
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import EVALUATION_BLOCK
from dist_mlpl.errors import CheckpointError, OvertakenError, ShardError
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN

T = TypeVar("T")
Array = TypeVar("Array", bound=np.ndarray)


def deal(things: Sequence[T], sizes: Sequence[int], *, world_size: int) -> list[list[T]]:
    """Cut a list into one consecutive run per rank, with nearly equal numbers of samples.

    Args:
        things: what to deal, in order.
        sizes: number of samples in each thing.
        world_size: R.

    Returns:
        R lists, some possibly empty.
    """
    weights = np.array(sizes, dtype=np.int64)
    middles = np.cumsum(weights) - weights / 2
    ranks = (middles * world_size // max(1, weights.sum())).astype(int)
    return [[thing for thing, owner in zip(things, ranks, strict=True) if owner == rank] for rank in range(world_size)]


def own_shards(index: SplitIndex) -> list[int]:
    """This rank's share of a split's shards."""
    return deal(range(len(index.shards)), index.shard_sizes, world_size=comm.world_size())[comm.rank()]


class Piece(NamedTuple):
    """Rows [first, stop) of a shard, which one rank scores and writes as one file."""

    shard: int
    first: int  # row of the shard
    stop: int

    @property
    def num_samples(self) -> int:
        """Number of rows."""
        return self.stop - self.first


def pieces_of(index: SplitIndex) -> list[Piece]:
    """Cut a split into about a thousand pieces of whole blocks, independently of the number of ranks."""
    length = piece_samples(index.num_samples)
    return [
        Piece(shard, first, min(first + length, size))
        for shard, size in enumerate(index.shard_sizes)
        for first in range(0, size, length)
    ]


def piece_samples(num_samples: int) -> int:
    """Most samples in a piece of a split of N: few enough to share the work, many enough to make few files."""
    blocks = -(-num_samples // (1024 * EVALUATION_BLOCK))
    return EVALUATION_BLOCK * min(128, max(8, blocks))


def part_url(run: str, number: int, origin: str, piece: Piece) -> str:
    """URL at which the scores of a piece are kept until the round's end.

    Args:
        run: URL of the run folder, RUN.
        number: number of the round.
        origin: hexadecimal digest of its plan.
        piece: the piece.
    """
    return round_url(run, number, "parts", origin[:16], f"{piece.shard:06d}-{piece.first:06d}.safetensors")


class _Found(NamedTuple):
    """Totals over the parts of all shards, the same on every rank."""

    num_known: npt.NDArray[np.int64]  # (C, 2) known labels that are absent, present
    num_samples: int
    num_undecodable: int
    cut: Cut | None
    num_at_cut: npt.NDArray[np.int64]  # (shards,) candidates at the cut's magnitude
    class_cuts: ClassCuts | None

    @property
    def num_unknown(self) -> npt.NDArray[np.int64]:
        """(C,) int64, number of unknown labels per class."""
        return self.num_samples - self.num_known.sum(axis=1)

    @property
    def decided(self) -> dict[str, float]:
        """Numbers computed from the data, for the commit: a threshold, or how many classes have one."""
        if self.cut is not None:
            return {"threshold": value_of(min(self.cut.key, NUM_KEYS - 1))}
        if self.class_cuts is not None:
            has_present = self.class_cuts.present < NUM_SIGNED_BINS
            has_absent = self.class_cuts.absent > 0
            return {
                "classes_with_present_threshold": float(has_present.sum()),
                "classes_with_absent_threshold": float(has_absent.sum()),
            }
        return {}


class _Shard(NamedTuple):
    """The decisions about one shard, before caps on classes."""

    proposed: Candidates  # proposed by this round, in order, without places of kept beliefs
    accepted: npt.NDArray[np.bool_]  # (k,) which of the proposed are believed
    kept: Overlay  # beliefs of the previous round that stay


class RoundCommitter:
    """Turns the parts of a round into its files and its commit; the ranks share the shards.

    Args:
        run: URL of the run folder, RUN.
        plan: the round's plan.
        origin: hexadecimal digest of the plan, which its parts carry.
        settings: the curriculum's settings.
        index: the split.
    """

    def __init__(
        self, run: str, plan: RoundPlan, *, origin: str, settings: CurriculumSettings, index: SplitIndex
    ) -> None:
        self._run, self._plan, self._origin, self._settings, self._index = run, plan, origin, settings, index
        self._num_classes = index.manifest.num_classes
        self._pieces: dict[int, list[Piece]] = {}
        for piece in pieces_of(index):
            self._pieces.setdefault(piece.shard, []).append(piece)
        self._own = own_shards(index)
        wanted = max(settings.agree_rounds - 1, int(settings.cumulative))
        self._earlier = round_chain(run, plan.parent)[:wanted] if wanted else []

    def commit(self) -> RoundCommit:
        """Decide which labels are believed, write the overlays, and commit the round.

        Raises:
            ConfigError: the strategy cannot work on these labels.
            CheckpointError: a part or an earlier round is damaged, or an overlay with other beliefs exists.
            ShardError: a part does not cover its piece.
            OvertakenError: the round was dropped, or committed differently, meanwhile.

        Collective: all ranks; a few sums, at most 76 MB each with caps and 9,605 classes, then one gather of file names
        and counts.
        """
        found = self._find()
        least = self._caps(found) if self._settings.has_class_caps else None
        with comm.shared_errors():
            written = [self._write(shard, state, least) for shard, state in self._shards(found)]
        gathered = [one for part in comm.gather_objects(written) for one in part]
        return comm.on_first_rank(lambda: self._publish(found, gathered))

    # What all shards say together

    def _find(self) -> _Found:
        strategy, num_classes = self._settings.strategy, self._num_classes
        sizes = {"score_fraction": NUM_KEYS, "class_precision": num_classes * 2 * NUM_SIGNED_BINS}
        kind: type[np.integer] = np.int32 if strategy == "class_precision" else np.int64
        totals: npt.NDArray[Any] = np.zeros(sizes.get(strategy, 0), dtype=kind)
        num_known = np.zeros((num_classes, 2), dtype=np.int64)
        numbers = np.zeros(2, dtype=np.int64)
        with comm.shared_errors():
            for _, part in self._parts():
                part.add_counts(totals)
                num_known += part.num_known
                numbers += (part.num_samples, part.num_undecodable)
        totals, num_known, numbers = _sum(totals), _sum(num_known), _sum(numbers)
        cut = cuts = None
        num_at_cut = np.zeros(len(self._index.shards), dtype=np.int64)
        if strategy == "score_fraction":
            cut = fraction_cut(totals, self._settings.fraction)
            with comm.shared_errors():
                for shard, part in self._parts():
                    num_at_cut[shard] = np.count_nonzero(keys_of(part.candidates.scores) == cut.key)
            num_at_cut = _sum(num_at_cut)
        elif strategy == "class_precision":
            counts = totals.reshape(num_classes, 2, NUM_SIGNED_BINS)
            cuts = class_cuts(counts, precision=self._settings.precision, min_known=self._settings.min_known)
        return _Found(num_known, int(numbers[0]), int(numbers[1]), cut, num_at_cut, cuts)

    def _caps(self, found: _Found) -> npt.NDArray[np.int64]:
        """The least strength at which a belief of each class and sign stays, (C, 2)."""
        coarse = np.zeros((self._num_classes, 2, caps.NUM_BINS), dtype=np.int32)
        num_kept = np.zeros((self._num_classes, 2), dtype=np.int64)
        with comm.shared_errors():
            for _, state in self._shards(found):
                coarse += caps.coarse_counts(state.proposed.where(state.accepted), self._num_classes)
                for column, value in enumerate((ABSENT, PRESENT)):
                    classes = state.kept.classes[state.kept.values == value]
                    num_kept[:, column] += np.bincount(classes, minlength=self._num_classes)
        coarse = _sum(coarse)
        limits = caps.class_limits(
            self._settings, num_known=found.num_known, num_unknown=found.num_unknown, num_kept=_sum(num_kept)
        )
        crossing = caps.crossing_bins(coarse, limits)
        fine = np.zeros((self._num_classes, 2, caps.FINE), dtype=np.int32)
        with comm.shared_errors():
            for _, state in self._shards(found):
                fine += caps.fine_counts(state.proposed.where(state.accepted), crossing)
        return caps.least_strengths(coarse, _sum(fine), crossing, limits)

    # One shard

    def _parts(self) -> Iterator[tuple[int, Part]]:
        for shard in self._own:
            yield shard, Part.join([self._part(piece) for piece in self._pieces[shard]])

    def _part(self, piece: Piece) -> Part:
        url = part_url(self._run, self._plan.round, self._origin, piece)
        try:
            content = storage.read_bytes(url)
        except FileNotFoundError:
            raise dropped(self._run, self._plan.round) from None
        part = decode_part(content, origin=self._origin, where=url)
        if part.num_samples + part.num_undecodable != piece.num_samples:
            raise ShardError(
                f"scores of {part.num_samples + part.num_undecodable} images",
                expected=f"{piece.num_samples}, all of this part of the shard",
                where=storage.shown(url),
                next_step="drop the unfinished round with `dist-mlpl labels rollback RUN`, and make it again",
            )
        return part

    def _shards(self, found: _Found) -> Iterator[tuple[int, _Shard]]:
        for shard, part in self._parts():
            yield shard, self._shard(shard, part, found)

    def _shard(self, shard: int, part: Part, found: _Found) -> _Shard:
        proposed = part.candidates
        if found.cut is not None:
            proposed = proposed.where(above_cut(proposed, found.cut, int(found.num_at_cut[:shard].sum())))
        elif found.class_cuts is not None:
            proposed = proposed.where(above_class_cuts(proposed, found.class_cuts))
        before = [self._overlay(commit, shard) for commit in self._earlier]
        kept = Overlay.empty(has_soft=True)
        if self._settings.cumulative and before:
            kept = _kept(before[0])
            codes = codes_of(proposed.rows, proposed.classes)
            proposed = proposed.where(~np.isin(codes, kept.codes, assume_unique=True))
        num_earlier = self._settings.agree_rounds - 1
        if len(before) < num_earlier:
            return _Shard(proposed, np.zeros(len(proposed.rows), dtype=bool), kept)
        earlier = [(overlay.codes, overlay.signs) for overlay in before[:num_earlier]]
        codes = codes_of(proposed.rows, proposed.classes)
        return _Shard(proposed, agreed(codes, proposed.signs, earlier), kept)

    def _overlay(self, commit: RoundCommit, shard: int) -> Overlay:
        num_samples = self._index.shards[shard].num_samples
        return read_overlay(self._run, commit, shard, num_samples=num_samples, num_classes=self._num_classes)

    def _write(
        self, shard: int, state: _Shard, least: npt.NDArray[np.int64] | None
    ) -> tuple[int, OverlayFile, dict[str, int]]:
        """Write the overlay of a shard, unless an earlier attempt has written the same."""
        accepted = state.accepted if least is None else state.accepted & caps.within_caps(state.proposed, least)
        overlay = self._overlay_of(state, accepted)
        content = encode_overlay(overlay)
        name = overlay_name(self._plan.split, shard)
        url = round_url(self._run, self._plan.round, name)
        if not storage.create_exclusive(url, content) and storage.read_bytes(url) != content:
            raise CheckpointError(
                "an overlay of this round with other beliefs",
                expected="what the same parts gave before",
                where=storage.shown(url),
                next_step="drop the round, another version made it: `dist-mlpl labels rollback RUN`; then start again",
            )
        counts = {value: int(np.count_nonzero(overlay.values == value)) for value in (PRESENT, ABSENT, UNKNOWN)}
        file = OverlayFile(
            path=f"{self._plan.round:06d}/{name}",
            num_bytes=len(content),
            sha256=storage.sha256_of_bytes(content),
            num_present=counts[PRESENT],
            num_absent=counts[ABSENT],
            num_proposed=counts[UNKNOWN],
        )
        about = {
            "num_kept": len(state.kept.rows),
            "num_capped": int(np.count_nonzero(state.accepted) - np.count_nonzero(accepted)),
        }
        return shard, file, about

    def _overlay_of(self, state: _Shard, accepted: npt.NDArray[np.bool_]) -> Overlay:
        """Kept beliefs, new beliefs and, where rounds must agree, mere proposals; in row-major order."""
        proposed, kept = state.proposed, state.kept
        values = np.where(accepted, proposed.signs, np.int8(UNKNOWN))
        sources = np.full(len(values), PREDICTED, dtype=np.uint8)
        new = Overlay(
            proposed.rows, proposed.classes, values, proposed.scores, sources, _probabilities(proposed.scores)
        )
        if self._settings.agree_rounds == 1:
            new = new.believed
        columns: Any = zip(kept, new, strict=True)
        joined = Overlay._make(np.concatenate(column) for column in columns)
        ordered = joined.where(np.argsort(joined.codes, kind="stable"))
        return ordered if self._settings.keep_soft else ordered._replace(soft=None)

    # The commit

    def _publish(self, found: _Found, written: list[tuple[int, OverlayFile, dict[str, int]]]) -> RoundCommit:
        """Create the round's commit. Rank 0 only."""
        files = [file for _, file, _ in sorted(written, key=lambda one: one[0])]
        counts = {
            "num_samples": found.num_samples,
            "num_undecodable": found.num_undecodable,
            "num_known_present": int(found.num_known[:, 1].sum()),
            "num_known_absent": int(found.num_known[:, 0].sum()),
            "num_unknown": int(found.num_unknown.sum()),
            **{name: sum(getattr(f, name) for f in files) for name in ("num_present", "num_absent", "num_proposed")},
            **{name: sum(about[name] for _, _, about in written) for name in ("num_kept", "num_capped")},
        }
        document = RoundCommit(
            **self._plan.model_dump(),
            counts=counts,
            decided=found.decided,
            has_soft=self._settings.keep_soft,
            files=tuple(files),
        )
        number = self._plan.round
        if read_plan(self._run, number) != self._plan:
            raise dropped(self._run, self._plan.round)
        url = round_url(self._run, number, "commit.json")
        content = document_bytes(document)
        if not storage.create_exclusive(url, content) and storage.read_bytes(url) != content:
            raise dropped(self._run, self._plan.round)
        storage.remove_folder(round_url(self._run, number, "parts"))
        return read_round(self._run, number)


def dropped(run: str, number: int) -> OvertakenError:
    """The error for a round whose files disappear or change while it is being made; the caller raises it."""
    return OvertakenError(
        f"round {number} is no longer the one that was being made",
        expected="its plan and its parts, until it is committed",
        where=storage.shown(round_url(run, number)),
        next_step="another job committed or dropped it: see `dist-mlpl labels log RUN`, then start again",
    )


def _kept(overlay: Overlay) -> Overlay:
    """The beliefs of a round that stay in the next one, marked as kept."""
    believed = overlay.believed
    soft = _probabilities(believed.scores) if believed.soft is None else believed.soft
    return believed._replace(sources=np.full(len(believed.rows), KEPT, dtype=np.uint8), soft=soft)


def _probabilities(scores: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    return torch.sigmoid(torch.from_numpy(scores.astype(np.float64))).numpy().astype(np.float16)


def _sum(counts: Array) -> Array:
    """Sum an array over ranks, in place."""
    comm.reduce_sum(torch.from_numpy(counts))
    return counts
