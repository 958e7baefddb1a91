"""One linear map, whichever kernel computes it."""

import runpy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from narrows.layers.linear import FeedForwardSequential, Linear
from narrows.measure import count_macs
from narrows.ops.linear import linear, linear_gelu, maps, processor, stacked, stacked_linear
from tests.support import assert_close, gradients

LINUX = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\n"


@pytest.fixture
def slow_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor from which MKL keeps its vectors."""
    monkeypatch.setattr(processor, "HAS_WIDE_VECTORS", True)
    monkeypatch.setattr(processor, "MKL_IS_BEHIND", False)
    monkeypatch.setattr(processor, "MKL_IS_SLOW", True)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which every product, however small, goes to oneDNN."""
    monkeypatch.setattr(processor, "HAS_WIDE_VECTORS", True)
    monkeypatch.setattr(processor, "MKL_IS_BEHIND", True)
    monkeypatch.setattr(processor, "MKL_IS_SLOW", False)
    monkeypatch.setattr(maps, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(maps, "FEWEST_WEIGHTS_BEFORE_GELU", 0)
    monkeypatch.setattr(maps, "FEWEST_ACTIVATIONS", 0)


@pytest.mark.usefixtures("slow_blas")
@pytest.mark.parametrize("fewest", [0, 128], ids=["convolved", "where it pays"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (1, 1, 5), (3, 4, 7, 5), (20, 9, 5), (0, 4, 5), (2, 2000, 5)], ids=str)
def test_linear_is_a_linear_map(
    shape: tuple[int, ...], dtype: torch.dtype, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "FEWEST_CONVOLVED", fewest)
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


@pytest.mark.usefixtures("slow_blas")
def test_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "FEWEST_CONVOLVED", 0)
    x, weight = torch.randn(5, 7, 4), torch.randn(6, 4)
    for view in (x.transpose(0, 1), x.flip(1), x[:, ::2], x.expand(3, 5, 7, 4)):
        assert_close(linear(view, weight), F.linear(view, weight))


@pytest.mark.usefixtures("slow_blas")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("rows", [1, 7, 8, 31, 32, 56])
@pytest.mark.parametrize("experts", [1, 3])
def test_stacked_linear_is_many_linear_maps(
    experts: int, rows: int, wide: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked, "FEWEST_WEIGHTS", 0 if wide else 2**30)
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


def assert_same_forward_derivatives(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> None:
    """Along all leaves at once, and along each of them while the others have no tangent."""
    assert_close(torch.func.jvp(ours, leaves, tangents)[1], torch.func.jvp(theirs, leaves, tangents)[1])
    for index in range(len(leaves)):
        moved, tangent = leaves[index : index + 1], tangents[index : index + 1]
        one, other = (
            torch.func.jvp(lambda leaf, f=f, i=index: f(*leaves[:i], leaf, *leaves[i + 1 :]), moved, tangent)[1]
            for f in (ours, theirs)
        )
        assert_close(one, other)


def stacked_leaves() -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=torch.double) for shape in ((3, 8, 6), (10, 3, 6), (3, 10)))


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_stacked_weights_lie_in_memory_as_weights_do(autocast: bool) -> None:
    rows, weight, bias = (leaf.float().requires_grad_() for leaf in stacked_leaves())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        mapped = stacked_linear(rows, weight, bias)
    assert mapped.dtype == (torch.bfloat16 if autocast else torch.float32)
    grad_rows, grad_weight, grad_bias = gradients(mapped, rows, weight, bias)
    assert grad_weight.stride() == weight.stride()
    assert {grad_rows.dtype, grad_weight.dtype, grad_bias.dtype} == {torch.float32}


