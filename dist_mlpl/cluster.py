"""Owns runs on Ray: training on N workers, restarted when one is lost, shown and stopped from the driver.

Ray starts, watches and restarts workers. It gets no checkpoints and no metrics: only the commit chain says where a run
stands, so a restarted worker group, a resubmitted job and a second call of the command all resume alike.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from dist_mlpl import comm, storage
from dist_mlpl.board import BoardSink, LostWorkers, make_board
from dist_mlpl.build import build_view, open_samples
from dist_mlpl.checkpoint import newest_job
from dist_mlpl.config import Config, with_absolute_paths
from dist_mlpl.curriculum.schedule import check_bounded
from dist_mlpl.data.order import check_global_batch
from dist_mlpl.data.tars import TarSet, check_num_tars
from dist_mlpl.data.views import check_size
from dist_mlpl.display import Display, work_bar
from dist_mlpl.environment import prepare_environment
from dist_mlpl.errors import ConfigError, MlplError, OvertakenError, RunError, StorageError, StorageRefusedError
from dist_mlpl.local import LastEpoch, StopRequest, run_sinks, show_last
from dist_mlpl.progress import Action, Report, Row, Sink
from dist_mlpl.run import changes_since
from dist_mlpl.tasks import join
from dist_mlpl.tools.relabel_job import Relabelled, relabel_run
from dist_mlpl.train import train

_LONGEST_TEMPORARY = 20  # characters of the temporary folder; Ray adds some 80 to it, and a socket's path has 107
_POLL_SECONDS = 0.3
_PATIENCE_SECONDS = 40.0  # when to say that workers are awaited; with room on the cluster, they start in about 15 s


class Ending:
    """A sink that remembers whether the run was stopped before its end."""

    def __init__(self) -> None:
        self.is_stopped = False

    def row(self, row: Row) -> None:
        self.is_stopped = row["event"] == "stopped"

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def train_on_ray(
    config: Config,
    *,
    address: str | None = None,
    allow_change: bool = False,
    max_steps: int | None = None,
    is_profiled: bool = False,
    observer: Sink | None = None,
    is_result_shown: bool = True,
) -> bool:
    """Train on Ray workers and show progress here until the end.

    A lost worker costs the steps since the last commit: Ray restarts the group, up to `cluster.max_failures` times, and
    training resumes from the chain.

    Args:
        config: the run's config.
        address: address of a running cluster; None for the config's, then RAY_ADDRESS, then a local cluster on this
            machine that ends with the call.
        allow_change, max_steps, is_profiled: see `train`.
        observer: another sink for the rows.
        is_result_shown: print the last evaluation at the end.

    Returns:
        True when a signal stopped the run before its end.

    Raises:
        MlplError: the error that stopped the workers; RunError if they failed too often.
    """
    config = with_absolute_paths(config)
    check_before_start(config, allow_change=allow_change)
    last: dict[str, float] = {}
    ending = Ending()
    shown: list[Sink] = [Display(), LastEpoch(last), ending, *([observer] if observer else [])]
    stop = StopRequest()
    arguments = {"allow_change": allow_change, "max_steps": max_steps, "is_profiled": is_profiled,
                 "job": secrets.token_hex(8)}  # fmt: skip
    has_ended = _run_workers(_train_worker, arguments, config, address=address, shown=shown, stop=stop)
    if last and is_result_shown:
        show_last(last, config.run_folder)
    return not has_ended or (stop.is_asked and ending.is_stopped)


def relabel_on_ray(
    config: Config, *, step: int | None = None, manifest_url: str | None = None, address: str | None = None
) -> Relabelled | None:
    """Make the next round of labels on Ray workers, as many as train the run.

    A lost worker costs the pieces of shards that it had not finished; finished ones are kept.

    Args:
        config: from `job_config`.
        step, manifest_url: see `relabel_run`.
        address: see `train_on_ray`.

    Returns:
        The round; None when a signal stopped it.

    Raises:
        MlplError: the error that stopped the workers; RunError if they failed too often.
    """
    config = with_absolute_paths(config)
    made: list[Relabelled] = []
    arguments = {"step": step, "manifest_url": None if manifest_url is None else storage.absolute(manifest_url)}
    with work_bar() as tell:
        stop = StopRequest("stopping; what is scored stays, and the same command goes on from there")
        _run_workers(
            _relabel_worker, arguments, config, address=address, shown=[MadeRound(made, tell)], stop=stop
        )  # fmt: skip
    return made[0] if made else None


def _run_workers(
    work: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    config: Config,
    *,
    address: str | None,
    shown: list[Sink],
    stop: StopRequest,
) -> bool:
    """Run a function on every worker until it ends, and show the rows that it reports.

    Args:
        work: takes `arguments`, to which the config and the board are added.
        arguments: picklable.
        config: the run's config.
        address: address of a running cluster, in place of the config's.
        shown: sinks for the rows.
        stop: set by a signal. Running workers then stop by themselves; if none run, waiting for them ends.

    Returns:
        False if a signal came while no workers ran.

    Raises:
        MlplError: the error that stopped the workers; RunError if they failed too often.
    """
    with cluster_at(address or config.cluster.address, config):
        stop.listen()  # only now, as ray.init installs its own SIGTERM handler
        board = make_board()
        arguments = arguments | {"config": config.model_dump(mode="json"), "board": board}
        end = board.fit.remote(_trainer(work, config, arguments, callback=LostWorkers(board)))
        idle_since, is_told, is_given_up = time.monotonic(), False, False
        fatal: MlplError | None = None
        failure: Exception | None = None
        try:
            while not is_given_up and not ray.wait([end], timeout=_POLL_SECONDS)[0]:
                if stop.is_asked:
                    ray.get(board.ask_stop.remote())
                if _show(board, shown):
                    idle_since, is_told = time.monotonic(), False
                elif stop.is_asked:
                    is_given_up = True
                elif not is_told and time.monotonic() - idle_since > _PATIENCE_SECONDS:
                    is_told = True
                    _note(shown, _waiting(config))
            _show(board, shown)
            fatal = ray.get(board.fatal.remote())
            failure = None if is_given_up else ray.get(end)
            if is_given_up and fatal is None:
                _note(shown, "stopped while no workers ran; the same command goes on from what is saved")
        except RayError as error:
            failure = error
        finally:
            for sink in shown:
                sink.close()
            with contextlib.suppress(RayError):  # it may have ended by itself
                ray.kill(board)
    if fatal is not None:
        raise fatal
    if failure is not None:
        raise _failed(failure, config)
    return not is_given_up


def _note(shown: list[Sink], text: str) -> None:
    """Show a note to the user, beside the rows of the run."""
    for sink in shown:
        sink.row({"event": "note", "text": text})


def _waiting(config: Config) -> str:
    """The note shown when no worker has started for a while."""
    have = ray.cluster_resources()
    cluster = config.cluster
    need = f"{cluster.num_workers} workers of {cluster.cpus_per_worker:g} CPUs" + (
        " and a GPU" if cluster.use_gpu else ""
    )
    return f"waiting for {need}; the cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs in all"


def check_before_start(config: Config, *, allow_change: bool) -> None:
    """Check on the driver what would otherwise stop every worker: shards, batch, run folder, changed settings.

    Raises:
        MlplError: see `errors`.
    """
    storage.configure_storage(config.data.storage_options)
    samples, _ = open_samples(config.data, config.data.train_split, config.data.eval_split)
    num_samples = samples.epoch_samples
    if config.data.is_view_asked:
        check_size(num_samples, samples.manifest.num_classes)
    elif config.data.view is not None:
        build_view(config.data, samples)  # raises here, not on every worker, if missing or of other shards
    num_workers = config.cluster.num_workers
    most = num_workers if isinstance(num_workers, int) else num_workers[1]
    check_global_batch(config.global_batch, group_size=config.group_size, world_size=most, num_samples=num_samples)
    if isinstance(samples, TarSet):
        check_num_tars(samples, world_size=most)
    if config.curriculum is not None:
        check_bounded(config.curriculum, num_samples=samples.num_samples, num_classes=samples.manifest.num_classes)
    storage.check_exclusive_create(config.run_folder)
    changes_since(config, allow_change=allow_change)


def _trainer(
    work: Callable[[dict[str, Any]], None], config: Config, arguments: dict[str, Any], *, callback: UserCallback
) -> TorchTrainer:
    cluster = config.cluster
    environment: dict[str, str] = {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker))),
    }
    prepare_environment(environment, num_ranks=1)
    if not cluster.use_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray does not hide GPUs from workers that asked for none
    filesystem, path = storage.arrow_filesystem(storage.join(config.run_folder, "ray"))
    return TorchTrainer(
        work,
        train_loop_config=arguments,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cluster.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=f"run-{secrets.token_hex(4)}",  # always new, so that Ray never restores a snapshot of its own
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": environment},
            callbacks=[callback],
        ),
    )


def _train_worker(arguments: dict[str, Any]) -> None:
    """Train on one worker, with the board as rank 0's display."""
    board = arguments["board"]
    if ray.get(board.open.remote()) is not None:
        return  # all workers of a restarted group see the same error, and the driver raises it
    config = Config.model_validate(arguments["config"])
    sink = BoardSink(board)
    report = Report(lambda out, attempt: run_sinks(out, attempt, sink), sink.ask)
    job = arguments["job"]
    with _telling_failures(board, config.run_folder, job), contextlib.closing(report):
        train(
            config,
            report,
            job=job,
            allow_change=arguments["allow_change"],
            max_steps=arguments["max_steps"],
            is_profiled=arguments["is_profiled"],
            is_output_logged=True,
        )


