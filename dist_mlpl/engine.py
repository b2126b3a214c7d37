"""Owns the training step: micro-batches, one backward, one update, on DeepSpeed or on the plain engine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from dist_mlpl import comm, keyed
from dist_mlpl.batch import Batch, Progress, RunLength, StepOutput
from dist_mlpl.engines.plain import PlainEngine
from dist_mlpl.engines.zero import ZeroEngine, derive_config
from dist_mlpl.errors import CheckpointError, ConfigError, RunError
from dist_mlpl.methods.base import Method
from dist_mlpl.optimizer import (
    OptimizerSettings,
    ScheduleSettings,
    build_optimizer,
    learning_rate_factor,
    moment_names,
)
from dist_mlpl.settings import Settings
from dist_mlpl.world import World


class EngineSettings(Settings):
    """How a step is computed. None of it changes what is learned beyond rounding."""

    kind: Literal["deepspeed", "plain"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 by autocast; parameters and updates stay float32
    micro_batch: int | None = Field(None, gt=0)  # rows of a rank at once at most; null: the rank's whole share
    batch_norm: Literal["frozen", "averaged", "sync"] = "averaged"
    clip_norm: float = Field(0.0, ge=0.0)  # 0: no clipping
    compile: bool = False


class EngineState(NamedTuple):
    """Everything that training changes, whole and on the CPU: nothing in it knows of stages or ranks."""

    model: dict[str, Tensor]  # parameters and buffers by name
    moments: dict[str, Tensor]  # `parameter/moment`
    num_updates: int


def start(settings: EngineSettings, *, timeout_seconds: float = 1800.0) -> World:
    """Join the process group if there are several ranks, and choose this rank's device.

    Ray Train and DeepSpeed find the group already there; torchrun leaves making it to us.

    Raises:
        ConfigError: `sync` BatchNorm without CUDA.

    Collective: all ranks, when the group is made.
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
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    if dist.is_initialized():
        return world
    backend = "cpu:gloo,cuda:nccl" if has_cuda else "gloo"  # control data stays on the CPU
    if world.size > 1:
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    elif settings.kind == "deepspeed":  # which wants a group even for one rank; this store needs no port
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    return world


