"""Owns the sampled profile of a run: traces of a few steps now and then, and a line that says where the time went."""

from __future__ import annotations

import gzip
import tempfile
import time
from pathlib import Path
from types import TracebackType

from torch.profiler import ProfilerActivity, profile

from dist_mlpl import comm, spans, storage
from dist_mlpl.batch import Progress
from dist_mlpl.progress import Report

_FIRST_STEP, _EVERY_STEPS = 4, 50  # steps of an attempt at which traces begin; the first few steps are atypical
_MEASURED_STEPS = 3  # steps measured per trace, after one that warms up the tracer
_NUM_TRACES = 4


class StepProfile:
    """Traces of sampled steps, under RUN/profile, for chrome://tracing or Perfetto.

    Args:
        out: URL of the run folder, RUN.
        attempt: name of this attempt.
        is_on: False takes no traces and costs nothing.
    """

    def __init__(self, out: str, attempt: str, *, is_on: bool) -> None:
        self._folder = storage.join(out, "profile")
        self._attempt = attempt
        self._is_on = is_on
        self._num_steps = 0
        self._tracer: profile | None = None
        self._began = 0.0

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        spans.measure(False)
        if self._tracer is not None:
            self._tracer.stop()

    def step(self, progress: Progress, report: Report) -> None:
        """Note that a step is done; start or end a trace when due. Called on all ranks.

        Args:
            progress: where the run stands after the step.
            report: receives the line that says where the time went.
        """
        number, phase = divmod(self._num_steps - _FIRST_STEP, _EVERY_STEPS)
        self._num_steps += 1
        if not self._is_on or not 0 <= number < _NUM_TRACES:
            return
        if phase == 0:
            self._tracer = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True)
            self._tracer.start()
        elif phase == 1:
            spans.measure(True)
            self._began = time.perf_counter()
        elif phase == 1 + _MEASURED_STEPS:
            seconds, total = spans.measure(False), time.perf_counter() - self._began
            self._save(progress.step)
            report.note(_where_time_went(progress.step, seconds, total))

    def _save(self, step: int) -> None:
        assert self._tracer is not None
        self._tracer.stop()
        name = f"{self._attempt}-step-{step:08d}-rank-{comm.rank()}.json"
        with tempfile.TemporaryDirectory(prefix="mlpl-profile-") as folder:
            path = Path(folder, name)
            self._tracer.export_chrome_trace(str(path))
            storage.write_bytes(storage.join(self._folder, f"{name}.gz"), gzip.compress(path.read_bytes(), 3))
        self._tracer = None


def _where_time_went(step: int, seconds: dict[str, float], total: float) -> str:
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    parts.append(("the rest", total - sum(seconds.values())))
    shown = ", ".join(f"{name} {value / total:.0%}" for name, value in parts)
    per_step = 1000 * total / _MEASURED_STEPS
    return f"profile of {_MEASURED_STEPS} steps to {step} on rank 0: {per_step:.0f} ms a step: {shown}"
