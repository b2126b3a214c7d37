"""Owns a run's reports: rows of numbers, written as JSON lines and TensorBoard files, and its logs.

Rank 0 makes rows; sinks take them. A row is a flat dict with an `event`: start, step, epoch, commit, scoring, round,
stopped or note.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from dist_mlpl import comm, storage
from dist_mlpl.batch import METRIC, Loading, Progress, StepOutput
from dist_mlpl.errors import StorageError

log = logging.getLogger(__name__)

_ROWS: Final = re.compile(r"(?P<attempt>\d+)-(?P<number>\d+)\.jsonl")

Row = dict[str, Any]


class Action(IntEnum):
    """What the training loop must do after a step; the largest value over ranks wins."""

    GO_ON = 0
    STOP = 1  # save, then return


class Sink(Protocol):
    """The interface of a receiver of rows, on rank 0."""

    def row(self, row: Row) -> None:
        """Take one row."""

    def flush(self) -> None:
        """Make the rows so far durable; called at each commit."""

    def close(self) -> None:
        """Release resources; no more rows follow."""


class Report:
    """Reports on a run for the training loop, with the same calls on every rank.

    Args:
        make_sinks: makes the sinks from the run folder and the attempt's name; called on rank 0 only.
        ask: the action asked of this rank (by a signal or the driver); must be cheap.
    """

    def __init__(
        self,
        make_sinks: Callable[[str, str], Sequence[Sink]] = lambda out, attempt: (),
        ask: Callable[[], Action] = lambda: Action.GO_ON,
    ) -> None:
        self._make_sinks, self._ask = make_sinks, ask
        self._sinks: Sequence[Sink] = ()
        self._failing: set[int] = set()  # ids of sinks whose last call failed
        self._global_batch = 0
        self._clock = 0.0
        self._loading = Loading()  # at the last row
        self._losses: list[float] = []  # of the steps since the last evaluation
        self._metrics: dict[str, float] = {}  # sums of the method's metrics over the same steps
        self._seconds = 0.0  # total time of the same steps

    def begin(self, out: str, attempt: str, progress: Progress, *, global_batch: int, about: Row) -> None:
        """Report that a run starts or resumes.

        Args:
            out: URL of the run folder, RUN.
            attempt: name of the attempt.
            progress: where the run stands.
            global_batch: G.
            about: more entries for the row (epochs, steps, classes, processes, method).
        """
        if comm.rank() == 0:
            self._sinks = self._make_sinks(out, attempt)
        self._global_batch = global_batch
        self._clock = time.perf_counter()
        self._emit({"event": "start", "attempt": attempt, **_position(progress), **about})

    def note(self, text: str) -> None:
        """Report something that the user should read once."""
        self._emit({"event": "note", "text": text})

    def step(self, progress: Progress, output: StepOutput, loading: Loading) -> Action:
        """Report that a step is done.

        Args:
            progress: where the run stands after the step.
            output: the step's output, for the global batch.
            loading: this rank's totals.

        Returns:
            What to do next, the same on all ranks.

        Collective: all ranks, one all-reduce of 4 bytes.
        """
        now = time.perf_counter()
        seconds, self._clock = max(now - self._clock, 1e-9), now
        waited, num_bytes, retries, num_samples, num_direct = (
            total - before for total, before in zip(loading, self._loading, strict=True)
        )
        self._loading = loading
        self._losses.append(float(output.loss))
        self._seconds += seconds
        extras = output.extras
        metrics = {name: value for name, value in extras.items() if name.startswith(METRIC)}
        for name, value in metrics.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value
        self._emit(
            {
                "event": "step",
                **_position(progress),
                "loss": float(output.loss),
                **{f"loss/{name}": float(term) for name, term in output.terms.items()},
                **metrics,
                "grad_norm": extras["grad_norm"],
                "learning_rate": extras["learning_rate"],
                "num_bad": extras["num_bad"],
                "images_per_second": self._global_batch / seconds,
                "wait_fraction": min(1.0, max(0.0, waited / seconds)),
                "bytes_read_per_second": num_bytes / seconds,
                "cache_hit_fraction": 1.0 - num_direct / max(1, num_samples),
                "retries": retries,
            }
        )
        return Action(int(comm.reduce_max(torch.tensor([int(self._ask())], dtype=torch.int32))))

    def epoch(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Report that an epoch was evaluated; `progress` is at the start of the next. Flushes the sinks."""
        self._emit({"event": "epoch", **_position(progress), **self.train_metrics(), **metrics})
        self._losses, self._metrics, self._seconds = [], {}, 0.0
        self._flush()
        self._clock = time.perf_counter()  # the evaluation does not count against the next step's images/s

    def scoring(self, progress: Progress, done: int, total: int) -> None:
        """Report that `done` of this rank's `total` images are scored for a round of labels."""
        self._emit({"event": "scoring", **_position(progress), "num_scored": done, "num_to_score": total})

    def round(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Report that the round of labels `progress.round` is in force from now on. Flushes the sinks."""
        self._emit({"event": "round", **_position(progress), **metrics})
        self._flush()
        self._clock = time.perf_counter()

    def is_asked_to_stop(self) -> bool:
        """Whether this rank was asked to stop; other ranks may differ."""
        return self._ask() is Action.STOP

    def train_metrics(self) -> dict[str, float]:
        """Mean loss, means of the method's metrics, and images per second, over the steps since the last evaluation.

        Only steps of this attempt count; empty before the first one.
        """
        num_steps = len(self._losses)
        if not num_steps:
            return {}
        means = {f"train_{name.removeprefix(METRIC)}": total / num_steps for name, total in self._metrics.items()}
        rate = self._global_batch * num_steps / max(self._seconds, 1e-9)
        return {"train_loss": sum(self._losses) / num_steps, **means, "train_images_per_second": rate}

    def saved(self, progress: Progress) -> None:
        """Report that a commit exists, and flush the sinks so that the rows before it are durable too."""
        self._emit({"event": "commit", **_position(progress)})
        self._flush()
        self._clock = time.perf_counter()

    def stopped(self, progress: Progress) -> None:
        """Report that the run was asked to stop and has saved."""
        self._emit({"event": "stopped", **_position(progress)})

    def close(self) -> None:
        """Close all sinks; the run has returned or failed."""
        with ExitStack() as closing:  # every sink is closed, whatever one of them raises
            for sink in self._sinks:
                closing.callback(self._told, sink, sink.close)
        self._sinks = ()

    def _emit(self, row: Row) -> None:
        for sink in self._sinks:
            self._told(sink, sink.row, row)

    def _flush(self) -> None:
        for sink in self._sinks:
            self._told(sink, sink.flush)

    def _told(self, sink: Sink, act: Callable[..., None], *arguments: Row) -> None:
        """Call a sink. What it cannot write is told in the log, once until it can again; it never ends the run."""
        try:
            act(*arguments)
            self._failing.discard(id(sink))
        except (OSError, StorageError) as error:
            if id(sink) not in self._failing:
                log.warning("%s: rows of this run cannot be written, and it goes on: %s", type(sink).__name__, error)
            self._failing.add(id(sink))


def _position(progress: Progress) -> Row:
    return {
        "step": progress.step,
        "epoch": progress.epoch,
        "samples_consumed": progress.samples_consumed,
        "round": progress.round,
        "fraction": progress.fraction,
    }


class JsonLines:
    """A sink that writes rows as JSON lines under RUN/metrics.

    On a disk each line is written at once; in an object store, each commit writes a new object with the lines since the
    one before.

    Args:
        out: URL of the run folder, RUN.
        attempt: name of this attempt.
    """

    def __init__(self, out: str, attempt: str) -> None:
        self._folder, self._attempt = storage.join(out, "metrics"), attempt
        self._lines: list[str] = []
        self._number = 0
        self._file = None
        if not storage.is_remote(out):
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            self._file = open(Path(self._folder) / f"{attempt}-0.jsonl", "a")  # noqa: SIM115 - closed in close()

    def row(self, row: Row) -> None:
        line = json.dumps(without_nan(row)) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)

    def flush(self) -> None:
        if self._lines:
            url = storage.join(self._folder, f"{self._attempt}-{self._number}.jsonl")
            storage.write_bytes(url, "".join(self._lines).encode())
            self._lines, self._number = [], self._number + 1

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def without_nan(value: Any) -> Any:
    """Replace non-finite numbers in dicts and lists, at any depth, by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(out: str) -> list[Row]:
    """Read all rows in force, in order; rows after the commit from which the next attempt resumed are dropped."""
    folder = storage.join(out, "metrics")
    files = [match for name in storage.list_names(folder) if (match := _ROWS.fullmatch(name))]
    by_attempt: dict[str, list[Row]] = {}
    for file in sorted(files, key=lambda file: (file["attempt"], int(file["number"]))):
        lines = storage.read_bytes(storage.join(folder, file[0])).decode().splitlines()
        complete = [line for line in lines if line.endswith("}")]  # a killed process may leave half a line
        by_attempt.setdefault(file["attempt"], []).extend(json.loads(line) for line in complete)
    kept: list[Row] = []
    for rows in filter(None, by_attempt.values()):  # an attempt may have died before its first row
        kept = [row for row in kept if row.get("step", 0) <= rows[0]["step"]] + rows
    return kept


class TensorBoard:
    """A sink that writes scalars for TensorBoard, into RUN, or here and copied at commits if RUN is remote.

    Args:
        out: URL of the run folder, RUN.
        attempt: name of this attempt; each has its own folder, so that curves show where a run resumed.
    """

    def __init__(self, out: str, attempt: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 writes

        self._url = storage.join(out, "tensorboard", attempt)
        self._folder = Path(tempfile.mkdtemp(prefix="tensorboard-")) if storage.is_remote(out) else Path(self._url)
        self._writer = SummaryWriter(str(self._folder))

    def row(self, row: Row) -> None:
        sections = {"step": "train", "epoch": "evaluation", "round": "labels"}
        if row["event"] not in sections:
            return
        skipped = ("event", "step", "samples_consumed")
        for name, value in row.items():
            if name not in skipped and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{sections[row['event']]}/{name}", value, row["step"])

    def flush(self) -> None:
        if storage.is_remote(self._url):  # events since the last flush become an object of their own
            self._writer.close()  # the next scalar opens another file
            self._upload()
        else:
            self._writer.flush()

    def _upload(self) -> None:
        for path in sorted(self._folder.iterdir()):
            storage.upload(path, storage.join(self._url, path.name))
            path.unlink()

    def close(self) -> None:
        self._writer.close()
        if storage.is_remote(self._url):
            try:
                self._upload()
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)


class LogFile:
    """This rank's log, RUN/logs/ATTEMPT/rank-r.log; copied there at commits if RUN is remote.

    Args:
        out: URL of the run folder, RUN.
        attempt: name of this attempt.
        rank: this process's rank.
        has_output: redirect everything that the process prints into the log, libraries' output and crash traces
            included; for workers without a terminal.
    """

    def __init__(self, out: str, attempt: str, rank: int, *, has_output: bool = False) -> None:
        self._url = storage.join(out, "logs", attempt, f"rank-{rank}.log")
        self._is_remote = storage.is_remote(out)
        self._path = Path(self._url)
        if self._is_remote:
            self._path = Path(tempfile.mkdtemp(prefix="mlpl-log-")) / self._path.name
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a")  # noqa: SIM115 - closed in close()
        self._handler = logging.StreamHandler(self._file)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._handler.addFilter(lambda r: r.levelno >= logging.WARNING or r.name.startswith("dist_mlpl"))
        logging.getLogger().addHandler(self._handler)
        logging.getLogger("dist_mlpl").setLevel(logging.INFO)
        self._shown: dict[int, int] = {}  # duplicates of the original standard output and error
        if has_output:
            faulthandler.enable(self._file)
            for number in (1, 2):
                self._shown[number] = os.dup(number)
                os.dup2(self._file.fileno(), number)

    def copy(self) -> None:
        """Flush the log, and copy it to RUN if that is remote. A copy that fails is told in the log, and made later."""
        try:
            self._handler.flush()
            if self._is_remote:
                storage.upload(self._path, self._url)
        except (OSError, StorageError) as error:
            log.warning("the log could not be copied to %s: %s", storage.shown(self._url), error)

    def close(self) -> None:
        """Copy the log a last time, and restore standard output and error."""
        if self._shown:
            sys.stdout.flush()
            sys.stderr.flush()
            faulthandler.disable()
        for number, shown in self._shown.items():
            os.dup2(shown, number)
            os.close(shown)
        try:
            self.copy()
        finally:
            logging.getLogger().removeHandler(self._handler)
            self._file.close()
            if self._is_remote:
                shutil.rmtree(self._path.parent, ignore_errors=True)
