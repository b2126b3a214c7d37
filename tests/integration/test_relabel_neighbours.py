"""Claims about rounds in which similar images vote: the beliefs are those of loops, and no kill changes a byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_mlpl import storage
from dist_mlpl.build import build_view
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.curriculum.votes import Embedded, decode_embedded
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.data.overlays import RoundCommit, document_bytes, newest_round, read_plan
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import OvertakenError
from dist_mlpl.tools.relabel_job import job_config, relabel_run
from tests.support.neighbours import slow_nearest, slow_votes
from tests.support.relabelling import beliefs_of, expected_beliefs
from tests.support.runs import tiny_config, tiny_shards, train_in_process

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

NUM_NEIGHBOURS = 12
ASKED = ["strategy=neighbours", f"num_neighbours={NUM_NEIGHBOURS}", "threshold=0.6"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch, no round."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train_in_process(tiny_config(tiny_shards(tmp_path_factory.mktemp("tiny")), num_epochs=1), out)
    return out


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in most shards."""
    monkeypatch.setattr("dist_mlpl.rounds.commit.piece_samples", lambda num_samples: 16)


def make(run: Path, *asked: str, **options: Callable[[], bool]) -> RoundCommit | None:
    made = relabel_run(job_config(str(run), [*ASKED, *asked], None), **options)
    return None if made is None else made.commit


def copy_of(trained: Path, folder: Path) -> Path:
    return Path(shutil.copytree(trained, folder / "run"))


def test_beliefs_are_the_votes_of_the_nearest_images_that_loops_find(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(trained, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_folder", lambda url: None)
        commit = make(run)
    assert commit is not None
    config = job_config(str(run), ASKED, None)
    index = SplitIndex(load_manifest(config.data.manifest), "train")
    labels = LabelStore(index, build_view(config.data, index)).at(0)
    targets = labels.targets(np.arange(index.num_samples))
    embeddings = torch.zeros(index.num_samples, 0)
    for shard, embedded in embedded_of(run):
        if embeddings.shape[1] == 0:
            embeddings = torch.zeros(index.num_samples, embedded.embeddings.shape[1], dtype=torch.float16)
        embeddings[embedded.rows + int(index.starts[shard])] = torch.from_numpy(embedded.embeddings)
    everyone = torch.arange(index.num_samples)
    _, found = slow_nearest(embeddings, everyone, embeddings, NUM_NEIGHBOURS + 1)
    voters = np.array([[v for v in row if v != own][:NUM_NEIGHBOURS] for own, row in enumerate(found.tolist())])
    scores = torch.from_numpy(slow_votes(voters, targets))
    settings = CurriculumSettings(strategy="neighbours", threshold=0.6)
    expected = expected_beliefs(settings, scores, targets)
    assert {1, -1} <= set(expected.values())
    assert beliefs_of(run, commit, index.shard_sizes, targets.shape[1]) == expected


def embedded_of(run: Path) -> list[tuple[int, Embedded]]:
    """Shard and content of every file of embeddings."""
    origin = storage.sha256_of_bytes(document_bytes(read_plan(str(run), 1)))
    files = sorted(run.glob("rounds/000001/parts/*/*.embedded.safetensors"))
    return [
        (int(path.name.split("-")[0]), decode_embedded(path.read_bytes(), origin=origin, where=str(path)))
        for path in files
    ]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize("ending", [".embedded.safetensors", "000000.safetensors", ".arrow", "commit.json"])
def test_a_round_killed_before_or_after_a_write_of_any_kind_ends_in_the_same_bytes(
    ending: str, is_before: bool, trained: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch
) -> None:
    run, create, seen = copy_of(trained, tmp_path), storage.create_exclusive, []

    def create_or_die(url: str, content: bytes, **options: bool) -> bool:
        seen.extend([url] if url.endswith(ending) else [])
        is_last = url.endswith(ending) and len(seen) == (1 if ending == "commit.json" else 2)
        if is_last and is_before:
            raise Killed
        made = create(url, content, **options)
        if is_last:
            raise Killed
        return made

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create_exclusive", create_or_die)
        with pytest.raises(Killed):
            make(run)
    assert (newest_round(str(run)) == 1) == (ending == "commit.json" and not is_before)
    make(run)
    assert {name: content for name, content in files_of(run).items() if "parts" not in name} == whole


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the round that nothing disturbed, of pieces of the usual size."""
    run = copy_of(trained, tmp_path_factory.mktemp("whole"))
    make(run)
    return files_of(run)


def files_of(run: Path) -> dict[str, bytes]:
    folder = run / "rounds"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_job_asked_to_stop_between_votes_goes_on_where_it_stood(
    trained: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    run = copy_of(trained, tmp_path)
    parts = run / "rounds" / "000001" / "parts"
    voted = lambda: [path for path in parts.glob("*/*.safetensors") if "embedded" not in path.name]  # noqa: E731
    assert make(run, is_asked=lambda: len(voted()) >= 2) is None
    assert len(voted()) == 2
    make(run)
    assert files_of(run) == whole


def test_a_round_whose_embeddings_are_gone_was_dropped(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(trained, tmp_path)
    assert make(run, is_asked=lambda: bool(list(run.glob("rounds/000001/parts/*/*.embedded.safetensors")))) is None
    list_names = storage.list_names
    with monkeypatch.context() as patch:
        patch.setattr(storage, "list_names", lambda url: hidden(run, list_names(url)))
        with pytest.raises(OvertakenError, match="no longer the one"):
            make(run)


def hidden(run: Path, names: list[str]) -> list[str]:
    """The names of a folder that is emptied as soon as it was listed."""
    for path in run.glob("rounds/000001/parts/*/*.embedded.safetensors"):
        path.unlink()
    return names
