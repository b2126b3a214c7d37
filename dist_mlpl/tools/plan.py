"""Owns the plan of a run: memory, traffic and FLOPs of its trunk, heads and banks, before anything is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dist_mlpl import keyed, storage
from dist_mlpl.build import build_view, open_samples
from dist_mlpl.config import Config
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.order import check_global_batch
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import ConfigError
from dist_mlpl.labels import Targets
from dist_mlpl.methods.base import Method, MethodSettings, images_alone
from dist_mlpl.methods.costs import Cost, Scale, reduce_bytes
from dist_mlpl.models.semantic import SemanticSettings

LARGEST: Final = 9605  # number of trainable classes of Open Images
_SAMPLED: Final = 2048  # number of images whose labels are counted
_NUM_IMAGES: Final = 2  # images in the measured forward pass; with only one, some BatchNorms have no variance


class Plan(NamedTuple):
    """The costs of a run."""

    num_classes: int  # C
    num_samples: int  # N of the train split
    scale: Scale
    trunk: Cost
    heads: list[Cost]  # heads used at inference
    extras: list[Cost]  # banks, and heads used only in training
    gradient_bytes: float  # bytes that a rank sends for a step's gradients, at ZeRO stages 0 to 2
    gradients: Cost  # held beside the parameters while a step runs
    moments: Cost  # the optimiser's

    @property
    def added(self) -> Cost:
        """Total of everything besides the trunk."""
        return total_cost("heads and banks", [*self.heads, *self.extras])


def total_cost(name: str, costs: list[Cost]) -> Cost:
    """Sum the costs of several parts under one name."""
    columns = zip(*(cost[1:] for cost in costs), strict=True)
    return Cost(name, *(sum(column) for column in columns)) if costs else Cost(name)


def make_plan(
    config: Config, *, num_ranks: int, num_classes: int | None = None, num_samples: int | None = None
) -> Plan:
    """Compute a run's plan; the model is built without allocating memory, and no image is read.

    Args:
        config: the run's config.
        num_ranks: R.
        num_classes: used in place of the manifest's C.
        num_samples: used in place of the train split's N.

    Raises:
        ConfigError: tars without an index, whose labels cannot be counted, or a batch that R ranks cannot share.
        ManifestError: no manifest or no train split.
    """
    storage.configure_storage(config.data.storage_options)
    (samples,) = open_samples(config.data, config.data.train_split)
    if not isinstance(samples, SplitIndex):
        raise ConfigError(
            "tars without an index",
            expected="indexed shards: a plan counts their labels",
            where="data.unindexed",
            next_step="run `dist-mlpl shards index` first",
        )
    N = samples.num_samples if num_samples is None else num_samples
    C = samples.manifest.num_classes if num_classes is None else num_classes
    check_global_batch(config.global_batch, group_size=config.group_size, world_size=num_ranks, num_samples=N)

    method, found = _measured(_settings(config, C, samples.manifest.num_classes), C, config.transform.size)
    method.begin_run(num_samples=N, epoch_samples=N, group_size=config.group_size, seed=config.seed)
    scale = Scale(
        world_size=num_ranks,
        global_batch=config.global_batch,
        num_cells=found.num_cells,
        targets=_told(config, samples, C),
    )
    trained = 4 * sum(p.numel() for p in method.parameters() if p.requires_grad)
    sent, stage = reduce_bytes(trained, num_ranks), config.engine.zero_stage if config.engine.kind == "deepspeed" else 0
    optimizer = config.optimizer
    num_moments = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0.0)
    return Plan(
        num_classes=C, num_samples=N, scale=scale, trunk=found.costs.pop("backbone"), heads=list(found.costs.values()),
        extras=method.costs(scale), gradient_bytes=sent,
        gradients=Cost("gradients", held_bytes=trained / (num_ranks if stage >= 2 else 1), sent_bytes=sent),
        moments=Cost("optimiser", held_bytes=num_moments * trained / (num_ranks if stage >= 1 else 1)),
    )  # fmt: skip


def _settings(config: Config, num_classes: int, given_classes: int) -> MethodSettings:
    """The method's settings without weight files; also without class embeddings if the classes are not the data's."""
    settings = config.method
    changes: dict[str, Any] = {"backbone": settings.backbone.model_copy(update={"weights": None})}
    for name in type(settings).model_fields:
        part = getattr(settings, name)
        if num_classes != given_classes and isinstance(part, SemanticSettings):
            changes[name] = part.model_copy(update={"embeddings": None})
    return settings.model_copy(update=changes)


def _told(config: Config, samples: SplitIndex, num_classes: int) -> Targets:
    """(n, C) int8, labels as the run sees them, of up to 2,048 images evenly spread over the split.

    If C is not the data's, each image has as many labels, of classes drawn uniformly.
    """
    chosen = np.unique(np.linspace(0, samples.num_samples - 1, _SAMPLED).round().astype(np.int64))
    targets = LabelStore(samples, build_view(config.data, samples)).at(0).targets(chosen)
    if num_classes == samples.manifest.num_classes:
        return targets
    images, classes = targets.nonzero()
    drawn = np.zeros((len(chosen), num_classes), dtype=np.int8)
    places = (keyed.uniform(keyed.key("classes"), len(images)) * num_classes).astype(np.int64)
    drawn[images, places] = targets[images, classes]
    return drawn


# Measuring ------------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    costs: dict[str, Cost]  # by name of the method's child modules, "backbone" among them
    num_cells: int


def _measured(settings: MethodSettings, num_classes: int, image_size: int) -> tuple[Method, _Found]:
    """Build a method with fake tensors, run a forward pass of inference, and a backward through each call of its parts.

    Kept activations are counted in float32; bf16 keeps about half.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        method = settings.build(num_classes=num_classes, image_size=image_size)
        batch = images_alone(torch.empty(_NUM_IMAGES, 3, image_size, image_size), num_classes)
        with _watched(method) as watch:
            method(batch, None)
        for call in watch.calls:
            call.count_backward(watch.flops)
    costs = {
        name: Cost(
            name,
            held_bytes=sum(tensor.nbytes for tensor in [*child.parameters(), *child.buffers()]),
            kept_bytes=watch.kept[name] / _NUM_IMAGES,
            flops=watch.flops[name] / _NUM_IMAGES,
        )
        for name, child in method.named_children()
    }
    return method, _Found(costs, watch.num_cells)


