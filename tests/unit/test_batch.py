"""Claims about the tuples that travel between rooms, and about where a run stands."""

from __future__ import annotations

import pytest
import torch

from dist_mlpl.batch import Batch, Progress, RunLength

pytestmark = pytest.mark.unit


def batch_of(num_images: int, *, has_beliefs: bool) -> Batch:
    generator = torch.Generator().manual_seed(num_images)
    targets = torch.randint(-1, 2, (num_images, 5), generator=generator).to(torch.int8)
    return Batch(
        images=torch.rand(num_images, 3, 4, 4, generator=generator),
        targets=targets,
        pseudo_targets=targets.clone() if has_beliefs else None,
        soft_targets=torch.rand(num_images, 5, generator=generator) if has_beliefs else None,
        index=torch.arange(num_images),
        crop=torch.rand(num_images, 4, generator=generator),
        flipped=torch.rand(num_images, generator=generator) < 0.5,
        valid=torch.rand(num_images, generator=generator) < 0.8,
    )


@pytest.mark.parametrize("has_beliefs", [True, False])
def test_rows_of_a_batch_laid_end_to_end_are_the_batch(has_beliefs: bool) -> None:
    batch = batch_of(7, has_beliefs=has_beliefs)
    parts = [batch.rows(0, 3), batch.rows(3, 4), batch.rows(4, 7)]
    assert [part.num_images for part in parts] == [3, 1, 3]
    for name in Batch._fields:
        whole, pieces = getattr(batch, name), [getattr(part, name) for part in parts]
        if whole is None:
            assert pieces == [None] * 3
        else:
            torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=0)
            assert pieces[0].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_a_batch_moves_whole() -> None:
    moved = batch_of(2, has_beliefs=True).to(torch.device("meta"))
    assert all(field.device.type == "meta" for field in moved)
    assert batch_of(2, has_beliefs=False).to(torch.device("cpu")).soft_targets is None


def test_steps_and_epochs_add_up_to_the_whole_run() -> None:
    length = RunLength(num_epochs=3, num_samples=70)
    progress, fractions = Progress(), []
    for _ in range(3):
        for _ in range(4):
            progress = progress.next(16, length)
            fractions.append(progress.fraction)
        progress = progress.next_epoch(length)
        assert progress.samples_consumed == 0
        fractions.append(progress.fraction)
    assert progress == Progress(epoch=3, samples_consumed=0, step=12, round=0, fraction=1.0)
    assert fractions == sorted(fractions)
    assert fractions[4] == pytest.approx(1 / 3)
    assert fractions[5] == pytest.approx((70 + 16) / 210)


def test_the_fraction_never_passes_one_and_a_round_is_kept() -> None:
    length = RunLength(num_epochs=1, num_samples=10)
    progress = Progress(round=4).next(16, length)
    assert (progress.fraction, progress.round) == (1.0, 4)


def test_a_save_is_due_at_every_multiple_and_never_before_the_first_step() -> None:
    assert [step for step in range(10) if Progress(step=step).due(3)] == [3, 6, 9]
    assert not any(Progress(step=step).due(None) for step in range(10))