def test_stacked_linear_has_forward_and_second_derivatives_and_a_rule_for_vmap() -> None:
    leaves, tangents = stacked_leaves(), stacked_leaves()

    def plain(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.einsum("ern,oen->ero", rows, weight) + bias[:, None]

    assert_same_forward_derivatives(stacked_linear, plain, leaves, tangents)
    many = torch.randn(4, 3, 8, 6, dtype=torch.double)
    assert_close(
        torch.vmap(stacked_linear, (0, None, None))(many, *leaves[1:]),
        torch.vmap(plain, (0, None, None))(many, *leaves[1:]),
    )
    required = tuple(leaf.requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(stacked_linear, required)
    assert torch.autograd.gradgradcheck(stacked_linear, required)


@pytest.mark.usefixtures("slow_blas")
def test_few_tokens_and_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "LARGE_WEIGHT", 0)
    monkeypatch.setattr(stacked, "FEWEST_WEIGHTS", 0)
    x, weight, bias = (
        torch.randn(3, 5, 6).requires_grad_(),
        torch.randn(7, 6).requires_grad_(),
        torch.randn(7).requires_grad_(),
    )
    ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    assert_close(ours, theirs)
    for one, other in zip(gradients(ours, x, weight, bias), gradients(theirs, x, weight, bias), strict=True):
        assert_close(one, other)


SHAPES = pytest.mark.parametrize("shape", [(7, 5), (5,), (3, 4, 7, 5), (0, 4, 5), (2, 300, 5)], ids=str)


@pytest.mark.usefixtures("onednn")
@SHAPES
@pytest.mark.parametrize("out", [3, 9], ids=["narrower", "wider"])
def test_onednn_computes_the_map_and_its_derivatives(shape: tuple[int, ...], out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator).requires_grad_() for size in (shape, (out, 5), (out,)))
    for leaves in ((x, weight, bias), (x, weight)):
        ours, theirs = linear(*leaves), F.linear(*leaves)
        assert "_Linear" in str(ours.grad_fn), "not computed by oneDNN"
        assert_close(ours, theirs)
        for one, other in zip(gradients(ours, *leaves), gradients(theirs, *leaves), strict=True):
            assert_close(one, other)


@pytest.mark.usefixtures("onednn")
@SHAPES
def test_onednn_applies_the_gelu(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape) * 3, torch.randn(6, 5), torch.randn(6)
    for leaves in ((x, weight, bias), (x, weight)):
        with torch.no_grad():
            assert _operations(lambda leaves=leaves: linear_gelu(*leaves)) == ["narrows.linear.default"]
            assert_close(linear_gelu(*leaves), F.gelu(F.linear(*leaves)))


@pytest.mark.usefixtures("onednn")
def test_few_activations_are_not_worth_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "FEWEST_WEIGHTS", 2**30)
    monkeypatch.setattr(maps, "FEWEST_ACTIVATIONS", 2 * 7 * 6)
    weight, bias = torch.randn(6, 5), torch.randn(6)
    with torch.no_grad():
        for tokens, is_fused in ((7, True), (6, False)):
            x = torch.randn(2, tokens, 5)
            assert ("narrows.linear.default" in _operations(lambda x=x: linear_gelu(x, weight, bias))) is is_fused
            assert_close(linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias)))


@pytest.mark.compiled
@pytest.mark.usefixtures("onednn")
def test_one_graph_for_few_and_many_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "FEWEST_ACTIVATIONS", 4 * 7 * 6)
    module = FeedForwardSequential(Linear(5, 6), nn.GELU(), Linear(6, 5))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 8):
            x = torch.randn(batch, 7, 5)
            torch._dynamo.mark_dynamic(x, 0)
            assert_close(compiled(x), module(x))


@pytest.mark.usefixtures("onednn")
def test_onednn_takes_any_strides() -> None:
    x, weight = torch.randn(5, 7, 4), torch.randn(4, 6).t()
    for view in (x, x.transpose(0, 1), x.flip(1), x[:, ::2], x.expand(3, 5, 7, 4)):
        assert_close(linear(view, weight), F.linear(view, weight))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("function", [linear, linear_gelu])
