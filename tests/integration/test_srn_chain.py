"""Claims about SRN's stages as runs: each goes on from the one before, and a killed one resumes to the bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_mlpl.chain import read_chain, read_model
from dist_mlpl.errors import CheckpointError, ConfigError
from tests.support.runs import assert_same_end, tiny_config, tiny_shards, train_in_process

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

STAGES = ("main", "attention", "branch", "joint")
SPATIAL = {"layer": "layer2", "attention_width": 8, "mixed_width": 8, "kernels": 2, "norm": "batch"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chain(shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run a stage, each from the one before."""
    folder = tmp_path_factory.mktemp("chain")
    runs: dict[str, Path] = {}
    for stage in STAGES:
        runs[stage] = folder / stage
        train_stage(shards, runs[stage], stage, init_from=list(runs.values())[-2] if len(runs) > 1 else None)
    return runs


def train_stage(shards: str, out: Path, stage: str, *, init_from: Path | None, **options: Any) -> None:
    method = {"name": "srn", "stage": stage, "spatial": SPATIAL, "dropout": 0.2, "backbone": {"name": "resnet_small"},
              "init_from": None if init_from is None else str(init_from)}  # fmt: skip
    train_in_process(tiny_config(shards, num_epochs=1, method=method), out, **options)


def model_of(out: Path) -> dict[str, Tensor]:
    return read_model(str(out), read_chain(str(out))[-1])


def test_each_stage_moves_its_own_part_and_keeps_the_others_to_the_bit(chain: dict[str, Path]) -> None:
    models = {stage: model_of(out) for stage, out in chain.items()}
    for before, after in pairwise(STAGES[:3]):
        assert models[before].keys() < models[after].keys()
        assert all(torch.equal(value, models[after][name]) for name, value in models[before].items())
    assert models["branch"].keys() == models["joint"].keys()
    moved = {name for name, value in models["branch"].items() if not torch.equal(value, models["joint"][name])}
    for prefix in ("backbone.", "head.", "spatial.hidden.", "spatial.maps.", "spatial.regularization."):
        assert any(name.startswith(prefix) for name in moved), prefix


def test_a_stopped_stage_resumes_to_the_same_bits(chain: dict[str, Path], shards: str, tmp_path: Path) -> None:
    for stage, start in (("branch", "attention"), ("joint", "branch")):
        out = tmp_path / stage
        train_stage(shards, out, stage, init_from=chain[start], max_steps=3)
        train_stage(shards, out, stage, init_from=chain[start])
        assert_same_end(str(chain[stage]), str(out))


def test_a_stage_that_skips_one_is_refused_by_name(chain: dict[str, Path], shards: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a run of stage 'attention'") as refused:
        train_stage(shards, tmp_path / "run", "branch", init_from=chain["main"])
    assert str(chain["main"]) in refused.value.where


def test_a_stage_without_the_run_that_it_needs_is_refused_before_anything_is_opened(
    shards: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="stage 'attention' needs init_from, a run of stage 'main'"):
        train_stage(shards, tmp_path / "run", "attention", init_from=None)
    assert not (tmp_path / "run").exists()


def test_the_attention_stage_starts_from_any_method_with_the_same_trunk_and_head(shards: str, tmp_path: Path) -> None:
    other = {"name": "csl", "mode": "ignore", "backbone": {"name": "resnet_small"}}
    train_in_process(tiny_config(shards, num_epochs=1) | {"method": other}, tmp_path / "csl", max_steps=1)
    train_stage(shards, tmp_path / "run", "attention", init_from=tmp_path / "csl", max_steps=1)
    before, after = model_of(tmp_path / "csl"), model_of(tmp_path / "run")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
