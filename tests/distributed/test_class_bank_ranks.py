"""Claims about banks that answer more than rows, on 1 to 4 ranks: means of rings, prototypes, nearest images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.bank_files import load_banks, save_banks
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.banks.neighbours import Neighbours
from dist_mlpl.banks.prototypes import Prototypes
from dist_mlpl.banks.ring import Ring
from dist_mlpl.chain import Commit
from dist_mlpl.errors import BankError
from tests.support.banks import UPDATES, commit_with, own_rows
from tests.support.class_banks import (
    CAPACITY,
    NUM_CLASSES,
    NUM_PROTOTYPES,
    SlowRing,
    make_prototypes,
    make_ring,
    own_part,
    random_features,
    update_prototypes,
    update_ring,
)
from tests.support.neighbours import crowded, slow_nearest
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

N, WIDTH, NUM_QUERIES, K = 600, 6, 40, 9
Answers = dict[str, Tensor]


def answers(ring: Ring, prototypes: Prototypes, neighbours: Neighbours) -> Answers:
    """All that methods ask of these banks; queries are dealt to ranks unevenly, and gathered in order."""
    late = ring.means()[0].clone()
    means, filled = ring.means()
    table, counts = prototypes.table()
    assert torch.equal(prototypes.counts(), counts)
    generator = torch.Generator().manual_seed(comm.rank())
    classes = torch.randint(0, NUM_CLASSES, (11 * comm.rank(),), generator=generator)
    slots = torch.randint(0, NUM_PROTOTYPES, (len(classes),), generator=generator)
    assert torch.equal(prototypes.read(classes, slots), table[classes, slots])
    own = own_rows(NUM_QUERIES)
    scores, found = neighbours.search(embeddings()[own], K)
    order = comm.gather_rows(own).argsort()
    scores, found = (comm.gather_rows(part)[order] for part in (scores, found))
    rings = {"late": late, "means": means, "filled": filled}
    return rings | {"table": table, "counts": counts, "scores": scores, "found": found}


def embeddings() -> Tensor:
    return crowded(N, WIDTH, seed=4)


def make_banks() -> tuple[Ring, Prototypes, Neighbours]:
    return make_ring("ring"), make_prototypes("prototypes_kmeans"), Neighbours("neighbours", N, WIDTH)


def fill(ring: Ring, prototypes: Prototypes, neighbours: Neighbours, updates: list[tuple[int, int]]) -> None:
    for update in updates:
        ring.means()  # what changed since the call before alone moves
        update_ring(ring, *update)
        update_prototypes(prototypes, *update)
    own = own_rows(N)
    own = own[own % 3 > 0]
    stamps = torch.ones(len(own), dtype=torch.int32)
    neighbours.write(own, {"rows": embeddings()[own], "stamps": stamps})


def work(rank: int, world_size: int, out: str) -> tuple[Answers, Commit]:
    banks = make_banks()
    fill(*banks, UPDATES)
    named = {bank.name: bank for bank in banks}
    records, files = save_banks(out, "checkpoints/00000001-0001", named, None)
    refuse(*banks)
    return answers(*banks), commit_with(records, files)


def refuse(ring: Ring, prototypes: Prototypes, neighbours: Neighbours) -> None:
    """The last rank alone asks for what there is not."""
    bad = torch.nan if comm.rank() == comm.world_size() - 1 else 1.0
    with pytest.raises(BankError, match="not finite"):
        neighbours.search(torch.full((comm.rank() + 1, WIDTH), bad), K)


def load(rank: int, world_size: int, out: str, commit: Commit) -> Answers:
    banks = make_banks()
    fill(*banks, [(7, 40)])  # to be gone afterwards
    answers(*banks)
    load_banks(out, commit, {bank.name: bank for bank in banks})
    return answers(*banks)


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Folder, and what each rank answered and saved."""
    found = {}
    for world_size in (1, 2, 3, 4):
        out = str(tmp_path_factory.mktemp("out"))
        found[world_size] = out, run_ranks(work, world_size, out)
    return found


def assert_same(found: Answers, expected: Answers) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_of_any_number_gets_the_bits_that_one_rank_gets(by_ranks, world_size: int) -> None:
    expected = by_ranks[1][1][0][0]
    for found, _ in by_ranks[world_size][1]:
        assert_same(found, expected)


