"""A claim about runs that remember heatmaps: killed in the middle of an epoch, they go on bit-equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_mlpl.banks.heatmaps import HeatmapBank
from dist_mlpl.chain import read_chain
from tests.support.banks import assert_same_banks, saved_bank
from tests.support.runs import assert_same_end, rows_reach, run, run_until, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.integration

METHOD = {"name": "spatial_consistency", "expected_positives": 2.0, "num_slots": 3, "map_size": 4}


def test_a_killed_run_resumes_with_bit_equal_slots_and_weights(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path / "tiny")
    whole, broken, mapped = tmp_path / "whole", tmp_path / "broken", tmp_path / "mapped"
    mapped.mkdir()
    config = write_config(tmp_path / "whole.yaml", tiny_config(shards, method=METHOD))
    run("train", config, "--local", "--out", str(whole))
    config = write_config(tmp_path / "broken.yaml", tiny_config(shards, method=METHOD | {"bank_folder": str(mapped)}))
    run_until(rows_reach(broken, 9), "train", config, "--local", "--out", str(broken))
    run("train", config, "--local", "--out", str(broken))
    assert_same_end(str(whole), str(broken))
    assert_same_banks(str(whole), str(broken))
    assert list(mapped.iterdir()) == []
    bank = HeatmapBank("slots", 104, num_slots=3, map_size=4, seed=0)
    rows = saved_bank(str(broken), read_chain(str(broken))[-1], bank)
    assert int((rows["visits"] == 2).sum()) >= 88  # of 96 a step can hold in an epoch
    assert torch.any(rows["heatmaps"] != 255)
