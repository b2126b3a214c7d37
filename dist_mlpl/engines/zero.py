"""Owns DeepSpeed: ZeRO stages 0-3 behind the plain engine's interface, with optimiser tensors read and written whole.

A checkpoint does not depend on stage or ranks: every parameter and moment is gathered to its full shape, and sliced
again when it is loaded.

Source:
    DeepSpeed 0.19.8, runtime/engine.py, runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py.
"""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from dist_mlpl import comm
from dist_mlpl.batch import Batch, StepOutput
from dist_mlpl.engines.plain import broadcast_tensors
from dist_mlpl.methods.base import Method
from dist_mlpl.optimizer import clip_gradients, make_averages, make_moments

# DeepSpeed allocates a buffer of this many gradient elements (its default takes 2 GB for any model).
_BUCKET_ELEMENTS = 1 << 25


def derive_config(
    *, stage: int, use_bfloat16: bool, clip_norm: float, micro_batch: int, num_micro_batches: int
) -> dict[str, Any]:
    """Make DeepSpeed's configuration. Every value follows from our own settings; users cannot set it.

    Args:
        stage: ZeRO stage, 0-3.
        use_bfloat16: True: autocast, with float32 parameters; DeepSpeed's own bf16 breaks BatchNorm on a CPU.
        clip_norm: largest gradient norm; 0: no clipping. Without the entry DeepSpeed would clip at 1.0.
        micro_batch: rows of a micro-batch on one rank.
        num_micro_batches: micro-batches in a step.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": clip_norm,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": _BUCKET_ELEMENTS},
        "zero_allow_untested_optimizer": True,
        # Without the empty list, gradients (and stage 3's parameters) would travel between ranks in bfloat16.
        "torch_autocast": {"enabled": use_bfloat16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "timers": {"throughput": {"enabled": False}},  # it would synchronise with the device twice a step
        "steps_per_print": 2**31,
    }


def import_deepspeed() -> Any:
    """Import DeepSpeed, quiet; on a CPU without the shared-memory operator that it would compile at start.

    That operator needs ninja and a C++ compiler and takes most of a minute; plain gloo needs neither.
    """
    is_cpu = not torch.cuda.is_available()
    if is_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if is_cpu:  # replaced whole: reading it would try to compile every operator
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


class ZeroEngine:
    """A method trained by DeepSpeed, with the interface of `PlainEngine`.

    Args:
        method: on its device; its parameters and buffers are made equal to rank 0's. DeepSpeed calls only its forward.
        optimizer: over the method's trainable parameters.
        config: from `derive_config`.
        keeps_average: True: keep tensors for an average of the weights beside the moments.

    Collective: all ranks, one broadcast of each tensor.
    """

    def __init__(
        self, method: Method, optimizer: torch.optim.Optimizer, config: dict[str, Any], *, keeps_average: bool
    ) -> None:
        broadcast_tensors(method)  # DeepSpeed would leave out the buffers
        self._deepspeed = import_deepspeed()
        self.method, self.optimizer = method, optimizer
        self._stage = int(config["zero_optimization"]["stage"])
        self._clip_norm = float(config["gradient_clipping"])
        if self._stage == 0:  # clipped here: DeepSpeed's step at stage 0 does not check that the norm is finite
            config = config | {"gradient_clipping": 0.0}
        self._engine, self._zero, _, _ = self._deepspeed.initialize(model=method, optimizer=optimizer, config=config)
        make_moments(optimizer, self.updated_tensors())
        if keeps_average:
            make_averages(optimizer, self.updated_tensors())
        if self._stage in (1, 2):  # links parameters to their slices; left alone, DeepSpeed links one group only
            self._zero._lazy_init_hp_params_optimizer_state()

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        """Run the method's forward through DeepSpeed's hooks; see `Method.forward`."""
        return self._engine(batch, recalled)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add this micro-batch's gradients.

        Args:
            loss: () this micro-batch's additive share of the global batch's loss. DeepSpeed averages gradients over
                ranks, so the share is multiplied by their number to get the sum.
            is_last: True if this completes the step's gradients.

        Collective: all ranks; what moves depends on the stage.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * comm.world_size(), scale_wrt_gas=False)

    def update(self) -> float:
        """Clip and step unless the gradient norm is not finite, then drop the gradients.

        Returns:
            The norm before clipping, the same on every rank; NaN or infinity when nothing moved.

        Collective: above stage 0, all ranks; the norm, then the updated parameters.
        """
        if self._stage > 0:  # DeepSpeed skips a step whose norm is not finite and reports `overflow`
            self._engine.step()
            return math.inf if self._zero.overflow else float(self._engine.get_global_grad_norm())
        norm = clip_gradients([p.grad for p in self.method.parameters() if p.grad is not None], self._clip_norm)
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    def read_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole value of a parameter, float32.

        Collective: at stage 3, all ranks, one all-gather of the parameter.
        """
        if self._stage < 3:
            return parameter.detach()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def read_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """The whole of one tensor of a trainable parameter's optimiser state.

        Collective: above stage 0, all ranks, one all-reduce or all-gather of the parameter's size.
        """
        if self._stage == 0:
            return self.optimizer.state[parameter][name]
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, name)

    def write_parameter(self, parameter: Any, value: Tensor) -> None:
        """Set a parameter to a whole value that every rank holds, in every copy that DeepSpeed keeps of it."""
        if self._stage < 3:
            parameter.detach().copy_(value)
            if self._stage > 0 and parameter.requires_grad:
                self._deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(parameter.device))
            return
        part = self._own_part(parameter, value)
        parameter.ds_tensor.copy_(part)  # the copy that forward gathers
        self.forget_gathered(parameter)
        if parameter.requires_grad:
            self._deepspeed.utils.safe_set_local_fp32_param(parameter, part)  # the copy that is updated

    def write_moment(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Set one tensor of a trainable parameter's optimiser state to a whole value that every rank holds."""
        if self._stage == 0:
            self.optimizer.state[parameter][name].copy_(value)
        elif self._stage < 3:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
        else:
            part = self._own_part(parameter, value)
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, part, name)

    def updated_tensors(self) -> list[Tensor]:
        """The tensors that the optimiser updates: parameters at stage 0, above it this rank's parts of flat groups."""
        if self._stage == 0:
            return [p for p in self.method.parameters() if p.requires_grad]
        if self._stage < 3:
            return list(self._zero.single_partition_of_fp32_groups)
        return list(self._zero.fp32_partitioned_groups_flat)

    def seen_part(self, parameter: Any) -> Tensor:
        """The tensor of a parameter that forward reads, itself; at stage 3 this rank's slice, from which it gathers."""
        return parameter.detach() if self._stage < 3 else parameter.ds_tensor.detach()

    def seen_part_of_moment(self, parameter: nn.Parameter, name: str) -> Tensor:
        """The part of an optimiser tensor that corresponds to `seen_part`.

        Collective: at stages 1 and 2, all ranks, one all-reduce of the parameter's size.
        """
        if self._stage < 3:
            return self.read_moment(parameter, name)
        return self._deepspeed.utils.safe_get_local_optimizer_state(parameter, name)

    def forget_gathered(self, parameter: Any) -> None:
        """At stage 3, drop the gathered copy of a changed parameter, which small ones keep between steps."""
        if self._stage == 3:
            parameter.partition()

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's slice of a whole value at stage 3; the last slices are padded."""
        length = parameter.ds_tensor.numel()
        flat = value.detach().flatten().to(parameter.ds_tensor.device)
        flat = nn.functional.pad(flat, (0, length * comm.world_size() - flat.numel()))
        return flat[length * comm.rank() : length * (comm.rank() + 1)]
