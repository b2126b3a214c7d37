"""Owns one relabelling round: every image of the train split is scored as in evaluation, then some answers believed.

A round is a pure function of its plan. The scoring pass writes a part for each finished piece of a shard, created
exclusively, so a killed round resumes where it stood, on any number of ranks, and ends in the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext

import torch

from dist_mlpl import comm, keyed, storage
from dist_mlpl.batch import Batch
from dist_mlpl.chain import Commit
from dist_mlpl.curriculum.schedule import CurriculumSettings, check_bounded
from dist_mlpl.curriculum.uncertainty import Moments, check_dropout, computed_once, dropping
from dist_mlpl.data.label_store import Labels, check_belongs
from dist_mlpl.data.order import PADDING
from dist_mlpl.data.overlays import (
    RoundCommit,
    RoundModel,
    RoundPlan,
    document_bytes,
    newest_round,
    read_plan,
    read_round,
    round_url,
)
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import EVALUATION_BLOCK, Stream, num_span_blocks
from dist_mlpl.data.tar_stream import AnyStream
from dist_mlpl.engine import Engine
from dist_mlpl.errors import CheckpointError, ConfigError, MlplError, OvertakenError, StorageError
from dist_mlpl.methods.base import Method
from dist_mlpl.rounds.commit import Piece, RoundCommitter, deal, dropped
from dist_mlpl.rounds.models import Model, find_members, is_made, load_models, model_record
from dist_mlpl.rounds.neighbours import vote
from dist_mlpl.rounds.parts import EmbeddingWriter, PartWriter, Place, Scores, Writer, missing

_LOOK_BLOCKS = 16  # blocks (512 images) between checks whether a rank failed or was asked to stop
_BLOCKS_IN_WORK = 4  # scored blocks that may wait to be put into a part while the next ones are computed


def relabel(
    run: str,
    head: Commit,
    settings: CurriculumSettings,
    engine: Engine,
    labels: Labels,
    *,
    open_stream: Callable[[], AnyStream],
    build: Callable[[], Method],
    seed: int,
    scored_with: str,
    is_asked: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> RoundCommit | None:
    """Make or resume the next round of a run; if the newest round was made from the same inputs, return that.

    Args:
        run: URL of the run folder, RUN.
        head: the commit whose model the engine holds.
        settings: the curriculum's settings.
        engine: holds the present model, at any ZeRO stage.
        labels: labels of the train split as the run sees them, without beliefs.
        open_stream: opens a stream over the train split with the evaluation transform; it is closed here.
        build: makes a new method like the engine's, for the other models of an ensemble.
        seed: the run's seed.
        scored_with: `Config.scoring_digest`.
        is_asked, tell: see `make_round`.

    Returns:
        The committed round; None when a rank was asked to stop before its end.

    Raises:
        MlplError: see `find_members`, `load_models`, `plan_round` and `make_round`.

    Collective: all ranks.
    """
    members = find_members(run, head, settings)
    records = [model_record(commit) for _, commit in members]
    if number := comm.on_first_rank(lambda: is_made(run, settings, records, scored_with=scored_with)):
        return comm.on_first_rank(lambda: read_round(run, number))
    engine.average_buffers()
    models = load_models(members, settings, engine, build)
    is_whole = engine.settings.kind == "plain" or engine.settings.zero_stage < 3
    scorer = Scorer(settings, models, engine.method, seed=seed, keeps_trunk=is_whole)
    plan = plan_round(run, labels, settings, records, seed=seed, scored_with=scored_with)
    with closing(open_stream()) as stream:
        assert isinstance(stream, Stream)  # since the split has an index
        return make_round(run, plan, labels, settings, scorer, stream, is_asked=is_asked, tell=tell)


class Scorer:
    """Scores blocks with one or several models, averaged over all passes.

    Args:
        settings: the curriculum's settings, which decide the passes.
        models: the present one first.
        method: the present model; its dropout is sampled under `uncertainty`.
        seed: the run's seed; dropout is keyed by (seed, round, block, side, pass).
        keeps_trunk: compute a trunk without dropout once per block and side, whatever the number of passes. False
            where the layers inside must be called every time (ZeRO stage 3).

    Raises:
        ConfigError: the strategy is `uncertainty` and the model has no dropout.
    """

    def __init__(
        self,
        settings: CurriculumSettings,
        models: Sequence[Model],
        method: Method,
        *,
        seed: int,
        keeps_trunk: bool = True,
    ) -> None:
        self._settings, self._method, self._seed, self._keeps_trunk = settings, method, seed, keeps_trunk
        self._predicts = [model.predict for model in models]
        self._samples_dropout = settings.strategy == "uncertainty"
        if self._samples_dropout:
            check_dropout(method)

    @property
    def device(self) -> torch.device:
        """Device of the present model."""
        return next(self._method.parameters()).device

    @contextmanager
    def scoring(self, round_number: int) -> Iterator[Callable[[Batch, int], Scores]]:
        """Yield a function that scores a batch, given the index of its first image; valid inside the context.

        Args:
            round_number: number of the round being made.
        """

        def score(batch: Batch, first_index: int) -> Scores:
            sides = [batch]
            if self._settings.flips:
                sides.append(batch._replace(images=batch.images.flip(-1), flipped=~batch.flipped))
            return self._score(sides, ("dropout", self._seed, round_number, first_index))

        with dropping(self._method) if self._samples_dropout else nullcontext():
            yield score

    def _score(self, sides: list[Batch], key: tuple[str | int, ...]) -> Scores:
        if len(sides) * len(self._predicts) == 1 and not self._samples_dropout:
            return Scores(self._predicts[0](sides[0]), None)
        moments = Moments()
        num_passes = self._settings.num_passes if self._samples_dropout else 1
        for side, batch in enumerate(sides):
            moments.begin_set()
            for predict in self._predicts:
                is_kept = self._keeps_trunk and num_passes > 1
                with computed_once(self._method.backbone) if is_kept else nullcontext():
                    for number in range(num_passes):
                        if self._samples_dropout:
                            torch.manual_seed(keyed.torch_seed(*key, side, number))
                        moments.add(predict(batch))
        return Scores(moments.mean, moments.variance if self._samples_dropout else None)


def plan_round(
    run: str,
    labels: Labels,
    settings: CurriculumSettings,
    models: Sequence[RoundModel],
    *,
    seed: int,
    scored_with: str,
) -> RoundPlan:
    """Begin the next round by creating its plan, or resume a round with an equal plan. Rank 0 decides for all.

    Args:
        run: URL of the run folder, RUN.
        labels: labels of the train split as the run sees them, without beliefs.
        settings: the curriculum's settings.
        models: the models that will score.
        seed: the run's seed.
        scored_with: `Config.scoring_digest`.

    Raises:
        ConfigError: tars without an index, or a round that could fill the disk.
        CheckpointError: the newest round was made from other shards or another view; or a round is being made, or was
            left unfinished, from other models or settings.

    Collective: all ranks, one broadcast.
    """
    index = indexed(labels)
    check_bounded(settings, num_samples=index.num_samples, num_classes=index.manifest.num_classes)

    def take() -> RoundPlan:
        parent = newest_round(run)
        if parent:
            check_belongs(run, read_round(run, parent), index, labels.view)
        plan = RoundPlan(
            round=parent + 1,
            parent=parent,
            split=index.split,
            manifest_digest=index.manifest.digest,
            view_digest=None if labels.view is None else labels.view.digest,
            strategy=settings.strategy,
            parameters=settings.parameters,
            models=tuple(models),
            scored_with=scored_with,
            seed=seed,
        )
        return _take(run, plan)

    return comm.on_first_rank(take)


def indexed(labels: Labels) -> SplitIndex:
    """The split that labels belong to.

    Raises:
        ConfigError: the split has no index, so its images have no address.
    """
    if isinstance(labels.samples, SplitIndex):
        return labels.samples
    raise ConfigError(
        "relabelling over tars without an index",
        expected="images with an address of their own: beliefs are kept by shard and row",
        where="data.unindexed, curriculum",
        next_step="run `dist-mlpl shards index` and set data.manifest to what it wrote",
    )


def _take(run: str, plan: RoundPlan) -> RoundPlan:
    if plan.parent:  # the parts that the parent's commit did not get to remove when it was killed
        storage.remove_folder(round_url(run, plan.parent, "parts"))
    if storage.create_exclusive(round_url(run, plan.round, "plan.json"), document_bytes(plan)):
        return plan
    found = read_plan(run, plan.round)
    if found != plan:
        ours, theirs = plan.model_dump(), found.model_dump()
        differing = [f"{key} {theirs[key]!r}, not {ours[key]!r}" for key in ours if ours[key] != theirs[key]]
        where = round_url(run, plan.round, "plan.json")
        begun = storage.written_at(where)
        raise CheckpointError(  # not OvertakenError: a restarted group of workers would meet it again
            f"round {plan.round} is being made from something else: " + "; ".join(differing)[:600],
            expected="one round at a time" + (f"; that one was begun at {begun:%Y-%m-%d %H:%M} UTC" if begun else ""),
            where=storage.shown(where),
            next_step="let that job finish, or drop its round with `dist-mlpl labels rollback RUN`",
        )
    return plan


def make_round(
    run: str,
    plan: RoundPlan,
    labels: Labels,
    settings: CurriculumSettings,
    scorer: Scorer,
    stream: Stream,
    *,
    is_asked: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> RoundCommit | None:
    """Score the images not scored yet, decide what is believed, and commit the round.

    Memory and disk are bounded for any N and C: one block of dense scores at a time, then parts, whose size
    `curriculum.max_per_image` bounds.

    Args:
        run: URL of the run folder, RUN.
        plan: from `plan_round`.
        labels: labels of the train split as the run sees them, without beliefs.
        settings: the curriculum's settings.
        scorer: scores with the plan's models.
        stream: over the train split with the evaluation transform.
        is_asked: whether this rank was asked to stop.
        tell: called now and then with the number of images this rank has scored and has to score.

    Returns:
        The committed round; None when a rank was asked to stop. Images scored by then need not be scored again.

    Raises:
        RunError: a score is not finite; on all ranks.
        MlplError: see `RoundCommitter.commit`.

    Collective: all ranks; 4 bytes every 512 images, then see `RoundCommitter.commit`.
    """
    index = indexed(labels)
    place = Place(run, plan.round, storage.sha256_of_bytes(document_bytes(plan)))
    has_votes = settings.strategy == "neighbours"
    todo = comm.on_first_rank(lambda: missing(index, place.embedded if has_votes else place.part))
    dealt = deal(todo, [piece.num_samples for piece in todo], world_size=comm.world_size())
    writer: Writer = EmbeddingWriter(place, index) if has_votes else PartWriter(place, settings, index)
    with _clearing(place):
        with scorer.scoring(plan.round) as score, ThreadPoolExecutor(1, "parts") as worker:
            if not _pass(dealt, labels, index, stream, score, writer, worker, is_asked, tell):
                return None
        if has_votes and not vote(place, settings, labels, index, device=scorer.device, is_asked=is_asked):
            return None
        return RoundCommitter(run, plan, origin=place.origin, settings=settings, index=index).commit()


@contextmanager
def _clearing(place: Place) -> Iterator[None]:
    """If a faster job has committed the round and removed the parts it saw, remove those written since."""
    try:
        yield
    except (OvertakenError, StorageError) as error:
        if newest_round(place.run) >= place.number:
            storage.remove_folder(round_url(place.run, place.number, "parts"))
            if isinstance(error, StorageError):  # a part that was being written went with the folder
                raise dropped(place.run, place.number) from error
        raise


def _pass(
    dealt: list[list[Piece]],
    labels: Labels,
    index: SplitIndex,
    stream: Stream,
    score: Callable[[Batch, int], Scores],
    writer: Writer,
    worker: ThreadPoolExecutor,
    is_asked: Callable[[], bool],
    tell: Callable[[int, int], None],
) -> bool:
    """Score this rank's pieces, in step with the others. False when a rank was asked to stop."""
    starts = index.starts.tolist()
    spans = [[(starts[piece.shard] + piece.first, starts[piece.shard] + piece.stop) for piece in own] for own in dealt]
    num_blocks = max(map(num_span_blocks, spans))
    own = dealt[comm.rank()]
    blocks = [(piece, row) for piece in own for row in range(piece.first, piece.stop, EVALUATION_BLOCK)]
    total, done = sum(piece.num_samples for piece in own), 0
    in_work: deque[Future[None]] = deque()
    failure: MlplError | None = None
    batches = stream.span_batches(labels, spans[comm.rank()], num_blocks=num_blocks)
    for number, batch in enumerate(batches):
        piece, row = blocks[number] if number < len(blocks) else (None, 0)
        first_index = PADDING if piece is None else starts[piece.shard] + row
        scores = score(batch, first_index)  # padding too: under ZeRO stage 3 all ranks must compute together
        try:
            if piece is not None and failure is None:
                in_work.append(worker.submit(writer.add, batch, scores, piece, row))
                done += batch.num_images
            while len(in_work) > (_BLOCKS_IN_WORK if number + 1 < num_blocks else 0):
                in_work.popleft().result()
        except MlplError as error:
            failure = error
        if (number + 1) % _LOOK_BLOCKS == 0 or number + 1 == num_blocks:
            tell(done, total)
            if comm.is_stop_asked(is_asked(), failure) and number + 1 < num_blocks:
                return False
    return True