def _relabel_worker(arguments: dict[str, Any]) -> None:
    """Make a round of labels on one worker; rank 0 reports to the board."""
    board = arguments["board"]
    if ray.get(board.open.remote()) is not None:
        return
    config = Config.model_validate(arguments["config"])
    sink = BoardSink(board)

    def tell(done: int, total: int) -> None:
        if comm.rank() == 0:
            sink.row({"event": "scoring", "num_scored": done, "num_to_score": total})

    with _telling_failures(board, config.run_folder, None):
        if comm.rank() == 0:
            sink.row({"event": "start"})
        made = relabel_run(
            config, step=arguments["step"], manifest_url=arguments["manifest_url"],
            is_asked=lambda: sink.ask() is Action.STOP, tell=tell,
        )  # fmt: skip
        if made is not None and comm.rank() == 0:
            ray.get(board.push.remote([{"event": "made", "made": made}]))


class MadeRound:
    """A sink that shows the progress of a round of labels, and keeps the round.

    Args:
        made: list to which the finished round is appended.
        tell: takes what is being done, how much is done, and the total.
    """

    def __init__(self, made: list[Relabelled], tell: Callable[[str, int, int], None]) -> None:
        self._made, self._tell = made, tell

    def row(self, row: Row) -> None:
        if row["event"] == "made":
            self._made.append(row["made"])
        elif row["event"] == "scoring":
            self._tell("scored by rank 0", row["num_scored"], row["num_to_score"])
        elif row["event"] == "note":
            print(row["text"], file=sys.stderr)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _telling_failures(board: Any, run: str, job: str | None) -> Iterator[None]:
    """Report the exception that ends a worker to the driver, as final if a restart would only repeat it."""
    try:
        yield
    except Exception as error:
        if is_final(error, run, job):
            ray.get(board.give_up.remote(error))
        else:  # usually a lost peer; the group restarts
            first_line = (str(error).splitlines() or [""])[0][:160]
            text = f"rank {comm.rank()} stopped: {type(error).__name__}: {first_line}"
            ray.get(board.push.remote([{"event": "note", "text": text}]))
        raise


