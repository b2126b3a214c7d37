"""Claims about the search for similar images on one rank, and about their votes, against slow loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_mlpl.banks import neighbours
from dist_mlpl.banks.neighbours import Neighbours, nearest_rows, unit_vectors
from dist_mlpl.curriculum.votes import (
    EmbeddedMaker,
    Known,
    Voters,
    decode_embedded,
    encode_embedded,
)
from dist_mlpl.errors import BankError, CheckpointError
from dist_mlpl.rounds.neighbours import others
from tests.support.neighbours import crowded, slow_nearest, slow_votes

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("num_rows", "k"), [(700, 1), (700, 20), (700, 300), (130, 7), (9, 20), (0, 3)])
def test_the_nearest_are_those_of_a_loop_even_where_rounding_hides_them(
    num_rows: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In few rows at once, so that blocks, tiles and second looks all happen."""
    for name, value in (
        ("_BLOCK", 100),
        ("_TILE", 16),
        ("_MORE", 2),
        ("_EXACT_NUMBERS", 200),
        ("_UNSURE_NUMBERS", 900),
    ):
        monkeypatch.setattr(neighbours, name, value)
    rows = crowded(num_rows, 6, seed=k) if num_rows > 5 else torch.empty(num_rows, 6)
    queries = torch.cat([rows[:12], rows[-12:], torch.randn(6, 6, generator=torch.Generator().manual_seed(3))])
    found = nearest_rows(unit_vectors(rows), unit_vectors(queries), k)
    expected = slow_nearest(rows, torch.arange(num_rows), queries, k)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


def test_what_is_written_later_is_found_and_what_never_was_is_not() -> None:
    rows = crowded(90, 5, seed=1)
    bank = Neighbours("x", 90, 5)
    empty = bank.search(rows[:2], 3)
    assert (empty[1] == -1).all()
    assert (empty[0] == -torch.inf).all()
    for index in (torch.arange(0, 90, 3), torch.arange(1, 90, 3)):
        bank.write(index, {"rows": rows[index], "stamps": torch.ones(len(index), dtype=torch.int32)})
        written = (bank.read(torch.arange(90))["stamps"] >= 0).nonzero().squeeze(1)
        for found, expected in zip(
            bank.search(rows[:40], 8), slow_nearest(rows[written], written, rows[:40], 8), strict=True
        ):
            assert torch.equal(found, expected)


def test_queries_that_do_not_fit_or_are_not_finite_are_refused() -> None:
    bank = Neighbours("x", 9, 3)
    for bad in (torch.ones(2, 4), torch.ones(3), torch.tensor([[1.0, torch.nan, 0.0]])):
        with pytest.raises(BankError, match="quer"):
            bank.search(bad, 2)


def test_an_image_is_not_its_own_neighbour() -> None:
    found = torch.tensor([[4, 1, 2], [7, 3, 9], [5, 6, 8]])
    assert others(found, torch.tensor([4, 9, 0])).tolist() == [[1, 2], [7, 3], [5, 6]]


def test_votes_are_those_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    targets = generator.choice([-1, 0, 0, 1], size=(50, 7)).astype(np.int8)
    targets[3] = 0
    voters = generator.integers(-1, 50, size=(30, 9))
    voters[4] = -1
    rows, classes = np.nonzero(targets)
    shuffled = generator.permutation(len(rows))
    known = Known(*(column[shuffled] for column in (rows, classes.astype(np.uint16), targets[rows, classes])))
    found = Voters(known, num_samples=50, num_classes=7).scores(voters)
    np.testing.assert_allclose(found, slow_votes(voters, targets), rtol=0, atol=1e-15)
    assert (found[4] == 0).all()


def test_embeddings_and_labels_of_a_stretch_come_back_without_what_did_not_decode() -> None:
    generator = np.random.default_rng(1)
    maker = EmbeddedMaker(first_row=64)
    embeddings = generator.normal(size=(2, 4, 3)).astype(np.float16)
    targets = generator.choice([-1, 0, 1], size=(2, 4, 5)).astype(np.int8)
    valid = np.array([[True, False, True, True], [True, True, False, False]])  # two rows of padding
    maker.add(embeddings[0], targets[0], valid[0], 4)
    maker.add(embeddings[1], targets[1], valid[1], 2)
    content = encode_embedded(maker.embedded(), origin="00ff")
    found = decode_embedded(content, origin="00ff", where="here")
    assert found.rows.tolist() == [64, 66, 67, 68, 69]
    assert np.array_equal(found.embeddings, embeddings[valid])
    dense = np.zeros((70, 5), dtype=np.int8)
    dense[found.known.rows, found.known.classes] = found.known.values
    assert np.array_equal(dense[found.rows], targets[valid])
    assert not dense[65].any()
    with pytest.raises(CheckpointError, match="of the plan 00ff"):
        decode_embedded(content, origin="11", where="here")
    with pytest.raises(CheckpointError, match="do not read"):
        decode_embedded(content[:40], origin="00ff", where="here")