class _Call(NamedTuple):
    """One call from outside into a child module of the method."""

    child: str
    module: nn.Module
    inputs: list[Tensor]
    outputs: list[Tensor]

    def count_backward(self, flops: Counter[str]) -> None:
        """Count the FLOPs of a backward pass through this call only, to its inputs and weights."""
        wanted = [t for t in [*self.inputs, *self.module.parameters()] if t.requires_grad]
        outputs = [t for t in self.outputs if t.requires_grad]
        if wanted and outputs:
            with _counting(self.child, flops):
                torch.autograd.grad([t.sum() for t in outputs], wanted, allow_unused=True, retain_graph=True)


class _Watch:
    """Measurements taken while a method runs."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.flops: Counter[str] = Counter()  # by child
        self.kept: Counter[str] = Counter()  # bytes by child
        self.num_cells = 0


@contextmanager
def _watched(method: Method) -> Iterator[_Watch]:
    """Record every call from outside into a child of the method, its FLOPs, and the bytes that autograd keeps."""
    watch = _Watch()
    running: list[tuple[str, Any]] = []  # (child, FLOP counter) of the calls in progress
    seen = {tensor.untyped_storage()._cdata for tensor in [*method.parameters(), *method.buffers()]}

    def enter(name: str) -> Any:
        def begin(module: nn.Module, inputs: Any) -> None:
            counting = None if running else _counting(name, watch.flops)
            if counting is not None:
                counting.__enter__()
            running.append((name, counting))

        return begin

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        name, counting = running.pop()
        if name == "backbone" and isinstance(output, Tensor) and output.dim() == 4:
            watch.num_cells = math.prod(output.shape[2:])  # the last layer's, as a method may call layers singly
        if counting is not None:
            counting.__exit__(None, None, None)
            watch.calls.append(_Call(name, module, _tensors(inputs), _tensors(output)))

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory._cdata not in seen:  # its address is unique while the graph lives
            seen.add(memory._cdata)
            watch.kept[running[-1][0] if running else ""] += memory.nbytes()
        return tensor

    hooks = []
    for child_name, child in method.named_children():
        for module in child.modules():
            hooks += [module.register_forward_pre_hook(enter(child_name)), module.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield watch
    for hook in hooks:
        hook.remove()


@contextmanager
def _counting(name: str, flops: Counter[str]) -> Iterator[None]:
    """Add the FLOPs computed in the block."""
    with FlopCounterMode(display=False, custom_mapping=_POINTWISE) as counter:
        yield
    flops[name] += counter.get_total_flops()


def _tensors(found: Any) -> list[Tensor]:
    """The tensors in a value, or in a tuple or list."""
    return [t for t in (found if isinstance(found, tuple | list) else [found]) if isinstance(t, Tensor)]


def _one_each(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """One FLOP per output element."""
    return math.prod(out_shape)


def _matrix_vector(matrix: Any, vector: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(matrix)


_ATEN = torch.ops.aten
_POINTWISE: Final = {  # operations that torch's counter leaves out and attention over classes uses
    **dict.fromkeys((_ATEN.tanh, _ATEN.tanh_, _ATEN.mul, _ATEN.mul_), _one_each), _ATEN.mv: _matrix_vector,
}  # fmt: skip


# Showing --------------------------------------------------------------------------------------------------------------


def document(plan: Plan) -> dict[str, Any]:
    """A plan as a dict for JSON."""
    costs = {"trunk": plan.trunk, "added": plan.added, "gradients": plan.gradients, "optimizer": plan.moments}
    parts = {"heads": plan.heads, "extras": plan.extras}
    return {
        "num_classes": plan.num_classes,
        "num_samples": plan.num_samples,
        **{name: value for name, value in plan.scale._asdict().items() if name != "targets"},
        "num_positives": plan.scale.num_positives,
        **{name: cost._asdict() for name, cost in costs.items()},
        **{name: [cost._asdict() for cost in found] for name, found in parts.items()},
        "gradient_bytes": plan.gradient_bytes,
    }


def plan_table(plan: Plan) -> Table:
    """A table with a row per part, then the total besides the trunk, the gradients and the optimiser."""
    scale = plan.scale
    title = (
        f"{plan.num_classes:,} classes, {plan.num_samples:,} images, {scale.world_size:,} "
        f"{'rank' if scale.world_size == 1 else 'ranks'}, {scale.global_batch} images a step, {scale.num_cells} cells, "
        f"{scale.num_positives:.2f} known positives each"
    )
    caption = (
        "held and sent: a rank; kept for the backward pass (float32): an image; FLOPs: forward and backward, also as a "
        "multiple of the trunk's. Parameters are counted whole (ZeRO 3 keeps a share of them on each rank)."
    )
    table = Table(title=title, caption=caption, min_width=96)
    for heading in ("", "held", "kept / image", "sent / step", "FLOPs / image", "trunk = 1"):
        table.add_column(heading, justify="right" if heading else "left")
    for cost in (plan.trunk, *plan.heads, *plan.extras):
        table.add_row(*_cells(cost, plan))
    table.add_section()
    for cost in (plan.added, plan.gradients, plan.moments):
        table.add_row(*_cells(cost, plan))
    return table


def largest_line(plan: Plan) -> str:
    """A line with the total besides the trunk, for a plan with another number of classes."""
    _, held, kept, sent, flops, share = (cell or "nothing" for cell in _cells(plan.added, plan))
    return (
        f"with {plan.num_classes:,} classes, heads and banks: {held} held, {kept} kept an image, {sent} sent a step, "
        f"{flops} FLOPs an image, forward and backward, {share} times the trunk's"
    )


def _cells(cost: Cost, plan: Plan) -> list[str]:
    ratio = cost.flops / plan.trunk.flops
    share = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}"
    sizes = [_scaled(size, "B") for size in (cost.held_bytes, cost.kept_bytes, cost.sent_bytes)]
    return [cost.name, *sizes, _scaled(cost.flops, ""), share if cost.flops else ""]


def _scaled(number: float, unit: str) -> str:
    """A number with three digits and an SI prefix, such as `1.25 MB`; empty for 0."""
    if number == 0:
        return ""
    power = min(5, max(0, int(math.log10(number) // 3)))
    return f"{number / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}".strip()
