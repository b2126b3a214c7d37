"""Owns small whole runs for tests: shards, a config, the command here or in processes of its own, a kill in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from dist_mlpl.chain import read_chain, read_model
from dist_mlpl.checkpoint import read_state
from dist_mlpl.config import check_config
from dist_mlpl.progress import Action, JsonLines, Report, Sink
from dist_mlpl.train import train
from shards.build import build
from shards.sources.table import read_table
from tests.support.forks import Verb
from tests.support.images import write_images

REPOSITORY = Path(__file__).parents[2]


def tiny_shards(folder: Path, *, num_train: int = 104, num_test: int = 40, num_classes: int = 5, out: str = "") -> str:
    """Shards of tiny images with random labels; several shards a split."""
    names = [f"{split}{n:04d}.jpg" for split, count in (("train", num_train), ("test", num_test)) for n in range(count)]
    write_images(folder / "images", names)
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(len(names), num_classes, generator=generator) < 0.4
    lines = [
        f"{name},{'|'.join(f'class{c}' for c in range(num_classes) if row[c])}"
        for name, row in zip(names, present, strict=True)
    ]
    (folder / "labels.csv").write_text("\n".join(["image,labels", *lines]) + "\n")
    (folder / "classes.csv").write_text("\n".join(["class", *(f"class{c}" for c in range(num_classes))]) + "\n")
    splits = [f"{name},{name[:-8]}" for name in names]
    (folder / "splits.csv").write_text("\n".join(["image,split", *splits]) + "\n")
    source = read_table(
        str(folder / "images"),
        str(folder / "labels.csv"),
        classes=str(folder / "classes.csv"),
        splits=str(folder / "splits.csv"),
    )
    return build(source, out or str(folder / "shards"), target_shard_bytes=32 << 10, workers=1).manifest.url


def tiny_config(manifest: str, **sections: Any) -> dict[str, Any]:
    """A run of 2 epochs of 6 steps on `tiny_shards`; sections replace or extend keys."""
    config: dict[str, Any] = {
        "num_epochs": 2,
        "global_batch": 16,
        "save_every_steps": 2,
        "data": {"manifest": manifest, "known_fraction": 0.6, "num_workers": 1, "max_bad_fraction": 0.0},
        "transform": {"size": 16, "scale": [0.5, 1.0]},
        "method": {"name": "partial_bce", "dropout": 0.2, "backbone": {"name": "resnet_small"}},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-2},
        "schedule": {"warmup_samples": 32},
        "engine": {"kind": "plain"},
    }
    for name, value in sections.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) and name in config else value
    if config["method"]["name"] in ("sst", "blending"):  # which have none
        del config["method"]["dropout"]
    return config


def train_in_process(
    config: Mapping[str, Any],
    out: Path,
    *sinks: Sink,
    ask: Callable[[], Action] = lambda: Action.GO_ON,
    **options: Any,
) -> None:
    """Train a config in this process; rows go to RUN/metrics and to the sinks, which are closed."""
    report = Report(lambda run, attempt: [*sinks, JsonLines(run, attempt)], ask)
    train(check_config({**config, "out": str(out)}, where="test"), report, **options)
    report.close()


def write_config(path: Path, config: Mapping[str, Any]) -> str:
    """The config as a YAML file."""
    path.write_text(yaml.safe_dump(dict(config)))
    return str(path)


def command(*arguments: str, num_ranks: int = 1) -> list[str]:
    """`dist-mlpl ARGUMENTS` of this checkout, alone or under torchrun."""
    if num_ranks == 1:
        return [sys.executable, "-m", "dist_mlpl.cli", *arguments]
    port = "--rdzv-endpoint=127.0.0.1:0"
    launcher = ["torch.distributed.run", f"--nproc-per-node={num_ranks}", "--rdzv-backend=c10d", port]
    own = [a for a in arguments if a != "--local"]  # torchrun takes it for an abbreviation of its own; it is implied
    return [sys.executable, "-m", *launcher, "-m", "dist_mlpl.cli", *own]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, one thread a rank, the checkout importable."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPOSITORY), **extra}


def run(*arguments: str, num_ranks: int = 1, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a verb without Ray to its end, on as many ranks; with `check`, a failure shows what it printed."""
    verb = Verb(*arguments, num_ranks=num_ranks, variables=environment())
    return _checked(arguments, verb.finished(timeout), check=check)


def run_command(
    *arguments: str, num_ranks: int = 1, check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess:
    """The same as a person starts it, by Python or torchrun, with all imports before it."""
    done = subprocess.run(
        command(*arguments, num_ranks=num_ranks), env=environment(), capture_output=True, text=True, timeout=timeout
    )
    return _checked(arguments, done, check=check)


def _checked(
    arguments: tuple[str, ...], done: subprocess.CompletedProcess, *, check: bool
) -> subprocess.CompletedProcess:
    if check and done.returncode != 0:
        raise AssertionError(f"{arguments} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_until(
    is_reached: Callable[[], bool], *arguments: str, num_ranks: int = 1, with_signal: int = signal.SIGKILL
) -> subprocess.CompletedProcess:
    """Start a verb without Ray and signal all its processes once a condition holds.

    Returns:
        The finished processes.
    """
    verb = Verb(*arguments, num_ranks=num_ranks, variables=environment())
    deadline = time.monotonic() + 240
    while not is_reached():
        if not verb.is_running or time.monotonic() > deadline:
            verb.signal(signal.SIGKILL)
            done = verb.finished(60)
            raise AssertionError(f"ended before the condition held: {done.stdout}\n{done.stderr}")
        time.sleep(0.005)  # between looks at the condition
    verb.signal(with_signal)
    return verb.finished(120)


def rows_reach(out: Path, step: int) -> Callable[[], bool]:
    """A condition: some attempt of the run has reported this step."""
    return lambda: any(f'"event": "step", "step": {step},' in path.read_text() for path in out.glob("metrics/*.jsonl"))


def assert_same_end(one: str, other: str) -> None:
    """Two runs' newest commits hold bit-equal models and moments, at the same step."""
    heads = [read_chain(url)[-1] for url in (one, other)]
    assert heads[0].step == heads[1].step
    models = [read_model(url, head) for url, head in zip((one, other), heads, strict=True)]
    moments = [read_state(url, head).moments for url, head in zip((one, other), heads, strict=True)]
    for first, second in (models, moments):
        assert first.keys() == second.keys()
        different = [name for name in first if not torch.equal(first[name], second[name])]
        assert not different, f"{len(different)} of {len(first)} tensors differ, first {different[0]}"
