"""Claims about the semantic attention: both forms against loops in float64, the kernels under the interpreter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dist_mlpl.kernels import semantic_attention as rooms
from dist_mlpl.kernels.semantic_attention import Attended, chunked_attention, fused_attention, semantic_attention
from tests.support.attention import Case, loop_attention, materialised_attention, random_case

pytestmark = pytest.mark.unit

KERNELS = "dist_mlpl.kernels.triton_scores"
Form = Callable[..., Attended]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels as numpy runs them; the module is left to be imported anew."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = sys.modules.pop(KERNELS, None)
    importlib.import_module(KERNELS)
    yield
    sys.modules.pop(KERNELS)
    if before is not None:
        sys.modules[KERNELS] = before


def slopes(form: Callable[[Case], Tensor], case: Case, weight: Tensor) -> list[Tensor]:
    """By every input, of the features summed with weights."""
    leaves = Case(*(tensor.detach().clone().requires_grad_() for tensor in case))
    return list(torch.autograd.grad((form(leaves) * weight).sum(), list(leaves)))


def assert_agrees(form: Form, case: Case, *, atol: float) -> None:
    """Features, attention and slopes of a form in the case's own type against float64; atol in units of the largest."""
    precise = Case(*(tensor.double() for tensor in case))
    found = form(*case)
    features = materialised_attention(precise)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [features, *slopes(materialised_attention, precise, weight)]
    own = [found.class_features, *slopes(lambda c: form(*c).class_features, case, weight.to(case.cells.dtype))]
    for value, exact in zip(own, expected, strict=True):
        assert value.dtype == case.cells.dtype
        assert float((value.double() - exact).abs().max()) <= atol * max(1e-2, float(exact.abs().max()))
    assert not found.attention.requires_grad
    torch.testing.assert_close(
        found.attention.sum(-1).double(), torch.ones(features.shape[:2]).double(), atol=1e-6, rtol=0
    )


def test_the_oracles_agree() -> None:
    case = random_case(2, 5, 6, 3, 4)
    torch.testing.assert_close(materialised_attention(case), loop_attention(case)[0], rtol=1e-12, atol=1e-12)


def test_the_chunked_form_equals_loops_in_float64() -> None:
    case = random_case(2, 7, 6, 5, 9)
    found, (features, attention) = chunked_attention(*case), loop_attention(case)
    torch.testing.assert_close(found.class_features, features, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.attention, attention, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 49, 24, 17, 13), (1, 196, 9, 5, 40), (3, 5, 33, 70, 7), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_chunked_form_and_its_slopes_equal_the_materialised_one(shape, dtype, atol, monkeypatch) -> None:
    for entries in (rooms._CPU_ENTRIES, 300, 1):  # blocks of many, a few and single vectors of tangents
        monkeypatch.setattr(rooms, "_CPU_ENTRIES", entries)
        assert_agrees(chunked_attention, random_case(*shape, dtype=dtype), atol=atol)


def test_slopes_of_the_chunked_form_pass_a_numerical_check() -> None:
    case = [tensor.requires_grad_() for tensor in random_case(2, 3, 4, 3, 5)]
    assert torch.autograd.gradcheck(lambda *given: chunked_attention(*given).class_features, case)


def test_scores_are_float32_under_autocast() -> None:
    case = random_case(2, 9, 16, 5, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = semantic_attention(*case)
    assert found.attention.dtype == torch.float32
    assert found.class_features.dtype == torch.bfloat16
    exact = materialised_attention(Case(*(tensor.double() for tensor in case)))
    assert float((found.class_features.double() - exact).abs().max() / exact.abs().max()) < 3e-2


def test_on_a_cpu_the_chunked_form_is_chosen(monkeypatch) -> None:
    monkeypatch.setattr(rooms, "fused_attention", None)
    case = random_case(1, 4, 3, 2, 5)
    assert torch.equal(semantic_attention(*case).class_features, chunked_attention(*case).class_features)


@pytest.mark.parametrize("missing", ["triton", "compiler", "header"])
def test_where_the_kernels_cannot_be_built_a_run_says_why_and_goes_without(monkeypatch, tmp_path, missing) -> None:
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    found = {"triton": object(), "compiler": "/usr/bin/gcc", "header": str(tmp_path)}
    found[missing] = str(tmp_path / "nowhere") if missing == "header" else None
    monkeypatch.setattr(rooms.importlib.util, "find_spec", lambda name: found["triton"])
    monkeypatch.setattr(rooms.shutil, "which", lambda name: found["compiler"])
    monkeypatch.setattr(rooms.sysconfig, "get_path", lambda name: found["header"])
    monkeypatch.setattr(rooms.torch.cuda, "is_available", lambda: True)
    rooms.fused_obstacle.cache_clear()
    try:
        (note,) = rooms.attention_notes()
    finally:
        rooms.fused_obstacle.cache_clear()
    assert {"triton": "not installed", "compiler": "no C compiler", "header": "Python.h"}[missing] in note


# Cells, classes and widths beside, below and above the blocks: 64 cells x 32 classes of scores, 32 x 64 of slopes.
SHAPES = [(2, 49, 24, 33, 13), (1, 196, 9, 5, 20), (3, 5, 33, 40, 7), (1, 20, 8, 10, 70), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize(
    ("shape", "dtype", "atol"),
    [*((shape, torch.float32, 1e-5) for shape in SHAPES), *((shape, torch.bfloat16, 3e-2) for shape in SHAPES[2:4])],
)
def test_the_triton_kernels_and_their_slopes_equal_the_materialised_form(interpreted, shape, dtype, atol) -> None:
    assert_agrees(fused_attention, random_case(*shape, dtype=dtype), atol=atol)


def test_the_triton_kernels_equal_the_chunked_form_of_bfloat16_inputs(interpreted) -> None:
    case = random_case(2, 49, 24, 17, 13, dtype=torch.bfloat16)
    weight = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, expected = (
        [form(*case).attention, *slopes(lambda c, form=form: form(*c).class_features, case, weight)]
        for form in (fused_attention, chunked_attention)
    )
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for value, exact in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(value, exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))


def test_sums_cut_into_parts_are_whole(interpreted, monkeypatch) -> None:
    kernels = sys.modules[KERNELS]
    monkeypatch.setattr(kernels, "_SHORTEST", 7)
    assert_agrees(fused_attention, random_case(2, 10, 6, 45, 5, dtype=torch.float32), atol=1e-5)


@pytest.mark.parametrize(("capability", "is_fast"), [(80, False), (90, True)])
def test_the_kernels_compile_for_devices_that_are_not_here(capability, is_fast) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = importlib.import_module(KERNELS)
    sizes = {"IS_FAST": is_fast}
    number = "bf16" if is_fast else "fp32"
    score = {"projected": number, "keys": number, "query": number, "scores": "fp32"}
    slope = {"own": number, "others": number, "query": number, "slopes": "fp32", "own_slope": "fp32",
             "query_slope": "fp32"}  # fmt: skip
    cases = [
        (kernels.score_kernel, score, ("num_cells", "num_classes", "width"),
         {"CELLS": kernels.CELLS, "CLASSES": kernels.CLASSES}),
        (kernels.slope_kernel, slope, ("num_rows", "num_others", "others_each", "width"),
         {"ROWS": kernels.ROWS, "WIDTH": kernels.WIDTH, "HAS_QUERY": True}),
    ]  # fmt: skip
    for kernel, pointers, integers, tile in cases:
        constants = tile | sizes
        signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(integers, "i32")
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert ("tanh.approx" in built.asm["ptx"]) == is_fast
