"""Claims about banks on 1 to 4 ranks: the suite over every bank, and saving on one number of ranks for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from dist_mlpl import storage
from dist_mlpl.bank_files import load_banks, save_banks
from dist_mlpl.banks.held import NUM_SHARDS
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.chain import Commit
from dist_mlpl.errors import BankError, CheckpointError, StorageError
from tests.support.banks import (
    BANKS,
    NUM_ROWS,
    SUITE,
    check_loaded,
    commit_with,
    saved_bank,
    saved_in_two_commits,
)
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


def run_suite(rank: int, world_size: int, folder: str) -> dict[str, str | None]:
    found = {}
    for name, kind in BANKS.items():
        for check in SUITE:
            found[f"{name} {check.__name__}"] = check(kind, folder)
    return found


@pytest.fixture(scope="module")
def suite_on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    (found,) = run_ranks(run_suite, 1, str(tmp_path_factory.mktemp("scratch")))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_bank_keeps_the_suite_and_the_same_bits_on_any_number_of_ranks(
    world_size: int, suite_on_one_rank: dict[str, str | None], tmp_path: Path
) -> None:
    for found in run_ranks(run_suite, world_size, str(tmp_path)):
        assert len(found) == len(BANKS) * len(SUITE)
        assert found == suite_on_one_rank  # digests of all that a bank holds
    assert list(tmp_path.iterdir()) == []  # mapped files have no name


def save(rank: int, world_size: int, out: str, scratch: str) -> list[Commit]:
    return saved_in_two_commits(out, scratch)


def load(rank: int, world_size: int, out: str, commit: Commit, scratch: str) -> None:
    check_loaded(out, commit, scratch)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, list[Commit]]]:
    """Saved on 1 and on 4 ranks: the run folder and its commits."""
    found = {}
    for world_size in (1, 4):
        out, scratch = (str(tmp_path_factory.mktemp(name)) for name in ("out", "scratch"))
        found[world_size] = out, run_ranks(save, world_size, out, scratch)[0]
    return found


@pytest.mark.parametrize(("from_ranks", "to_ranks"), [(4, 3), (4, 1), (4, 4), (1, 2), (1, 1)])
def test_banks_saved_on_some_ranks_load_on_others(saved, from_ranks: int, to_ranks: int, tmp_path: Path) -> None:
    out, commits = saved[from_ranks]
    run_ranks(load, to_ranks, out, commits[-1], str(tmp_path))


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_commit_writes_the_shards_that_changed_and_names_the_others(saved, world_size: int) -> None:
    out, (first, second) = saved[world_size]
    for name in BANKS:
        new = [part for part in second.banks[name].parts if part.path.startswith("checkpoints/00000011")]
        old = [part for part in second.banks[name].parts if part not in new]
        assert 1 <= sum(stop - start for part in new for start, stop in part.shards) <= 3
        if name != "few":
            assert {part.path for part in old} <= {part.path for part in first.banks[name].parts}
        shards = [s for part in (*old, *new) for start, stop in part.shards for s in range(start, stop)]
        assert len(shards) == len(set(shards))
        for part in new:
            stored = safetensors.torch.load(storage.read_bytes(storage.join(out, part.path)))
            assert set(stored["shards"].tolist()) == {s for start, stop in part.shards for s in range(start, stop)}
    needed = {part.path for record in second.banks.values() for part in record.parts}
    assert {file.path for file in second.files} == needed


def test_every_rank_owns_whole_shards_and_all_ranks_own_all() -> None:
    for world_size in (1, 2, 3, 4):

        def owned(rank: int, world_size: int) -> list[int]:
            return list(KeyedBank("x", NUM_ROWS, (1,), "f32").held_shards)

        parts = run_ranks(owned, world_size)
        assert sorted(shard for part in parts for shard in part) == list(range(NUM_SHARDS))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_bank_of_another_make_is_refused(saved) -> None:
    out, commits = saved[1]
    others = [make() for kind in BANKS.values() for make in kind.others]
    assert len(others) > len(BANKS)
    for bank in others:
        with pytest.raises(BankError, match="differs") as caught:
            load_banks(out, commits[-1], {bank.name: bank})
        assert "00000011.json" in caught.value.where
    with pytest.raises(BankError, match="no bank"):
        load_banks(out, commits[-1], {"elsewhere": KeyedBank("elsewhere", 3, (1,), "f32")})


def test_a_damaged_or_missing_bank_file_is_refused_by_name(saved, tmp_path: Path) -> None:
    out, commits = saved[1]
    part = commits[-1].banks["f32"].parts[0]
    path = Path(out, part.path)
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="banks/f32"):
            load_banks(out, commits[-1], {"f32": BANKS["f32"].make("")})
        path.unlink()
        with pytest.raises(CheckpointError, match="banks/f32"):
            load_banks(out, commits[-1], {"f32": BANKS["f32"].make("")})
    finally:
        path.write_bytes(whole)


def test_a_folder_that_cannot_hold_the_memory_is_refused_before_it_is_used(tmp_path: Path) -> None:
    bank = KeyedBank("x", NUM_ROWS, (3,), "f32", folder=str(tmp_path / "missing"))
    with pytest.raises(BankError, match="cannot be mapped"):
        bank.read(torch.tensor([0]))


def test_a_rank_that_cannot_save_stops_all(tmp_path: Path) -> None:
    def blocked(rank: int, world_size: int, folder: str) -> str:
        out = f"{folder}/run"
        if rank == 1:
            storage.write_bytes = _refuse  # type: ignore[assignment]
        with pytest.raises(StorageError) as caught:
            saved_in_two_commits(out, folder)
        return str(caught.value.found)

    def _refuse(url: str, content: bytes) -> None:
        raise StorageError("no space", expected="space", where=url, next_step="make some")

    assert run_ranks(blocked, 2, str(tmp_path)) == ["no space"] * 2


def test_a_bank_with_a_row_that_is_not_finite_is_saved_by_no_rank(tmp_path: Path) -> None:
    def refused(rank: int, world_size: int, out: str) -> list[str]:
        bank = KeyedBank("x", NUM_ROWS, (3,), "f32")
        stamps = torch.ones(2, dtype=torch.int32)
        index = torch.tensor([2 * rank, 2 * rank + 1])
        bank.write(index, {"rows": torch.ones(2, 3), "stamps": stamps})
        rows = torch.full((2, 3), torch.nan if rank == 1 else 2.0)
        bank.write(index, {"rows": rows, "stamps": stamps})  # delivers the first
        with pytest.raises(BankError) as caught:
            save_banks(out, "refused", {"x": bank}, None)
        assert not Path(out, "refused").exists()
        records, files = save_banks(out, "checkpoints/00000001-0001", {"x": bank}, None)
        found = saved_bank(out, commit_with(records, files), KeyedBank("x", NUM_ROWS, (3,), "f32"))
        expected = torch.zeros(NUM_ROWS, 3)
        expected[: 2 * world_size] = 1.0
        assert torch.equal(found["rows"], expected)
        return [caught.value.found, caught.value.where]

    for heard in run_ranks(refused, 3, str(tmp_path)):
        assert heard == ["column 'rows' would hold a number that is not finite", "bank 'x', rank 1"]


def test_large_banks_are_cut_into_several_files(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dist_mlpl.bank_files._FILE_BYTES", 1000)
    commits = saved_in_two_commits(str(tmp_path), str(tmp_path))
    parts = commits[0].banks["f32"].parts
    assert len(parts) > 5
    sizes = [file.num_bytes for file in commits[0].files if "/f32/" in file.path]
    assert max(sizes) < 2000  # 1000 of rows, and the names
    check_loaded(str(tmp_path), commits[-1], str(tmp_path))
