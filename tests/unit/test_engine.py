from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dist_mlpl.batch import Progress
from dist_mlpl.engine import Engine, EngineSettings, start
from dist_mlpl.engines.zero import derive_config, import_deepspeed
from dist_mlpl.errors import CheckpointError, ConfigError
from dist_mlpl.optimizer import OptimizerSettings, ScheduleSettings, build_optimizer, learning_rate_factor
from tests.support.methods import random_batch, tiny_method
from tests.support.training import (
    BATCH_NORM,
    GROUP_SIZE,
    LENGTH,
    LayerNormTrunk,
    is_equal,
    is_same,
    largest_difference,
    make_engine,
    train,
    train_on,
    whole_state,
)

pytestmark = pytest.mark.unit

# DeepSpeed 0.19 refuses a config that has one of these.
REMOVED_KEYS = {
    "elasticity", "nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue",
    "sparse_attention", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
}  # fmt: skip


def buffers_of(engine: Engine) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in engine.method.named_buffers()}


def parameters_of(method: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in method.named_parameters()}


@pytest.mark.parametrize("rule", [{"weight_decay": 0.05}, {"name": "sgd", "learning_rate": 0.1}], ids=["adamw", "sgd"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_the_plain_engine_is_the_loop_that_everybody_writes(rule, clip_norm):
    schedule = ScheduleSettings(warmup_samples=24)
    rule = rule | {"head_multiplier": 3.0}
    engine = make_engine("plain", optimizer=rule, schedule=schedule.model_dump(), clip_norm=clip_norm, micro_batch=8)
    method = tiny_method("partial_bce", backbone={"name": "resnet_small_gn"})
    optimizer = build_optimizer(OptimizerSettings(**rule), method.parameter_groups())
    for step in range(3):
        batch = random_batch(16, seed=step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_learning_rate"] * learning_rate_factor(schedule, step * 16, LENGTH.total_samples)
        optimizer.zero_grad()
        loss = method(batch, method.recall(batch, Progress())).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(method.parameters(), clip_norm or float("inf"))
        optimizer.step()
        found = train_on(engine, batch, step)
        assert found.loss == pytest.approx(float(loss.detach()), abs=1e-6)
        assert found.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert largest_difference(parameters_of(engine.method), parameters_of(method)) < 2e-5


def test_the_learning_rate_follows_samples_whatever_the_batch():
    schedule = {"name": "cosine", "warmup_samples": 48}
    rates: dict[int, dict[int, float]] = {}
    for global_batch in (8, 16):
        engine = make_engine("plain", global_batch=global_batch, schedule=schedule)
        rates[global_batch] = {}
        for step in range(64 // global_batch):
            progress = Progress(step=step, samples_consumed=step * global_batch)
            batch = random_batch(global_batch, seed=step)
            output = engine.train_step(batch, engine.method.recall(batch, progress), progress)
            rates[global_batch][progress.samples_consumed] = output.extras["learning_rate"]
    shared = rates[8].keys() & rates[16].keys()
    assert len(shared) == 4
    assert {s: rates[8][s] for s in shared} == {s: rates[16][s] for s in shared}


@pytest.mark.parametrize("num_groups", [1, 2, 5])
@pytest.mark.parametrize("micro_batch", [None, GROUP_SIZE, GROUP_SIZE + 1, 2 * GROUP_SIZE, 3 * GROUP_SIZE])
def test_micro_batches_are_whole_groups_in_order_within_the_limit(num_groups, micro_batch):
    num_images = num_groups * GROUP_SIZE
    engine = make_engine("plain", global_batch=num_images, micro_batch=micro_batch)
    seen, recalled_seen = [], []

    def look(method: nn.Module, arguments: tuple) -> None:
        seen.append(arguments[0].index.tolist())
        recalled_seen.append(arguments[1])

    engine.method.register_forward_pre_hook(look)
    batch = random_batch(num_images, seed=0)
    recalled = engine.method.recall(batch, Progress())
    output = engine.train_step(batch, recalled, Progress())
    assert [index for part in seen for index in part] == list(range(num_images))
    assert all(part and len(part) % GROUP_SIZE == 0 for part in seen)
    assert max(map(len, seen)) <= (micro_batch or num_images)
    assert max(map(len, seen)) - min(map(len, seen)) <= GROUP_SIZE
    assert all(other is recalled for other in recalled_seen)
    assert output.logits.shape[0] == output.extras["embedding"].shape[0] == num_images


def test_rows_of_a_step_stay_in_order_over_micro_batches():
    batch = random_batch(16, seed=3)
    whole, cut = (make_engine("plain", micro_batch=micro_batch) for micro_batch in (None, 4))
    outputs = [e.train_step(batch, e.method.recall(batch, Progress()), Progress()) for e in (whole, cut)]
    for name in ("logits", "embedding"):
        first, second = (getattr(o, name, None) if name == "logits" else o.extras[name] for o in outputs)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_compilation_is_refused_where_it_would_fall_back_step_by_step():
    with pytest.raises(ValidationError, match=r"engine.compile does not work with engine.zero_stage 3"):
        EngineSettings(compile=True, zero_stage=3)
    assert EngineSettings(compile=True, zero_stage=3, kind="plain").compile


@pytest.mark.parametrize("name", ["blending", "sst"])
def test_a_compiled_semantic_method_trains_as_it_does_without_and_compiles_nothing_anew(name, monkeypatch):
    narrow = {"head": {"attention_width": 8, "embedding_width": 6, "feature_width": 12}, "start_epoch": 1}
    graphs = []

    def count(graph, inputs):  # in place of the C++ compiler: the graph as it is
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    losses, num_graphs = {}, []
    for is_compiled in (False, True):
        method = tiny_method(name, **narrow)
        method.backbone = LayerNormTrunk()
        engine = make_engine("plain", method=method, compile=is_compiled)
        losses[is_compiled] = []
        for step in range(4):  # each with another number of known labels
            progress = Progress(epoch=step // 2, samples_consumed=16 * (step % 2), step=step)
            if progress.samples_consumed == 0:
                engine.method.begin_epoch(progress)
            batch = random_batch(16, seed=step, known_fraction=0.3 + 0.1 * step)
            output = engine.train_step(batch, engine.method.recall(batch, progress), progress)
            engine.method.observe(batch, output)
            losses[is_compiled].append(float(output.loss))
            num_graphs.append(len(graphs))
    torch.compiler.reset()
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert num_graphs[:4] == [0] * 4
    assert num_graphs[4] > 0
    assert num_graphs[4:] == [num_graphs[4]] * 4


def test_a_micro_batch_without_a_whole_group_is_refused():
    with pytest.raises(ConfigError, match="micro_batch 3 with group_size 4"):
        make_engine("plain", micro_batch=3)


def test_undecodable_samples_are_counted_and_padding_is_not():
    engine = make_engine("plain")
    batch = random_batch(16, seed=0)
    batch.valid[[1, 5, 6]] = False
    batch.index[6] = -1
    output = engine.train_step(batch, engine.method.recall(batch, Progress()), Progress())
    assert output.extras["num_bad"] == 2


def test_frozen_batch_norm_keeps_its_statistics_and_others_move_them():
    for mode, is_kept in (("frozen", True), ("averaged", False)):
        engine = make_engine("plain", backbone=BATCH_NORM, batch_norm=mode)
        before = buffers_of(engine)
        train(engine, 1)
        engine.predict(random_batch(16, seed=9))
        train(engine, 1, start=1)  # training again after an evaluation
        assert is_equal(buffers_of(engine), before) is is_kept


def test_prediction_moves_nothing_and_training_goes_on_after_it():
    engine = make_engine("plain", backbone=BATCH_NORM)
    train(engine, 1)
    before = whole_state(engine)
    batch = random_batch(16, seed=9)
    output = engine.predict(batch)
    assert is_same(whole_state(engine), before)
    assert output.terms == {}
    assert not output.logits.requires_grad
    assert torch.equal(output.logits, engine.predict(batch).logits)
    train(engine, 1, start=1)
    assert not is_equal(whole_state(engine).model, before.model)


def test_chance_depends_on_the_step_and_on_nothing_drawn_before():
    engine = make_engine("plain", method=tiny_method("partial_bce", backbone=BATCH_NORM, dropout=0.5))
    state, batch = whole_state(engine), random_batch(16, seed=0)
    losses = []
    for step in (4, 4, 5):
        torch.rand(7)
        engine.load(state)
        losses.append(train_on(engine, batch, step).loss)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="synchronised BatchNorm runs on CUDA")
def test_synchronised_batch_norm_is_refused_without_cuda():
    with pytest.raises(ConfigError, match=r"batch_norm sync on a machine without CUDA"):
        start(EngineSettings(batch_norm="sync"))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_state_taken_over_goes_on_to_the_bit(kind):
    keys = {"backbone": BATCH_NORM, "optimizer": {"name": kind}}
    engine, other = make_engine("plain", **keys), make_engine("plain", **keys)
    train(engine, 2)
    other.load(whole_state(engine))
    assert is_same(whole_state(other), whole_state(engine))
    assert train(other, 3, start=2) == train(engine, 3, start=2)
    assert is_same(whole_state(other), whole_state(engine))


def test_a_state_owns_its_tensors():
    engine = make_engine("plain")
    state = whole_state(engine)
    before = {name: tensor.clone() for name, tensor in state.model.items()}
    train(engine, 1)
    assert is_equal(state.model, before)


@pytest.mark.parametrize("where", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "other shape"])
def test_a_state_that_does_not_fit_is_refused_whole(where, fault):
    engine = make_engine("plain")
    before = whole_state(engine)
    train(engine, 1)
    state = whole_state(engine)
    tensors = state.model if where == "model.safetensors" else state.moments
    name = "head.linear.weight" if where == "model.safetensors" else "head.linear.weight/exp_avg"
    if fault == "missing":
        del tensors[name]
    else:
        name = name if fault == "other shape" else f"{name}.more"
        tensors[name] = torch.zeros(2, 3)
    engine.load(before)
    with pytest.raises(CheckpointError, match=f"1 tensors differ, first '{name}'") as caught:
        engine.load(state)
    assert caught.value.where == where
    assert is_same(whole_state(engine), before)


def test_another_optimizer_is_refused_with_a_way_out():
    state = whole_state(make_engine("plain"))
    with pytest.raises(CheckpointError, match=r"as this config's model and optimizer have it"):
        make_engine("plain", optimizer={"name": "sgd"}).load(state)


def test_a_model_taken_over_leaves_the_moments():
    engine, other = make_engine("plain"), make_engine("plain")
    train(engine, 1)
    train(other, 2)
    before, model = whole_state(other), whole_state(engine).model
    other.load_model(model)
    after = whole_state(other)
    assert is_equal(after.model, model)
    assert is_equal(after.moments, before.moments)
    assert after.num_updates == 2
    with pytest.raises(CheckpointError):
        other.load_model({})


def test_only_tensors_of_the_same_name_and_shape_are_taken_from_another_model():
    engine = make_engine("plain")
    before = whole_state(engine).model
    other = {"head.linear.weight": torch.ones(5, 128), "head.linear.bias": torch.ones(6), "elsewhere": torch.ones(1)}
    assert engine.load_matching(other) == (["head.linear.weight"], {})
    after = whole_state(engine).model
    assert torch.equal(after.pop("head.linear.weight"), other["head.linear.weight"])
    del before["head.linear.weight"]
    assert is_equal(after, before)


@pytest.mark.parametrize(("stage", "use_bfloat16"), product(range(4), (False, True)))
def test_the_derived_config_is_complete_and_accepted(stage, use_bfloat16):
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    keys = {"stage": stage, "use_bfloat16": use_bfloat16, "micro_batch": 8, "num_micro_batches": 3}
    config = derive_config(clip_norm=0.0, **keys)
    assert config["gradient_clipping"] == 0.0  # left out, DeepSpeed would clip at 1.0
    assert not REMOVED_KEYS & config.keys()
    assert not {"bf16", "bfloat16", "fp16", "optimizer", "scheduler"} & config.keys()
    read = DeepSpeedConfig(derive_config(clip_norm=0.5, **keys))
    assert read.gradient_clipping == 0.5
    assert read.zero_optimization_stage == stage
    assert read.gradient_accumulation_steps == 3
    assert (read.torch_autocast_enabled, read.bfloat16_config.enabled) == (use_bfloat16, False)
    assert read.torch_autocast_lower_precision_safe_modules == []
    assert not read.timers_config.enabled


LONE_PROCESS = """
from dist_mlpl.engine import EngineSettings, start
from tests.support.methods import random_batch
from tests.support.training import make_engine, train_on

assert start(EngineSettings(zero_stage=2)).size == 1
engine = make_engine(2)
print([train_on(engine, random_batch(16, seed=0), step).loss for step in range(4)])
"""


def test_deepspeed_trains_alone_without_compiler_or_ninja(tmp_path: Path):
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC", "RANK", "WORLD_SIZE")}
    env = kept | {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LONE_PROCESS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in done.stdout.strip().splitlines()[-1].strip("[]").split(",")]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert list(tmp_path.iterdir()) == []
