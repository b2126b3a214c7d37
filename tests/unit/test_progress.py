"""Claims about what a person sees: rows, the lines for finished epochs, the answer to a wish to stop."""

from __future__ import annotations

import errno
import io
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_mlpl import board, storage
from dist_mlpl.batch import METRIC, Loading, Progress, StepOutput
from dist_mlpl.config import check_config
from dist_mlpl.display import Display, epoch_line
from dist_mlpl.errors import StorageError
from dist_mlpl.progress import Action, JsonLines, LogFile, Report, Row, TensorBoard, read_rows
from tests.support.runs import tiny_config

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.unit

ABOUT = {"num_epochs": 2, "num_samples": 32, "num_steps": 4, "num_classes": 3}


class Rows(list):
    """A sink that keeps rows."""

    def row(self, row: dict) -> None:
        self.append(row)

    def flush(self) -> None:
        self.append({"event": "flushed"})

    def close(self) -> None:
        self.append({"event": "closed"})


def output(loss: float, **metrics: float) -> StepOutput:
    extras = {"grad_norm": 1.0, "learning_rate": 0.1, "num_bad": 0}
    extras |= {METRIC + name: value for name, value in metrics.items()}
    return StepOutput(torch.tensor(loss), {"bce": torch.tensor(loss)}, torch.zeros(2, 3), extras)


def begun(*sinks: object, ask=lambda: Action.GO_ON) -> Report:
    report = Report(lambda out, attempt: sinks, ask)
    report.begin("RUN", "0001", Progress(), global_batch=16, about=ABOUT)
    return report


def test_a_step_row_says_position_loss_terms_rate_and_waiting() -> None:
    rows = Rows()
    report = begun(rows)
    report.step(Progress(0, 16, 1, 0, 0.25), output(0.5), Loading())
    row = rows[-1]
    assert (row["event"], row["step"], row["epoch"], row["samples_consumed"]) == ("step", 1, 0, 16)
    assert row["loss"] == row["loss/bce"] == 0.5
    assert row["images_per_second"] > 0
    assert 0.0 <= row["wait_fraction"] <= 1.0


def test_step_rows_say_what_the_data_of_the_step_cost_not_of_the_run() -> None:
    rows = Rows()
    report = begun(rows)
    report.step(Progress(0, 16, 1), output(0.5), Loading(0.0, 10**6, 3, num_samples=16, num_direct=16))
    report.step(Progress(0, 32, 2), output(0.5), Loading(0.0, 10**6, 3, num_samples=32, num_direct=20))
    first, second = rows[-2], rows[-1]
    assert (first["retries"], second["retries"]) == (3, 0)
    assert (first["cache_hit_fraction"], second["cache_hit_fraction"]) == (0.0, 0.75)
    assert first["bytes_read_per_second"] > 0 == second["bytes_read_per_second"]


def test_an_epoch_row_has_the_mean_loss_of_its_own_steps_and_is_flushed() -> None:
    rows = Rows()
    report = begun(rows)
    for step, loss in enumerate((1.0, 2.0, 6.0), start=1):
        report.step(Progress(0, 16 * step, step), output(loss), Loading())
    report.epoch(Progress(1, 0, 3), {"mAP": 0.5})
    epoch = next(row for row in rows if row["event"] == "epoch")
    assert epoch["train_loss"] == 3.0
    assert epoch["mAP"] == 0.5
    assert rows[-1]["event"] == "flushed"
    assert report.train_metrics() == {}


def test_a_methods_metrics_are_in_its_steps_and_their_means_in_the_epoch_and_its_line() -> None:
    rows = Rows()
    report = begun(rows)
    for epoch in range(2):
        for step, share in enumerate((0.25, 0.75), start=1):
            report.step(Progress(epoch, 16 * step, step), output(1.0, slots_evicted_fraction=share + epoch), Loading())
        report.epoch(Progress(epoch + 1, 0, 2), {})
    assert [row["metric/slots_evicted_fraction"] for row in rows if row["event"] == "step"] == [0.25, 0.75, 1.25, 1.75]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert [row["train_slots_evicted_fraction"] for row in epochs] == [0.5, 1.5]
    assert "slots evicted 50.0%" in epoch_line(epochs[0], num_epochs=2)


def test_the_wish_to_stop_is_the_answer_to_a_step() -> None:
    report = begun(ask=lambda: Action.STOP)
    assert report.step(Progress(0, 16, 1), output(1.0), Loading()) is Action.STOP


def test_every_sink_is_closed_even_if_one_of_them_fails() -> None:
    class Failing(Rows):
        def close(self) -> None:
            raise ZeroDivisionError("full")

    first, last = Rows(), Rows()
    report = begun(first, Failing(), last)
    with pytest.raises(ZeroDivisionError, match="full"):
        report.close()
    assert first[-1]["event"] == last[-1]["event"] == "closed"


def test_rows_after_the_commit_that_the_next_attempt_went_on_from_are_not_read(tmp_path) -> None:
    for attempt, start, steps in (("0001", 0, (1, 2, 3)), ("0002", 2, (3, 4))):
        sink = JsonLines(str(tmp_path), attempt)
        sink.row({"event": "start", "step": start})
        for step in steps:
            sink.row({"event": "step", "step": step, "attempt": attempt, "loss": math.nan})
        sink.close()
    JsonLines(str(tmp_path), "0003").close()  # died before its first row
    steps = [(row["step"], row["attempt"]) for row in read_rows(str(tmp_path)) if row["event"] == "step"]
    assert steps == [(1, "0001"), (2, "0001"), (3, "0002"), (4, "0002")]
    assert read_rows(str(tmp_path))[1]["loss"] is None


