"""THE RECIPE: one rank's run, top to bottom. Open this file first; every other room is reached from it."""

from __future__ import annotations

import logging
import os
import socket

import torch

from dist_mlpl import comm, keyed, storage
from dist_mlpl.batch import Progress, RunLength
from dist_mlpl.checkpoint import Checkpoint, RunIdentity, begin_attempt, read_head, read_model
from dist_mlpl.config import Config, check_resume, read_run_config, run_config_url
from dist_mlpl.data.cache import ShardCache
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import Manifest, load_manifest
from dist_mlpl.data.order import EpochOrder, check_global_batch, last_position
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import DataSettings, Stream
from dist_mlpl.data.transform import Transform
from dist_mlpl.data.views import View
from dist_mlpl.engine import Engine, start
from dist_mlpl.evaluate import evaluate
from dist_mlpl.methods.base import Method
from dist_mlpl.progress import Action, Report, keep_log
from dist_mlpl.world import World

log = logging.getLogger(__name__)


def train(config: Config, report: Report, *, allow_change: bool = False, max_steps: int | None = None) -> Progress:
    """Run or resume one training, on this rank.

    Args:
        config: of the run, the same on every rank.
        report: what is told, and how the run is asked to stop.
        allow_change: resume under a changed batch, schedule or length.
        max_steps: return after this many steps of this attempt, with a commit.

    Returns:
        Where the run stands when it returns.

    Raises:
        MlplError: see `errors`; nothing that was committed is lost.

    Collective: all ranks run this function with the same arguments.
    """
    world = start(config.engine)
    storage.configure_storage(config.data.storage_options)
    manifest = load_manifest(config.data.manifest)
    index = SplitIndex(manifest, config.data.train_split)
    length = RunLength(config.num_epochs, index.num_samples)
    check_global_batch(
        config.global_batch, group_size=config.group_size, world_size=world.size, num_samples=index.num_samples
    )
    out = config.run_folder
    notes = open_run_folder(config, allow_change=allow_change)
    attempt = begin_attempt(out)
    copy_log = keep_log(out, attempt.name, world.rank)

    method = build_method(config, manifest)
    engine = Engine(
        method, config.engine, config.optimizer, config.schedule,
        length=length, world=world, global_batch=config.global_batch, group_size=config.group_size, seed=config.seed,
    )  # fmt: skip
    store = LabelStore(index, build_view(config.data, index))
    judged_store = LabelStore(SplitIndex(manifest, config.data.eval_split))
    stream = build_stream(config, index, world, engine, train=True)
    judged_stream = build_stream(config, judged_store.samples, world, engine, train=False)
    identity = RunIdentity(
        global_batch=config.global_batch, num_lanes=config.data.num_lanes, window_samples=config.data.window_samples,
        group_size=config.group_size,
        digests={"config": config.digest, "classes": manifest.classes_sha256, "manifest": manifest.digest,
                 "view": store.view_digest},
    )  # fmt: skip
    saved = Checkpoint(out, engine, stream, identity=identity, attempt=attempt, length=length)
    progress = saved.restore()
    if attempt.parent is None and config.method.init_from:
        notes += start_from(config.method.init_from, engine)
    report.begin(out, attempt.name, progress, global_batch=config.global_batch, about=about(config, manifest, length))
    for note in [str(method.weights_report), *notes]:
        report.note(note)

    last_step = None if max_steps is None else progress.step + max_steps
    action = Action.GO_ON
    log.info("attempt %s on rank %d of %d begins at %s", attempt.name, world.rank, world.size, progress)
    try:
        for epoch in range(progress.epoch, config.num_epochs):
            if progress.samples_consumed == 0:  # never again after a resume in the middle of an epoch
                method.begin_epoch(progress)
            order = epoch_order(config, index, epoch)
            start_position, labels = progress.samples_consumed, store.at(progress.round)
            end = last_position(start_position, global_batch=config.global_batch, num_samples=length.num_samples)
            for batch in stream.train_batches(
                order, labels, epoch=epoch, start=start_position, global_batch=config.global_batch
            ):
                recalled = method.recall(batch, progress)
                output = engine.train_step(batch, recalled, progress)  # micro-batches, backward, one update
                stream.stop_if_bad(output.extras["num_bad"])
                method.observe(batch, output)
                progress = progress.next(config.global_batch, length)
                action = report.step(progress, output, waited_seconds=stream.waited_seconds)
                action = Action.STOP if progress.step == last_step else action
                if progress.samples_consumed == end:
                    break  # the epoch's own save follows
                if action or progress.due(config.save_every_steps):
                    saved.save(progress)
                    report.saved(progress)
                    copy_log()
                if action is Action.STOP:
                    report.stopped(progress)
                    return progress

            is_due = (epoch + 1) % config.evaluation.every_epochs == 0 or epoch + 1 == config.num_epochs
            judged = evaluate(engine, judged_stream, judged_store.at(0), config.evaluation) if is_due else None
            progress = progress.next_epoch(length)
            saved.save(progress, judged.metrics if judged else None)
            report.epoch(progress, judged.metrics if judged else {})
            report.saved(progress)
            copy_log()
            if action is Action.STOP and progress.epoch < config.num_epochs:
                report.stopped(progress)
                return progress
        return progress
    except Exception:
        log.exception("the run stops at %s", progress)
        raise
    finally:
        log.info("this rank ends at %s", progress)
        copy_log()
        stream.close()
        judged_stream.close()