def is_final(error: Exception, run: str, job: str | None) -> bool:
    """Whether a restart would only repeat an error, or would in turn overtake the job that overtook this one.

    Args:
        error: the exception that ended a worker.
        run: URL of the run folder, RUN.
        job: token of this training job; None for a round of labels, where being overtaken is not final.
    """
    if not isinstance(error, MlplError):
        return False
    if isinstance(error, StorageError):
        return isinstance(error, StorageRefusedError)
    if not isinstance(error, OvertakenError):
        return True
    try:
        return job is not None and newest_job(run) != job  # else an older worker group of this job was overtaken
    except MlplError:
        return False


def _show(board: Any, shown: list[Sink]) -> bool:
    """Show new rows; returns whether workers are running."""
    rows, is_running = ray.get(board.take.remote())
    for row in rows:
        for sink in shown:
            sink.row(row)
    return is_running


def _failed(error: BaseException, config: Config) -> MlplError:
    """The typed error inside Ray's, or a new one that says where to look."""
    inner = error.worker_failures.values() if isinstance(error, ray.train.WorkerGroupError) else [error]
    for failure in inner:
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, MlplError):
            return cause
    text = str(error).strip().splitlines()
    return (
        RunError(
            f"the workers failed: {text[-1] if text else type(error).__name__}",
            expected=f"at most {config.cluster.max_failures} lost worker groups (cluster.max_failures)",
            where=storage.join(config.run_folder, "logs"),
            next_step="read the logs; the same command goes on from the last commit",
        )
        if isinstance(error, TrainingFailedError)
        else RunError(
            f"Ray failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            expected="a cluster that runs the workers",
            where="ray",
            next_step="check `ray status`; the same command goes on from the last commit",
        )
    )


