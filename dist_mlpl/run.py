"""Owns one rank's run: all its parts, opened in order, and what happens between training steps."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from dist_mlpl import comm, storage
from dist_mlpl.batch import Progress, RunLength
from dist_mlpl.build import build_cache, build_method, build_stream, build_view, check_cache, open_samples
from dist_mlpl.chain import Commit, RunIdentity, read_head, read_model, read_newest
from dist_mlpl.checkpoint import Attempt, Checkpoint, begin_attempt
from dist_mlpl.config import Config, check_resume, check_run_folder, read_run_config, run_config_url
from dist_mlpl.curriculum.schedule import check_bounded, is_due
from dist_mlpl.curriculum.uncertainty import check_dropout
from dist_mlpl.data.cache import ExtentCache
from dist_mlpl.data.label_store import Labels, LabelStore
from dist_mlpl.data.manifest import Manifest
from dist_mlpl.data.order import check_global_batch
from dist_mlpl.data.overlays import newest_round, unfinished_round
from dist_mlpl.data.tar_stream import AnyStream
from dist_mlpl.data.tars import LIMITS, AnySamples, TarSet
from dist_mlpl.engine import Engine
from dist_mlpl.errors import CheckpointError, RankMismatchError
from dist_mlpl.evaluate import evaluate
from dist_mlpl.methods.base import Method
from dist_mlpl.progress import LogFile, Report, without_nan
from dist_mlpl.rounds.relabel import relabel
from dist_mlpl.rounds.truth import measure, summary
from dist_mlpl.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All parts of one rank's run, opened by `open_run`."""

    config: Config
    manifest: Manifest
    samples: AnySamples
    length: RunLength
    method: Method
    engine: Engine
    store: LabelStore
    cache: ExtentCache | None
    stream: AnyStream
    judged: AnyStream
    judged_labels: Labels
    saved: Checkpoint
    attempt: Attempt
    notes: list[str]  # lines that the user should read once
    log_file: LogFile

    def restore(self) -> Progress:
        """Load the head of the chain, and save the config in force, which `evaluate` and the next resume read.

        Returns:
            Where the run stands.

        Raises:
            BankError, CheckpointError: see `Checkpoint.restore`.

        Collective: all ranks.
        """
        progress = self.saved.restore()
        url, text = run_config_url(self.config.run_folder), self.config.to_yaml()
        comm.on_first_rank(lambda: storage.write_bytes(url, text.encode()))
        return progress

    def introduce(self, report: Report, progress: Progress) -> None:
        """Report what starts or resumes here, and the notes.

        Collective: all ranks, one gather of names.
        """
        config = self.config
        about = {
            "num_epochs": self.length.num_epochs,
            "num_samples": self.length.num_samples,
            "num_steps": self.length.num_epochs * (self.length.num_samples // config.global_batch),
            "num_classes": self.manifest.num_classes,
            "world_size": comm.world_size(),
            "processes": comm.gather_objects((socket.gethostname(), os.getpid())),
            "method": config.method.name,
            "backbone": config.method.backbone.name,
        }
        out = config.run_folder
        report.begin(out, self.attempt.name, progress, global_batch=config.global_batch, about=about)
        for note in self.notes:
            report.note(note)
        log.info(
            "attempt %s on rank %d of %d begins at %s", self.attempt.name, comm.rank(), comm.world_size(), progress
        )

    def commit(self, progress: Progress, report: Report) -> None:
        """Save a checkpoint, and make all reports so far durable. Raises as `Checkpoint.save`.

        Collective: all ranks.
        """
        self.saved.save(progress, report.train_metrics())
        report.saved(progress)
        self.log_file.copy()

    def renew_labels(self, progress: Progress, report: Report) -> Progress | None:
        """Make a round of labels if one is due, then switch to the newest round, whichever job made it.

        Returns:
            `progress` with the newest round; None when the run was asked to stop in the middle of a round.

        Raises:
            MlplError: see `relabel` and `measure`.

        Collective: all ranks.
        """
        config, curriculum, out = self.config, self.config.curriculum, self.config.run_folder
        if curriculum is not None and is_due(curriculum, progress.epoch):
            head = self.saved.newest_head()
            assert head is not None  # no round is due before the first epoch, which ends in a commit
            made = relabel(
                out, head, curriculum, self.engine, self.store.at(0),
                open_stream=lambda: build_stream(
                    config, self.samples, self.cache, self.engine.world, self.engine, train=False
                ),
                build=lambda: build_method(config, self.manifest),
                seed=config.seed, scored_with=config.scoring_digest,
                is_asked=report.is_asked_to_stop, tell=lambda done, total: report.scoring(progress, done, total),
            )  # fmt: skip
            if made is None:
                return None
        newest = comm.on_first_rank(lambda: newest_round(out))
        if newest == progress.round:
            return progress
        labels, progress = self.store.at(newest), progress._replace(round=newest)
        assert labels.round is not None
        commit, is_measured = labels.round.commit, curriculum is None or curriculum.measure_hidden
        report.round(progress, summary(commit) | (measure(out, commit, labels) if is_measured else {}))
        return progress

    def judge_if_due(self, progress: Progress, report: Report) -> None:
        """Evaluate the epoch that just ended, unless it is not due or done already; RUN/evaluations has the record.

        This comes after the epoch's commit, so nothing is lost if the evaluation fails or is killed.

        Collective: all ranks.
        """
        config, epoch = self.config, progress.epoch
        is_judged = epoch % config.evaluation.every_epochs == 0 or epoch == config.num_epochs
        if progress.samples_consumed > 0 or epoch == 0 or not is_judged:
            return
        head = self.saved.head
        assert head is not None  # the epoch ended with it
        url = storage.join(config.run_folder, "evaluations", f"{head.name}.json")
        about = {"step": head.step, "attempt": head.attempt, "epoch": epoch, "split": config.data.eval_split}
        if comm.on_first_rank(lambda: _is_about(url, head)):
            return
        metrics = evaluate(self.engine, self.judged, self.judged_labels, config.evaluation).metrics
        record = json.dumps({**about, **without_nan(metrics)}, indent=1)
        comm.on_first_rank(lambda: storage.write_bytes(url, record.encode()))
        report.epoch(progress, metrics)


@contextmanager
def open_run(
    config: Config, world: World, *, allow_change: bool, is_output_logged: bool, job: str | None = None
) -> Iterator[Run]:
    """Check the config, then open all parts of a run, from the samples to the checkpoint.

    The error that ends the run goes into its log. Leaving the context stops the run's threads and closes the log.

    Args:
        config: the run's config.
        world: this rank.
        allow_change, is_output_logged, job: see `train`.

    Raises:
        MlplError: the run cannot start; nothing that was committed is lost.

    Collective: all ranks.
    """
    storage.configure_storage(config.data.storage_options)
    out, data = config.run_folder, config.data
    samples, judged_samples = open_samples(data, data.train_split, data.eval_split)
    manifest = samples.manifest
    check_same_data(manifest.digest)
    length = RunLength(config.num_epochs, samples.epoch_samples)
    check_global_batch(
        config.global_batch, group_size=config.group_size, world_size=world.size, num_samples=length.num_samples
    )
    notes = compare_with_run(config, allow_change=allow_change)
    attempt = begin_attempt(out, config.digest, job=job)
    with ExitStack() as opened:
        log_file = opened.enter_context(_logged(out, attempt, world, has_output=is_output_logged))
        method = build_method(config, manifest)
        store = LabelStore(samples, build_view(data, samples), run=out)
        if attempt.parent is None:
            method.read_labels(store.at(0))
        engine = Engine(
            method, config.engine, config.optimizer, config.schedule,
            length=length, world=world, global_batch=config.global_batch, group_size=config.group_size,
            seed=config.seed, num_samples=samples.num_samples,
        )  # fmt: skip
        if config.curriculum is not None:
            check_bounded(config.curriculum, num_samples=samples.num_samples, num_classes=manifest.num_classes)
            if config.curriculum.strategy == "uncertainty":
                check_dropout(method)
        if attempt.parent is None and config.method.init_from:
            notes.append(start_from(config.method.init_from, engine))
        cache = None
        if isinstance(samples, TarSet):
            notes += LIMITS
        else:
            is_shrunk = attempt.parent is not None and world.size < attempt.parent.world_size
            told, is_used = check_cache(config, samples, world, is_shrunk=is_shrunk)
            notes += told
            cache = build_cache(data, samples, world) if is_used else None
        stream = opened.enter_context(closing(build_stream(config, samples, cache, world, engine, train=True)))
        judged = opened.enter_context(closing(build_stream(config, judged_samples, cache, world, engine, train=False)))
        identity = RunIdentity(
            global_batch=config.global_batch, num_lanes=data.num_lanes, window_samples=data.window_samples,
            group_size=config.group_size,
            digests={"config": config.digest, "classes": manifest.classes_sha256, "manifest": manifest.digest,
                     "view": store.view_digest},
        )  # fmt: skip
        saved = Checkpoint(
            out, engine, stream,
            identity=identity, attempt=attempt, length=length, keep_checkpoints=config.keep_checkpoints,
        )  # fmt: skip
        if config.curriculum is not None:
            notes += comm.on_first_rank(lambda: _unfinished(out))
        yield Run(
            config=config,
            manifest=manifest,
            samples=samples,
            length=length,
            method=method,
            engine=engine,
            store=store,
            cache=cache,
            stream=stream,
            judged=judged,
            judged_labels=LabelStore(judged_samples).at(0),
            saved=saved,
            attempt=attempt,
            notes=[str(method.weights_report), *method.notes, *notes],
            log_file=log_file,
        )


def _unfinished(out: str) -> list[str]:
    """A note for the user about a round of labels that was begun and not committed, if there is one."""
    number = unfinished_round(out)
    return [] if number is None else [
        f"round {number} of labels was begun and is not finished: it goes on if it is made from the same models and "
        "settings; if another job left it behind, drop it with `dist-mlpl labels rollback RUN`"
    ]  # fmt: skip


def check_same_data(digest: str) -> None:
    """Refuse ranks that read different manifests, as when a set was packed anew between their starts.

    Collective: all ranks, one gather of digests.
    """
    digests = comm.gather_objects(digest)
    if len(set(digests)) > 1:
        raise RankMismatchError(
            "manifests of " + ", ".join(sorted({one[:16] for one in digests})),
            expected="one data set on all ranks",
            where=f"data.manifest on rank {comm.rank()} of {comm.world_size()}",
            next_step="start again; if it stays, each node reads a copy of its own: make the copies the same",
        )


@contextmanager
def _logged(out: str, attempt: Attempt, world: World, *, has_output: bool) -> Iterator[LogFile]:
    """Open this rank's log; an exception that ends the run becomes its last lines."""
    log_file = LogFile(out, attempt.name, world.rank, has_output=has_output)
    try:
        yield log_file
    except Exception:
        log.exception("the run stops")
        raise
    finally:
        log_file.close()


def _is_about(url: str, commit: Commit) -> bool:
    """Whether a record exists for this commit, rather than for one at the same step that was moved away."""
    return storage.exists(url) and json.loads(storage.read_bytes(url)).get("attempt") == commit.attempt


def compare_with_run(config: Config, *, allow_change: bool) -> list[str]:
    """Compare the config with the one saved in the run folder. Rank 0 decides for all.

    Returns:
        Lines that say what changed; none in a new run folder.

    Raises:
        CheckpointError: a change is refused, or needs --allow-change.

    Collective: all ranks, one broadcast.
    """

    return comm.on_first_rank(lambda: changes_since(config, allow_change=allow_change))


def changes_since(config: Config, *, allow_change: bool) -> list[str]:
    """Compare the config with the one saved in the run folder; the same as `compare_with_run`, on one process.

    Returns:
        Lines that say what changed; none if nothing was trained yet that another config could contradict.

    Raises:
        CheckpointError: a change is refused or needs --allow-change, or the folder is another program's.
    """
    check_run_folder(config.run_folder)
    if read_head(config.run_folder) is None or not storage.exists(run_config_url(config.run_folder)):
        return []
    changes = check_resume(read_run_config(config.run_folder), config, allow_change=allow_change)
    return [f"changed since the run was last started: {line}" for line in changes]


def start_from(url: str, engine: Engine) -> str:
    """Load the model of another run where names and shapes agree.

    Args:
        url: URL of that run's folder.
        engine: receives the tensors.

    Returns:
        A line that says how many tensors were loaded, and which were kept as they are, and why.

    Raises:
        CheckpointError: no such run, no tensor that fits, or too few for the method.

    Collective: all ranks, one broadcast of a commit.
    """
    # Read the commit once for all ranks, as that run may still train.
    model = read_model(url, comm.on_first_rank(lambda: read_newest(url)))
    taken, kept = engine.load_matching(model)
    if not taken:
        raise CheckpointError(
            f"none of {len(model)} tensors has a name and shape of this method's",
            expected="a run of the same backbone, at least",
            where=f"method.init_from: {url}",
            next_step="check the path and the backbone's name",
        )
    engine.method.check_start(url, taken)
    parts = [f"{len(taken)} of {len(model)} tensors taken over"]
    parts += [f"kept: {name}, {reason}" for name, reason in kept.items()]
    return f"init_from {url}: {'; '.join(parts)}"
