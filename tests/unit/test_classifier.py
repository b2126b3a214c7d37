from __future__ import annotations

import pytest
import torch

from dist_mlpl.models.classifier import PooledHead

pytestmark = pytest.mark.unit


def head_and_map(dropout: float = 0.0) -> tuple[PooledHead, torch.Tensor]:
    torch.manual_seed(0)
    return PooledHead(6, 4, dropout=dropout), torch.randn(3, 6, 5, 2)


def test_logits_are_a_linear_map_of_the_mean_over_cells():
    head, feature_map = head_and_map()
    output, weight = head(feature_map), head.linear.weight.detach()
    for b in range(3):
        for c in range(4):
            pooled = [sum(feature_map[b, f].double().flatten().tolist()) / 10 for f in range(6)]
            value = sum(float(weight[c, f]) * pooled[f] for f in range(6))
            assert float(output.logits[b, c].detach()) == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(output.embedding, feature_map.mean((2, 3)))


def test_activation_maps_average_to_the_logits_and_cost_nothing_unless_asked_for():
    head, feature_map = head_and_map()
    assert head(feature_map).heatmaps is None
    output = head(feature_map, with_heatmaps=True)
    assert output.heatmaps.shape == (3, 4, 5, 2)
    torch.testing.assert_close(output.heatmaps.mean((2, 3)), output.logits)


def test_dropout_acts_on_logits_alone():
    head, feature_map = head_and_map(dropout=0.5)
    embedding = head(feature_map).embedding
    torch.testing.assert_close(embedding, feature_map.mean((2, 3)))
    assert not torch.equal(head(feature_map).logits, head.linear(embedding))
    torch.testing.assert_close(head.eval()(feature_map).logits, head.linear(embedding))


def test_the_bias_starts_at_zero():
    head, _ = head_and_map()
    assert not head.linear.bias.any()


@pytest.mark.parametrize("use_autocast", [True, False])
def test_everything_it_gives_is_float32_in_bf16_too(use_autocast):
    head, feature_map = head_and_map()
    with torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
        model = head if use_autocast else head.bfloat16()
        output = model(feature_map.bfloat16(), with_heatmaps=True)
    assert {tensor.dtype for tensor in output} == {torch.float32}


def test_a_float64_model_stays_float64():
    head, feature_map = head_and_map()
    output = head.double()(feature_map.double(), with_heatmaps=True)
    assert {tensor.dtype for tensor in output} == {torch.float64}