def test_means_and_nearest_images_are_those_of_loops(by_ranks) -> None:
    found = by_ranks[1][1][0][0]
    twin = SlowRing(make_ring("ring"))
    for update in UPDATES:
        means, _ = twin.means()
        twin.update(*update)
    np.testing.assert_allclose(found["late"].numpy(), means, rtol=0, atol=1e-7)
    means, filled = twin.means()
    np.testing.assert_allclose(found["means"].numpy(), means, rtol=0, atol=1e-7)
    assert found["filled"].tolist() == filled.tolist()
    assert max(filled) == CAPACITY
    index = torch.arange(N)[torch.arange(N) % 3 > 0]
    scores, nearest = slow_nearest(embeddings()[index], index, embeddings()[:NUM_QUERIES], K)
    assert torch.equal(found["found"], nearest)
    assert torch.equal(found["scores"], scores)


@pytest.mark.parametrize(("from_ranks", "to_ranks"), [(4, 3), (1, 4), (3, 1)])
def test_banks_that_were_loaded_answer_as_those_that_were_saved(by_ranks, from_ranks: int, to_ranks: int) -> None:
    out, results = by_ranks[from_ranks]
    for found in run_ranks(load, to_ranks, out, results[0][1]):
        assert_same(found, by_ranks[1][1][0][0])


def push_foretold(
    rank: int, world_size: int, told: str, flushed_after: tuple[int, ...] = (), read_after: tuple[int, ...] = ()
) -> list[Tensor]:
    """Means before each of some updates, when all, nothing or something else was foretold by some ranks."""
    ring, found = make_ring("ring"), []
    for seed, num_rows in UPDATES:
        own = own_part(random_features(seed, num_rows)).class_id
        coming = {"all": own, "nothing": None, "wrong": own.flip(0)[: len(own) // 2] if rank else own + 0}[told]
        found += [part.clone() for part in ring.means(coming)]
        update_ring(ring, seed, num_rows)
        if seed in flushed_after:
            ring.flush()
        if seed in read_after:
            ring.read(torch.arange(rank, NUM_CLASSES, 5))
    with pytest.raises(BankError, match=f"row {NUM_CLASSES}"):
        ring.means(torch.tensor([NUM_CLASSES if rank == world_size - 1 else 0]))
    return [*found, *ring.means()]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("told", ["all", "nothing", "wrong"])
def test_what_was_foretold_of_a_push_changes_no_mean(world_size: int, told: str) -> None:
    expected = run_ranks(push_foretold, 1, "nothing")[0]
    for found in run_ranks(push_foretold, world_size, told):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_flushed_or_read_between_two_calls_changes_no_mean(world_size: int) -> None:
    expected = run_ranks(push_foretold, 1, "nothing")[0]
    for found in run_ranks(push_foretold, world_size, "all", (0, 4), (1, 4)):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def fail_alone(rank: int, world_size: int, folder: str) -> list[str]:
    """Banks of which the last rank alone cannot map its memory, used as in a step."""
    folder = folder + "/gone" if rank == world_size - 1 else folder
    ring, prototypes = make_ring("ring", folder), make_prototypes("prototypes_kmeans", folder)
    with pytest.raises(BankError, match="cannot be mapped"):
        make_prototypes("prototypes_slots", folder).renew()  # at an epoch's start, before anything was added
    rows = KeyedBank("rows", 2048, (WIDTH,), "f32", folder=folder)  # so many that each rank owns some
    own = own_rows(N)
    values = {"rows": embeddings()[own], "stamps": torch.ones(len(own), dtype=torch.int32)}

    def use(bank: Ring | Prototypes | KeyedBank) -> None:
        if isinstance(bank, KeyedBank):
            bank.write(own, values)
        elif isinstance(bank, Ring):
            update_ring(bank, 0, 60)
            bank.means()
        else:
            update_prototypes(bank, 0, 40)
        bank.flush()

    found = []
    for bank in (ring, prototypes, rows):
        with pytest.raises(BankError) as caught:
            use(bank)
        found.append(str(caught.value))
    return found


def test_a_bank_folder_that_fails_on_one_rank_stops_all_ranks(tmp_path: Path) -> None:
    for found in run_ranks(fail_alone, 3, str(tmp_path)):
        assert all("cannot be mapped" in message and "rank 2" in message for message in found)


def refused_twice(rank: int, world_size: int) -> None:
    """A push that holds a NaN on one rank, and a class that is none foretold by another."""
    ring = make_ring("ring")
    features = torch.full((1, WIDTH), torch.nan if rank == world_size - 1 else 1.0)
    ring.push(torch.tensor([3]), features, torch.tensor([rank]))
    with pytest.raises(BankError, match="not finite"):
        ring.means(torch.tensor([NUM_CLASSES if rank == 0 else 0]))
    ring.means()
    assert not ring.means()[1].any()


def test_features_that_are_dropped_are_named_before_anything_else() -> None:
    run_ranks(refused_twice, 2)
