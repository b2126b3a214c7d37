"""Claims about a relabelling round on several ranks: the same bytes on any number, all fail together, none waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.batch import Batch
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.data.fetch import Fetcher
from dist_mlpl.data.label_store import Labels
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.data.overlays import RoundModel, newest_round, round_url
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import Stream
from dist_mlpl.data.transform import Transform, TransformSettings
from dist_mlpl.data.views import View
from dist_mlpl.errors import CheckpointError, MlplError, RunError, ShardError
from dist_mlpl.rounds import commit as round_commit
from dist_mlpl.rounds import relabel
from dist_mlpl.rounds.models import Model
from dist_mlpl.rounds.relabel import Scorer, make_round, plan_round
from dist_mlpl.rounds.truth import measure
from dist_mlpl.world import World
from tests.support.images import tiny_jpeg
from tests.support.label_sets import label_split, write_label_set
from tests.support.methods import tiny_method
from tests.support.ranks import run_ranks
from tests.support.runs import tiny_shards

pytestmark = pytest.mark.distributed

CASES: dict[str, dict[str, Any]] = {
    "threshold": {"strategy": "score_threshold", "threshold": 0.02, "max_per_class": 7, "cumulative": True},
    "fraction": {"strategy": "score_fraction", "fraction": 0.5, "max_per_image": 2, "agree_rounds": 2},
    "positive": {"strategy": "positive_only", "threshold": 0.02, "flips": True},
    "ensemble": {"strategy": "ensemble", "threshold": 0.03},
    "uncertainty": {"strategy": "uncertainty", "num_passes": 3, "max_variance": 0.05, "keep_soft": True},
    "precision": {"strategy": "class_precision", "precision": 0.55, "prior_quota": 1.0},
    "neighbours": {"strategy": "neighbours", "num_neighbours": 7, "threshold": 0.5, "flips": True},
}


class Place:
    """What a round needs, on this rank."""

    def __init__(self, manifest: str, rank: int, size: int, settings: CurriculumSettings) -> None:
        self.settings = settings
        self.index = SplitIndex(load_manifest(manifest), "train")
        view = View(
            "bernoulli", 0.6, None, shard_sizes=self.index.shard_sizes, source_rows=self.index.source_rows(),
            targets_of=self.index.targets_between, num_classes=self.index.manifest.num_classes,
        )  # fmt: skip
        self.labels = Labels(self.index, view)
        self.world = World(rank=rank, size=size, local_rank=rank, local_size=size)
        self.method = tiny_method("partial_bce", dropout=0.3)
        self.spoilt = -1  # sample about which the model answers NaN

    def predict(self, batch: Batch) -> Tensor:
        self.method.eval()
        with torch.no_grad():
            output = self.method(batch, None)
        answers = output.extras["embedding"] if self.settings.strategy == "neighbours" else output.logits
        answers[batch.index == self.spoilt, 3] = float("nan")
        return answers

    def round(self, run: str, **options: Any) -> Any:
        """The next round, or None when stopped."""
        records = [RoundModel(step=7, sha256="a"), RoundModel(step=3, sha256="b")]
        models = [Model(record, self.predict) for record in records]
        models[1] = Model(records[1], lambda batch: -0.5 * self.predict(batch))
        models = models if self.settings.strategy == "ensemble" else models[:1]
        plan = plan_round(run, self.labels, self.settings, [m.record for m in models], seed=5, scored_with="s")
        scorer = Scorer(self.settings, models, self.method, seed=5)
        stream = Stream(
            self.index, Fetcher(self.index), Transform(TransformSettings(size=32), seed=5, train=False),
            world=self.world, num_workers=1, device=torch.device("cpu"), max_bad_fraction=1.0,
        )  # fmt: skip
        try:
            return make_round(run, plan, self.labels, self.settings, scorer, stream, **options)
        finally:
            stream.close()


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def fail(rank: int, size: int, manifest: str, run: str) -> list[MlplError]:
    errors = []
    place = Place(manifest, rank, size, CurriculumSettings(strategy="score_threshold", threshold=0.0))
    place.spoilt = 41
    with pytest.raises(MlplError) as caught:
        place.round(run)
    errors.append(caught.value)
    other = Place(manifest, rank, size, CurriculumSettings(strategy="score_fraction"))
    with pytest.raises(MlplError) as caught:
        other.round(run)
    errors.append(caught.value)
    return errors


def two_rounds(rank: int, size: int, manifest: str, out: str, is_disturbed: bool) -> Any:
    """What hidden labels tell after two rounds of each case; disturbed ones are stopped after their first blocks and
    begun again, and rounds that cannot be follow."""
    torch.set_num_threads(1)
    relabel._LOOK_BLOCKS = 1 if is_disturbed else 16
    round_commit.piece_samples = lambda num_samples: 8  # two pieces in most shards
    measured = {}
    for name, keys in CASES.items():
        place, run = Place(manifest, rank, size, CurriculumSettings(**keys)), f"{out}/{name}"
        for number in (1, 2):
            if is_disturbed:
                assert place.round(run, is_asked=lambda: comm.rank() == 1) is None
                assert comm.broadcast_object(newest_round(run)) == number - 1
            commit = place.round(run)
            assert commit.round == number
            comm.gather_objects(None)
        measured[name] = measure(run, commit, place.labels)
    return measured, fail(rank, size, manifest, f"{out}-failing") if is_disturbed else []


def test_a_pass_that_stopped_at_a_score_which_is_no_number_leaves_nothing_that_a_later_one_would_believe(
    tmp_path: Path,
) -> None:
    generator = np.random.default_rng(0)
    split = label_split(generator.choice([-1, 0, 1], (256, 5)).astype(np.int8), num_shards=1)
    images = [tiny_jpeg(seed) for seed in range(256)]
    set_url = write_label_set(tmp_path / "set", {"train": split._replace(images=images)}, unlisted="unknown").url
    place = Place(set_url, 0, 1, CurriculumSettings(strategy="score_threshold", threshold=0.0))
    place.round(str(tmp_path / "clean"))
    for spoilt in (170, 3):  # in the sixth block of eight; in the first
        place.spoilt = spoilt
        for _ in range(2):
            with pytest.raises(RunError, match="nan"):
                place.round(str(tmp_path / "run"))
    place.spoilt = -1
    place.round(str(tmp_path / "run"))
    assert_same(files_of(tmp_path / "run"), files_of(tmp_path / "clean"))


def test_scores_that_lack_images_are_refused_and_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = relabel.PartWriter.add

    def losing(self: Any, batch: Batch, scores: Any, piece: Any, row: int) -> None:
        if row == piece.first or batch.num_images < 4:
            add(self, batch, scores, piece, row)
        else:
            add(self, batch.rows(0, 4), scores._replace(mean=scores.mean[:4]), piece, row + batch.num_images - 4)

    monkeypatch.setattr(relabel.PartWriter, "add", losing)
    generator = np.random.default_rng(0)
    split = label_split(generator.choice([-1, 0, 1], (96, 5)).astype(np.int8), num_shards=1)
    images = [tiny_jpeg(seed) for seed in range(96)]
    set_url = write_label_set(tmp_path / "set", {"train": split._replace(images=images)}, unlisted="unknown").url
    place = Place(set_url, 0, 1, CurriculumSettings(strategy="score_threshold", threshold=0.0))
    with pytest.raises(ShardError, match="scores of 40 images"):
        place.round(str(tmp_path / "run"))
    assert newest_round(str(tmp_path / "run")) == 0


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("tiny"), num_train=60, num_test=8)


@pytest.fixture(scope="module")
def on_one_rank(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    out = tmp_path_factory.mktemp("one")
    ((measured, _),) = run_ranks(two_rounds, 1, manifest, str(out), False)
    return files_of(out), measured


@pytest.fixture(scope="module")
def disturbed(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """On two ranks: the folder, and what each rank returned."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, run_ranks(two_rounds, 2, manifest, str(out), True)


