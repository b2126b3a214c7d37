"""Owns making a sweep's runs: concurrent child processes; finished runs are skipped, failed ones recorded."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Final, NamedTuple

from dist_mlpl import storage
from dist_mlpl.cli_options import INTERRUPTED
from dist_mlpl.errors import ConfigError, MlplError, RunError, nearest_names
from dist_mlpl.tools.sweep import PlannedRun, check_folders, epochs_done, result_of
from dist_mlpl.tools.sweep_page import write_tables
from dist_mlpl.tools.sweep_table import Result, tabulate

_LOOK_SECONDS: Final = 0.2  # time between checks of the child processes
_TELL_SECONDS: Final = 3.0  # time between progress reports
_SHOWN_LINES: Final = 12  # lines kept of a failed run's output

Tell = Callable[[str, int, int], None]  # (what is counted, how much is done, total)


class Failure(NamedTuple):
    """A run that ended without a result."""

    run: PlannedRun
    why: str  # the last lines of its output, or the error


class Outcome(NamedTuple):
    """The state of a sweep at its end."""

    results: list[Result]  # results of all finished runs, in planned order
    failures: list[Failure]
    num_left: int  # runs neither finished nor failed, when the sweep was asked to stop


class _Child:
    """One run as a process in its own session: Ctrl-C in the terminal reaches only the sweep, which relays it."""

    def __init__(self, run: PlannedRun, environment: Mapping[str, str]) -> None:
        self.run = run
        self._printed: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dist_mlpl.tools.sweep_child", str(os.getpid()), *run.arguments],
            env=environment, stdin=subprocess.DEVNULL, stdout=self._printed, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._began = time.monotonic()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def ask_to_stop(self) -> None:
        """Ask the run to commit and stop."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the run at once; its chain stays intact."""
        self._process.kill()
        self._process.wait()
        self._printed.close()

    def take_ending(self) -> tuple[int, float, str]:
        """Exit status, running time in seconds, and the last lines of output; the run must have ended."""
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").splitlines()
        self._printed.close()
        return self._process.returncode, time.monotonic() - self._began, "\n".join(lines[-_SHOWN_LINES:])


class Queue:
    """Makes the missing runs of a sweep.

    Args:
        runs: in the order in which they are begun.
        num_jobs: number of concurrent runs, at least 1; each gets an equal share of this machine's cores as threads.
        is_asked: whether to stop; active runs then commit and end, and no other is begun.
        tell: called every few seconds with the number of epochs done.
        say: called with a line about each run that ends.
        is_new: called with all results whenever there is a new one.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        *,
        num_jobs: int,
        is_asked: Callable[[], bool],
        tell: Tell,
        say: Callable[[str], None],
        is_new: Callable[[list[Result]], None],
    ) -> None:
        self._runs, self._num_jobs = runs, num_jobs
        self._is_asked, self._tell, self._say, self._is_new = is_asked, tell, say, is_new
        threads = max(1, len(os.sched_getaffinity(0)) // num_jobs)
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        self._results: dict[str, Result] = {}
        self._failures: list[Failure] = []
        self._waiting: deque[PlannedRun] = deque()
        self._active: list[_Child] = []

    def make(self) -> Outcome:
        """Make every run that has no result yet; each is tried once."""
        for run in self._runs:
            self._look_up(run)
        if self._results:
            self._say(f"{len(self._results)} of {len(self._runs)} runs are finished already")
        told, is_stopping = 0.0, False
        try:
            while self._active or (self._waiting and not is_stopping):
                while self._waiting and len(self._active) < self._num_jobs and not is_stopping:
                    self._active.append(_Child(self._waiting.popleft(), self._environment))
                if time.monotonic() - told > _TELL_SECONDS:
                    self._tell_progress()
                    told = time.monotonic()
                time.sleep(_LOOK_SECONDS)
                for child in [child for child in self._active if child.has_ended()]:
                    self._active.remove(child)
                    self._settle(child)
                if self._is_asked() and not is_stopping:
                    is_stopping = True
                    for child in self._active:
                        child.ask_to_stop()
        finally:  # children remain only after an error, or a second Ctrl-C
            for child in self._active:
                child.kill()
        return Outcome(self._listed(), self._failures, len(self._runs) - len(self._results) - len(self._failures))

    def _look_up(self, run: PlannedRun) -> None:
        """Sort a run into finished, failed or waiting before anything is started."""
        try:
            result = result_of(run)
        except MlplError as error:
            self._failures.append(Failure(run, str(error)))
            self._say(f"{run.name}: cannot go on: {error.found}")
            return
        if result is None:
            self._waiting.append(run)
        else:
            self._results[run.name] = result

    def _settle(self, child: _Child) -> None:
        status, seconds, printed = child.take_ending()
        if self._is_asked() and status in (INTERRUPTED, -signal.SIGTERM):
            return  # the next sweep resumes it from its last commit
        try:
            result = result_of(child.run) if status == 0 else None
        except MlplError as error:
            result, printed = None, str(error)
        if result is None:
            self._failures.append(Failure(child.run, printed))
            self._say(f"{child.run.name}: failed with status {status} after {seconds:.0f} s: {_reason(printed)}")
            return
        self._results[child.run.name] = result
        numbers = "  ".join(f"{name} {result.metrics[name]:.4f}" for name in ("mAP", "OF1") if name in result.metrics)
        self._say(f"{child.run.name}: {numbers}  {seconds:.0f} s")
        self._is_new(self._listed())

    def _listed(self) -> list[Result]:
        return [self._results[run.name] for run in self._runs if run.name in self._results]

    def _tell_progress(self) -> None:
        """Report epochs done over all runs; those of failed runs count as done."""
        open_runs = {run.name for run in self._waiting} | {child.run.name for child in self._active}
        done = sum(epochs_done(run) if run.name in open_runs else run.config.num_epochs for run in self._runs)
        self._tell(f"epochs of {len(self._runs)} runs", done, sum(run.config.num_epochs for run in self._runs))


def _reason(printed: str) -> str:
    """The line of a run's last output that says why it failed: what an error found, else the last line."""
    lines = printed.strip().splitlines() or ["it printed nothing"]
    before = [line for line, after in itertools.pairwise(lines) if after.startswith("  expected: ")]
    return (before or lines)[-1].strip()


