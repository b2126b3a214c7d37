"""Owns terminal output: a run's progress bar, a line per finished epoch, the table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from dist_mlpl.progress import Row

_LINE_SECONDS = 30.0  # time between progress lines in a log


class Display:
    """A sink that shows a bar while steps run and one line per finished epoch; without a terminal, only the lines.

    Args:
        console: where to print; standard error by default, which leaves standard output to results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self._bar = Bar(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=24),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}  {task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._about: Row = {}
        self._rate = 0.0
        self._num_bad, self._retries = 0, 0  # totals of this attempt

    def row(self, row: Row) -> None:
        event = row["event"]
        if event == "start":
            self._start(row)
        elif event == "step" and self._task is not None:
            self._step(row)
        elif event == "epoch":
            self._say(epoch_line(row, num_epochs=self._about.get("num_epochs", "?")))
        elif event == "scoring" and self._task is not None:
            numbers = f"a round of labels: {row['num_scored']:,} of {row['num_to_score']:,} scored by rank 0"
            self._bar.update(self._task, numbers=numbers, left="?")
        elif event == "round":
            self._say(round_line(row))
        elif event == "stopped":
            self._say(f"stopped and saved at step {row['step']}; the same command goes on from there")
        elif event == "note":
            self._say(row["text"])

    def _say(self, text: str) -> None:
        """Print a line of plain text: brackets are not markup, and narrow logs do not wrap it."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _start(self, row: Row) -> None:
        self._about = row
        if row["epoch"] >= row["num_epochs"]:
            self._say(f"the run is complete at step {row['step']}")
        elif row["step"] or int(row["attempt"]) > 1:
            where = f"epoch {row['epoch']}, {row['samples_consumed']} samples in, step {row['step']}"
            self._say(f"attempt {int(row['attempt'])} resumes at {where}")
        if self._task is None:
            self._task = self._bar.add_task(
                "", total=row["num_steps"], epoch=row["epoch"] + 1, epochs=row["num_epochs"], numbers="", left="?"
            )
            self._bar.start()
        self._bar.update(self._task, completed=row["step"])

    def _step(self, row: Row) -> None:
        assert self._task is not None
        rate = row["images_per_second"]
        self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        total = self._about["num_epochs"] * self._about["num_samples"]
        left = (1.0 - row["fraction"]) * total / max(self._rate, 1e-9)
        terms = [f"{name.removeprefix('loss/')} {value:.4f}" for name, value in row.items() if name.startswith("loss/")]
        parts = [f"{self._rate:.0f} images/s", f"wait {row['wait_fraction']:.0%}", f"loss {row['loss']:.4f}"]
        if row["bytes_read_per_second"] > 0:
            parts.append(f"{row['bytes_read_per_second'] / 1e6:.1f} MB/s, {row['cache_hit_fraction']:.0%} cached")
        self._num_bad += row["num_bad"]
        self._retries += row["retries"]
        parts += [f"{count} {what}" for what, count in (("bad", self._num_bad), ("retries", self._retries)) if count]
        numbers = "  ".join(parts + (terms if len(terms) > 1 else []))  # one term is the loss
        self._bar.update(
            self._task,
            completed=row["step"],
            epoch=min(row["epoch"] + 1, self._about["num_epochs"]),
            numbers=numbers,
            left=f"{int(left // 60)}:{int(left % 60):02d}",
        )

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._bar.stop()


def epoch_line(row: Row, *, num_epochs: Any) -> str:
    """One line about a finished epoch."""
    parts = [f"epoch {row['epoch']:>3}/{num_epochs}", f"step {row['step']}"]
    if "train_loss" in row:
        parts.append(f"loss {row['train_loss']:.4f}")
    parts += [f"{name} {row[name]:.4f}" for name in ("mAP", "OF1", "CF1") if name in row]
    for name, value in row.items():  # the method's metrics
        if name.startswith("train_") and name.endswith("_fraction"):
            parts.append(f"{name.removeprefix('train_').removesuffix('_fraction').replace('_', ' ')} {value:.1%}")
    if "train_loss" in row:
        parts.append(f"{row['train_images_per_second']:.0f} images/s")
    if row.get("num_undecodable"):
        parts.append(f"{row['num_undecodable']:.0f} undecodable")
    return "  ".join(parts)


def round_line(row: Row) -> str:
    """One line about a round of labels that comes into force."""
    parts = [f"labels of round {row['round']}: {row['num_present']:,.0f} present, {row['num_absent']:,.0f} absent"]
    parts += [f"{row['num_proposed']:,.0f} proposed"] if row.get("num_proposed") else []
    parts.append(f"{row['labelled_fraction']:.1%} of all labels in force")
    for sign in ("present", "absent"):
        share = row.get(f"hidden_precision_{sign}")
        parts += [f"{share:.1%} of {sign} right"] if share is not None and share == share else []  # NaN != NaN
    parts += [f"{row['num_flipped']:,.0f} flipped"] if row.get("num_flipped") else []
    return "  ".join(parts)


def metrics_table(metrics: dict[str, float]) -> Table:
    """A table of all metrics of one evaluation, fractions with four digits, counts as integers."""
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        is_count = name.startswith("num_") and float(value).is_integer()
        table.add_row(name, f"{value:.0f}" if is_count else f"{value:.4f}")
    return table


class _Pace:
    """The pace of one kind of work since it was first reported, possibly midway."""

    def __init__(self, done: int, num_bytes: int) -> None:
        self._began, self._done, self._num_bytes = time.monotonic(), done, num_bytes
        self._said = self._began

    def text(self, done: int, total: int, num_bytes: int) -> str:
        """Text like `1,900/s  310 MB/s  1:08:00 left`; empty before there is progress."""
        seconds = time.monotonic() - self._began
        if done <= self._done or seconds <= 0:
            return ""
        rate, byte_rate = (done - self._done) / seconds, (num_bytes - self._num_bytes) / seconds
        parts = [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"]
        if byte_rate > 0:
            parts.append(f"{byte_rate / 1e6:,.0f} MB/s")
        return "  ".join([*parts, f"{timedelta(seconds=round((total - done) / rate))} left"])

    def is_due(self) -> bool:
        """Whether the next line for a log is due; if so, the waiting time starts anew."""
        is_due = time.monotonic() - self._said > _LINE_SECONDS
        if is_due:
            self._said = time.monotonic()
        return is_due


@contextmanager
def work_bar() -> Iterator[Callable[..., None]]:
    """Show a progress bar: yields `tell(doing, done, total[, bytes done])`.

    Without a terminal, as in a log, it prints a line every half minute instead.
    """
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, tuple[TaskID, _Pace]] = {}

        def tell(doing: str, done: int, total: int, num_bytes: int = 0) -> None:
            if doing not in tasks:
                tasks[doing] = bar.add_task(doing, total=total, pace=""), _Pace(done, num_bytes)
            task, pace = tasks[doing]
            text = pace.text(done, total, num_bytes)
            bar.update(task, completed=done, total=total, pace=text)
            if not console.is_terminal and pace.is_due():
                console.print(f"{doing}: {done:,} of {total:,}  {text}", markup=False, highlight=False, soft_wrap=True)

        yield tell
