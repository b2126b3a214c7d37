"""Owns the training step: forward and backward by micro-batches, then one update, on DeepSpeed or the plain engine."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_mlpl import comm, keyed
from dist_mlpl.batch import METRIC, Batch, Progress, RunLength, StepOutput
from dist_mlpl.engines.averages import WeightAverage
from dist_mlpl.engines.batch_norm import average_over_ranks, batch_norms, running_statistics
from dist_mlpl.engines.faults import not_finite, watched_gradients
from dist_mlpl.engines.plain import PlainEngine
from dist_mlpl.engines.state import (
    EngineState,
    gather_state,
    install_state,
    tensor_shapes,
    write_model,
    write_tensors,
)
from dist_mlpl.engines.zero import ZeroEngine, derive_config
from dist_mlpl.errors import ConfigError
from dist_mlpl.methods.base import Method
from dist_mlpl.optimizer import (
    OptimizerSettings,
    ScheduleSettings,
    build_optimizer,
    learning_rate_factor,
)
from dist_mlpl.settings import Settings
from dist_mlpl.spans import span
from dist_mlpl.world import World


class EngineSettings(Settings):
    """How a step is computed. Only `clip_norm`, `batch_norm`, `weight_average` and rounding change what is learned."""

    kind: Literal["deepspeed", "plain"] = "deepspeed"  # plain: a torch optimiser and one all-reduce
    zero_stage: Literal[0, 1, 2, 3] = 0  # what ranks share: 1 moments, 2 also gradients, 3 also parameters
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 by autocast; parameters and updates stay float32
    micro_batch: int | None = Field(None, gt=0)  # most rows of a rank at once; null: its whole share
    # frozen: running statistics stay; averaged: each rank has its own, averaged before they are used or saved; sync:
    # statistics of the whole micro-batch over all ranks, CUDA only
    batch_norm: Literal["frozen", "averaged", "sync"] = "averaged"
    clip_norm: float = Field(0.0, ge=0.0)  # 0: no clipping
    # Decay of a running average of the weights, which is then evaluated, and saved as the model; null: none.
    weight_average: float | None = Field(None, gt=0.0, lt=1.0)
    # Takes a minute at the first step. Semantic and pair heads, which work block by block, are not compiled. Refused at
    # stage 3, whose hooks sit inside every layer.
    compile: bool = False

    @model_validator(mode="after")
    def _refuse_compiled_stage_3(self) -> EngineSettings:
        if self.compile and self.kind == "deepspeed" and self.zero_stage == 3:
            raise ValueError("engine.compile does not work with engine.zero_stage 3; choose stage 2, or no compilation")
        return self


def start(settings: EngineSettings, *, timeout_seconds: float = 1800.0) -> World:
    """Make the process group if it is needed and missing, and choose this rank's device.

    Ray Train has made the group already; torchrun leaves it to this function. DeepSpeed uses the group it finds.

    Raises:
        ConfigError: `sync` BatchNorm without CUDA, or more ranks on this node than GPUs.

    Collective: all ranks, if the group is made here.
    """
    world = World.detect()
    has_cuda = torch.cuda.is_available()
    if settings.batch_norm == "sync" and not has_cuda:
        raise ConfigError(
            "engine.batch_norm sync on a machine without CUDA",
            expected="averaged or frozen; torch's synchronised BatchNorm runs on CUDA only",
            where="engine.batch_norm",
            next_step="set engine.batch_norm to averaged (the default)",
        )
    if has_cuda:
        torch.cuda.set_device(_own_device(world))
    if dist.is_initialized():
        return world
    backend = "cpu:gloo,cuda:nccl" if has_cuda else "gloo"  # control data stays on the CPU
    if world.size > 1:
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    elif settings.kind == "deepspeed":  # needs a group even for one rank; this store needs no port
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    return world


def _own_device(world: World) -> int:
    """The index of this rank's GPU: one GPU per rank.

    Raises:
        ConfigError: more ranks on this node than GPUs.
    """
    if world.local_rank < torch.cuda.device_count():
        return world.local_rank
    raise ConfigError(
        f"local rank {world.local_rank} on a node that shows {torch.cuda.device_count()} GPUs",
        expected="a GPU for each rank of the node",
        where="LOCAL_RANK, CUDA_VISIBLE_DEVICES",
        next_step="start fewer ranks on a node, show each all GPUs, or hide them all to train on CPUs",
    )


class Engine:
    """One method being trained.

    Args:
        method: built on every rank; rank 0's parameters and buffers are copied to all.
        settings: how a step is computed.
        optimizer: the update rule.
        schedule: how its learning rate changes.
        length: the run's length, for the schedule.
        world: this rank.
        global_batch: G, samples in a global batch.
        group_size: number of consecutive samples that are never split over ranks or micro-batches.
        num_samples: N of the train split; None: as many as an epoch has.
        seed: the run's seed; the torch generator is reseeded from (seed, step, rank) before each step.

    Raises:
        ConfigError: a micro-batch smaller than a group.

    Collective: all ranks; weights are broadcast.
    """

    def __init__(
        self,
        method: Method,
        settings: EngineSettings,
        optimizer: OptimizerSettings,
        schedule: ScheduleSettings,
        *,
        length: RunLength,
        world: World,
        global_batch: int,
        group_size: int,
        seed: int,
        num_samples: int | None = None,
    ) -> None:
        has_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
        self.settings, self.world = settings, world
        self._optimizer_settings, self._schedule, self._length, self._seed = optimizer, schedule, length, seed
        self._group_size = group_size
        self._num_updates = 0

        share_groups = -(-(global_batch // group_size) // world.size)  # in the longest share; others are padded to it
        micro_groups = share_groups if settings.micro_batch is None else settings.micro_batch // group_size
        if micro_groups == 0:
            raise ConfigError(
                f"engine.micro_batch {settings.micro_batch} with group_size {group_size}",
                expected="at least one whole group in a micro-batch",
                where="engine.micro_batch",
                next_step=f"set engine.micro_batch to {group_size} or more, or lower group_size",
            )
        self._num_micro_batches = -(-share_groups // micro_groups)

        method.begin_run(
            num_samples=length.num_samples if num_samples is None else num_samples,
            epoch_samples=length.num_samples,
            group_size=group_size,
            seed=seed,
        )
        method.to(self.device)
        if settings.batch_norm == "sync":
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        if settings.compile:  # child by child: DeepSpeed puts hooks on the whole module, which cannot be compiled
            for part in method.children():
                part.compile()
        self.method = method
        self._train_mode()
        torch_optimizer = build_optimizer(optimizer, method.parameter_groups())
        self._param_groups = torch_optimizer.param_groups
        use_bfloat16 = settings.precision == "bf16"
        self._backend: PlainEngine | ZeroEngine
        if settings.kind == "plain":
            self._backend = PlainEngine(
                method,
                torch_optimizer,
                clip_norm=settings.clip_norm,
                use_bfloat16=use_bfloat16,
                keeps_average=settings.weight_average is not None,
            )
        else:
            config = derive_config(
                stage=settings.zero_stage,
                use_bfloat16=use_bfloat16,
                clip_norm=settings.clip_norm,
                micro_batch=micro_groups * group_size,
                num_micro_batches=self._num_micro_batches,
            )
            keeps_average = settings.weight_average is not None
            self._backend = ZeroEngine(method, torch_optimizer, config, keeps_average=keeps_average)
        decay = settings.weight_average
        self._average = None if decay is None else WeightAverage(self._backend, decay)

    def train_step(self, batch: Batch, recalled: dict[str, Tensor], progress: Progress) -> StepOutput:
        """Forward and backward over this rank's share in micro-batches, then one update.

        Args:
            batch: this rank's share of the global batch.
            recalled: what the method recalled for the whole step; every micro-batch gets all of it.
            progress: where the run stands before this step; sets the learning rate and seeds the random generator.

        Returns:
            `loss` and `terms` of the global batch, the same on every rank; `logits` of this rank's rows; and `extras`:
            the method's, whose tensors with dimensions have a row per image and are joined like the logits; METRIC
            entries as numbers for the global batch; `grad_norm` (before clipping), `learning_rate` (of the backbone)
            and `num_bad` (undecodable samples over all ranks).

        Raises:
            RunError: loss or gradient norm is not finite, on all ranks. No parameter or moment changed on any rank; the
                engine cannot be used further.

        Collective: all ranks; the gradients, and one all-reduce of loss, terms and metrics.
        """
        self._show_average(False)
        learning_rate = self._set_learning_rate(progress)
        outputs = self._accumulate(batch, recalled, progress)
        names = ["loss", *sorted(outputs[0].terms)]
        measured = sorted(name for name in outputs[0].extras if name.startswith(METRIC))
        shares = torch.stack([
            torch.stack([o.loss, *(o.terms[name] for name in names[1:]), *(o.extras[name] for name in measured)])
            for o in outputs
        ])  # fmt: skip
        num_bad = ((batch.index >= 0) & ~batch.valid).sum()
        own = torch.cat([shares.sum(0), num_bad[None]])
        with span("loss over ranks"):
            total = comm.reduce_sum(own.clone()).tolist()  # global batch: loss, terms, metrics, bad samples
        if not math.isfinite(total[0]):
            raise not_finite("the loss", progress, dict(zip(names, own.tolist(), strict=False)))
        with span("update"):
            grad_norm = self._backend.update()
        if not math.isfinite(grad_norm):
            with watched_gradients(self.method) as bad:  # the sum hides the NaN's source: run the step again
                self._accumulate(batch, recalled, progress)
            raise not_finite("the gradient norm", progress, dict(zip(names, own.tolist(), strict=False)), bad)
        self._num_updates += 1
        if self._average is not None:
            self._average.update(self._num_updates)
        extras = _joined_extras(outputs)
        extras |= {"grad_norm": grad_norm, "learning_rate": learning_rate, "num_bad": round(total[-1])}
        extras |= dict(zip(measured, total[len(names) : -1], strict=True))
        return StepOutput(
            loss=torch.tensor(total[0]),
            terms={name: torch.tensor(value) for name, value in zip(names[1:], total[1 : len(names)], strict=True)},
            logits=torch.cat([o.logits for o in outputs]),
            extras=extras,
        )

    def predict(self, batch: Batch) -> StepOutput:
        """Run inference: no loss, no gradient, evaluation mode; with the average of the weights if one is kept.

        Collective: all ranks at stage 3, where forward gathers parameters; with an average, at stages 1 and 2 in the
        first call after a step.
        """
        self._show_average(True)
        self.method.eval()
        with torch.no_grad():
            return self._backend.forward(batch, None)

    def average_buffers(self) -> None:
        """Average BatchNorm's running statistics over ranks, in place, if `engine.batch_norm` is `averaged`.

        Collective: all ranks, one all-reduce of the statistics.
        """
        if self.settings.batch_norm != "averaged":
            return
        self._show_average(False)
        statistics = running_statistics(self.method)
        average_over_ranks(list(statistics.values()))
        if self._average is not None:
            average_over_ranks([self._average.buffers[name] for name in statistics])

    def state(self) -> EngineState | None:
        """Gather everything that training changes on rank 0; None elsewhere.

        If an average of the weights is kept, it is the state's `model`, and the weights themselves are in `moments`.

        Collective: all ranks; above stage 0 each parameter and moment is gathered in turn.
        """
        self.average_buffers()
        self._show_average(False)
        return gather_state(self._backend, self._average, num_updates=self._num_updates, keep=self.world.is_first)

    def load(self, state: EngineState) -> None:
        """Load a state that every rank holds whole, made at any stage on any number of ranks.

        Raises:
            CheckpointError: names or shapes differ from this method's.
        """
        self._show_average(False)
        install_state(self._backend, state, self._average)
        self._num_updates = state.num_updates

    def load_model(self, model: dict[str, Tensor]) -> None:
        """Load parameters and buffers only; an average of the weights starts from them.

        Raises:
            CheckpointError: names or shapes differ from this method's.
        """
        self._show_average(False)
        write_model(self._backend, model, self._average)

    def load_matching(self, model: dict[str, Tensor]) -> tuple[list[str], dict[str, str]]:
        """Load the parameters and buffers whose name and shape agree with this method's; leave the others.

        Returns:
            The names of those loaded; and, by name, what those are that the method keeps (`Method.kept_at_start`)
            although name and shape agree.
        """
        shapes = tensor_shapes(self._backend)
        kept = self.method.kept_at_start([name for name, t in model.items() if shapes.get(name, t.shape) == t.shape])
        fitting = {name: tensor for name, tensor in model.items() if shapes.get(name) == tensor.shape}
        taken = {name: tensor for name, tensor in fitting.items() if name not in kept}
        self._show_average(False)
        write_tensors(self._backend, taken, self._average)
        return list(taken), {name: kept[name] for name in fitting if name in kept}

    def _accumulate(self, batch: Batch, recalled: dict[str, Tensor], progress: Progress) -> list[StepOutput]:
        """Run forward and backward over the micro-batches; random draws depend on seed, step and rank only.

        Returns:
            The micro-batches' outputs, the losses detached.
        """
        torch.manual_seed(keyed.torch_seed("step", self._seed, progress.step, self.world.rank))
        if not self.method.training:
            self._train_mode()
        outputs = []
        num_groups, count = batch.num_images // self._group_size, self._num_micro_batches
        for number in range(count):  # split between groups into nearly equal parts, as many on every rank
            first, last = number * num_groups // count, (number + 1) * num_groups // count
            with span("forward"):
                output = self._backend.forward(batch.rows(first * self._group_size, last * self._group_size), recalled)
            with span("backward"):
                self._backend.backward(output.loss, is_last=number == count - 1)
            outputs.append(output._replace(loss=output.loss.detach()))
        return outputs

    def _set_learning_rate(self, progress: Progress) -> float:
        seen = self._length.samples_seen(progress.epoch, progress.samples_consumed)
        factor = learning_rate_factor(self._schedule, seen, self._length.total_samples)
        for group in self._param_groups:
            group["lr"] = group["base_learning_rate"] * factor
        return self._optimizer_settings.learning_rate * factor

    def _show_average(self, is_shown: bool) -> None:
        """Make forward use the average of the weights, or the weights that are trained."""
        if self._average is not None:
            self._average.show() if is_shown else self._average.hide()

    def _train_mode(self) -> None:
        self.method.train()
        if self.settings.batch_norm == "frozen":
            for layer in batch_norms(self.method):
                layer.eval()


def _joined_extras(outputs: list[StepOutput]) -> dict[str, Any]:
    """The extras of a step: tensors with dimensions joined over micro-batches, others those of the last one."""
    extras = dict(outputs[-1].extras)
    for name, last in extras.items():
        if isinstance(last, Tensor) and last.dim() > 0:
            extras[name] = torch.cat([o.extras[name] for o in outputs])
    return extras
