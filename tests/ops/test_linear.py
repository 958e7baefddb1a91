"""One linear map, whichever kernel computes it."""

import pytest
import torch
import torch.nn.functional as F

from narrows.ops import linear as module
from narrows.ops.linear import linear, stacked_linear
from tests.support import assert_close, gradients


@pytest.fixture(autouse=True)
def slow_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_blas_slow", lambda: True)


@pytest.mark.parametrize("fewest", [0, 128], ids=["convolved", "where it pays"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (1, 1, 5), (3, 4, 7, 5), (20, 9, 5), (0, 4, 5), (2, 2000, 5)], ids=str)
def test_linear_is_a_linear_map(
    shape: tuple[int, ...], dtype: torch.dtype, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEWEST_CONVOLVED", fewest)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(6, 5, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(6, generator=generator).to(dtype).requires_grad_()
    for leaves in ((x, weight, bias), (x, weight)):
        ours, theirs = linear(*leaves), F.linear(*leaves)
        assert ours.dtype == dtype
        assert_close(ours, theirs)
        for one, other in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
            assert_close(one, other)


def test_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST_CONVOLVED", 0)
    x, weight = torch.randn(5, 7, 4), torch.randn(6, 4)
    for view in (x.transpose(0, 1), x.flip(1), x[:, ::2], x.expand(3, 5, 7, 4)):
        assert_close(linear(view, weight), F.linear(view, weight))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("rows", [1, 7, 8, 31, 32, 56])
@pytest.mark.parametrize("experts", [1, 3])
def test_stacked_linear_is_many_linear_maps(
    experts: int, rows: int, wide: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEWEST_WEIGHTS", 0 if wide else 2**30)
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x, weight, bias = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((experts, rows, 6), (10, experts, 6), (experts, 10))
    )
    torch.set_num_threads(threads)
    try:
        for leaves in ((x, weight, bias), (x, weight)):
            ours = stacked_linear(*leaves)
            theirs = torch.stack(
                [F.linear(x[e], weight[:, e], bias[e] if len(leaves) == 3 else None) for e in range(experts)]
            )
            assert_close(ours, theirs)
            for one, other in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
                assert_close(one, other)
    finally:
        torch.set_num_threads(before)


def test_few_tokens_and_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE_WEIGHT", 0)
    monkeypatch.setattr(module, "FEWEST_WEIGHTS", 0)
    x, weight, bias = (
        torch.randn(3, 5, 6).requires_grad_(),
        torch.randn(7, 6).requires_grad_(),
        torch.randn(7).requires_grad_(),
    )
    ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    assert_close(ours, theirs)
    for one, other in zip(gradients(ours, x, weight, bias), gradients(theirs, x, weight, bias), strict=True):
        assert_close(one, other)


LINUX = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\n"


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "mkl", "slow"),
    [
        (LINUX.format("AuthenticAMD", 26), "AVX512", True, True),
        (LINUX.format("AuthenticAMD", 26), "AVX512", False, False),
        (LINUX.format("AuthenticAMD", 26), "AVX2", True, False),
        (LINUX.format("AuthenticAMD", 25), "AVX512", True, False),
        (LINUX.format("GenuineIntel", 6), "AVX512", True, False),
        ("processor : 0", "AVX512", True, False),
    ],
)
def test_blas_is_slow_where_mkl_keeps_avx_512_from_a_processor_that_is_wide(
    cpuinfo: str, capability: str, mkl: bool, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(module.Path, "is_file", lambda _: True)
    monkeypatch.setattr(module.Path, "read_text", lambda _: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert module._is_blas_slow.__wrapped__() is slow


def test_where_there_is_no_cpuinfo_the_platform_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(module.Path, "is_file", lambda _: False)
    monkeypatch.setattr(module.platform, "processor", lambda: "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert module._is_blas_slow.__wrapped__() is True
