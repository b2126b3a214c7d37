from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from dist_mlpl.errors import ConfigError
from dist_mlpl.models.classifier import PooledHead, Pooling, WeldonSettings, pool_regions
from tests.support.weldon import weldon_oracle

pytestmark = pytest.mark.unit


def head_and_map(dropout: float = 0.0, pooling: Pooling = "average") -> tuple[PooledHead, torch.Tensor]:
    torch.manual_seed(0)
    return PooledHead(6, 4, dropout=dropout, pooling=pooling), torch.randn(3, 6, 5, 2)


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


@pytest.mark.parametrize("pooling", ["average", "max", "weldon"])
@pytest.mark.parametrize("use_autocast", [True, False])
def test_everything_it_gives_is_float32_in_bf16_too(use_autocast, pooling):
    head, feature_map = head_and_map(pooling=pooling)
    with torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
        model = head if use_autocast else head.bfloat16()
        output = model(feature_map.bfloat16(), with_heatmaps=True)
    assert {tensor.dtype for tensor in output} == {torch.float32}


@pytest.mark.parametrize("pooling", ["average", "max", "weldon"])
def test_a_float64_model_stays_float64(pooling):
    head, feature_map = head_and_map(pooling=pooling)
    output = head.double()(feature_map.double(), with_heatmaps=True)
    assert {tensor.dtype for tensor in output} == {torch.float64}


@pytest.mark.parametrize(("num_top", "num_bottom"), [(1, 1), (3, 3), (2, 5), (4, 0), (10, 10)])
def test_weldon_adds_the_mean_of_the_highest_scores_and_the_mean_of_the_lowest(num_top, num_bottom):
    settings = WeldonSettings(num_top=num_top, num_bottom=num_bottom)
    head, feature_map = head_and_map(pooling=settings)
    head, feature_map = head.double(), feature_map.double()
    torch.nn.init.normal_(head.linear.bias)
    output = head(feature_map, with_heatmaps=True)
    expected = weldon_oracle(feature_map, head.linear.weight, head.linear.bias, num_top, num_bottom)
    torch.testing.assert_close(output.logits.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pool_regions(output.heatmaps.permute(0, 2, 3, 1), settings), output.logits)
    torch.testing.assert_close(output.embedding, feature_map.mean((2, 3)))


def test_one_top_region_and_no_bottom_one_is_the_maximum_and_all_regions_are_twice_the_mean():
    scores = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    maximum = pool_regions(scores, WeldonSettings(num_top=1, num_bottom=0))
    everywhere = pool_regions(scores, WeldonSettings(num_top=12, num_bottom=12))
    assert torch.equal(maximum, scores.amax(dim=(1, 2)))
    torch.testing.assert_close(everywhere, 2 * scores.mean(dim=(1, 2)))


def test_the_slope_reaches_the_chosen_cells_alone_in_equal_parts():
    scores = torch.tensor([5.0, 1.0, -2.0, 4.0, 0.0, -3.0]).view(1, 2, 3, 1).requires_grad_()
    pool_regions(scores, WeldonSettings(num_top=2, num_bottom=1)).sum().backward()
    assert scores.grad.flatten().tolist() == [0.5, 0.0, 0.0, 0.5, 0.0, 1.0]


def test_with_weldon_dropout_draws_once_for_all_cells_of_an_image():
    head, feature_map = head_and_map(dropout=0.5, pooling="weldon")
    torch.manual_seed(1)
    logits = head(feature_map).logits
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(torch.ones(3, 6), 0.5)[:, :, None, None]
    head.eval()
    torch.testing.assert_close(logits, head(feature_map * kept).logits)
    assert not torch.equal(logits, head(feature_map).logits)


def test_more_regions_than_cells_are_refused_with_the_number_of_cells():
    head, feature_map = head_and_map(pooling=WeldonSettings(num_top=11))
    with pytest.raises(ConfigError, match="of 10 cells"):
        head(feature_map)


def test_pooling_is_a_name_or_weldon_with_its_numbers():
    pooling = TypeAdapter(Pooling)
    assert pooling.validate_python("weldon") == "weldon"
    settings = pooling.validate_python({"name": "weldon", "num_top": 3})
    assert (settings.num_top, settings.num_bottom) == (3, 1)
    for wrong in ("mean", {"name": "max"}, {"num_top": 0}, {"num_bottom": -1}, {"k": 3}, None):
        with pytest.raises(ValidationError):
            pooling.validate_python(wrong)
