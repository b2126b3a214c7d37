"""Claims about SST on several ranks: neither what is counted, learned nor remembered depends on who holds what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.batch import Batch, Progress
from dist_mlpl.methods.base import Method
from dist_mlpl.methods.table import METHODS
from dist_mlpl.models import label_counts
from dist_mlpl.models.label_counts import count_cooccurrence
from tests.support.losses import random_targets
from tests.support.methods import IMAGE_SIZE, random_batch, tiny_method
from tests.support.ranks import run_ranks
from tests.support.semantic import LabelsOf, as_pairs, counts_oracle, random_labels
from tests.support.training import largest_difference, make_engine, own_share, whole_state

pytestmark = pytest.mark.distributed

SST: dict[str, Any] = {
    "head": {"embedding_width": 8, "attention_width": 16},
    "pairs": {"class_width": 8, "pair_width": 16},
    "ring_capacity": 5,
    "start_epoch": 1,
    "threshold": 0.6,
    "threshold_floor": 0.5,
}
MATRIX = random_labels(101, 7, seed=0)


class LabelsOfRun(LabelsOf):
    """With what a run's labels say of themselves."""

    class samples:  # noqa: N801
        num_samples = 60

        class manifest:  # noqa: N801
            class_ids: tuple[str, ...] = ()


def count(rank: int, world_size: int, most_dense: int) -> dict[tuple[int, int], tuple[int, int]]:
    label_counts._MOST_DENSE, label_counts._BLOCK_SAMPLES = most_dense, 16
    return as_pairs(count_cooccurrence(LabelsOf(MATRIX), *MATRIX.shape))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("most_dense", [1024, 0])
def test_ranks_count_together_what_one_counts_alone(world_size, most_dense):
    assert run_ranks(count, world_size, most_dense) == [counts_oracle(MATRIX)] * world_size


_STEPS = {"units": 2.0**-29, "means": 1.0}  # of the ring's numbers


def batches() -> list[Batch]:
    """Two epochs of three steps; some rows undecodable, a group of 4 all undecodable."""
    found = []
    for number in range(6):
        batch = random_batch(16, seed=number, known_fraction=0.5)
        valid = torch.ones(16, dtype=torch.bool)
        valid[[1, 8, 9, 10, 11]] = False
        found.append(batch._replace(valid=valid, index=batch.index * 31 % 97))
    return found


def memory(method: Method) -> dict[str, Tensor]:
    """The ring, on every rank, and the means it gives."""
    (bank,) = method.banks().values()
    rows = bank.read(torch.arange(bank.spec.num_rows))
    return rows | {"means": bank.means()[0].clone()}  # type: ignore[attr-defined]


def learn(rank: int, world_size: int, form: dict[str, Any]) -> dict[tuple[Any, Any], Any]:
    found = {}
    for kind in ("plain", 2, 3) if world_size == 2 else ("plain",):
        for micro_batch in (None, 4) if kind == "plain" and "faithful" not in form else (None,):
            method = tiny_method("sst", **SST | form)
            method.read_labels(LabelsOfRun(random_labels(60, 5, seed=1)))  # type: ignore[arg-type]
            engine = make_engine(
                kind, method=method, micro_batch=micro_batch, optimizer={"name": "sgd", "learning_rate": 0.05}
            )
            steps = []
            for step, batch in enumerate(batches()):
                progress = Progress(epoch=step // 3, samples_consumed=16 * (step % 3), step=step)
                share = own_share(batch)
                output = engine.train_step(share, method.recall(share, progress), progress)
                method.observe(share, output)
                steps.append({name: float(term) for name, term in output.terms.items()})
                assert engine.predict(share).logits.shape == (len(share.index), 5)
            found[kind, micro_batch] = steps, whole_state(engine).model, memory(method)
    return found


@pytest.mark.parametrize(
    "form",
    [{}, {"faithful": True}, {"normalization": "masked_mean", "head": SST["head"] | {"shortcut": "max"}}],
    ids=str,
)
def test_ranks_engines_and_micro_batches_change_neither_what_is_learned_nor_what_is_remembered(form):
    steps, model, remembered = run_ranks(learn, 1, form)[0]["plain", None]
    assert all(terms["bce_intra"] == terms["bce_inter"] == 0.0 for terms in steps[:3])
    assert any(terms["bce_inter"] != pytest.approx(terms["bce"], rel=1e-4) for terms in steps[3:])
    assert all(terms["intra"] > 0 for terms in steps[1:])
    for world_size in (1, 2, 4):
        for rank, found in enumerate(run_ranks(learn, world_size, form)):
            for key, (other_steps, other_model, other_remembered) in found.items():
                where = (key, rank, world_size)
                for own, other in zip(steps, other_steps, strict=True):
                    assert other == pytest.approx(own, rel=1e-5, abs=1e-6), where
                assert largest_difference(other_model, model) < 1e-5, where
                for name in ("stamps", "num_pushed"):
                    assert torch.equal(other_remembered[name], remembered[name]), where
                for name in ("units", "means"):
                    found_here, expected = (part[name] * _STEPS[name] for part in (other_remembered, remembered))
                    torch.testing.assert_close(found_here, expected, rtol=0, atol=1e-4)


def step_at(rank: int, world_size: int, num_classes: int, keys: dict[str, Any]) -> list[dict[str, float]]:
    """Two steps of a tiny trunk with C classes, transfers on; labels counted before."""
    torch.manual_seed(0)
    settings = METHODS["sst"](name="sst", backbone={"name": "resnet_small_gn"}, **keys)
    method = settings.build(num_classes=num_classes, image_size=IMAGE_SIZE)
    labels = random_labels(60, num_classes, seed=0, known=20 / num_classes)
    method.read_labels(LabelsOfRun(labels))  # type: ignore[arg-type]
    engine = make_engine("plain" if world_size == 1 else 2, method=method, global_batch=8)
    found = []
    for step in range(2):
        targets = random_targets((8, num_classes), 20 / num_classes, torch.Generator().manual_seed(step))
        share = own_share(random_batch(8, seed=step)._replace(targets=targets))
        progress = Progress(epoch=5, step=step)
        output = engine.train_step(share, method.recall(share, progress), progress)
        method.observe(share, output)
        found.append({name: float(term) for name, term in output.terms.items()})
    return comm.broadcast_object(found)


@pytest.mark.parametrize("num_classes", [80, 601, pytest.param(9605, marks=pytest.mark.long)])
def test_steps_run_alike_on_one_and_two_ranks_with_any_number_of_classes(num_classes):
    keys = SST | {"pairs": {"class_width": 8, "pair_width": 16}}
    alone = run_ranks(step_at, 1, num_classes, keys)[0]
    together = run_ranks(step_at, 2, num_classes, keys)[0]
    for own, other in zip(alone, together, strict=True):
        assert other == pytest.approx(own, rel=1e-4, abs=1e-5)
