"""What is held out of a train split: whole shards, each sample on one side, its labels as they would be without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl.build import build_view, open_samples
from dist_mlpl.config import Config, check_config
from dist_mlpl.data.held_out import HELD_OUT, hold_out, run_manifest
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import Manifest, ShardEntry, SourceEntry, Split, load_manifest
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import ConfigError
from shards.simulate import simulate
from tests.support.held_out import possible_fraction
from tests.support.runs import tiny_config, tiny_shards

pytestmark = pytest.mark.unit


def manifest_of(sizes: list[int], **splits: list[int]) -> Manifest:
    """A manifest without files: shards of these sizes in `train`."""
    made = {
        name: Split.of(
            ShardEntry(
                file=f"{name}-{n}.tar", index=f"{name}-{n}.arrow", num_samples=size, num_bytes=1, index_sha256=""
            )
            for n, size in enumerate(numbers)
        )
        for name, numbers in {"train": sizes, **splits}.items()
    }
    source = SourceEntry(name="table", arguments={}, digest="")
    return Manifest.model_construct(
        version="0", classes=(), classes_sha256="", unlisted="absent", splits=made, source=source, packing=None,
        digest="d", url="/shards", parts={}, tars="", extensions=(),
    )  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.floats(0.05, 0.9))
def test_every_shard_is_on_one_side_and_the_part_is_as_large_as_asked(sizes: list[int], fraction: float) -> None:
    whole = manifest_of(sizes, test=[3])
    try:
        held = hold_out(whole, "train", fraction)
    except ConfigError:
        return  # such sizes cannot give the fraction; see below
    kept, out = held.split("train"), held.split(HELD_OUT)
    assert sorted([*kept.shards, *out.shards], key=whole.split("train").shards.index) == list(
        whole.split("train").shards
    )
    for side in (kept, out):  # in manifest order
        assert list(side.shards) == sorted(side.shards, key=whole.split("train").shards.index)
    assert abs(out.num_samples - fraction * sum(sizes)) <= 0.1 * fraction * sum(sizes)
    assert kept.num_samples + out.num_samples == sum(sizes)
    assert held.split("test") == whole.split("test")
    assert held.digest != whole.digest
    assert held == hold_out(whole, "train", fraction)


@pytest.mark.parametrize("sizes", [[100], [50, 50], [10, 1000]])
def test_shards_too_few_to_hold_out_the_fraction_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ConfigError) as caught:
        hold_out(manifest_of(sizes), "train", 0.2)
    assert "--target-shard-bytes" in caught.value.next_step
    assert "data.held_out_fraction" in caught.value.where


def test_a_set_that_has_such_a_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="held_out"):
        hold_out(manifest_of([5] * 10, held_out=[3]), "train", 0.2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def fraction(shards: str) -> float:
    """One that these few shards can give."""
    return possible_fraction(shards)


def config_of(shards: str, **data: Any) -> Config:
    return check_config(tiny_config(shards, data={"known_fraction": None, **data}), where="test")


def labels_seen(config: Config) -> dict[str, list[int]]:
    """Labels of each train sample as a run sees them, by the sample's key."""
    (index,) = open_samples(config.data, "train")
    assert isinstance(index, SplitIndex)
    store = LabelStore(index, build_view(config.data, index))
    targets = store.at(0).targets(np.arange(index.num_samples))
    keys = [key for shard in index.shard_indexes() for key in shard.keys]
    return dict(zip(keys, targets.tolist(), strict=True))


RULES = [{"known_fraction": 0.4}, {"known_fraction": 0.4, "known_rule": "exact_count"},
         {"known_fraction": 0.4, "known_rule": "dense_subset"}, {"known_rule": "single_positive"}, {}]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_held_out_or_not_a_sample_keeps_the_labels_that_its_view_leaves(
    shards: str, fraction: float, rule: dict[str, Any]
) -> None:
    whole = labels_seen(config_of(shards, **rule))
    kept = labels_seen(config_of(shards, held_out_fraction=fraction, **rule))
    assert 0 < len(kept) < len(whole)
    assert kept == {key: whole[key] for key in kept}


def test_a_view_on_disk_is_the_same_view_with_a_part_held_out(tmp_path: Path, fraction: float) -> None:
    own = tiny_shards(tmp_path)
    simulate(own, name="k40", rule="bernoulli", fraction=0.4)
    whole = labels_seen(config_of(own, view="k40"))
    kept = labels_seen(config_of(own, view="k40", held_out_fraction=fraction))
    assert kept == {key: whole[key] for key in kept}
    assert whole == labels_seen(config_of(own, known_fraction=0.4))


def test_the_two_sides_together_are_the_split(shards: str, fraction: float) -> None:
    data = config_of(shards, held_out_fraction=fraction).data
    whole = load_manifest(shards)
    rows = [SplitIndex(run_manifest(data), name).source_rows().tolist() for name in ("train", HELD_OUT)]
    assert sorted(rows[0] + rows[1]) == sorted(SplitIndex(whole, "train").source_rows().tolist())
    assert not set(rows[0]) & set(rows[1])


def test_another_part_makes_another_digest_of_manifest_and_view(shards: str, fraction: float) -> None:
    plain, held = (config_of(shards, known_fraction=0.4, held_out_fraction=part) for part in (None, fraction))
    digests = []
    for config in (plain, held):
        (index,) = open_samples(config.data, "train")
        view = build_view(config.data, index)
        assert view is not None
        digests.append((index.manifest.digest, view.digest))
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] != digests[1][1]


@pytest.mark.parametrize(
    "data",
    [
        {"manifest": ["a", "b"]},
        {"manifest": "", "unindexed": {"tars": {"train": "t"}, "classes": "c", "epoch_samples": 8}},
    ],
)
def test_nothing_is_held_out_of_mixtures_or_tars_without_an_index(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="held_out_fraction"):
        config_of("unused", **data, held_out_fraction=0.2)