def test_onednn_has_forward_and_second_derivatives_and_a_rule_for_vmap(function: Callable[..., Tensor]) -> None:
    def plain(*leaves: Tensor) -> Tensor:
        return F.gelu(F.linear(*leaves)) if function is linear_gelu else F.linear(*leaves)

    leaves = tuple(torch.randn(size) for size in ((4, 5), (6, 5), (6,)))
    tangents = tuple(map(torch.randn_like, leaves))
    with torch.no_grad():  # where the GELU is part of it
        assert_same_forward_derivatives(function, plain, leaves, tangents)
        many = torch.randn(3, 4, 5)
        assert_close(torch.vmap(function, (0, None, None))(many, *leaves[1:]), plain(many, *leaves[1:]))

    def gradient_norm(f: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(lambda *a: f(*a).cos().sum(), (0, 1, 2))(*leaves))  # pyright: ignore

    ours, theirs = (
        torch.func.grad(lambda *a, f=f: gradient_norm(f, *a), (0, 1, 2))(*leaves) for f in (function, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("gelu", [False, True])
def test_the_operation_is_registered_as_pytorch_wants_it(gelu: bool) -> None:
    arguments = (torch.randn(3, 4, 5), torch.randn(6, 5), torch.randn(6), gelu)
    torch.library.opcheck(torch.ops.narrows.linear.default, arguments)


@pytest.mark.compiled
@pytest.mark.usefixtures("onednn")
def test_onednn_is_in_compiled_inference_and_not_in_exported_programs() -> None:
    module, x = FeedForwardSequential(Linear(5, 8), nn.GELU(), Linear(8, 5)), torch.randn(2, 7, 5)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    expected = F.linear(F.gelu(F.linear(x, module[0].weight, module[0].bias)), module[2].weight, module[2].bias)
    with torch.no_grad():
        assert_close(torch.compile(module, fullgraph=True, backend=backend)(x), expected)
        assert_close(torch.compile(module, fullgraph=True)(x), expected)
    assert [str(node.target) for node in graphs[0].graph.nodes].count("narrows.linear") == 2
    torch._dynamo.reset()
    trained = torch.compile(module, fullgraph=True)(x)
    assert_close(gradients(trained, *module.parameters())[0], gradients(expected, *module.parameters())[0])
    with torch.no_grad():
        exported = torch.export.export(module, (x,))
    assert not any("narrows" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.usefixtures("onednn")
def test_every_multiplication_is_counted() -> None:
    x, weight = torch.randn(2, 7, 5), torch.randn(6, 5)
    with torch.no_grad():
        assert count_macs(lambda: linear_gelu(x, weight)) == 2 * 7 * 5 * 6
    counter = FlopCounterMode(display=False)
    with counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 2 * 7 * 5 * 6


@pytest.mark.usefixtures("onednn")
def test_a_gelu_waits_for_what_stands_between_it_and_its_linear_map() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1

    x = torch.randn(2, 7, 5)

    def network() -> FeedForwardSequential:
        torch.manual_seed(0)
        return FeedForwardSequential(Linear(5, 8), nn.GELU(), nn.Dropout(0.0), Linear(8, 5))

    with torch.no_grad():
        plain = network()
        first, last = plain[0], plain[3]
        assert _operations(lambda: plain(x)).count("aten.gelu.default") == 0
        assert_close(plain(x), F.linear(F.gelu(F.linear(x, first.weight, first.bias)), last.weight, last.bias))

        adapted = network()
        adapted[0] = Adapted(adapted[0])
        assert_close(adapted(x), F.linear(F.gelu(F.linear(x, first.weight, first.bias) + 1), last.weight, last.bias))

        watched, seen = network(), []
        watched[0].register_forward_hook(lambda *call: seen.append(call[2]))
        assert_close(watched(x), plain(x))
        assert_close(seen[0], F.linear(x, first.weight, first.bias))

        approximate = network()
        approximate[1] = nn.GELU("tanh")
        hidden = F.gelu(F.linear(x, first.weight, first.bias), approximate="tanh")
        assert_close(approximate(x), F.linear(hidden, last.weight, last.bias))


def _operations(function: Callable[[], object]) -> list[str]:
    """Names of the operations that `function` executes."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Names():
        function()
    return names


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "mkl", "family"),
    [
        (LINUX.format("AuthenticAMD", 26), "AVX512", True, 26),
        (LINUX.format("AuthenticAMD", 26), "AVX512", False, -1),
        (LINUX.format("AuthenticAMD", 26), "AVX2", True, -1),
        (LINUX.format("AuthenticAMD", 25), "AVX512", True, 25),
        (LINUX.format("GenuineIntel", 6), "AVX512", True, -1),
        ("processor : 0", "AVX512", True, -1),
        (None, "AVX512", True, 26),
    ],
)
def test_which_processor_it_is(
    cpuinfo: str | None, capability: str, mkl: bool, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor.Path, "is_file", lambda _: cpuinfo is not None)
    monkeypatch.setattr(processor.Path, "read_text", lambda _: cpuinfo)
    monkeypatch.setattr(processor.platform, "processor", lambda: "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    found = runpy.run_path(processor.__file__)
    assert found["_FAMILY"] == family
    assert found["MKL_IS_SLOW"] is (family == 26)
    assert found["MKL_IS_BEHIND"] is (family == 25)
