"""Claims about EN + CL + SCL on 1 to 4 ranks: what is learned and remembered does not depend on who holds what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_mlpl.batch import Batch, Progress
from tests.support.methods import random_batch, tiny_method
from tests.support.ranks import run_ranks
from tests.support.training import largest_difference, make_engine, own_share, whole_state

pytestmark = pytest.mark.distributed

KEYS = {"expected_positives": 2.0, "num_slots": 3, "map_size": 6, "ramp_fraction": 0.0}


def batches() -> list[Batch]:
    """Three epochs of two steps on the same 32 samples, through other crops every time; some rows undecodable."""
    found = []
    for number in range(6):
        batch = random_batch(16, seed=number % 2, known_fraction=0.3)
        generator = torch.Generator().manual_seed(number)
        low = 0.5 * torch.rand(16, 2, generator=generator)
        crop = torch.cat([low, 0.3 + torch.rand(16, 2, generator=generator) * (0.7 - low)], dim=1)
        valid = torch.ones(16, dtype=torch.bool)
        valid[[1, 8, 9, 10, 11]] = False
        flipped = torch.rand(16, generator=generator) < 0.5
        index = batch.index * 31 % 97 + 97 * (number % 2)
        found.append(batch._replace(crop=crop, flipped=flipped, valid=valid, index=index))
    return found


Found = tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]


def learn(rank: int, world_size: int) -> dict[tuple[str, int | None], Found]:
    """Cut into micro-batches or not, under DeepSpeed too on 2 ranks."""
    found = {}
    for kind, micro_batch in [("plain", None), ("plain", 4), *(((0, None), (3, None)) if world_size == 2 else ())]:
        method = tiny_method("spatial_consistency", **KEYS)
        engine = make_engine(
            kind, method=method, micro_batch=micro_batch, optimizer={"name": "sgd", "learning_rate": 0.05}
        )
        terms = []
        for step, batch in enumerate(batches()):
            progress = Progress(epoch=step // 2, samples_consumed=16 * (step % 2), step=step, fraction=step / 6)
            share = own_share(batch)
            output = engine.train_step(share, engine.method.recall(share, progress), progress)
            engine.method.observe(share, output)
            terms.append({name: float(term) for name, term in output.terms.items()})
        rows = engine.method.banks()["slots"].read(torch.arange(200))
        found[str(kind), micro_batch] = terms, whole_state(engine).model, rows
    return found


@pytest.fixture(scope="module")
def by_ranks() -> dict[int, list[dict[tuple[str, int | None], Found]]]:
    return {world_size: run_ranks(learn, world_size) for world_size in (1, 2, 3, 4)}


def test_ranks_engines_and_micro_batches_change_neither_what_is_learned_nor_what_is_remembered(by_ranks):
    terms, model, rows = by_ranks[1][0]["plain", None]
    assert all(min(step.values()) > 0 for step in terms[2:])
    for world_size, ranks in by_ranks.items():
        for rank, found in enumerate(ranks):
            for key, (other_terms, other_model, other_rows) in found.items():
                where = key, rank, world_size
                for mine, other in zip(terms, other_terms, strict=True):
                    assert other == pytest.approx(mine, rel=2e-3, abs=1e-6), where  # a code may fall to either side
                assert largest_difference(other_model, model) < 1e-4, where
                assert torch.equal(other_rows["classes"], rows["classes"]), where
                assert torch.equal(other_rows["visits"], rows["visits"]), where
                torch.testing.assert_close(other_rows["scores"], rows["scores"], rtol=0, atol=2e-3)
                apart = (other_rows["heatmaps"].int() - rows["heatmaps"].int()).abs()
                assert int(apart.max()) <= 1, where
                assert float((apart > 0).float().mean()) < 1e-3, where


def test_every_rank_reads_the_same_memory_and_only_valid_samples_have_one(by_ranks):
    seen = {int(i) for batch in batches() for i in batch.index[batch.valid]}
    for ranks in by_ranks.values():
        for key, (_, _, rows) in ranks[0].items():
            for other in ranks[1:]:
                assert all(torch.equal(other[key][2][name], rows[name]) for name in rows)
            assert set((rows["visits"] > 0).nonzero().squeeze(1).tolist()) == seen
            assert rows["visits"].unique().tolist() == [0, 3]
