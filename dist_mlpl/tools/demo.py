"""Owns the demo: the whole system on one machine, with one worker killed during training."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from pathlib import Path

from rich.console import Console

from dist_mlpl import storage
from dist_mlpl.cluster import train_on_ray
from dist_mlpl.config import Config, load_config
from dist_mlpl.display import metrics_table
from dist_mlpl.errors import ConfigError, RunError
from dist_mlpl.progress import Row, read_rows
from dist_mlpl.tools.audit import audit
from dist_mlpl.tools.object_store import EmbeddedS3
from dist_mlpl.tools.scenes import write_scenes
from shards.build import build
from shards.sources.table import read_table

_MARKER = ".mlpl-demo"  # file that marks a folder that the demo made and may empty
_KILL_AT = 0.45  # fraction of the run after which the worker is killed
_SHOWN = ("mAP", "mAP_voc12", "OP", "OR", "OF1", "CP", "CR", "CF1", "exact_match", "num_images", "num_classes_scored")


class Assassin:
    """Watches the rows and sends SIGKILL to the last rank's process once, in the middle of the run.

    Args:
        say: console for messages.
        save_every_steps: steps between two commits; the kill falls between commits, so that steps are lost.
    """

    def __init__(self, say: Console, *, save_every_steps: int) -> None:
        self._say = say
        self._window = range(save_every_steps // 4, save_every_steps // 2)  # steps after a commit at which it may kill
        self._save_every_steps = save_every_steps
        self._processes: list[tuple[str, int]] = []
        self.killed_at_step: int | None = None
        self.resumed_at_step: int | None = None

    def row(self, row: Row) -> None:
        if row["event"] == "start":
            self._processes = row["processes"]
            if self.killed_at_step is not None:
                self.resumed_at_step = row["step"]
        elif row["event"] == "step" and row["fraction"] >= _KILL_AT and self.killed_at_step is None:
            if row["step"] % self._save_every_steps not in self._window:
                return
            host, pid = self._processes[-1]
            if host != socket.gethostname():
                raise RunError(
                    f"rank {len(self._processes) - 1} runs on {host}",
                    expected="this machine",
                    where="demo",
                    next_step="run the demo without RAY_ADDRESS",
                )
            self.killed_at_step = row["step"]
            self._say.print(
                f"[bold]step {row['step']}: SIGKILL to rank {len(self._processes) - 1} (process {pid})[/]",
                highlight=False,
            )
            os.kill(pid, signal.SIGKILL)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def run_demo(folder: str, *, num_epochs: int | None = None, config_path: str | None = None) -> None:
    """Make images, pack them into an S3 bucket, train on two workers, lose one, recover, and show the result.

    Args:
        folder: a new folder, or an earlier demo's, which is emptied. In the end it holds the images, and copies of the
            bucket's shards and run.
        num_epochs: overrides the config's.
        config_path: used instead of configs/demo.yaml.

    Raises:
        ConfigError: the folder holds something else.
        RunError: the run ended without losing and recovering its worker, or is not exact.
    """
    began = time.monotonic()
    say = Console(stderr=True)
    root = Path(folder).absolute()
    _empty(root)
    os.environ.pop("RAY_ADDRESS", None)
    with EmbeddedS3() as server:
        bucket = server.make_bucket("mlpl-demo")
        say.rule("1  images: handwritten digits composed into scenes")
        scenes = write_scenes(root / "scenes")
        say.print(f"{scenes.num_train + scenes.num_test} images in {scenes.images}", highlight=False)

        say.rule(f"2  shards: into {bucket} at {server.endpoint}")
        table = read_table(scenes.images, scenes.labels, classes=scenes.classes, splits=scenes.splits)
        manifest = build(table, storage.join(bucket, "shards"), target_shard_bytes=1 << 20, workers=2).manifest
        for name, split in manifest.splits.items():
            say.print(f"{name}: {split.num_samples} images in {len(split.shards)} tars", highlight=False)

        say.rule("3  training: two Ray workers, a DeepSpeed engine each, 30 % of labels known")
        config = demo_config(bucket, num_epochs=num_epochs, config_path=config_path)
        assassin = Assassin(say, save_every_steps=config.save_every_steps or 1)
        if train_on_ray(config, observer=assassin, is_result_shown=False):
            say.print("interrupted")
            return
        _check_recovery(assassin)

        say.rule("4  proof: every planned sample once, the kill included")
        report = audit(config.run_folder)
        positions = sum(proof.num_planned for proof in report.epochs)
        verdict = "exact" if not report.faults else "NOT exact: " + "; ".join(report.faults)
        say.print(
            f"killed after step {assassin.killed_at_step}, went on from the commit at step {assassin.resumed_at_step}; "
            f"{positions} positions in {len(report.epochs)} epochs: {verdict}",
            highlight=False,
        )
        for name in ("shards", "run"):
            _copy_down(storage.join(bucket, name), root / name)
    _show_result(say, root, seconds=time.monotonic() - began)
    if report.faults:
        raise RunError(
            report.faults[0], expected="an exact chain", where=str(root / "run"), next_step="report this fault"
        )


def _empty(root: Path) -> None:
    """Create the demo's folder, or empty it if an earlier demo made it.

    Raises:
        ConfigError: it holds something else.
    """
    marker = root / _MARKER
    if root.exists() and any(root.iterdir()) and not marker.exists():
        raise ConfigError(
            f"{root} is not empty",
            expected="a new folder, or one of an earlier demo",
            where="--folder",
            next_step="name another folder",
        )
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    marker.touch()


def demo_config(bucket: str, *, num_epochs: int | None, config_path: str | None) -> Config:
    """The demo's config, with its shards and run in the bucket."""
    path = config_path or str(Path(__file__).parents[2] / "configs" / "demo.yaml")
    overrides = [f"data.manifest={storage.join(bucket, 'shards')}"]
    if num_epochs is not None:
        overrides.append(f"num_epochs={num_epochs}")
    return load_config(path, overrides=overrides, out=storage.join(bucket, "run"))


def _check_recovery(assassin: Assassin) -> None:
    if assassin.killed_at_step is None or assassin.resumed_at_step is None:
        raise RunError(
            f"killed at step {assassin.killed_at_step}, resumed at step {assassin.resumed_at_step}",
            expected="a worker lost in the middle, and a recovery",
            where="demo",
            next_step="use more epochs: the run was over before the kill",
        )


def _copy_down(url: str, folder: Path) -> None:
    """Copy a folder of the bucket to disk, as the embedded server's contents end with it."""
    for name in storage.list_files(url):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.download(storage.join(url, name), path)


def _show_result(say: Console, root: Path, *, seconds: float) -> None:
    run = root / "run"
    last = [row for row in read_rows(str(run)) if row["event"] == "epoch" and "mAP" in row][-1]
    say.rule(f"5  the result, after {seconds:.0f} s in all")
    say.print(metrics_table({name: last[name] for name in _SHOWN}))
    say.print(
        f"the bucket ended with the demo; its copy:\n"
        f"  {run}/metrics      every step as JSON lines\n"
        f"  {run}/commits      the chain; checkpoints beside it\n"
        f"  {root}/shards   plain WebDataset tars and their manifest\n"
        f"  tensorboard --logdir {run}/tensorboard\n"
        f"  dist-mlpl evaluate {run} --manifest {root}/shards\n"
        f"  dist-mlpl audit {run} --manifest {root}/shards",
        highlight=False,
    )