def make_sweep(
    runs: Sequence[PlannedRun],
    *,
    out: str,
    num_jobs: int,
    baseline: str | None,
    is_asked: Callable[[], bool],
    tell: Tell,
    say: Callable[[str], None],
) -> Outcome:
    """Make the missing runs, and rewrite the table whenever one has finished; without a result no table is written.

    Args:
        runs: from `plan_sweep`.
        out: folder or URL for the table, and for OUT/failures/RUN.txt with the last output of each failed run.
        num_jobs, is_asked, tell, say: see `Queue`.
        baseline: method that the table compares with; None for no comparison.

    Raises:
        ConfigError: no method of that name in the sweep, or OUT holds runs with other settings; nothing is written.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    if baseline is not None and baseline not in methods:
        raise ConfigError(
            f"no method {baseline!r} in this sweep",
            expected=nearest_names(baseline, methods),
            where="--baseline",
            next_step="name one of the configs without its folder and ending",
        )

    if runs:
        storage.configure_storage(runs[0].config.data.storage_options)
        check_folders(runs, out)

    def write(results: list[Result]) -> None:
        write_tables(out, tabulate(results, baseline=baseline), results, baseline=baseline)

    queue = Queue(runs, num_jobs=num_jobs, is_asked=is_asked, tell=tell, say=say, is_new=write)
    outcome = queue.make()
    if outcome.results:
        write(outcome.results)
    folder, failed = storage.join(out, "failures"), {failure.run.name: failure for failure in outcome.failures}
    written = set(storage.list_names(folder))
    for run in runs:
        url = storage.join(folder, f"{run.name}.txt")
        if run.name in failed:
            storage.write_bytes(url, f"{run.command}\n\n{failed[run.name].why}\n".encode())
        elif storage.name(url) in written:
            storage.remove(url)  # from an earlier failure
    return outcome


def check_outcome(outcome: Outcome, out: str) -> None:
    """Raise an error that names the failed runs, if there are any.

    Raises:
        RunError: at least one run failed.
    """
    if outcome.failures:
        names = ", ".join(failure.run.name for failure in outcome.failures)
        count, others = len(outcome.failures), len(outcome.results)
        raise RunError(
            f"{count} {'run' if count == 1 else 'runs'} failed: {names}; the first: {_reason(outcome.failures[0].why)}",
            expected="every run to end in a result" + (f"; {others} did" if others else ""),
            where=storage.shown(storage.join(out, "failures")),
            next_step="see why there and correct it; the same command then makes what is missing",
        )
