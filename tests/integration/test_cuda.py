"""Claims about what runs differently on a GPU: the fused kernel, methods, batches copied ahead, BatchNorm, JPEGs.

MLPL_TEST_DEVICE=cpu runs those that can run without one, to try out the tests themselves.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import tests.support.methods as contract
from dist_mlpl.batch import Batch
from dist_mlpl.data.collate import HostBatch, empty_batch, normalised, put, to_device
from dist_mlpl.data.jpeg import Decoded, decode_jpeg, decode_on
from dist_mlpl.data.transform import Transform, TransformSettings
from dist_mlpl.engine import EngineSettings, start
from dist_mlpl.kernels.semantic_attention import chunked_attention, fused_attention
from dist_mlpl.methods.table import METHODS
from tests.support.attention import Case, materialised_attention, random_case
from tests.support.images import tiny_jpeg
from tests.support.losses import random_targets
from tests.support.methods import random_batch, tiny_method
from tests.support.semantic import random_pair_head
from tests.support.training import make_engine, train

DEVICE = torch.device(os.environ.get("MLPL_TEST_DEVICE", "cuda"))
HAS_CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not HAS_CUDA, reason="no CUDA device"),
]
only_cuda = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")


@only_cuda
@pytest.mark.parametrize("shape", [(4, 196, 512, 601, 512), (2, 49, 1024, 80, 512), (3, 5, 33, 40, 7), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_fused_attention_and_its_slopes_equal_the_plain_one(shape, dtype, atol):
    case = Case(*(tensor.to(DEVICE) for tensor in random_case(*shape, dtype=dtype)))
    weight = torch.randn(shape[0], shape[3], shape[2], generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def results(form, given):
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        features = form(*leaves).class_features
        return [features, *torch.autograd.grad((features.double() * weight).sum(), leaves)]

    found = results(fused_attention, case)
    expected = results(chunked_attention, [tensor.double() for tensor in case])
    again = results(fused_attention, case)
    for value, exact, repeated in zip(found, expected, again, strict=True):
        assert value.dtype == dtype
        assert float((value.double() - exact).abs().max()) <= atol * max(1e-2, float(exact.abs().max()))
        assert torch.equal(value, repeated)


def test_the_plain_attention_is_the_same_on_the_device():
    case = random_case(2, 49, 24, 33, 13, dtype=torch.float32)
    found = chunked_attention(*(tensor.to(DEVICE) for tensor in case)).class_features.cpu()
    torch.testing.assert_close(found, materialised_attention(case), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("check", contract.CONTRACT, ids=lambda check: check.__name__)
def test_every_method_keeps_its_contract_on_the_device(name, check, monkeypatch):
    if "autocast" in check.__name__:
        pytest.skip("its autocast is the CPU's")

    def there(num_images: int, **keys: float) -> Batch:
        return random_batch(num_images, **keys).to(DEVICE)

    monkeypatch.setattr(contract, "random_batch", there)
    check(tiny_method(name).to(DEVICE))


@pytest.mark.parametrize("name", METHODS)
def test_steps_on_the_device_agree_with_steps_on_the_cpu(name):
    """An engine takes CUDA where it is; its first losses are those of the same steps without an engine on the CPU."""
    if DEVICE.type == "cuda":
        start(EngineSettings(kind="plain"))
    steps = train(make_engine("plain", method=tiny_method(name)), 1)
    method, batch = tiny_method(name), random_batch(16, seed=0)
    method.begin_run(num_samples=10_000, epoch_samples=10_000, group_size=4, seed=0)
    expected = method.train()(batch, method.recall(batch, contract.PROGRESS._replace(step=0, fraction=0.0)))
    assert steps[0].loss == pytest.approx(float(expected.loss), rel=1e-3)


def test_pairs_that_share_their_ends_have_the_same_slopes_to_the_bit_each_time():
    head = random_pair_head(30, 8).to(DEVICE)
    targets = random_targets((6, 30), 0.7, torch.Generator().manual_seed(0)).to(DEVICE)
    pairs = head.pairs(targets != 0, targets != 0)
    features = torch.randn(6, 30, head.class_weight.shape[1], generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def slopes() -> list[torch.Tensor]:
        return list(torch.autograd.grad(head(features, pairs).square().sum(), list(head.parameters())))

    first = slopes()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, slopes(), strict=True))


def test_batches_copied_ahead_arrive_whole_and_in_order():
    """Each batch is read long after the next one was copied, by work that keeps the computing stream busy."""
    transform = Transform(TransformSettings(size=64), seed=0, train=False)
    generator = torch.Generator().manual_seed(0)

    def host(number: int) -> HostBatch:
        indices = np.arange(8) + 8 * number
        batch = empty_batch(indices, num_classes=3, image_size=64, is_pinned=DEVICE.type == "cuda")
        batch.images.copy_(torch.randint(0, 256, batch.images.shape, generator=generator, dtype=torch.uint8))
        for row in range(8):
            put(batch, row, None, np.full(3, 1, dtype=np.int8))
        batch.crop.fill_(0.5)
        batch.flipped.fill_(False)
        return HostBatch(batch, indices, indices, [])

    hosts = [host(number) for number in range(12)]
    expected = [transform.normalise(h.batch.images.clone()) for h in hosts]
    busy = torch.randn(1500, 1500, device=DEVICE)
    found = []
    for moved in to_device(iter(hosts), DEVICE, lambda h: normalised(h, transform)):
        for _ in range(3 if DEVICE.type == "cpu" else 50):
            busy = (busy @ busy).tanh()
        found.append((moved.batch.images + 0.0 * busy[0, 0], moved.batch.index))
    for number, (images, index) in enumerate(found):
        assert index.tolist() == list(range(8 * number, 8 * number + 8))
        torch.testing.assert_close(images.cpu(), expected[number], rtol=1e-6, atol=1e-6)


def test_jpegs_decoded_on_the_device_look_as_those_decoded_here():
    contents = [tiny_jpeg(seed, height=64, width=97) for seed in range(4)]
    for content, picture in zip(contents, decode_on(DEVICE, contents), strict=True):
        assert isinstance(picture, Decoded)
        ours, theirs = decode_jpeg(content).float(), picture.decode().permute(2, 0, 1).cpu().float()
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().mean()) < 2.0  # of 255; decoders round and upsample colour differently
    damaged = decode_on(DEVICE, [contents[0], contents[1][:40], contents[2]])
    assert [isinstance(found, Exception) for found in damaged] == [False, True, False]


@only_cuda
def test_synchronised_batch_norm_on_one_rank_is_plain_batch_norm():
    start(EngineSettings(kind="plain"))
    keys = {"backbone": {"name": "resnet_small"}}
    losses = [
        [step.loss for step in train(make_engine("plain", batch_norm=kind, **keys), 3)] for kind in ("averaged", "sync")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
