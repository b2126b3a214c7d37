"""Owns DeepSpeed: ZeRO stages 0-3 behind the plain engine's verbs, with optimiser tensors read and written whole.

A checkpoint made here knows nothing of stages or ranks: every parameter and moment is gathered to its full shape,
and cut again for whoever loads it.

Source:
    DeepSpeed 0.19.8, runtime/engine.py, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from dist_mlpl import comm
from dist_mlpl.batch import Batch, StepOutput
from dist_mlpl.methods.base import Method


def derive_config(
    *, stage: int, use_bfloat16: bool, clip_norm: float, micro_batch: int, num_micro_batches: int
) -> dict[str, Any]:
    """DeepSpeed's JSON. Every value follows from our own settings; nothing here is settable.

    Args:
        stage: 0-3.
        use_bfloat16: by autocast, with float32 parameters; DeepSpeed's own bf16 breaks BatchNorm on a CPU.
        clip_norm: 0 for none. Left out, DeepSpeed would clip at 1.0.
        micro_batch: rows of a micro-batch on one rank.
        num_micro_batches: of a step.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": clip_norm,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": use_bfloat16, "dtype": "bfloat16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and on a CPU without the shared-memory operator that it would compile at start.

    That operator needs ninja and a C++ compiler and takes most of a minute; plain gloo needs neither.
    """
    is_cpu = not torch.cuda.is_available()
    if is_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if is_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroEngine:
    """A method under DeepSpeed. Same verbs as `PlainEngine`.

    Args:
        method: on its device. DeepSpeed sees one entry, its forward.
        optimizer: over the method's parameters.
        config: from `derive_config`.
    """

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        self._deepspeed = _import_deepspeed()
        for name, buffer in method.named_buffers():  # start-up broadcasts parameters only
            del name
            comm.broadcast_tensor(buffer)
        self.method, self.optimizer = method, optimizer
        self._stage = int(config["zero_optimization"]["stage"])
        self._clip_norm = float(config["gradient_clipping"])
        self._engine, self._zero, _, _ = self._deepspeed.initialize(model=method, optimizer=optimizer, config=config)

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        """The method's forward through DeepSpeed's hooks."""
        return self._engine(batch, recalled)

    def backward(self, loss: Tensor, *, num_micro_batches: int, is_last: bool) -> None:
        """Add this micro-batch's gradients.

        Args:
            loss: () this micro-batch's additive share of the global batch's loss. DeepSpeed averages over ranks
                and micro-batches, so the share is scaled up to make that average its sum.
            num_micro_batches: of the step.
            is_last: whether the step's gradients are then complete.

        Collective: all ranks; what moves depends on the stage.
        """
        self._engine.backward(loss * (comm.world_size() * num_micro_batches))
        if not is_last:
            self._engine.step()  # counts the micro-batch; no update before the boundary

    def update(self) -> float:
        """Clip and step unless the gradient norm is not finite.

        Returns:
            The norm before clipping, the same on every rank; NaN or infinity when nothing moved.

        Collective: all ranks.
        """
        if self._stage > 0:  # DeepSpeed leaves out a step whose norm is not finite and says so
            self._engine.step()
            return float("inf") if self._zero.overflow else float(self._engine.get_global_grad_norm())
        gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if norm < float("inf"):
            self._engine.step()
        return norm

    def read_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole value, float32.

        Collective: at stage 3, all ranks, one all-gather of the parameter.
        """
        if self._stage < 3:
            return parameter.detach()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """The whole of one optimiser tensor of a parameter.

        Collective: above stage 0, all ranks, one all-reduce or all-gather of the parameter's size.
        """
        if self._stage == 0:
            return self.optimizer.state[parameter][name]
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, name)

    def write_parameter(self, parameter: Any, value: Tensor) -> None:
        """Set a parameter to a whole value that every rank holds, in every copy that DeepSpeed keeps of it.

        Collective: none.
        """
        with torch.no_grad():
            if self._stage == 3:
                part = self._own_part(parameter, value)
                parameter.ds_tensor.data.copy_(part)  # the copy that forward gathers
                if parameter.requires_grad:
                    self._deepspeed.utils.safe_set_local_fp32_param(parameter, part)  # the copy that is updated
                return
            parameter.copy_(value)
            if self._stage > 0 and parameter.requires_grad:
                self._deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(parameter.device))

    def write_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor], *, num_updates: int) -> None:
        """Set a parameter's optimiser tensors to whole values that every rank holds.

        Collective: none.
        """
        if self._stage == 0:
            state = self.optimizer.state[parameter]
            state.update({name: value.to(parameter.device, copy=True) for name, value in moments.items()})
            if "exp_avg" in moments:
                state["step"] = torch.tensor(float(num_updates))
            return
        self._make_states(tuple(moments), num_updates)
        for name, value in moments.items():
            if self._stage == 3:
                part = self._own_part(parameter, value)
                self._deepspeed.utils.safe_set_local_optimizer_state(parameter, part, name)
            else:
                self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)

    def _make_states(self, names: tuple[str, ...], num_updates: int) -> None:
        """Give the flat partitions the optimiser tensors that torch would make at the first step."""
        flats = (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        for flat in flats:
            state = self.optimizer.state[flat]
            if "exp_avg" in names:
                state["step"] = torch.tensor(float(num_updates))
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(flat)
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()  # links parameters to their slices of the tensors

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's slice of a whole value at stage 3; the last slices are padded."""
        length = parameter.ds_tensor.numel()
        flat = value.detach().flatten().to(parameter.ds_tensor.device)
        flat = nn.functional.pad(flat, (0, length * comm.world_size() - flat.numel()))
        return flat[length * comm.rank() : length * (comm.rank() + 1)]