def test_a_note_may_hold_brackets_and_an_epoch_is_one_line() -> None:
    stream = io.StringIO()
    display = Display(Console(file=stream, width=60))
    display.row({"event": "start", "attempt": "0002", "step": 2, "epoch": 1, "samples_consumed": 0, **ABOUT})
    display.row({"event": "note", "text": "[/gloo/pair.cc:561] lost"})
    display.row({"event": "epoch", "step": 4, "epoch": 2, "train_loss": 0.5, "train_images_per_second": 100.0,
                 "mAP": 0.25, "OF1": 0.5, "CF1": 0.5, "num_undecodable": 2.0})  # fmt: skip
    display.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "attempt 2 resumes at epoch 1, 0 samples in, step 2"
    assert lines[1] == "[/gloo/pair.cc:561] lost"
    assert lines[2].endswith("mAP 0.2500  OF1 0.5000  CF1 0.5000  100 images/s  2 undecodable")


def test_a_stop_is_heard_when_steps_take_longer_than_the_pushes_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        """A remote answer that is ready a little after it was asked for."""

        def __init__(self, action: Action) -> None:
            self.action, self.ready_at = action, clock[0] + 0.001

    class Push:
        @staticmethod
        def remote(rows: list) -> Answer:
            return Answer(Action.STOP)

    class Board:
        push = Push

    clock = [0.0]
    monkeypatch.setattr(board.ray, "wait", lambda refs, timeout: ([r for r in refs if r.ready_at <= clock[0]], []))
    monkeypatch.setattr(board.ray, "get", lambda ref: ref.action)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    sink = board.BoardSink(Board)
    heard = []
    for step in range(3):
        clock[0] += 10.0
        sink.row({"event": "step", "step": step})
        heard.append(sink.ask())
    assert heard == [Action.GO_ON, Action.STOP, Action.STOP]


WORKER = """
import logging, os, sys
from dist_mlpl.progress import LogFile
log = LogFile(sys.argv[1], "0001", 3, has_output=True)
print("a print")
os.write(2, b"a library below Python\\n")
logging.getLogger("dist_mlpl.x").info("a record")
logging.getLogger("elsewhere").info("chatter")
if sys.argv[2] == "dies":
    os.abort()
log.close()
print("shown again")
"""


@pytest.mark.parametrize("ending", ["returns", "dies"])
def test_a_workers_log_holds_what_it_and_its_libraries_print_to_the_last_word(tmp_path, ending: str) -> None:
    arguments = [sys.executable, "-u", "-c", WORKER, str(tmp_path), ending]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=REPOSITORY)
    text = (tmp_path / "logs" / "0001" / "rank-3.log").read_text()
    for part in ("a print", "a library below Python", "INFO dist_mlpl.x: a record"):
        assert part in text
    assert "chatter" not in text
    assert ("Fatal Python error: Aborted" in text) == (ending == "dies")
    assert done.stdout == ("shown again\n" if ending == "returns" else "")


class Broken:
    """A sink whose disk is full for some calls."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.calls = failing, list[str]()

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    def row(self, row: Row) -> None:
        self._call("row")

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("failing", [("row",), ("flush",), ("close",), ("row", "flush", "close")])
def test_a_sink_that_cannot_write_is_told_once_and_ends_nothing(
    failing: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = Broken(*failing), Broken()
    report = Report(lambda out, attempt: [broken, whole])
    report.begin("out", "0001", Progress(), global_batch=8, about={})
    for _ in range(3):
        report.saved(Progress())
    report.close()
    assert broken.calls == whole.calls == ["row", *["row", "flush"] * 3, "close"]
    told = [record for record in caplog.records if "Broken: rows of this run cannot be written" in record.getMessage()]
    expected = {
        ("row",): 3,
        ("flush",): 3,
        ("close",): 1,
    }  # the first two rows follow each other; then calls work between
    assert len(told) == expected.get(failing, 1)


def test_an_error_that_is_no_fault_of_a_disk_or_store_is_raised() -> None:
    class Wrong(Broken):
        def row(self, row: Row) -> None:
            raise ZeroDivisionError

    report = Report(lambda out, attempt: [Wrong()])
    with pytest.raises(ZeroDivisionError):
        report.begin("out", "0001", Progress(), global_batch=8, about={})


def test_curves_in_a_store_are_sent_once_and_read_back_whole(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    sink, sent = TensorBoard(url, "0001"), list[int]()
    for step in range(40):
        sink.row({"event": "step", "step": step, "loss": float(step)})
        if step % 10 == 9:
            sink.flush()
            sent.append(sum(size for _, size in storage.list_sizes(f"{url}/tensorboard/0001")))
    sink.close()
    growth = np.diff(sent)
    assert growth.max() < 1.1 * sent[0], "each flush sends its own rows, not all since the start"
    for name in storage.list_names(f"{url}/tensorboard/0001"):
        storage.download(f"{url}/tensorboard/0001/{name}", tmp_path / name)
    curves = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in curves.Scalars("train/loss")] == list(range(40))


def test_a_log_that_cannot_be_copied_is_told_and_copied_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url, upload = f"memory://{tmp_path.name}", storage.upload
    log = LogFile(url, "0001", 0)

    def refuse(path: Path, url: str) -> None:
        raise StorageError("refused", expected="", where="", next_step="")

    monkeypatch.setattr(storage, "upload", refuse)
    log.copy()
    assert "the log could not be copied" in caplog.text
    monkeypatch.setattr(storage, "upload", upload)
    log.close()
    assert "the log could not be copied" in storage.read_bytes(f"{url}/logs/0001/rank-0.log").decode()


def test_a_run_folder_given_as_a_file_url_is_that_folder(tmp_path: Path) -> None:
    config = check_config(tiny_config("shards") | {"out": f"file://{tmp_path}/run"}, where="test")
    assert config.run_folder == f"{tmp_path}/run"