class Engine:
    """One method being trained.

    Args:
        method: built on every rank; rank 0's weights win.
        settings: how a step is computed.
        optimizer: which update rule.
        schedule: how its learning rate moves.
        length: of the run, for the schedule.
        world: this rank.
        global_batch: G.
        group_size: positions that are never cut apart.
        seed: of the run; the torch generator is reseeded from (seed, step, rank) before each step.

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
    ) -> None:
        has_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
        self.settings, self.world = settings, world
        self._schedule, self._length, self._seed = schedule, length, seed
        self._group_size = group_size
        self._moment_names = moment_names(optimizer)
        self._num_updates = 0

        share_groups = -(-(global_batch // group_size) // world.size)  # of the longest share; others are padded to it
        micro_groups = share_groups if settings.micro_batch is None else max(1, settings.micro_batch // group_size)
        self._num_micro_batches = -(-share_groups // micro_groups)

        method.to(self.device)
        if settings.batch_norm == "sync":
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        if settings.compile:
            method.compile()
        self.method = method
        torch_optimizer = build_optimizer(optimizer, method.parameter_groups())
        use_bfloat16 = settings.precision == "bf16"
        self._backend: PlainEngine | ZeroEngine
        if settings.kind == "plain":
            self._backend = PlainEngine(
                method, torch_optimizer, clip_norm=settings.clip_norm, use_bfloat16=use_bfloat16
            )
        else:
            config = derive_config(
                stage=settings.zero_stage,
                use_bfloat16=use_bfloat16,
                clip_norm=settings.clip_norm,
                micro_batch=micro_groups * group_size,
                num_micro_batches=self._num_micro_batches,
            )
            self._backend = ZeroEngine(method, torch_optimizer, config)
        self._optimizer = torch_optimizer

    def train_step(self, batch: Batch, recalled: dict[str, Tensor], progress: Progress) -> StepOutput:
        """Forward and backward over this rank's share in micro-batches, then one update.

        Args:
            batch: this rank's share of the global batch.
            recalled: what the method recalled for the whole step.
            progress: where the run stands before this step; keys the learning rate and the random generator.

        Returns:
            `loss` and `terms` of the global batch, the same on every rank; `logits` of this rank's rows;
            `extras` of the last micro-batch with `grad_norm`, `learning_rate` and `num_bad` (undecodable samples
            over all ranks).

        Raises:
            RunError: loss or gradient is not finite; nothing moved on any rank.

        Collective: all ranks; gradients, and one all-reduce of the loss terms.
        """
        factor = self._set_learning_rate(progress)
        torch.manual_seed(keyed.key("step", self._seed, progress.step, self.world.rank) & (2**63 - 1))
        self._train_mode()
        parts = list(self._micro_batches(batch))
        outputs = []
        for number, part in enumerate(parts):
            output = self._backend.forward(part, recalled)
            is_last = number == len(parts) - 1
            self._backend.backward(output.loss, num_micro_batches=len(parts), is_last=is_last)
            outputs.append(output._replace(loss=output.loss.detach(), logits=output.logits.detach()))

        names = sorted(outputs[0].terms)
        num_bad = ((batch.index >= 0) & ~batch.valid).sum()
        parts_of = [[o.loss for o in outputs], *([o.terms[name] for o in outputs] for name in names)]
        own = torch.stack([*(torch.stack(shares).sum() for shares in parts_of), num_bad]).float()
        total = comm.reduce_sum(own.clone()).tolist()
        if not math.isfinite(total[0]):
            raise self._not_finite("the loss", dict(zip(["loss", *names], own.tolist(), strict=False)), progress)
        grad_norm = self._backend.update()
        if not math.isfinite(grad_norm):
            raise self._not_finite("the gradient norm", {"grad_norm": grad_norm}, progress)
        self._num_updates += 1
        terms = {name: torch.tensor(value) for name, value in zip(names, total[1:-1], strict=True)}
        extras = dict(outputs[-1].extras) | {
            "grad_norm": grad_norm,
            "learning_rate": factor,
            "num_bad": round(total[-1]),
        }
        return StepOutput(torch.tensor(total[0]), terms, torch.cat([o.logits for o in outputs]), extras)

    def predict(self, batch: Batch) -> StepOutput:
        """Inference: no losses, no gradient, evaluation mode.

        Collective: all ranks at stage 3, where forward gathers parameters.
        """
        self.method.eval()
        with torch.no_grad():
            return self._backend.forward(batch, None)

    def average_buffers(self) -> None:
        """Make BatchNorm's running statistics the mean over ranks, in place (`engine.batch_norm: averaged`).

        Collective: all ranks, one all-reduce of the floating-point buffers.
        """
        buffers = [b for b in self.method.buffers() if b.is_floating_point()]
        if self.settings.batch_norm != "averaged" or comm.world_size() == 1 or not buffers:
            return
        flat = comm.reduce_sum(torch.cat([b.flatten() for b in buffers])) / comm.world_size()
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def state(self) -> EngineState | None:
        """Everything that training changes, whole, on rank 0; None elsewhere.

        Collective: all ranks; above stage 0 each parameter and moment is gathered in turn.
        """
        self.average_buffers()
        keep = self.world.is_first
        model: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, parameter in self.method.named_parameters():
            value = self._backend.read_parameter(parameter)
            if keep:
                model[name] = value.cpu().clone()
            for moment in self._moment_names if parameter.requires_grad and self._num_updates else ():
                value = self._backend.read_moment(parameter, moment)
                if keep:
                    moments[f"{name}/{moment}"] = value.cpu().clone()
        model.update({name: buffer.cpu().clone() for name, buffer in self.method.named_buffers() if keep})
        return EngineState(model, moments, self._num_updates) if keep else None

    def load(self, state: EngineState) -> None:
        """Take over a state that every rank holds whole, made at any stage on any number of ranks.

        Raises:
            CheckpointError: names or shapes differ from this method's.
        """
        self.load_model(state.model)
        for name, parameter in self.method.named_parameters():
            if parameter.requires_grad and state.num_updates:
                found = {moment: state.moments[f"{name}/{moment}"] for moment in self._moment_names}
                if found:
                    self._backend.write_moments(parameter, found, num_updates=state.num_updates)
        self._num_updates = state.num_updates

    def load_model(self, model: dict[str, Tensor]) -> None:
        """Take over parameters and buffers alone.

        Raises:
            CheckpointError: names or shapes differ from this method's.
        """
        own = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.method.named_parameters()}
        own |= {name: tuple(b.shape) for name, b in self.method.named_buffers()}
        other = {name: tuple(value.shape) for name, value in model.items()}
        if own != other:
            differing = sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
            first = differing[0]
            raise CheckpointError(
                f"{len(differing)} tensors differ, first {first!r} of shape {other.get(first)}",
                expected=f"shape {own.get(first)}, as this config's model has",
                where="model.safetensors",
                next_step="use the run's own config.yaml, or start a new run folder",
            )
        for name, parameter in self.method.named_parameters():
            self._backend.write_parameter(parameter, model[name])
        for name, buffer in self.method.named_buffers():
            buffer.copy_(model[name])

    def load_matching(self, model: dict[str, Tensor]) -> list[str]:
        """Take over the tensors whose name and shape agree with this method's.

        Returns:
            Their names.
        """
        taken = []
        for name, parameter in self.method.named_parameters():
            if name in model and tuple(model[name].shape) == tuple(getattr(parameter, "ds_shape", parameter.shape)):
                self._backend.write_parameter(parameter, model[name])
                taken.append(name)
        for name, buffer in self.method.named_buffers():
            if name in model and model[name].shape == buffer.shape:
                buffer.copy_(model[name])
                taken.append(name)
        return taken

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """The share cut between groups into nearly equal parts, the same number on every rank."""
        num_groups, count = batch.num_images // self._group_size, self._num_micro_batches
        for part in range(count):
            first, last = part * num_groups // count, (part + 1) * num_groups // count
            yield batch.rows(first * self._group_size, last * self._group_size)

    def _set_learning_rate(self, progress: Progress) -> float:
        seen = self._length.samples_seen(progress.epoch, progress.samples_consumed)
        factor = learning_rate_factor(self._schedule, seen, self._length.total_samples)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_learning_rate"] * factor
        return self._optimizer.param_groups[0]["lr"]

    def _train_mode(self) -> None:
        self.method.train()
        if self.settings.batch_norm == "frozen":
            for module in self.method.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _not_finite(self, what: str, own: dict[str, float], progress: Progress) -> RunError:
        """The error that all ranks raise together; it names who brought the NaN."""
        culprits = [
            f"rank {rank}: " + ", ".join(f"{name}={value:g}" for name, value in values.items())
            for rank, values in enumerate(comm.gather_objects(own))
            if not all(math.isfinite(value) for value in values.values())
        ]
        return RunError(
            f"{what} is not finite at step {progress.step}",
            expected="finite numbers; the optimiser did not move",
            where="; ".join(culprits) or "every rank's own terms are finite, their sum or gradient is not",
            next_step="lower optimizer.learning_rate or set engine.clip_norm; resume goes on from the last commit",
        )
