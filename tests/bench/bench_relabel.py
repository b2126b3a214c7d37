"""A round of labels against plain inference over the same images, in one run; and against S passes for S-pass rounds.

python -m tests.bench.bench_relabel [--repeats N] [--only resnet_small resnet18 resnet18-9605] [--rounds NAME ...]

Plain inference reads the same split with the same transform in blocks of 32 and throws the logits away. Rounds and
inference take turns in one process, so that what else the machine does meets all of them; a round's ratio is the
median over turns of its time over S times the mean of the inference before and after it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dist_mlpl.batch import RunLength
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.data.fetch import Fetcher
from dist_mlpl.data.label_store import Labels
from dist_mlpl.data.overlays import RoundModel
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import Stream
from dist_mlpl.data.transform import Transform, TransformSettings
from dist_mlpl.engine import Engine, EngineSettings
from dist_mlpl.methods.table import METHODS
from dist_mlpl.optimizer import OptimizerSettings, ScheduleSettings
from dist_mlpl.rounds.models import Model
from dist_mlpl.rounds.relabel import Scorer, make_round, plan_round
from dist_mlpl.world import World
from tests.support.images import tiny_jpeg
from tests.support.label_sets import label_split, write_label_set

BAR = 1.05
JPEG_SIDE = 256
KNOWN = 0.1  # of labels; 0.00066 with 9,605 classes

# Strategy, its keys, passes over the images S.
ROUNDS: dict[str, tuple[dict[str, Any], int]] = {
    "score_threshold": ({}, 1),
    "score_fraction": ({"fraction": 0.1}, 1),
    "class_precision": ({"precision": 0.51, "min_known": 1}, 1),
    "positive_only, flips": ({"flips": True}, 2),
    "ensemble of 3": ({"checkpoints": 3}, 3),
    "uncertainty, 4 passes": ({"num_passes": 4}, 4),
}


class Case(NamedTuple):
    """A model and a set."""

    backbone: str
    size: int  # pixels
    num_classes: int
    num_images: int


CASES = {
    "resnet_small": Case("resnet_small", 64, 17, 1536),
    "resnet18": Case("resnet18", 160, 601, 384),
    "resnet18-9605": Case("resnet18", 160, 9605, 384),
}


class Pass:
    """Everything a pass over one set needs."""

    def __init__(self, case: Case, folder: Path) -> None:
        generator = np.random.default_rng(0)
        known = KNOWN if case.num_classes < 5000 else 0.00066
        told = generator.random((case.num_images, case.num_classes)) < known
        targets = np.where(told, generator.choice([-1, 1], size=told.shape), 0).astype(np.int8)
        split = label_split(targets, num_shards=3)
        images = [tiny_jpeg(seed, height=JPEG_SIDE, width=JPEG_SIDE) for seed in range(case.num_images)]
        manifest = write_label_set(folder / "set", {"train": split._replace(images=images)}, unlisted="unknown")
        self.case = case
        self.index = SplitIndex(manifest, "train")
        self.labels = Labels(self.index, None)
        self._folder, self._num_rounds = folder, 0
        self._world = World(rank=0, size=1, local_rank=0, local_size=1)
        torch.manual_seed(0)
        settings = METHODS["partial_bce"](name="partial_bce", backbone={"name": case.backbone}, dropout=0.3)
        self.method = settings.build(num_classes=case.num_classes, image_size=case.size)
        self.engine = Engine(
            self.method, EngineSettings(kind="plain"), OptimizerSettings(), ScheduleSettings(),
            length=RunLength(1, case.num_images), world=self._world, global_batch=32, group_size=8, seed=0,
        )  # fmt: skip

    def stream(self) -> Stream:
        """Over the whole split, as in evaluation."""
        return Stream(
            self.index, Fetcher(self.index), Transform(TransformSettings(size=self.case.size), seed=0, train=False),
            world=self._world, num_workers=1, device=torch.device("cpu"), max_bad_fraction=0.0,
        )  # fmt: skip

    def infer(self) -> None:
        """Plain inference."""
        with closing(self.stream()) as stream:
            for batch in stream.evaluation_batches(self.labels):
                self.engine.predict(batch)

    def round(self, name: str) -> None:
        """A round, in a run folder of its own."""
        keys, _ = ROUNDS[name]
        many = {"max_per_image": 200} if self.case.num_classes > 200 else {}
        settings = CurriculumSettings(**({"strategy": name.split()[0].rstrip(","), "threshold": None} | many | keys))
        self._num_rounds += 1
        num_models = settings.checkpoints if settings.strategy == "ensemble" else 1
        records = [RoundModel(step=number, sha256="0" * 64) for number in range(num_models)]
        models = [Model(record, lambda batch: self.engine.predict(batch).logits) for record in records]
        run = str(self._folder / f"run-{self._num_rounds}")
        plan = plan_round(run, self.labels, settings, records, seed=0, scored_with="0")
        scorer = Scorer(settings, models, self.method, seed=0)
        with closing(self.stream()) as stream:
            commit = make_round(run, plan, self.labels, settings, scorer, stream)
        assert commit is not None
        assert commit.counts["num_samples"] == self.case.num_images


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """(wall, processor) time of some work."""
    began, began_cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - began_cpu


def measure(case: Case, repeats: int, names: Sequence[str]) -> tuple[float, dict[str, tuple[float, float, float]]]:
    """Seconds of plain inference; of every round named seconds, wall ratio and processor ratio."""
    with tempfile.TemporaryDirectory() as folder:
        one = Pass(case, Path(folder))
        one.infer()  # pages, allocator, threads
        plain = [seconds(one.infer)]
        rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
        for turn in range(repeats):
            for name in names:
                num_passes = ROUNDS[name][1]
                wall, cpu = seconds(lambda name=name: one.round(name))  # type: ignore[misc]
                plain.append(seconds(one.infer))
                beside = [num_passes * (a + b) / 2 for a, b in zip(plain[-2], plain[-1], strict=True)]
                rounds[name].append((wall, wall / beside[0], cpu / beside[1]))
                print(f"turn {turn + 1} of {repeats}  {name:<22} {wall:7.2f} s  {wall / beside[0]:.3f}", flush=True)
    medians = {
        name: tuple(statistics.median(column) for column in zip(*turns, strict=True)) for name, turns in rounds.items()
    }
    return statistics.median(wall for wall, _ in plain), medians  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    for name in asked.only:
        case = CASES[name]
        plain, rounds = measure(case, asked.repeats, asked.rounds)
        title = f"{case.num_images} images, {case.backbone} at {case.size} px, {case.num_classes} classes"
        table = Table(title=f"{title}; plain inference {plain:.2f} s", title_justify="left")
        for word in ("round", "S", "seconds", "time / S inferences", "processor", f"<= {BAR}"):
            table.add_column(word, justify="left" if word == "round" else "right")
        for strategy, (wall, ratio, cpu_ratio) in rounds.items():
            verdict = "met" if ratio <= BAR else "not met"
            table.add_row(
                strategy, str(ROUNDS[strategy][1]), f"{wall:.2f}", f"{ratio:.3f}", f"{cpu_ratio:.3f}", verdict
            )
        console.print(table)


if __name__ == "__main__":
    main()
