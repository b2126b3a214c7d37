"""Claims about methods with memory on several ranks: what they learn and remember does not depend on who holds what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_mlpl.batch import Batch, Progress
from dist_mlpl.engine import Engine
from dist_mlpl.methods.base import Method
from tests.support.methods import random_batch, tiny_method
from tests.support.ranks import run_ranks
from tests.support.single_positive import LOSSES
from tests.support.training import largest_difference, make_engine, own_share, whole_state

pytestmark = pytest.mark.distributed

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{loss: ("single_positive", {"loss": loss, **keys}) for loss, keys in LOSSES.items()},
    "csl ignore": ("csl", {"mode": "ignore"}),
    "csl prior": ("csl", {"top_k": 1, "prior_threshold": 0.5, "ignore_epochs": 2}),
}
MEMORIES = ("role", "en", "ll_cp")  # a row a sample


def batches() -> list[Batch]:
    """Three epochs of two steps on the same 32 samples; some rows undecodable, a group of 4 all undecodable."""
    found = []
    for number in range(2):
        batch = random_batch(16, seed=number, known_fraction=0.3)
        valid = torch.ones(16, dtype=torch.bool)
        valid[[1, 8, 9, 10, 11]] = False
        found.append(batch._replace(valid=valid, index=batch.index * 31 % 97 + 97 * number))
    return found * 3


def run(engine: Engine) -> list[float]:
    losses = []
    for step, batch in enumerate(batches()):
        progress = Progress(epoch=step // 2, samples_consumed=16 * (step % 2), step=step)
        if progress.samples_consumed == 0:
            engine.method.begin_epoch(progress)
        share = own_share(batch)
        output = engine.train_step(share, engine.method.recall(share, progress), progress)
        engine.method.observe(share, output)
        losses.append(float(output.loss))
    return losses


def memory(method: Method) -> dict[str, Tensor]:
    """Every row of every bank, on every rank."""
    found = {}
    for name, bank in method.banks().items():
        rows = torch.arange(min(200, bank.spec.num_rows))
        found |= {f"{name}/{column}": values for column, values in bank.read(rows).items()}
    return found


Found = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def learn(rank: int, world_size: int) -> dict[tuple[str, Any, Any], Found]:
    """Every case, cut into micro-batches or not on 1 and 2 ranks, under DeepSpeed too where rows are kept on 2."""
    found = {}
    for case, (name, keys) in CASES.items():
        kinds = ("plain", 0, 3) if case in MEMORIES and world_size == 2 else ("plain",)
        for kind in kinds:
            for micro_batch in (None, 4) if kind == "plain" and world_size < 4 else (None,):
                engine = make_engine(
                    kind,
                    method=tiny_method(name, **keys),
                    micro_batch=micro_batch,
                    optimizer={"name": "sgd", "learning_rate": 0.05},
                )
                losses = run(engine)
                found[case, kind, micro_batch] = losses, whole_state(engine).model, memory(engine.method)
    return found


@pytest.fixture(scope="module")
def by_ranks() -> dict[int, list[dict[tuple[str, Any, Any], Found]]]:
    return {world_size: run_ranks(learn, world_size) for world_size in (1, 2, 4)}


@pytest.mark.parametrize("case", CASES)
def test_ranks_engines_and_micro_batches_change_neither_what_is_learned_nor_what_is_remembered(by_ranks, case):
    losses, model, remembered = by_ranks[1][0][case, "plain", None]
    assert len(set(losses)) == len(losses)
    for world_size, ranks in by_ranks.items():
        for rank, found in enumerate(ranks):
            runs = {key: value for key, value in found.items() if key[0] == case}
            for key, (other_losses, other_model, other_remembered) in runs.items():
                where = (key, rank, world_size)
                assert other_losses == pytest.approx(losses, rel=1e-5, abs=1e-6), where
                assert largest_difference(other_model, model) < 1e-5, where
                assert other_remembered.keys() == remembered.keys(), where
                for name, rows in remembered.items():
                    if rows.is_floating_point():
                        torch.testing.assert_close(
                            other_remembered[name].float(), rows.float(), rtol=0, atol=2e-3 if case == "en" else 1e-4
                        )
                    elif name == "prior/sums":  # of probabilities that may differ in their last bits
                        assert int((other_remembered[name] - rows).abs().max()) < 2**32 * 1e-4, where
                    else:
                        assert torch.equal(other_remembered[name], rows), (name, where)


@pytest.mark.parametrize("case", MEMORIES)
def test_rows_of_padding_and_undecodable_samples_are_never_written(by_ranks, case):
    remembered = by_ranks[4][0][case, "plain", None][2]
    seen = {int(i) for batch in batches() for i in batch.index[batch.valid]}
    stamps = next(rows for name, rows in remembered.items() if name.endswith("/stamps"))
    written = set((stamps >= 0).nonzero().squeeze(1).tolist())
    assert written <= seen if case == "ll_cp" else written == seen
    assert written


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_reads_the_same_memory(by_ranks, world_size):
    first, *others = by_ranks[world_size]
    for other in others:
        for key, (_, _, remembered) in first.items():
            assert all(torch.equal(other[key][2][name], rows) for name, rows in remembered.items())