def _socket_folder() -> str:
    """A temporary folder for a local cluster, with a path so short that its sockets' fit into 107 bytes."""
    temporary = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="mlpl-ray-", dir=temporary if len(temporary) <= _LONGEST_TEMPORARY else "/tmp")


@contextlib.contextmanager
def cluster_at(address: str | None, config: Config) -> Iterator[None]:
    """Join a running cluster, or start one on this machine for as long as the block runs.

    A local cluster gets its own temporary folder, since another cluster's stale address file costs every run 12 s.

    Args:
        address: address of a running cluster; None or `local` (after RAY_ADDRESS for None) starts one here.
        config: the run's config, for the workers' needs.

    Raises:
        ConfigError: this machine, as a local cluster, has too few CPUs or GPUs for the workers.
        RunError: no cluster at the address.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield
        return
    if address not in (None, "local"):
        join(address, where=f"--address, cluster.address or RAY_ADDRESS: {address}")
        try:
            yield
        finally:
            ray.shutdown()
        return
    num_workers = config.cluster.num_workers
    fewest = num_workers if isinstance(num_workers, int) else num_workers[0]
    num_cores = len(os.sched_getaffinity(0))
    if config.cluster.use_gpu and fewest > torch.cuda.device_count():
        raise ConfigError(
            f"{fewest} workers of a GPU each",
            expected=f"at most {torch.cuda.device_count()} GPUs, which this machine has",
            where="cluster.num_workers, cluster.use_gpu",
            next_step="lower cluster.num_workers, set cluster.use_gpu to false, or join a cluster with --address",
        )
    if fewest * config.cluster.cpus_per_worker > num_cores:
        raise ConfigError(
            f"{fewest} workers of {config.cluster.cpus_per_worker:g} CPUs",
            expected=f"at most {num_cores} CPUs, which this machine has",
            where="cluster.num_workers, cluster.cpus_per_worker",
            next_step="lower one of them, or join a larger cluster with --address",
        )
    folder = _socket_folder()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # this cluster listens on this machine only
    try:
        ray.init(
            address="local", include_dashboard=False, _temp_dir=folder, num_cpus=num_cores,
            log_to_driver=False, logging_level=logging.ERROR,
        )  # fmt: skip
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
