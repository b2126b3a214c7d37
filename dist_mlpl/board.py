"""Owns what passes between workers on Ray and the driver that shows and stops them."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train import TrainingFailedError, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dist_mlpl import comm
from dist_mlpl.errors import MlplError
from dist_mlpl.progress import Action, Row

_PUSH_SECONDS = 0.3  # at least, between two rows of steps


class Board:
    """An actor between workers and the driver: rows go one way, the wish to stop the other.

    Ray's trainer runs in it too, beside the other calls: nobody but the owner of Ray's controller can end it, and with
    this actor it ends, and the workers with it. From a thread of the driver it could not be ended at all.
    """

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._action = Action.GO_ON
        self._fatal: MlplError | None = None
        self._is_running = False

    @ray.method(concurrency_group="fit")
    def fit(self, trainer: TorchTrainer) -> Exception | None:
        """Run workers until they end; what Ray says of their failures, if it gave up on them."""
        try:
            trainer.fit()
        except TrainingFailedError as error:
            return error
        return None

    def push(self, rows: list[Row]) -> Action:
        """Rank 0 hands over rows and learns what the driver wants."""
        self._rows.extend(rows)
        return self._action

    def open(self) -> MlplError | None:
        """A worker begins: from now on workers are at work. The error that none should repeat, if there is one."""
        self._is_running = True
        return self._fatal

    def lose(self) -> None:
        """A group of workers has ended in an error; Ray may start another when it finds room for one."""
        self._is_running = False

    def take(self) -> tuple[list[Row], bool]:
        """The driver takes the rows, and learns whether workers are at work."""
        rows, self._rows = self._rows, []
        return rows, self._is_running

    def ask_stop(self) -> None:
        """The driver wants a commit and an end."""
        self._action = Action.STOP

    def give_up(self, error: MlplError) -> None:
        """A worker met an error that a restart would only repeat; the first one is kept."""
        self._fatal = self._fatal or error

    def fatal(self) -> MlplError | None:
        """That error, if there is one."""
        return self._fatal


def make_board() -> Any:
    """The actor, on the driver's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, concurrency_groups={"fit": 1}, scheduling_strategy=here)(Board)
    return actor.remote()


class BoardSink:
    """Rank 0's side of the board; never waits for it."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._rows: list[Row] = []
        self._answer: Any = None
        self._pushed = 0.0
        self.action = Action.GO_ON

    def row(self, row: Row) -> None:
        self._rows.append(row)
        if row["event"] != "step" or time.monotonic() - self._pushed > _PUSH_SECONDS:
            self._push()

    def ask(self) -> Action:
        """What the driver wanted when it was last heard of, which is not long ago."""
        self._listen()
        if self._answer is None and comm.rank() == 0 and time.monotonic() - self._pushed > _PUSH_SECONDS:
            self._push()  # where no rows are told for a while, a stop would not be heard
        return self.action

    def _listen(self) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self.action = max(self.action, Action(ray.get(self._answer)))
            self._answer = None

    def _push(self) -> None:
        self._listen()  # to the answer to the last push, before its successor takes its place
        self._answer = self._board.push.remote(self._rows)
        self._rows, self._pushed = [], time.monotonic()

    def flush(self) -> None:
        self._push()

    def close(self) -> None:
        self._push()


class Losses(UserCallback):
    """Tells the board, from Ray's own process, that a group of workers has ended in an error.

    Args:
        board: the actor.
    """

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """See Ray."""
        ray.get(self._board.lose.remote())
