"""Owns the whole training state: parameters, buffers and moments by name, whichever engine holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dist_mlpl.engines.averages import WeightAverage
from dist_mlpl.engines.plain import PlainEngine
from dist_mlpl.engines.zero import ZeroEngine
from dist_mlpl.errors import CheckpointError
from dist_mlpl.optimizer import AVERAGE, moment_names, set_num_updates

# Suffix of a tensor's name in `moments`: its trained value, where `model` holds the average.
_TRAINED: Final = "/trained"


class EngineState(NamedTuple):
    """Everything that training changes, whole and on the CPU, independent of ZeRO stage and number of ranks."""

    model: dict[str, Tensor]  # parameters and buffers by name; their average if one is kept
    moments: dict[str, Tensor]  # `parameter/moment`; with an average also `name/trained`, the trained values
    num_updates: int  # since training began

    @property
    def trained(self) -> dict[str, Tensor]:
        """The trained parameters and buffers by name, not their average."""
        return {name: self.moments.get(name + _TRAINED, value) for name, value in self.model.items()}


def gather_state(
    engine: PlainEngine | ZeroEngine, average: WeightAverage | None = None, *, num_updates: int, keep: bool
) -> EngineState | None:
    """Gather the whole training state, one tensor at a time.

    Args:
        engine: the engine that holds it.
        average: the average of its weights, if one is kept; it must be hidden.
        num_updates: number of updates since training began.
        keep: True: this rank gets the state; the others take part and get None.

    Collective: all ranks; above stage 0 each parameter and moment is gathered in turn.
    """
    model: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    for name, parameter in engine.method.named_parameters():
        value = engine.read_parameter(parameter)
        if keep:
            model[name] = _own_copy(value)
        for moment in moment_names(engine.optimizer) if parameter.requires_grad else ():
            value = engine.read_moment(parameter, moment)
            if keep:
                moments[f"{name}/{moment}"] = _own_copy(value)
        if average is not None and parameter.requires_grad:
            value = engine.read_moment(parameter, AVERAGE)
            if keep:
                averages[name] = _own_copy(value)
    if not keep:
        return None
    model |= {name: _own_copy(buffer) for name, buffer in engine.method.named_buffers()}
    averages |= {name: _own_copy(buffer) for name, buffer in average.buffers.items()} if average is not None else {}
    moments |= {name + _TRAINED: model[name] for name in averages}
    return EngineState(model | averages, moments, num_updates)


def install_state(engine: PlainEngine | ZeroEngine, state: EngineState, average: WeightAverage | None = None) -> None:
    """Load a state that every rank holds whole, made at any stage on any number of ranks.

    Raises:
        CheckpointError: names or shapes differ from this method's; nothing is written.
    """
    shapes = tensor_shapes(engine)
    parameters = {name: p for name, p in engine.method.named_parameters() if p.requires_grad}
    names = [(name, moment) for name in parameters for moment in moment_names(engine.optimizer)]
    moments = {name: moment for name, moment in state.moments.items() if not name.endswith(_TRAINED)}
    _check_same({f"{name}/{moment}": shapes[name] for name, moment in names}, moments, "optimizer.safetensors")
    write_model(engine, state.trained)
    if average is not None:
        average.take(state.model)
    for name, moment in names:
        engine.write_moment(parameters[name], moment, state.moments[f"{name}/{moment}"])
    set_num_updates(engine.optimizer, state.num_updates)


def write_model(
    engine: PlainEngine | ZeroEngine, model: Mapping[str, Tensor], average: WeightAverage | None = None
) -> None:
    """Load parameters and buffers that every rank holds whole; an `average` is set to the same values.

    Raises:
        CheckpointError: names or shapes differ from this method's; nothing is written.
    """
    _check_same(tensor_shapes(engine), model, "model.safetensors")
    write_tensors(engine, model, average)


def write_tensors(
    engine: PlainEngine | ZeroEngine, model: Mapping[str, Tensor], average: WeightAverage | None = None
) -> None:
    """Load the parameters and buffers in `model`, whose shapes must fit; leave the others. Likewise in `average`."""
    for name, parameter in engine.method.named_parameters():
        if name in model:
            engine.write_parameter(parameter, model[name])
    for name, buffer in engine.method.named_buffers():
        if name in model:
            buffer.copy_(model[name])
    if average is not None:
        average.take(model)


def tensor_shapes(engine: PlainEngine | ZeroEngine) -> dict[str, torch.Size]:
    """Whole shapes of parameters and buffers by name."""
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.method.named_parameters()}  # stage 3 slices p
    return shapes | {name: buffer.shape for name, buffer in engine.method.named_buffers()}


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _check_same(own: Mapping[str, torch.Size], found: Mapping[str, Tensor], where: str) -> None:
    other = {name: tensor.shape for name, tensor in found.items()}
    differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"{len(differing)} tensors differ, first {first!r}: {_shape(other.get(first))} in the file",
            expected=f"{_shape(own.get(first))}, as this config's model and optimizer have it",
            where=where,
            next_step="use the run's own config.yaml, or start a new run folder",
        )


def _shape(shape: torch.Size | None) -> str:
    return "no such tensor" if shape is None else f"shape {tuple(shape)}"
