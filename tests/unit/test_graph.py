from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_mlpl.errors import ConfigError
from dist_mlpl.models import graph as graph_module
from dist_mlpl.models.graph import LabelGraph, LabelGraphSettings
from tests.support.graph import graph_oracle
from tests.support.memory import most_bytes

pytestmark = pytest.mark.unit

MESSAGES, IDENTITIES, READOUTS = ("sender", "pair"), ("one_hot", "learned", "none"), ("both", "last", "averaged")
SMALL = {"width": 6, "message_width": 4}

every_form = pytest.mark.parametrize(("messages", "identity"), list(itertools.product(MESSAGES, IDENTITIES)))


def random_graph(num_classes: int, **keys) -> LabelGraph:
    """A graph all of whose weights matter, the readout's too."""
    torch.manual_seed(0)
    graph = LabelGraph(LabelGraphSettings(**keys), num_classes)
    for name, parameter in graph.named_parameters():
        if not name.startswith("message_weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    return graph


def random_logits(num_images: int, num_classes: int) -> Tensor:
    return torch.randn(num_images, num_classes, generator=torch.Generator().manual_seed(1))


def plain_graph(graph: LabelGraph, logits: Tensor) -> Tensor:
    """The same with the mean over the others written out, (B, C, C, M), torch's own GRU, and plain autograd."""
    B, C = logits.shape
    H = graph.width
    others = 1.0 - torch.eye(C, dtype=logits.dtype)
    states = first = graph._first_states(logits).transpose(0, 1)  # (B, C, H)
    for _ in range(graph.num_steps):
        senders = states.unsqueeze(1).expand(B, C, C, H)
        if graph.message_weight.shape[1] == 2 * H:
            senders = torch.cat([senders, states.unsqueeze(2).expand(B, C, C, H)], dim=-1)
        messages = F.linear(senders, graph.message_weight, graph.message_bias).relu()
        mean = (messages * others.unsqueeze(-1)).sum(dim=2) / max(1, C - 1)
        weights = graph.input_weight, graph.state_weight, graph.input_bias, graph.state_bias
        states = torch.gru_cell(mean.flatten(0, 1), states.flatten(0, 1), *weights).view(B, C, H)
    seen = torch.cat([first, states], dim=-1) if graph.readout == "both" else states
    new = F.linear(seen, graph.output_weight, graph.output_bias).squeeze(-1)
    return (logits + new) / 2 if graph.readout == "averaged" else new


@pytest.mark.parametrize("entries", [1, 60, 2**18])
@pytest.mark.parametrize("num_classes", [1, 2, 5])
@every_form
def test_logits_are_what_loops_over_nodes_and_neighbours_give(monkeypatch, messages, identity, num_classes, entries):
    monkeypatch.setattr(graph_module, "_CPU_ENTRIES", entries)
    logits = random_logits(2, num_classes).double()
    for readout in READOUTS:
        graph = random_graph(num_classes, messages=messages, identity=identity, readout=readout, **SMALL).double()
        torch.testing.assert_close(graph(logits), graph_oracle(graph, logits), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("entries", [1, 100, 2**18])
@every_form
def test_gradients_are_those_of_plain_autograd_however_the_nodes_are_cut(monkeypatch, messages, identity, entries):
    monkeypatch.setattr(graph_module, "_CPU_ENTRIES", entries)
    for readout in READOUTS:
        graph = random_graph(5, messages=messages, identity=identity, readout=readout, **SMALL).double()
        logits = random_logits(3, 5).double().requires_grad_()
        slope = torch.randn(3, 5, dtype=torch.float64)
        inputs = [logits, *graph.parameters()]
        found = torch.autograd.grad(graph(logits), inputs, slope)
        expected = torch.autograd.grad(plain_graph(graph, logits), inputs, slope)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    graph = random_graph(3, identity="learned", num_steps=2, width=3).double()
    logits = random_logits(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *weights: graph(x), (logits, *graph.parameters()))


def test_the_sum_less_the_own_message_is_the_masked_mean_for_hundreds_of_classes():
    graph, logits = random_graph(300, identity="learned", width=16), random_logits(2, 300)
    torch.testing.assert_close(graph(logits), plain_graph(graph, logits), rtol=1e-5, atol=1e-6)


def test_classes_in_another_order_give_the_same_numbers_only_where_their_identity_goes_along():
    order = torch.tensor([3, 0, 4, 1, 2])
    logits = random_logits(2, 5)
    for identity in IDENTITIES:
        graph = random_graph(5, identity=identity, width=6)
        before = graph(logits)
        assert torch.allclose(graph(logits[:, order]), before[:, order], atol=1e-5) == (identity == "none")
        if identity == "learned":
            graph.class_vectors.data = graph.class_vectors.data[order]
            torch.testing.assert_close(graph(logits[:, order]), before[:, order])


def test_permuting_one_hot_places_in_all_weights_permutes_the_logits():
    order = torch.tensor([3, 0, 4, 1, 2])
    graph, logits = random_graph(5, identity="one_hot"), random_logits(2, 5)
    before = graph(logits)
    gates = torch.cat([order, order + 5, order + 10])
    with torch.no_grad():
        graph.message_weight.copy_(graph.message_weight[:, order])
        graph.input_weight.copy_(graph.input_weight[gates])
        graph.input_bias.copy_(graph.input_bias[gates])
        graph.state_weight.copy_(graph.state_weight[gates][:, order])
        graph.state_bias.copy_(graph.state_bias[gates])
        graph.output_weight.copy_(graph.output_weight[:, torch.cat([order, order + 5])])
    torch.testing.assert_close(graph(logits[:, order]), before[:, order])


@every_form
def test_a_new_graph_changes_no_logit_but_learns(messages, identity):
    graph = LabelGraph(LabelGraphSettings(messages=messages, identity=identity, width=6), 5)
    logits = random_logits(3, 5)
    output = graph(logits)
    assert torch.equal(output, logits)
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters())
    assert bool(graph.output_weight.grad[0, 6:].any())


def test_every_class_hears_every_other_and_no_other_image():
    graph, logits = random_graph(6, identity="learned", width=8), random_logits(2, 6).requires_grad_()
    for c in range(6):
        (slope,) = torch.autograd.grad(graph(logits)[0, c], logits)
        assert bool(slope[0].all())
        assert not slope[1].any()


def test_images_together_or_alone_get_the_same_logits():
    graph, logits = random_graph(40, width=48), random_logits(9, 40)
    alone = torch.cat([graph(row) for row in logits.split(1)])
    torch.testing.assert_close(graph(logits), alone, rtol=1e-6, atol=1e-6)
    assert graph(logits[:0]).shape == (0, 40)


@pytest.mark.parametrize(("messages", "num_kept"), [("sender", 4), ("pair", 7)])
def test_what_is_kept_for_the_backward_pass_grows_with_the_classes_alone(messages, num_kept):
    """Three states before the steps and one after; with pairs also three times the senders' parts."""
    B, H = 4, 16

    def kept_bytes(num_classes: int) -> int:
        graph = random_graph(num_classes, messages=messages, identity="learned", width=H)
        logits = random_logits(B, num_classes).requires_grad_()
        own = {tensor.untyped_storage().data_ptr() for tensor in (logits, *graph.parameters())}
        kept: dict[int, int] = {}

        def see(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            output = graph(logits)
        assert output.requires_grad
        return sum(kept.values())

    sums = 0 if messages == "pair" else 3 * B * H * 4
    assert [kept_bytes(C) - sums for C in (50, 200)] == [num_kept * B * C * H * 4 for C in (50, 200)]


def test_under_autocast_states_and_logits_stay_float32_and_close():
    graph, logits = random_graph(300, identity="learned", width=16), random_logits(2, 300).requires_grad_()
    exact = graph(logits)
    exact_slope = torch.autograd.grad(exact.square().mean(), logits)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = graph(logits)
    slope = torch.autograd.grad(output.square().mean(), logits)[0]
    assert output.dtype == slope.dtype == torch.float32
    assert not torch.equal(output, exact)
    torch.testing.assert_close(output, exact, rtol=0.02, atol=0.02)
    torch.testing.assert_close(slope, exact_slope, rtol=0.02, atol=0.02 * float(exact_slope.abs().max()))


def test_under_autocast_the_backward_pass_keeps_no_casts_of_blocks_that_are_done(monkeypatch):
    graph, logits = random_graph(64, width=192), random_logits(2, 64).requires_grad_()

    def peak(num_classes: int) -> int:
        """In blocks of so many classes."""
        monkeypatch.setattr(graph_module, "_CPU_ENTRIES", num_classes * 2 * max(graph.message_weight.shape))
        with torch.autocast("cpu", torch.bfloat16):
            total = graph(logits).sum()
        return most_bytes(total.backward)

    assert peak(1) < peak(16)


def test_with_an_average_readout_half_the_logit_is_the_one_that_came_in():
    graph, logits = random_graph(5, readout="averaged"), random_logits(2, 5)
    halves = graph(logits) - logits / 2
    graph.readout = "last"
    torch.testing.assert_close(halves * 2, graph(logits))


def test_dropout_acts_on_the_last_states_in_training_alone():
    graph, logits = random_graph(5, dropout=0.5), random_logits(2, 5)
    assert not torch.equal(graph(logits), graph(logits))
    graph.eval()
    assert torch.equal(graph(logits), graph(logits))


@pytest.mark.parametrize(
    ("num_classes", "keys", "identity", "width"),
    [
        (80, {}, "one_hot", 80),
        (1, {}, "one_hot", 2),
        (1000, {}, "one_hot", 1000),
        (1001, {}, "learned", 128),
        (80, {"width": 128}, "one_hot", 128),
        (80, {"width": 79}, "learned", 79),
        (80, {"identity": "learned"}, "learned", 128),
        (80, {"identity": "none"}, "none", 128),
        (1200, {"identity": "one_hot"}, "one_hot", 1200),
    ],
)
def test_what_is_left_open_follows_from_the_number_of_classes(num_classes, keys, identity, width):
    graph = LabelGraph(LabelGraphSettings(message_width=2, **keys), num_classes)
    assert (graph.identity, graph.width) == (identity, width)
    assert all(parameter.dim() > 0 for parameter in graph.parameters())


def test_one_hot_places_need_a_width_of_as_many():
    with pytest.raises(ConfigError, match="with 80 classes"):
        LabelGraph(LabelGraphSettings(identity="one_hot", width=79), 80)
