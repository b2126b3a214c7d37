"""Owns a run without Ray, in this process or as one of torchrun's ranks; a signal makes it commit and stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

import torch.distributed as dist
from rich.console import Console

from dist_mlpl import comm
from dist_mlpl.config import Config
from dist_mlpl.display import Display, metrics_table, work_bar
from dist_mlpl.progress import Action, JsonLines, Report, Sink, TensorBoard
from dist_mlpl.tools.relabel_job import Relabelled, relabel_run
from dist_mlpl.train import train


class StopRequest:
    """Remembers SIGTERM and Ctrl-C as a request to stop; a second Ctrl-C interrupts at once.

    Args:
        answer: the line printed on standard error in response.
    """

    def __init__(self, answer: str = "stopping after this step, with a commit") -> None:
        self._answer = answer
        self.is_asked = False

    def listen(self) -> None:
        """Install handlers for both signals."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_asked = True
        with contextlib.suppress(OSError):  # written directly, as the signal may have interrupted Python's buffered I/O
            os.write(sys.stderr.fileno(), f"{self._answer}\n".encode())

    def action(self) -> Action:
        """The action that the training loop should take."""
        return Action.STOP if self.is_asked else Action.GO_ON


def train_here(
    config: Config, *, allow_change: bool = False, max_steps: int | None = None, is_profiled: bool = False
) -> bool:
    """Run a training in this process; see `train` for the arguments.

    Returns:
        True when a signal stopped the run before its end.
    """
    stop = StopRequest()
    stop.listen()
    last: dict[str, float] = {}
    report = Report(lambda out, attempt: run_sinks(out, attempt, LastEpoch(last), Display()), stop.action)
    try:
        progress = train(config, report, allow_change=allow_change, max_steps=max_steps, is_profiled=is_profiled)
    finally:
        report.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    if last:
        show_last(last, config.run_folder)
    return stop.is_asked and progress.epoch < config.num_epochs


def relabel_here(config: Config, *, step: int | None = None, manifest_url: str | None = None) -> Relabelled | None:
    """Make the next round of labels in this process.

    Args:
        config: from `job_config`.
        step, manifest_url: see `relabel_run`.

    Returns:
        The round; None when a signal stopped it.
    """
    stop = StopRequest("stopping; what is scored stays, and the same command goes on from there")
    stop.listen()
    try:
        with work_bar() as bar:

            def tell(done: int, total: int) -> None:
                if comm.rank() == 0:
                    bar("scored by rank 0", done, total)

            return relabel_run(
                config, step=step, manifest_url=manifest_url, is_asked=lambda: stop.is_asked, tell=tell
            )  # fmt: skip
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_sinks(out: str, attempt: str, *others: Sink) -> list[Sink]:
    """The sinks of rank 0's rows in every run: JSON lines, TensorBoard, and `others`, which show them."""
    return [JsonLines(out, attempt), TensorBoard(out, attempt), *others]


def show_last(metrics: dict[str, float], out: str) -> None:
    """Print the last evaluation as a table on standard error."""
    console = Console(file=sys.stderr)
    console.print(f"last evaluation of {out}", markup=False, highlight=False, soft_wrap=True)
    console.print(metrics_table(metrics))


class LastEpoch:
    """A sink that keeps the metrics of the last evaluation in a dict, for the table at the end."""

    def __init__(self, metrics: dict[str, float]) -> None:
        self._metrics = metrics

    def row(self, row: dict) -> None:
        if row["event"] == "epoch" and "mAP" in row:
            hidden = ("event", "step", "epoch", "samples_consumed", "round", "fraction")
            self._metrics.clear()
            self._metrics.update({name: value for name, value in row.items() if name not in hidden})

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
