"""Owns the method contract: claims that hold for every row of the method table, as functions that assert.

Models are tiny and normalise by groups, so that rows of a batch do not see one another.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dist_mlpl.batch import METRIC, Batch, Progress, StepOutput
from dist_mlpl.methods.base import HEATMAPS, Method
from dist_mlpl.methods.table import METHODS
from dist_mlpl.models.classifier import WeldonSettings
from tests.support.losses import random_targets

NUM_CLASSES, IMAGE_SIZE = 5, 32
PROGRESS = Progress(step=3, fraction=0.1)


def tiny_method(name: str, **keys: Any) -> Method:
    """A row of the table with a GroupNorm trunk, seeded."""
    torch.manual_seed(0)
    settings = METHODS[name](**({"name": name, "backbone": {"name": "resnet_small_gn"}} | keys))
    method = settings.build(num_classes=NUM_CLASSES, image_size=IMAGE_SIZE)
    # An engine says so again, with its own run's numbers.
    method.begin_run(num_samples=100, epoch_samples=100, group_size=8, seed=0)
    return method


def random_batch(num_images: int, *, seed: int, known_fraction: float = 0.5) -> Batch:
    """Random images and labels; every row valid."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        targets=random_targets((num_images, NUM_CLASSES), known_fraction, generator),
        pseudo_targets=None,
        soft_targets=None,
        index=torch.arange(num_images),
        crop=torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(num_images, 1),
        flipped=torch.zeros(num_images, dtype=torch.bool),
        valid=torch.ones(num_images, dtype=torch.bool),
    )


def trained(method: Method) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name."""
    return {name: p for name, p in method.named_parameters() if p.requires_grad}


def gradients(method: Method, batch: Batch) -> dict[str, Tensor]:
    """One backward on one batch that is the whole step; every trainable parameter must have received a gradient."""
    method.zero_grad(set_to_none=True)
    output = method(batch, method.recall(batch, PROGRESS))
    assert bool(torch.isfinite(output.loss))
    output.loss.backward()
    without = [name for name, p in trained(method).items() if p.grad is None]
    assert without == []
    return {name: p.grad for name, p in trained(method).items() if p.grad is not None}


def check_groups_hold_every_trainable_parameter_once(method: Method) -> None:
    groups = method.parameter_groups()
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    assert set(groups) == {"backbone", "head"}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in trained(method).values()}
    assert all(p.dim() > 0 for p in method.parameters())


def check_same_parameters_get_gradients_whatever_the_batch(method: Method) -> None:
    batch = random_batch(8, seed=1)
    gradients(method, batch)
    gradients(method, batch._replace(targets=torch.zeros_like(batch.targets)))
    gradients(method, batch._replace(targets=batch.targets.clamp(max=0)))
    gradients(method, batch._replace(targets=torch.ones_like(batch.targets)))
    nothing_valid = batch._replace(valid=torch.zeros_like(batch.valid))
    for name, gradient in gradients(method, nothing_valid).items():
        assert not gradient.any(), name


def check_shares_add_up(method: Method, *, group_size: int = 8) -> None:
    """However a global batch is cut between groups, its shares sum to the loss and the metrics of the whole."""
    method.eval()
    batch = random_batch(4 * group_size, seed=2)
    valid = batch.valid.clone()
    valid[[1, group_size]] = False
    batch = batch._replace(valid=valid)
    recalled = method.recall(batch, PROGRESS)
    whole = method(batch, recalled)
    for cuts in ([0, 1, 2, 3, 4], [0, 1, 4], [0, 3, 4]):
        parts = [method(batch.rows(first * group_size, last * group_size), recalled) for first, last in pairwise(cuts)]
        _assert_close(sum(p.loss for p in parts), whole.loss)
        for name in whole.terms:
            _assert_close(sum(p.terms[name] for p in parts), whole.terms[name])
        for name in (name for name in whole.extras if name.startswith(METRIC)):
            _assert_close(sum(p.extras[name] for p in parts), whole.extras[name])


def check_invalid_rows_add_nothing(method: Method) -> None:
    method.eval()
    batch = random_batch(16, seed=3)
    clean = batch._replace(valid=torch.arange(16) < 13)
    garbage = clean._replace(targets=torch.where(clean.valid[:, None], clean.targets, 1).to(torch.int8))
    blank = clean._replace(targets=torch.where(clean.valid[:, None], clean.targets, 0).to(torch.int8))
    losses = [method(b, method.recall(b, PROGRESS)).loss for b in (clean, garbage, blank)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def check_output_has_the_agreed_form(method: Method) -> None:
    batch = random_batch(8, seed=4)
    recalled = method.recall(batch, PROGRESS)
    for name in ("num_valid", "num_known"):
        assert recalled[name].shape == (1,)
        assert recalled[name].dtype == torch.float32
    output: StepOutput = method(batch, recalled)
    _assert_close(sum(output.terms.values()), output.loss)
    assert output.loss.shape == ()
    assert output.loss.requires_grad
    for tensor in (output.logits, *output.terms.values(), *output.extras.values()):
        assert not tensor.requires_grad
    assert output.logits.shape == (8, NUM_CLASSES)


def check_inference_needs_images_alone(method: Method) -> None:
    method.eval()
    batch = random_batch(8, seed=5)
    output = method(batch, None)
    other_labels = method(batch._replace(targets=-batch.targets, index=batch.index + 7), None)
    assert float(output.loss) == 0.0
    assert output.terms == {}
    assert HEATMAPS not in output.extras
    assert torch.equal(output.logits, other_labels.logits)
    assert torch.equal(method.embed(batch.images), output.extras["embedding"])
    heatmaps = method.explain(batch.images)
    assert heatmaps.shape[:2] == (8, NUM_CLASSES)
    assert heatmaps.dtype == torch.float32
    assert not method.is_asked(HEATMAPS)


def check_logits_and_loss_are_float32_under_autocast(method: Method) -> None:
    batch = random_batch(8, seed=6)
    recalled = method.recall(batch, PROGRESS)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(batch, recalled)
    assert output.logits.dtype == output.loss.dtype == torch.float32
    is_rounded = isinstance(getattr(method.head, "pooling", None), WeldonSettings)  # of all cells: see `PooledHead`
    is_on_grid = output.logits.bfloat16().float() == output.logits  # of few numbers: ties between images
    assert is_rounded or is_on_grid.float().mean() < 0.1
    output.loss.backward()
    assert all(p.grad is not None for p in trained(method).values())


def check_forward_can_be_replayed(method: Method) -> None:
    """Two calls under one seed agree to the bit, so nothing but buffers of normalisation moves."""
    batch = random_batch(8, seed=7)
    recalled = method.recall(batch, PROGRESS)
    outputs = []
    for _ in range(2):
        torch.manual_seed(11)
        outputs.append(method(batch, recalled))
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].logits, outputs[1].logits)


CONTRACT = [
    check_groups_hold_every_trainable_parameter_once,
    check_same_parameters_get_gradients_whatever_the_batch,
    check_shares_add_up,
    check_invalid_rows_add_nothing,
    check_output_has_the_agreed_form,
    check_inference_needs_images_alone,
    check_logits_and_loss_are_float32_under_autocast,
    check_forward_can_be_replayed,
]


def _assert_close(value: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(value), expected, rtol=1e-6, atol=1e-6)
