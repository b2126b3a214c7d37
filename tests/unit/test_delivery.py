"""Claims about batches on their way to training: rows without a sample look like the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_mlpl.data.collate import BadSample, HostBatch
from dist_mlpl.data.delivery import without_blanks
from dist_mlpl.data.order import PADDING
from tests.support.methods import random_batch

pytestmark = pytest.mark.unit


def host_batch(valid: list[bool], *, padding: int = 0) -> HostBatch:
    batch = random_batch(len(valid), seed=0, known_fraction=0.5)._replace(valid=torch.tensor(valid))
    batch = batch._replace(images=batch.images * batch.valid[:, None, None, None])  # black
    indices = np.arange(len(valid))
    indices[len(valid) - padding :] = PADDING
    bad = [BadSample(row, "", "") for row in np.flatnonzero(~np.array(valid) & (indices != PADDING)).tolist()]
    return HostBatch(batch, indices, indices, bad)


def test_rows_without_a_sample_show_the_valid_images_in_turn_and_stay_invalid() -> None:
    host = host_batch([True, False, True, True, False, False, False, False], padding=4)
    found = without_blanks(host)
    shown = [0, 2, 2, 3, 2, 3, 0, 2]  # valid rows 0, 2, 3; row r shows the (r mod 3)th of them
    assert torch.equal(found.images, host.batch.images[shown])
    for name in ("targets", "index", "crop", "flipped", "valid"):
        assert torch.equal(getattr(found, name), getattr(host.batch, name))


def test_a_batch_of_samples_alone_is_handed_out_as_it_is() -> None:
    host = host_batch([True] * 4)
    assert without_blanks(host) is host.batch


def test_a_share_without_any_sample_stays_black() -> None:
    host = host_batch([False] * 4, padding=4)
    assert without_blanks(host).images.count_nonzero() == 0


def test_the_statistics_of_batch_norm_do_not_depend_on_how_far_a_share_is_padded() -> None:
    alone, padded = host_batch([True] * 4), host_batch([True] * 4 + [False] * 8, padding=8)
    padded.batch.images[:4] = alone.batch.images
    layers = [torch.nn.BatchNorm2d(3) for _ in range(2)]
    for layer, host in zip(layers, (alone, padded), strict=True):
        layer(without_blanks(host).images)
    torch.testing.assert_close(layers[1].running_mean, layers[0].running_mean)
    torch.testing.assert_close(layers[1].running_var, layers[0].running_var, rtol=0.02, atol=0)  # over n - 1 values
