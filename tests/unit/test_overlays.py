"""Claims about the files of rounds and how beliefs join human labels while reading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.data import label_store
from dist_mlpl.data.label_store import LabelStore, RoundBeliefs
from dist_mlpl.data.overlays import (
    KEPT,
    PREDICTED,
    Overlay,
    decode_overlay,
    encode_overlay,
    newest_round,
    read_round,
    round_url,
    unfinished_round,
)
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import CheckpointError
from tests.support.relabelling import beliefs_of, round_from_table, split_of
from tests.support.views import random_targets

pytestmark = pytest.mark.unit

N, C, SHARDS = 23, 6, [9, 1, 13]


def random_overlay(seed: int, *, has_soft: bool = True, num_samples: int = 9) -> Overlay:
    generator = np.random.default_rng(seed)
    rows, classes = np.nonzero(generator.random((num_samples, C)) < 0.4)
    k = len(rows)
    return Overlay(
        rows.astype(np.int32), classes.astype(np.uint16), generator.integers(-1, 2, k).astype(np.int8),
        generator.normal(size=k).astype(np.float16), generator.choice([PREDICTED, KEPT], k).astype(np.uint8),
        generator.random(k).astype(np.float16) if has_soft else None,
    )  # fmt: skip


def decoded(content: bytes, **changes: Any) -> Overlay:
    keys = {"num_samples": 9, "num_classes": C, "has_soft": True, "where": "test"} | changes
    return decode_overlay(content, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("has_soft", [True, False])
def test_an_overlay_survives_its_file_and_equal_ones_have_equal_bytes(has_soft: bool) -> None:
    overlay = random_overlay(1, has_soft=has_soft)
    content = encode_overlay(overlay)
    assert content == encode_overlay(random_overlay(1, has_soft=has_soft))
    for found, expected in zip(decoded(content, has_soft=has_soft), overlay, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or np.array_equal(found, expected)
    empty = decoded(encode_overlay(Overlay.empty(has_soft=has_soft)), has_soft=has_soft)
    assert len(empty.rows) == 0


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda o: o.where(np.arange(len(o.rows))[::-1]), "row-major"),
        (lambda o: o._replace(rows=o.rows + 5), "outside"),
        (lambda o: o._replace(classes=o.classes + np.uint16(4)), "outside"),
        (lambda o: o._replace(values=o.values * np.int8(2)), "no label"),
        (lambda o: o._replace(soft=o.soft + np.float16(1.5)), "soft label"),
        (lambda o: o._replace(soft=None), "empty cell"),
    ],
)
def test_an_overlay_that_cannot_be_is_refused(spoil: Any, word: str) -> None:
    with pytest.raises(CheckpointError, match=word):
        decoded(encode_overlay(spoil(random_overlay(2))))
    with pytest.raises(CheckpointError, match="does not read"):
        decoded(b"not Arrow")


def made(run: Path, targets: np.ndarray, **keys: Any) -> Any:
    settings = CurriculumSettings(**({"strategy": "score_threshold", "threshold": 0.5} | keys))
    scores = torch.randn(N, C, generator=torch.Generator().manual_seed(4))
    return round_from_table(run, settings, scores, targets, shard_sizes=SHARDS)


def addressed(sizes: list[int]) -> Any:
    """A split that finds shard and row of a sample, without files."""
    index = split_of(sizes, C)

    def rows(indices: np.ndarray) -> list[tuple[int, int]]:
        shards = np.searchsorted(index.starts, indices, side="right") - 1
        return list(zip(shards.tolist(), (indices - index.starts[shards]).tolist(), strict=True))

    return SimpleNamespace(**vars(index), rows=rows)


@pytest.mark.parametrize("keep_soft", [False, True])
def test_beliefs_join_only_where_nobody_spoke(keep_soft: bool, tmp_path: Path) -> None:
    targets = random_targets(N, C, seed=7, unknown=0.7)
    commit = made(tmp_path, targets, keep_soft=keep_soft)
    entries = beliefs_of(tmp_path, commit, SHARDS, C)
    told_since = random_targets(N, C, seed=8, unknown=0.7)  # labels that came after the round was made
    indices = np.random.default_rng(0).permutation(N)[:17]
    beliefs = RoundBeliefs(str(tmp_path), commit, addressed(SHARDS)).of(told_since[indices], indices)
    assert (beliefs.soft is not None) == keep_soft
    for place, sample in enumerate(indices.tolist()):
        for column in range(C):
            human, belief = int(told_since[sample, column]), entries.get((sample, column), 0)
            assert beliefs.values[place, column] == (belief if human == 0 else 0)
            if beliefs.soft is not None:
                soft = beliefs.soft[place, column]
                assert soft == (human + 1) / 2 if human else (soft > 0.5 if belief > 0 else soft <= 0.5)
                assert soft == 0.5 or human or belief


def test_few_shards_are_kept_and_each_is_read_once_while_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = made(tmp_path, np.zeros((N, C), dtype=np.int8))
    reads: list[int] = []
    read = label_store.read_overlay
    monkeypatch.setattr(
        label_store,
        "read_overlay",
        lambda run, commit, shard, **k: reads.append(shard) or read(run, commit, shard, **k),
    )
    beliefs = RoundBeliefs(str(tmp_path), commit, addressed(SHARDS))
    nothing = np.zeros((3, C), dtype=np.int8)
    for _ in range(2):
        beliefs.of(nothing, np.array([0, 9, 12]))
    assert reads == [0, 1, 2]
    monkeypatch.setattr(label_store, "KEPT_BYTES", 0)
    beliefs = RoundBeliefs(str(tmp_path), commit, addressed(SHARDS))
    reads.clear()
    for _ in range(2):
        beliefs.of(nothing, np.array([0, 9, 12]))
    assert reads == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("damage", ["missing", "changed", "short"])
def test_a_file_that_is_not_the_committed_one_is_refused(damage: str, tmp_path: Path) -> None:
    commit = made(tmp_path, np.zeros((N, C), dtype=np.int8))
    path = tmp_path / "rounds" / commit.files[2].path
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] + (b"" if damage == "short" else bytes([content[-1] ^ 1])))
    beliefs = RoundBeliefs(str(tmp_path), commit, addressed(SHARDS))
    beliefs.of(np.zeros((1, C), dtype=np.int8), np.array([0]))
    with pytest.raises(CheckpointError, match="train-000002"):
        beliefs.of(np.zeros((1, C), dtype=np.int8), np.array([N - 1]))


def test_a_round_exists_once_it_is_committed(tmp_path: Path) -> None:
    assert (newest_round(str(tmp_path)), unfinished_round(str(tmp_path))) == (0, None)
    commit = made(tmp_path, np.zeros((N, C), dtype=np.int8))
    assert (newest_round(str(tmp_path)), unfinished_round(str(tmp_path))) == (1, None)
    assert read_round(str(tmp_path), 1) == commit
    (tmp_path / "rounds" / "000001" / "commit.json").unlink()
    assert (newest_round(str(tmp_path)), unfinished_round(str(tmp_path))) == (0, 1)
    with pytest.raises(CheckpointError, match="round 1"):
        read_round(str(tmp_path), 1)


def test_a_round_of_another_view_or_other_shards_is_refused(tmp_path: Path) -> None:
    made(tmp_path, np.zeros((N, C), dtype=np.int8))
    index = SplitIndex.__new__(SplitIndex)  # identity alone is compared
    index.split, index.shards = "train", [SimpleNamespace()] * 3  # type: ignore[assignment]
    index.manifest = SimpleNamespace(digest="m")  # type: ignore[assignment]
    assert LabelStore(index, run=str(tmp_path)).at(1).round is not None
    view: Any = SimpleNamespace(digest="v")
    with pytest.raises(CheckpointError, match="another view"):
        LabelStore(index, view, run=str(tmp_path)).at(1)
    index.manifest = SimpleNamespace(digest="n")  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="another manifest"):
        LabelStore(index, run=str(tmp_path)).at(1)


def test_nothing_in_a_round_tells_where_or_when_it_was_made(tmp_path: Path) -> None:
    targets = random_targets(N, C, seed=7, unknown=0.7)
    for name in ("one", "other"):
        made(tmp_path / name, targets, keep_soft=True)
    files = [sorted(p for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("one", "other")]
    assert [p.relative_to(tmp_path / "one") for p in files[0]] == [p.relative_to(tmp_path / "other") for p in files[1]]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True))
    assert round_url(str(tmp_path / "one"), 1, "commit.json") in map(str, files[0])