def test_rounds_stopped_in_the_middle_on_two_ranks_have_the_bytes_of_one_rank(
    disturbed: tuple[Path, list[Any]], on_one_rank: tuple[dict[str, bytes], Any]
) -> None:
    files = files_of(disturbed[0])
    assert_same(files, on_one_rank[0])
    assert repr([measured for measured, _ in disturbed[1]]) == repr([on_one_rank[1]] * 2)  # as text: NaN is not itself
    assert any(name.endswith("000002/commit.json") for name in files)
    assert not any("parts" in name for name in files)


def test_rounds_on_four_ranks_have_the_bytes_of_one_rank(
    manifest: str, on_one_rank: tuple[dict[str, bytes], Any], tmp_path: Path
) -> None:
    found = run_ranks(two_rounds, 4, manifest, str(tmp_path), False)
    assert_same(files_of(tmp_path), on_one_rank[0])
    assert repr(found) == repr([(on_one_rank[1], [])] * 4)


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_a_score_that_is_no_number_and_a_second_job_stop_all_ranks_with_the_same_words(
    disturbed: tuple[Path, list[Any]],
) -> None:
    out, ((_, first), (_, second)) = disturbed
    assert [type(error) for error in first] == [RunError, CheckpointError]
    assert [str(error) for error in first] == [str(error) for error in second]
    assert "class3" in str(first[0])
    assert "sample 41" in str(first[0])
    assert "strategy 'score_threshold', not 'score_fraction'" in str(first[1])
    assert "labels rollback" in str(first[1])
    assert not Path(round_url(f"{out}-failing", 1, "commit.json")).exists()
