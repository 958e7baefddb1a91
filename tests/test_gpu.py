"""Every layer on a GPU: as on the CPU in float64, captured as a CUDA graph, and compiled with graphs of its own."""

import pytest
import torch
from torch import Tensor, nn

from tests.cases import LayerCase
from tests.layers.every_layer import CASES, build, cast, every_layer, inputs, total
from tests.support import assert_close, parameter_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

every_implementation = pytest.mark.parametrize(
    ("case", "impl"),
    [(case, impl) for case in CASES for impl in dict.fromkeys((*case.impls, "auto"))],
    ids=lambda value: value.name if isinstance(value, LayerCase) else value,
)

# Of each kind of layer one: compiling takes longer than all the rest.
COMPILED = {
    "SlotAttention",
    "TwoWaySlotAttention",
    "PerceiverResampler-clips",
    "MaskedCrossAttention",
    "SoftMoE",
    "DynamicSlotsSoftMoE",
    "separable_attention",
    "SampledAttention-sampling",
}


def given(case: LayerCase, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs with masks where the layer takes them, and given slots where it would draw some."""
    arguments = cast(inputs(case), dtype)
    generator = torch.Generator().manual_seed(2)
    for name, masked in case.padded.items():
        shape = arguments[masked].shape[: case.pad_axis + 1]
        arguments[name] = torch.rand(shape, generator=generator) < 0.7
    if case.random:
        arguments["slots"] = torch.randn(3, 4, 12, generator=generator, dtype=torch.float64).to(dtype)
    return {name: value.to(device) for name, value in arguments.items()}


@every_implementation
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_the_gpu_gives_what_the_cpu_gives(case: LayerCase, impl: str, dtype: torch.dtype, tolerance: float) -> None:
    exact = build(case, impl="reference").double()
    layer = build(case, impl=impl).to("cuda", dtype)
    expected = case.outputs(exact(**given(case, torch.float64, "cpu")))
    outputs = case.outputs(layer(**given(case, dtype, "cuda")))
    for name, value in outputs.items():
        assert_close(value.cpu().double(), expected[name].double(), tolerance)
    right = parameter_gradients(exact, total(expected))
    for name, gradient in parameter_gradients(layer, total(outputs)).items():
        assert_close(gradient.cpu().double(), right[name], 10 * tolerance)


@every_implementation
def test_bfloat16_is_finite_and_near(case: LayerCase, impl: str) -> None:
    arguments = given(case, torch.bfloat16, "cuda")
    outputs = case.outputs(build(case, impl=impl).to("cuda", torch.bfloat16)(**arguments))
    expected = case.outputs(build(case, impl="reference").to("cuda")(**cast(arguments, torch.float32)))
    for name, value in outputs.items():
        assert torch.isfinite(value.float()).all()
        if "sampling" not in case.name:  # which tokens are kept is a choice that may fall otherwise
            assert_close(value.float(), expected[name].float(), 0.1)


@every_implementation
def test_a_cuda_graph_replays_forward_and_backward(case: LayerCase, impl: str) -> None:
    layer, arguments = build(case, impl=impl).to("cuda", torch.bfloat16), given(case, torch.bfloat16, "cuda")

    def step() -> tuple[Tensor, tuple[Tensor, ...]]:
        output = torch.cat([v.flatten() for v in case.outputs(layer(**arguments)).values() if v.is_floating_point()])
        learned = [p for p in layer.parameters() if p.requires_grad]
        return output, torch.autograd.grad(output, learned, torch.ones_like(output), allow_unused=True)

    expected, gradients = step()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_gradients = step()
    graph.replay()
    assert_close(captured.float(), expected.float(), 2e-2)
    for ours, theirs in zip(captured_gradients, gradients, strict=True):
        if theirs is not None:
            assert_close(ours.float(), theirs.float(), 5e-2)


@every_layer
def test_noise_is_drawn_on_the_gpu(case: LayerCase) -> None:
    if not case.random:
        pytest.skip("draws nothing")
    layer, arguments = build(case).cuda(), {name: value.cuda() for name, value in inputs(case).items()}
    generator = torch.Generator("cuda")
    first, second = (case.outputs(layer(**arguments, generator=generator.manual_seed(3))) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_layer
def test_what_stands_at_masked_places_reaches_nothing(case: LayerCase) -> None:
    arguments = given(case, torch.float32, "cuda")
    layer = build(case).cuda()
    expected = case.outputs(layer(**arguments))
    for name, masked in case.padded.items():
        mask = arguments[name]
        real = mask.reshape(mask.shape + (1,) * (arguments[masked].ndim - mask.ndim))
        arguments[masked] = arguments[masked].masked_fill(~real, float("nan"))
    outputs = case.outputs(layer(**arguments))
    for name, value in outputs.items():
        assert_close(value.double(), expected[name].double(), 1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in COMPILED], ids=lambda case: case.name)
@pytest.mark.compiled
def test_compiled_with_its_own_graphs_it_gives_the_same(case: LayerCase) -> None:
    torch._dynamo.reset()
    layer, arguments = build(case).cuda(), given(case, torch.float32, "cuda")
    expected = {name: value.clone() for name, value in case.outputs(layer(**arguments)).items()}
    right = parameter_gradients(layer, total(case.outputs(layer(**arguments))))
    compiled: nn.Module = torch.compile(layer, fullgraph=True, mode="reduce-overhead")  # type: ignore[assignment]
    for _ in range(3):  # the first calls warm up and record
        torch.compiler.cudagraph_mark_step_begin()
        outputs = case.outputs(compiled(**arguments))
        found = parameter_gradients(layer, total(outputs))
    for name, value in outputs.items():
        assert_close(value.double(), expected[name].double(), 1e-4)
    for name, gradient in found.items():
        assert_close(gradient, right[name], 1e-3)
