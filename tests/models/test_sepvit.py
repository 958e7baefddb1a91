import re
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from narrows.costs import count_macs
from narrows.errors import InvalidArgument, InvalidType
from narrows.models import SepViT, create_model, load_model
from narrows.models.sepvit import DropPath
from narrows.ops.separable_attention import WindowOrder
from tests.models.small_sepvit import images, random_small, small
from tests.support import assert_close, parameter_gradients

# Of the paper's release: parameters and multiply-accumulates at 224 pixels, in millions and thousand millions.
PAPER = {
    "sepvit_lite": (3.66, 0.57),
    "sepvit_tiny": (31.18, 4.52),
    "sepvit_small": (46.57, 7.46),
    "sepvit_base": (82.38, 13.05),
}


@pytest.mark.parametrize("window_tokens", ["shared", "per_window"])
@pytest.mark.parametrize("name", PAPER)
def test_presets_are_as_large_and_as_costly_as_those_of_the_paper(name: str, window_tokens: str) -> None:
    with torch.device("meta"):
        model = create_model(name, window_tokens=window_tokens).eval()
        macs = count_macs(lambda: model(torch.randn(1, 3, 224, 224))) / 1e9
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    expected, expected_macs = PAPER[name]
    assert parameters == pytest.approx(expected, rel=0.005)
    assert macs == pytest.approx(expected_macs, rel=0.005)
    if window_tokens == "per_window":  # as released, and to the last digit
        assert round(parameters, 2) == expected
        assert round(macs, 2) == expected_macs


def test_the_network_is_put_together_as_in_the_paper() -> None:
    """Embedding and norm, a block, positions, the other blocks; at the end norm, mean and linear."""
    model, x = random_small(), images(32, 32).double()
    feature_map = x
    for stage in model.stages:
        embedded = F.conv2d(
            feature_map, stage.embedding.weight, stage.embedding.bias, stage.embedding.stride, stage.embedding.padding
        )
        feature_map = F.layer_norm(
            embedded.movedim(1, -1), embedded.shape[1:2], stage.embedding_norm.weight, stage.embedding_norm.bias, 1e-6
        )
        for index, block in enumerate(stage.blocks):
            feature_map = feature_map + block.attention(feature_map)
            feature_map = feature_map + block.feed_forward(block.feed_forward_norm(feature_map))
            if index == 0:
                feature_map = feature_map + stage.position(feature_map.movedim(-1, 1)).movedim(1, -1)
        feature_map = feature_map.movedim(-1, 1)
    normed = F.layer_norm(feature_map.movedim(1, -1), (16,), model.norm.weight, model.norm.bias, 1e-6)
    assert_close(model(x), model.head(normed.mean((1, 2))), 1e-12)


def test_kernels_windows_and_what_is_left_out_at_a_single_window() -> None:
    with torch.device("meta"):
        model = create_model("sepvit_tiny")
    convolutions = [(s.embedding.kernel_size[0], s.embedding.stride[0], s.embedding.padding[0]) for s in model.stages]
    assert convolutions == [(7, 4, 3), (3, 2, 1), (3, 2, 1), (3, 2, 1)]
    blocks = [[block.attention for block in stage.blocks] for stage in model.stages]
    assert [[layer.window_size for layer in stage] for stage in blocks] == [[7], [7, 14], [7, 14] * 3, [7, 7]]
    exchanging = [[layer.window_token is not None for layer in stage] for stage in blocks]
    assert exchanging == [[True], [True, True], [True, False] * 3, [False, False]]
    for layer in (layer for stage in blocks for layer in stage):
        assert layer.dim // layer.heads == 32
        assert layer.norm.eps == 1e-6
        assert (layer.window_norm is None) == (layer.window_query_key is None) == (layer.window_token is None)
    assert all(block.feed_forward[0].out_features == 4 * stage.embedding.out_channels
               for stage in model.stages for block in stage.blocks)  # fmt: skip


def test_initialisation_of_the_paper() -> None:
    model = SepViT(num_classes=100, dims=(64, 128), depths=(1, 1), heads=(2, 4), window_size=7)
    linear = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert linear.std().item() == pytest.approx(0.02, rel=0.02)
    embedding = model.stages[1].embedding.weight
    assert embedding.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert model.stages[0].position.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all((bias == 0).all() for bias in biases)
    assert (model.stages[0].blocks[0].attention.window_token == 0).all()


@pytest.mark.parametrize("size", [(32, 32), (40, 27)], ids=str)
def test_every_parameter_has_a_finite_gradient(size: tuple[int, int]) -> None:
    model = small(drop_path_rate=0.1)
    for name, gradient in parameter_gradients(model, model(images(*size))).items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("image_size", [32, None])
