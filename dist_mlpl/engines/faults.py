"""Owns the error of a loss or gradient that is not finite: at which step, on which rank, in which term or parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_mlpl import comm
from dist_mlpl.batch import Progress
from dist_mlpl.errors import RunError


def not_finite(
    what: str, progress: Progress, own_terms: Mapping[str, float], bad_gradients: Sequence[str] = ()
) -> RunError:
    """Make the error that all ranks raise together; it names the ranks where the fault arose.

    Args:
        what: the quantity that is not finite, for the message.
        progress: where the run stands.
        own_terms: this rank's share of the loss and of each term, by name.
        bad_gradients: names of parameters whose gradient on this rank is not finite.

    Collective: all ranks, one gather of pickles.
    """
    fault = ", ".join(f"{name}={value:g}" for name, value in own_terms.items())
    if bad_gradients:
        more = f" and {len(bad_gradients) - 1} more" if len(bad_gradients) > 1 else ""
        fault += f", gradient of {bad_gradients[0]}{more}"
    elif all(math.isfinite(value) for value in own_terms.values()):
        fault = ""
    faults = [f"rank {rank}: {text}" for rank, text in enumerate(comm.gather_objects(fault)) if text]
    return RunError(
        f"{what} is not finite at step {progress.step}",
        expected="finite numbers; the optimiser did not move",
        where="; ".join(faults) or "no rank alone: the numbers of each are finite, their sum is not",
        next_step="lower optimizer.learning_rate or set engine.clip_norm; resume goes on from the last commit",
    )


@contextmanager
def watched_gradients(method: nn.Module) -> Iterator[list[str]]:
    """Watch this rank's own gradients, before they are summed over ranks, in backward passes inside the block.

    Yields:
        A list that fills with the names of parameters whose gradient is not finite, those nearest to the loss first.
    """
    bad: list[str] = []

    def watch(name: str, parameter: nn.Parameter) -> RemovableHandle:
        def look(gradient: Tensor) -> None:
            if name not in bad and not bool(gradient.isfinite().all()):
                bad.append(name)

        return parameter.register_hook(look)

    hooks = [watch(name, p) for name, p in method.named_parameters() if p.requires_grad]
    try:
        yield bad
    finally:
        for hook in hooks:
            hook.remove()
