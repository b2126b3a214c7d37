"""Claims of the method contract for every row of the method table, on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dist_mlpl.batch import Batch
from dist_mlpl.methods.base import Method
from dist_mlpl.methods.table import METHODS
from tests.support.methods import CONTRACT, tiny_method

pytestmark = [
    pytest.mark.unit,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(method: Method, device: str) -> Method:
    """The same method there; batches are brought to it, as the stream does, and what it recalls stays as it is."""

    def bring(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return arguments[0].to(torch.device(device)), *arguments[1:]

    def recall(own: Callable[..., Any], batch: Batch, progress: Any) -> Any:
        return own(batch.to(torch.device(device)), progress)

    method.to(device).register_forward_pre_hook(bring)
    method.recall = partial(recall, method.recall)  # type: ignore[method-assign]
    return method


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_contract_on_cuda(name: str, check: Callable[[Method], None]) -> None:
    check(on_device(tiny_method(name), "cuda"))
