"""Claims about training on several packed sets at once: every set has its weight, and the audit knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dist_mlpl.chain import read_chain
from dist_mlpl.config import load_config
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.data.mixture import MixedSet, load_mixture
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import ConfigError, ManifestError
from tests.support.runs import run, tiny_config, tiny_shards, train_in_process, write_config
from tests.support.sets import images_of, stream_over

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(tiny_shards(tmp_path_factory.mktemp(name))) for name in ("one", "two")]


def mixed(config: dict[str, Any], sets: list[str], *, weight: float = 1.5) -> dict[str, Any]:
    data = {key: value for key, value in config["data"].items() if not key.startswith("known_")}
    data |= {"manifest": [sets[0], {"manifest": sets[1], "weight": weight}]}
    return {**config, "data": data}


def test_samples_of_every_set_are_found_by_one_address(sets: list[str]) -> None:
    manifest = load_mixture([MixedSet(manifest=url) for url in sets])
    index = SplitIndex(manifest, "train")
    alone = [SplitIndex(load_manifest(url), "train") for url in sets]
    assert index.num_samples == sum(one.num_samples for one in alone)
    np.testing.assert_array_equal(
        index.targets_between(0, index.num_samples),
        np.concatenate([one.targets_between(0, one.num_samples) for one in alone]),
    )
    fetcher = stream_over(index).fetcher
    found = list(fetcher.take(fetcher.begin(np.arange(index.num_samples))))
    fetcher.close()
    assert found == [image for url in sets for image in images_of(load_manifest(url), "train")]


def test_a_run_over_a_mixture_stops_resumes_and_proves_exact(sets: list[str], tmp_path: Path) -> None:
    config, out = write_config(tmp_path / "run.yaml", mixed(tiny_config(sets[0], num_epochs=2), sets)), tmp_path / "run"
    run("train", config, "--local", "--out", str(out), "--max-steps", "3")
    run("train", config, "--local", "--out", str(out))
    proof = json.loads(run("audit", str(out), "--json").stdout)
    assert proof["is_exact"], proof
    sizes = [SplitIndex(load_manifest(url), "train").num_samples for url in sets]
    planned = sizes[0] + sizes[1] + round(0.5 * sizes[1])
    batch = yaml.safe_load(Path(config).read_text())["global_batch"]
    assert [epoch["num_planned"] for epoch in proof["epochs"]] == [planned // batch * batch] * 2


def test_a_memory_of_single_samples_has_a_row_for_each_where_an_epoch_leaves_some_out(
    sets: list[str], tmp_path: Path
) -> None:
    role = {"name": "single_positive", "loss": "role", "expected_positives": 2.0}
    config = mixed(tiny_config(sets[0], num_epochs=2, method=role), sets, weight=0.25)
    del config["method"]["dropout"]
    train_in_process(config, tmp_path / "run")
    record = read_chain(str(tmp_path / "run"))[-1].banks["estimates"]
    assert record.spec.num_rows == sum(SplitIndex(load_manifest(url), "train").num_samples for url in sets)


def test_sets_of_other_classes_and_views_over_a_mixture_are_refused(sets: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    document = json.loads((Path(sets[1]) / "manifest.json").read_text())
    document["unlisted"] = "absent" if document["unlisted"] == "unknown" else "unknown"
    (other / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="unlisted") as caught:
        load_mixture([MixedSet(manifest=sets[0]), MixedSet(manifest=str(other))])
    assert caught.value.where == str(other)
    config = mixed(tiny_config(sets[0]), sets)
    config["data"]["known_fraction"] = 0.5
    with pytest.raises(ConfigError, match="over one set"):
        load_config(write_config(tmp_path / "view.yaml", config), out=str(tmp_path / "run"))