def test_no_parameter_is_ever_left_out_of_the_graph(image_size: int | None) -> None:
    """Also where an image has a single window: data-parallel training does not stop."""
    model = small(image_size=image_size).train()
    model(images(4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stochastic_depth_grows_linearly_and_keeps_the_expectation() -> None:
    model = small(drop_path_rate=0.4)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    drop, branch = DropPath(0.3).train(), torch.ones(20000, 2, 3)
    dropped = drop(branch)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert torch.equal(dropped.amax((1, 2)), dropped.amin((1, 2)))
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(drop.eval()(branch), branch)


def test_a_dropped_branch_leaves_a_sample_as_it_was() -> None:
    model = random_small(drop_path_rate=0.999).train()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.rate = 0.999999
    stage, feature_map = model.stages[0], torch.randn(2, 32, 32, 3).double()
    embedded = stage.embedding_norm(stage.embedding(feature_map.movedim(-1, 1)).movedim(1, -1))
    positioned = embedded + stage.position(embedded.movedim(-1, 1)).movedim(1, -1)
    assert_close(stage(feature_map), positioned, 1e-12)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, x = random_small().train(), images(24, 32).double()
    expected = parameter_gradients(model, model(x))
    model.set_grad_checkpointing()
    for name, gradient in parameter_gradients(model, model(x)).items():
        assert_close(gradient, expected[name], 1e-12)
    assert all(stage.grad_checkpointing for stage in model.stages)
    model.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in model.stages)


def test_tokens_are_moved_for_convolutions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a stage windows of both sizes are views of the tokens as they stand."""
    model = small(depths=(1, 5))
    calls: list[str] = []

    def watched(name: str) -> None:
        original = getattr(WindowOrder, name)

        def call(self: WindowOrder, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
            moved = original(self, tokens, *rest)
            calls.append(f"{name}: {'view' if moved.data_ptr() == tokens.data_ptr() else 'copy'}")
            return moved

        monkeypatch.setattr(WindowOrder, name, call)

    for name in ("windows", "tokens", "arrange", "restore"):
        watched(name)
    with torch.no_grad():
        model.eval()(images(32, 32))
    first = ["arrange: copy", "windows: view", "tokens: view", "restore: copy"]
    rest = ["windows: view", "tokens: view"]
    assert calls == [*first, *first, *rest * 4, "restore: copy"]


def test_shared_window_tokens_cost_what_those_of_each_window_do() -> None:
    """Both stand before the tokens of every window, and are projected with them."""
    shared, each = (
        create_model("sepvit_lite", depths=(1, 1, 1, 1), window_tokens=form, device="meta").eval()
        for form in ("shared", "per_window")
    )
    x = torch.randn(1, 3, 224, 224, device="meta")
    assert count_macs(lambda: each(x)) == count_macs(lambda: shared(x))


def test_heads_pool_and_classes_can_be_exchanged() -> None:
    model, x = random_small(), images(32, 32).double()
    features = model.forward_features(x)
    assert features.shape == (2, 8, 8, 16)
    assert torch.equal(model(x), model.forward_head(features))
    assert_close(model.forward_head(features, pre_logits=True), features.mean((1, 2)), 1e-12)
    assert model.get_classifier() is model.head

    model.reset_classifier(0)
    assert_close(model(x), features.mean((1, 2)), 1e-12)
    model.reset_classifier(0, "max")
    assert_close(model(x), features.amax((1, 2)), 1e-12)
    model.reset_classifier(0, "")
    assert_close(model(x), features, 1e-12)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    assert model.head.weight.dtype == torch.float64
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (7, 16, 16)


def test_a_model_is_saved_as_it_stands(tmp_path) -> None:
    """The head it was given later, and neither the device nor the precision it was built in."""
    model = small(device="cpu", dtype=torch.float32)
    model.reset_classifier(3, "max")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, SepViT)
    assert torch.equal(loaded(images(32, 32)), model(images(32, 32)))


def test_device_and_dtype_reach_every_parameter_and_meta_models_can_be_filled() -> None:
    model = small(device="meta", dtype=torch.bfloat16, window_tokens="per_window")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        empty = small()
    expected = small()
    empty.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(empty(images(32, 32)), expected(images(32, 32)))
    assert small(image_size=(32, 32), window_tokens="per_window").to_empty(device="cpu") is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_half_precision_is_finite_with_large_activations_and_near(dtype: torch.dtype, scale: float) -> None:
    model, x = small(), scale * images(32, 40)
    expected = model(x)
    logits = small().to(dtype)
    logits.load_state_dict(model.state_dict())
    output = logits(x.to(dtype))
    assert output.dtype == dtype
    # Five blocks of some ten roundings each.
    assert (output.float() - expected).abs().max() <= 50 * torch.finfo(dtype).eps * expected.abs().max()


def test_window_tokens_are_spared_weight_decay_and_every_parameter_has_its_layer() -> None:
    model = small()
    tokens = {name for name, _ in model.named_parameters() if "window_token" in name}
    assert model.no_weight_decay() == tokens
    assert len(tokens) == 5
    matcher = model.group_matcher()
    patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"])]
    layers = {name: [p for p in patterns if re.match(p, name)] for name, _ in model.named_parameters()}
    assert {name for name, found in layers.items() if not found} == {"head.weight", "head.bias"}
    assert re.match(model.group_matcher(coarse=True)["blocks"], "stages.1.blocks.0.attention.qkv.weight")


def test_the_routing_of_a_model_has_one_record_for_each_block() -> None:
    model = random_small()
    routings = model.routing(images(32, 36).double())
    assert len(routings) == 5
    assert [routing.grid for routing in routings] == [(16, 18)] * 2 + [(8, 9)] * 3
    assert [routing.num_carriers for routing in routings] == [8 * 9, 4 * 5, 4 * 5, 2 * 3, 4 * 5]
    assert routings[0].name == "stages.0.blocks.0.attention"
    assert model.token_grid(torch.zeros(1, 3, 31, 36)) == (16, 18)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": (1, 2, 3)}, r"heads: expected one value, or 2: one for each of the stages .*, got \(1, 2, 3\)"),
        ({"heads": (2, 3)}, r"heads: expected divisors of dims = \(8, 16\), got \(2, 3\)"),
        ({"heads": (1, 0)}, r"heads: expected positive values, got \(1, 0\)"),
        ({"window_size": [4]}, r"window_size: expected one value, or 2: .*, got \[4\]"),
        ({"window_size": (2, (4, 6))}, r"window_size: expected window sizes of a stage of which each divides the next"),
        ({"window_size": (2, ())}, r"window_size: expected at least one window size for each stage"),
        ({"depths": (1,)}, r"depths: expected one value, or 2: "),
        ({"mlp_ratio": (4.0,)}, r"mlp_ratio: expected one value, or 2: "),
        ({"mlp_ratio": 0.0}, r"mlp_ratio: expected positive values, got 0.0"),
        ({"num_classes": -1}, r"num_classes: expected a positive integer, got -1"),
        ({"channels": 0}, r"channels: expected a positive integer, got 0"),
        ({"patch_stride": 0}, r"patch_stride: expected a positive integer, got 0"),
        ({"dims": ()}, r"dims: expected at least one stage, got \(\)"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate: expected a share in \[0, 1\), got 1.0"),
        ({"drop_rate": -0.1}, r"drop_rate: expected a share in \[0, 1\), got -0.1"),
        ({"global_pool": "mean"}, r"global_pool: expected one of \('avg', 'max', ''\), got 'mean'"),
        ({"window_tokens": "each"}, r"window_tokens: expected one of \('shared', 'per_window'\), got 'each'"),
        ({"window_tokens": "per_window", "image_size": None}, r"image_size: expected the size that has these"),
        ({"image_size": (1, 2, 3)}, r"image_size: expected a side, \(height, width\) or None, got \(1, 2, 3\)"),
        ({"image_size": 0}, r"image_size: expected a positive integer, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_messages_of_the_constructor(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        small(**arguments)


def test_wrong_images_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for shape in [(1, 4, 16, 16), (3, 16, 16)]:
        with pytest.raises(InvalidArgument, match=r"images: expected shape \[B, C, H, W\] with C = 3, got shape"):
            small()(torch.zeros(shape))
    with pytest.raises(InvalidArgument, match=r"images: expected sides of at least 3 pixels, one window .* 2 x 16"):
        small()(torch.zeros(1, 3, 2, 16))
    with pytest.raises(InvalidArgument, match=r"sides of at least 25 pixels, .* got 224 x 24"):
        create_model("sepvit_lite", depths=(1, 1, 1, 1))(torch.zeros(1, 3, 224, 24))
    with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, H, W\] = \(2, 8, 8\), got shape \(2, 4, 4\)"):
        small()(torch.zeros(2, 3, 8, 8), torch.ones(2, 4, 4, dtype=torch.bool))
    with pytest.raises(InvalidType, match=r"mask: expected a boolean tensor"):
        small()(torch.zeros(2, 3, 8, 8), torch.ones(2, 8, 8))


@pytest.mark.compiled
def test_compiles_to_one_graph_with_padding_and_images_of_two_sizes() -> None:
    """Without a mask, where windows are views, it is a case of `test_every_model.py`."""
    torch._dynamo.reset()
    model, x, mask = small(depths=(1, 2)), images(20, 27), torch.zeros(2, 20, 27, dtype=torch.bool)
    mask[0, :11], mask[1, :, :18] = True, True
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits, expected = compiled(x, mask), model(x, mask)
    assert_close(logits, expected, 1e-5)
    expected_gradients = parameter_gradients(model, expected)
    for name, gradient in parameter_gradients(model, logits).items():
        assert_close(gradient, expected_gradients[name], 1e-4)


@pytest.mark.compiled
def test_exports_with_any_batch_where_windows_are_padded() -> None:
    model = small()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images(20, 27),), dynamic_shapes=({0: batch},), strict=False).module()
        for count in (1, 5):
            others = images(20, 27, batch=count)
            assert_close(program(others), model(others), 1e-5)


@pytest.mark.compiled
@pytest.mark.parametrize("size", [(32, 32), (20, 27)], ids=str)
def test_onnx_runtime_computes_the_same(size: tuple[int, int], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = small(depths=(1, 2)), tmp_path / "sepvit.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (images(*size),), file, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    others = images(*size, batch=3)
    (logits,) = session.run(None, {session.get_inputs()[0].name: others.numpy()})
    assert np.abs(logits - model(others).detach().numpy()).max() < 1e-4
