"""One graph under `torch.compile`, `torch.export`, and ONNX Runtime."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from narrows.adapters.token_reduction import METHODS, reduce_tokens
from narrows.errors import InvalidArgument
from tests.adapters.token_reduction.families import FAMILIES, images, vit
from tests.adapters.token_reduction.hosts import HOSTS, inputs, outputs
from tests.support import assert_close

CASES = [("vit", "ats"), ("vit", "tome"), ("dinov3", "ats"), ("siglip", "topk")]


@pytest.mark.compiled
@torch.no_grad()
@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_reduced_model_is_one_graph(family: str, method: str) -> None:
    model = FAMILIES[family]()
    with reduce_tokens(model, method=method, budget={1: 0.6, 2: 0.4}):
        expected = model(images())
        torch._dynamo.reset()
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images()), expected)


@pytest.mark.compiled
@torch.no_grad()
@pytest.mark.parametrize(("name", "method"), [("timm vit", "topk"), ("transformers dinov2", "tome")])
def test_a_compiled_model_takes_images_of_other_sizes(name: str, method: str) -> None:
    model = First(vit(dynamic_img_size=True) if name == "timm vit" else HOSTS[name](), {})
    with reduce_tokens(model, method=method, budget={1: 0.6}):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for height, width in ((48, 64), (40, 40), (64, 32)):
            given = images(2, 64)[..., :height, :width]
            assert_close(compiled(given), model(given))


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("name", "method", "marked"),
    [
        *(("timm vit", method, False) for method in METHODS),
        ("timm vit", "ats", True),
        ("timm vit", "random", True),
        ("transformers dinov2", "tome", False),
    ],
)
@torch.no_grad()
def test_one_graph_serves_any_number_of_images(name: str, method: str, marked: bool) -> None:
    """And one more a single image, which compilers treat apart, whatever they compile."""
    model = HOSTS[name]().train(method == "random")  # which only then draws
    counter = CompileCounterWithBackend("eager")
    with reduce_tokens(model, method=method, budget={1: 0.6, 2: 0.4}):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        compilations = []
        for batch in (1, 2, 5, 3):
            arguments = inputs(model, batch)
            torch.manual_seed(0)
            expected = outputs(model, arguments)
            if marked and batch > 1:
                for value in arguments.values():
                    torch._dynamo.mark_dynamic(value, 0)
            torch.manual_seed(0)
            for ours, theirs in zip(outputs(compiled, arguments), expected, strict=True):
                assert_close(ours, theirs)
            compilations.append(counter.frame_count)
    assert compilations == [1, 2, 2, 2]


@pytest.mark.compiled
@torch.no_grad()
def test_inductor_compiles_a_reduced_model_for_any_number_of_images() -> None:
    model = vit(depth=2)
    with reduce_tokens(model, method="ats", budget={0: 0.5}):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for batch in (2, 5):
            assert_close(compiled(images(batch)), model(images(batch)))


@pytest.mark.compiled
def test_gradients_of_the_compiled_model() -> None:
    model = vit()
    with reduce_tokens(model, budget=0.5):
        expected = torch.autograd.grad(model(images()).square().sum(), model.patch_embed.proj.weight)[0]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(images()).square().sum(), model.patch_embed.proj.weight)[0]
    assert_close(got, expected)


@pytest.mark.compiled
@torch.no_grad()
@pytest.mark.parametrize(("family", "method", "strict"), [("vit", "ats", True), ("deit", "tome", False)])
def test_a_reduced_model_is_exported_for_any_batch(family: str, method: str, strict: bool) -> None:
    model = FAMILIES[family]()
    side = model.patch_embed.img_size[0]
    with reduce_tokens(model, method=method, budget=0.5):
        batch = {"x": {0: Dim("batch", min=1, max=64)}}
        program = export(model, (images(2, side),), dynamic_shapes=batch, strict=strict).module()
        for size in (1, 5):
            assert_close(program(images(size, side)), model(images(size, side)))


class First(nn.Module):
    """The first tensor that a model returns.

    Args:
        model: of timm or transformers.
        options: of its call.
    """

    def __init__(self, model: nn.Module, options: dict[str, bool]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features or logits."""
        name = self.model.main_input_name if hasattr(self.model, "main_input_name") else "x"
        return outputs(self.model, {name: pixel_values}, **self.options)[0]


# The host, the method, and whether images are of any size (but the model's own, which transformers takes apart).
EXPORTED = [
    ("transformers beit", "ats", False),
    ("transformers data2vec, shared", "ats", False),
    ("timm beit", "ats", False),
    ("transformers beit", "tome", False),
    ("transformers beit, shared", "evit", False),
    ("transformers deit", "topk", True),
    ("transformers dinov2", "ats", True),
    ("transformers dinov2", "tome", True),
    ("timm vit", "tome", True),
]


@pytest.mark.compiled
@torch.no_grad()
@pytest.mark.parametrize(("name", "method", "any_size"), EXPORTED)
def test_hosts_are_exported_for_any_batch_and_size(name: str, method: str, any_size: bool) -> None:
    """Traced with an even number of tokens, run with others."""
    options = {"interpolate_pos_encoding": True} if any_size and "deit" in name else {}
    host = vit(dynamic_img_size=True) if name == "timm vit" else HOSTS[name]()
    model = First(host, options)
    dynamic = {0: Dim.DYNAMIC, **({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if any_size else {})}
    own = next(iter(inputs(host, 1).values())).shape[-2:]
    sizes = [(48, 64), (40, 48), (40, 56)] if any_size else [own]
    generator = torch.Generator().manual_seed(0)
    with reduce_tokens(model.model, method=method, budget=0.5):
        program = export(model, (torch.randn(2, 3, *sizes[0]),), dynamic_shapes=(dynamic,), strict=False).module()
        for size in sizes:
            for batch in (1, 5):
                given = torch.randn(batch, 3, *size, generator=generator)
                assert_close(program(given), model(given))


@pytest.mark.compiled
@torch.no_grad()
@pytest.mark.parametrize(("family", "method"), [("dinov2_registers", "ats"), ("siglip", "evit")])
def test_a_reduced_model_runs_in_onnx_runtime(family: str, method: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = FAMILIES[family]()
    side = model.patch_embed.img_size[0]
    with reduce_tokens(model, method=method, budget=0.5):
        expected = model(images(3, side))
        program = torch.onnx.export(model, (images(3, side),), dynamo=True, verbose=False)
        assert program is not None
        program.save(tmp_path / "reduced.onnx")
    session = runtime.InferenceSession(tmp_path / "reduced.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images(3, side).numpy()})
    assert np.abs(logits - expected.numpy()).max() <= 1e-4


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_what_would_fix_the_batch_is_refused_before_it_writes(tmp_path: Path) -> None:
    model = FAMILIES["vit"]()
    with reduce_tokens(model, method="evit", budget=0.5):
        with pytest.raises(InvalidArgument, match=r"expected torch.export, or .*dynamo=True.* reduced by EViT"):
            torch.jit.trace(model, images(2))
        with pytest.raises(InvalidArgument, match="number of images of the example"):
            torch.onnx.export(model, (images(2),), tmp_path / "model.onnx", dynamo=False)
    assert not list(tmp_path.iterdir())
