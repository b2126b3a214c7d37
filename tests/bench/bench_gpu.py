"""A GPU: first that its paths are right (`pytest -m gpu`), then the fused semantic attention beside the chunked."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from dist_mlpl.data.jpeg import decode_jpeg, decode_on
from dist_mlpl.kernels.semantic_attention import Attended, chunked_attention, fused_attention
from tests.support.attention import random_case
from tests.support.images import tiny_jpeg

Form = Callable[..., Attended]

B, L, D, C, WIDTH = 32, 14 * 14, 1024, 601, 512
ROUNDS = 20
PASSES = 3  # over all tangents: one forward, two backward
TANGENTS_PER_CLOCK = 16  # of a multiprocessor, compute capability 8.0 to 9.0


def native_attention(cells: Tensor, keys: Tensor, projection: Tensor, query: Tensor) -> Attended:
    """Blocks of classes under activation checkpointing, every tangent in the inputs' own type: what one would write."""
    from torch.utils.checkpoint import checkpoint

    u = cells @ projection.T
    scores = [
        checkpoint(lambda u, t: torch.tanh(u[:, None] * t[:, None]) @ query, u, part, use_reentrant=False)
        for part in keys.split(16)
    ]
    attention = torch.cat(scores, dim=1).float().softmax(dim=-1)
    return Attended(attention.to(cells.dtype) @ cells, attention.detach())


def milliseconds(form: Form, inputs: list[Tensor]) -> float:
    """Median of one forward and backward, by events on the device."""
    times = []
    for number in range(ROUNDS + 3):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        form(*leaves).class_features.sum().backward()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:  # after compilation and the allocator's first round
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def peak_megabytes(form: Form, inputs: list[Tensor]) -> float:
    """Allocated at most during one forward and backward, the inputs apart."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    form(*leaves).class_features.sum().backward()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def clock_hertz() -> float:
    """The device's highest clock, which it may not hold."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return 1e6 * float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def compare_attention() -> None:
    properties = torch.cuda.get_device_properties(0)
    bound = TANGENTS_PER_CLOCK * properties.multi_processor_count * clock_hertz()
    print(f"semantic attention, forward and backward: B {B}, {L} cells x {D}, {C} classes, width {WIDTH}, bfloat16")
    inputs = [tensor.cuda() for tensor in random_case(B, L, D, C, WIDTH, dtype=torch.bfloat16)]
    forms: dict[str, Form] = {"fused": fused_attention, "chunked": chunked_attention, "checkpointed": native_attention}
    times = {name: milliseconds(form, inputs) for name, form in forms.items()}
    for name, form in forms.items():
        rate = PASSES * B * L * C * WIDTH / (times[name] / 1e3)
        print(
            f"{name:14}{times[name]:9.2f} ms  {times[name] / times['fused']:6.2f} x fused  "
            f"{peak_megabytes(form, inputs):9.0f} MB  {rate:.2e} tangents/s, {rate / bound:.0%} of {bound:.2e}"
        )


def compare_decoding() -> None:
    contents = [tiny_jpeg(seed, height=384, width=512) for seed in range(64)]

    def decode_here() -> None:
        for content in contents:
            decode_jpeg(content)

    def decode_there() -> None:
        decode_on(torch.device("cuda"), contents)
        torch.cuda.synchronize()

    import time

    for name, decode in (("one CPU thread", decode_here), ("the GPU", decode_there)):
        decode()
        times = []
        for _ in range(5):
            began = time.perf_counter()
            decode()
            times.append(time.perf_counter() - began)
        print(f"JPEGs of 512 x 384 decoded on {name}: {len(contents) / statistics.median(times):,.0f}/s")


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was tested and nothing was measured")
    print(torch.cuda.get_device_name(0), torch.__version__)
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
    if subprocess.run(tests, check=False).returncode != 0:
        sys.exit("a test failed: nothing was measured")
    compare_attention()
    compare_decoding()


if __name__ == "__main__":
    main()
