"""Claims about methods with memory on several ranks: what they learn and remember does not depend on who holds what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_mlpl.batch import Batch
from tests.support.methods import tiny_method
from tests.support.ranks import run_ranks
from tests.support.single_positive import LOSSES
from tests.support.training import (
    STAGES,
    Step,
    largest_difference,
    make_engine,
    memory_of,
    train_epochs,
    two_steps_thrice,
    whole_state,
)

pytestmark = pytest.mark.distributed

MIXED = {
    "head": {"attention_width": 8, "embedding_width": 6, "feature_width": 12},
    "start_epoch": 1,
    "renew_every_epochs": 1,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{loss: ("single_positive", {"loss": loss, **keys}) for loss, keys in LOSSES.items()},
    "csl ignore": ("csl", {"mode": "ignore"}),
    "csl prior": ("csl", {"top_k": 1, "prior_threshold": 0.5, "ignore_epochs": 2}),
    "sarb": ("blending", MIXED | {"prototypes": "kmeans", "num_prototypes": 3}),
    "dsrb": ("blending", MIXED),
    "dsrb faithful": ("blending", MIXED | {"faithful": True, "renew_every_epochs": 2}),
}
MEMORIES = ("role", "en", "ll_cp")  # a row a sample
PROTOTYPES = ("sarb", "dsrb", "dsrb faithful")  # a row a class
KINDS: dict[str, tuple[str | int, ...]] = dict.fromkeys(MEMORIES, ("plain", 0, 3)) | {"dsrb": ("plain", *STAGES)}


def batches(case: str) -> list[Batch]:
    return two_steps_thrice(known_fraction=0.4 if case in PROTOTYPES else 0.3)  # at 0.3 a rounding turns a ReLU of sarb


Found = tuple[list[Step], dict[str, Tensor], dict[str, Tensor]]


def learn(rank: int, world_size: int) -> dict[tuple[str, Any, Any], Found]:
    """Every case, cut into micro-batches or not on 1 and 2 ranks, and some under DeepSpeed on 2."""
    found = {}
    for case, (name, keys) in CASES.items():
        for kind in KINDS.get(case, ("plain",)) if world_size == 2 else ("plain",):
            for micro_batch in (None, 4) if kind == "plain" and world_size < 4 else (None,):
                engine = make_engine(
                    kind,
                    method=tiny_method(name, **keys),
                    micro_batch=micro_batch,
                    optimizer={"name": "sgd", "learning_rate": 0.05},
                    batch_norm="frozen",
                )
                steps = train_epochs(engine, batches(case))
                found[case, kind, micro_batch] = steps, whole_state(engine).model, memory_of(engine.method)
    return found


@pytest.fixture(scope="module")
def by_ranks() -> dict[int, list[dict[tuple[str, Any, Any], Found]]]:
    return {world_size: run_ranks(learn, world_size) for world_size in (1, 2, 4)}


@pytest.mark.parametrize("case", CASES)
def test_ranks_engines_and_micro_batches_change_neither_what_is_learned_nor_what_is_remembered(by_ranks, case):
    steps, model, remembered = by_ranks[1][0][case, "plain", None]
    assert len({step.loss for step in steps}) == len(steps)
    for world_size, ranks in by_ranks.items():
        for rank, found in enumerate(ranks):
            runs = {key: value for key, value in found.items() if key[0] == case}
            for key, (other_steps, other_model, other_remembered) in runs.items():
                where = (key, rank, world_size)
                for own, other in zip(steps, other_steps, strict=True):
                    assert other.loss == pytest.approx(own.loss, rel=1e-5, abs=1e-6), where
                    assert other.terms == pytest.approx(own.terms, rel=1e-5, abs=1e-6), where
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
    seen = {int(i) for batch in batches(case) for i in batch.index[batch.valid]}
    stamps = next(rows for name, rows in remembered.items() if name.endswith("/stamps"))
    written = set((stamps >= 0).nonzero().squeeze(1).tolist())
    assert written <= seen if case == "ll_cp" else written == seen
    assert written


@pytest.mark.parametrize("case", PROTOTYPES)
def test_every_class_has_all_its_prototypes(by_ranks, case):
    remembered = by_ranks[1][0][case, "plain", None][2]
    assert bool((remembered["prototypes/counts"] > 0).all())


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_reads_the_same_memory(by_ranks, world_size):
    first, *others = by_ranks[world_size]
    for other in others:
        for key, (_, _, remembered) in first.items():
            assert all(torch.equal(other[key][2][name], rows) for name, rows in remembered.items())