def open_run_folder(config: Config, *, allow_change: bool) -> list[str]:
    """Write RUN/config.yaml in a new run folder; in an old one compare it. Rank 0 decides for all.

    Returns:
        Lines that say what changed since the run began.

    Raises:
        CheckpointError: a change that is refused, or needs --allow-change.

    Collective: all ranks, one broadcast.
    """
    if comm.rank() != 0:
        return comm.broadcast_object([])
    url = run_config_url(config.run_folder)
    changes: list[str] = []
    if storage.exists(url):
        changes = check_resume(read_run_config(config.run_folder), config, allow_change=allow_change)
    else:
        storage.write_bytes(url, config.to_yaml().encode())
    return comm.broadcast_object([f"changed since the run began: {line}" for line in changes])


def build_method(config: Config, manifest: Manifest) -> Method:
    """The run's method; its random weights are drawn under the run's seed."""
    torch.manual_seed(keyed.key("weights", config.seed) & (2**63 - 1))
    return config.method.build(num_classes=manifest.num_classes, image_size=config.transform.size)


def build_view(data: DataSettings, index: SplitIndex) -> View | None:
    """The view that hides train labels, or None when every label may be seen."""
    if data.known_fraction is None and data.known_rule == "bernoulli":
        return None
    return View(
        data.known_rule,
        data.known_fraction,
        data.known_seed,
        shard_sizes=index.shard_sizes,
        source_rows=index.source_rows(),
        targets_of=index.targets_between,
        num_classes=index.manifest.num_classes,
    )


def build_stream(config: Config, index: SplitIndex, world: World, engine: Engine, *, train: bool) -> Stream:
    """Batches of one split for this rank, augmented or as they are."""
    return Stream(
        index,
        ShardCache(index.manifest, limit_bytes=config.data.cache_bytes),
        Transform(config.transform, seed=config.seed, train=train),
        world=world,
        num_workers=config.data.num_workers,
        device=engine.device,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def epoch_order(config: Config, index: SplitIndex, epoch: int) -> EpochOrder:
    """The order of one epoch of this run."""
    return EpochOrder(
        index.shard_sizes,
        seed=config.seed,
        epoch=epoch,
        num_lanes=config.data.num_lanes,
        window_samples=config.data.window_samples,
        group_size=config.group_size,
    )


def start_from(url: str, engine: Engine) -> list[str]:
    """Take over the model of another run where names and shapes agree.

    Returns:
        A line that says how much was taken.

    Raises:
        CheckpointError: no such run.
    """
    head = read_head(url)
    model = read_model(url, head) if head else {}
    taken = engine.load_matching(model)
    return [f"init_from {url}: {len(taken)} of {len(model)} tensors taken over"]


def about(config: Config, manifest: Manifest, length: RunLength) -> dict[str, object]:
    """What a reader of the rows should know first.

    Collective: all ranks, one gather of names.
    """
    return {
        "num_epochs": length.num_epochs,
        "num_samples": length.num_samples,
        "num_steps": length.num_epochs * (length.num_samples // config.global_batch),
        "num_classes": manifest.num_classes,
        "world_size": comm.world_size(),
        "processes": comm.gather_objects((socket.gethostname(), os.getpid())),
        "method": config.method.name,
        "backbone": config.method.backbone.name,
    }
