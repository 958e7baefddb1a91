"""What the resampler says about images, clips and time, and where upstream says otherwise."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from flamingo_pytorch import PerceiverResampler as UpstreamResampler
from torch import Tensor, nn
from torch.nn.functional import layer_norm, relu

from narrows.costs import saved_for_backward
from narrows.errors import ImplementationUnavailable, InvalidArgument, InvalidType
from narrows.layers import perceiver_resampler
from narrows.layers.perceiver_resampler import PerceiverResampler, SquaredReLU
from tests.cases import all_cases
from tests.support import assert_close, gradients

SMALL = next(case for case in all_cases() if case.name == "PerceiverResampler-image")

IMPLS = ("reference", "fused", "folded")
every_impl = pytest.mark.parametrize("impl", IMPLS)


def build(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return SMALL.build(**kwargs).double()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, dtype=torch.float64)


@every_impl
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_it_is_the_pseudo_code_of_the_paper(impl: str, masked: bool) -> None:
    """Figure 5, with the LayerNorms and the final LayerNorm that the code has and the figure leaves out."""
    resampler, clip = build(impl=impl), draw(1, 1, 3, 5).requires_grad_()
    mask = torch.arange(15).view(1, 1, 3, 5) % 4 > 0 if masked else None
    x_f = (clip[0, 0] + resampler.time_embeddings[:3, None]).flatten(0, 1)
    x_f = x_f if mask is None else x_f[mask.flatten()]
    x = resampler.latents
    for layer in resampler.layers:
        attn = layer.attn
        normed = attn.norm_latents(x)
        kv = torch.cat((attn.norm_media(x_f), normed)) @ attn.to_kv.weight.T
        heads = []
        for h in range(2):
            query = normed @ attn.to_q.weight.T[:, 8 * h : 8 * h + 8]
            key, value = kv[:, 8 * h : 8 * h + 8], kv[:, 16 + 8 * h : 24 + 8 * h]
            heads.append((query @ key.T / 8**0.5).softmax(-1) @ value)
        x = x + torch.cat(heads, -1) @ attn.to_out.weight.T
        x = x + layer.ff(x)
    expected = layer_norm(x, (16,), resampler.norm.weight, resampler.norm.bias)
    latents = resampler(clip, mask)[0, 0]
    assert_close(latents, expected, 1e-12)
    inputs = (clip, *resampler.parameters())
    for ours, theirs in zip(gradients(latents, *inputs), gradients(expected, *inputs), strict=True):
        assert_close(ours, theirs, 1e-12)


def test_media_norms_are_folded_where_all_of_them_are_plain() -> None:
    assert [build(impl=impl).implementation() for impl in IMPLS] == list(IMPLS)
    assert build().implementation() == "folded"


def hook(attn: nn.Module) -> None:
    attn.to_kv.register_forward_hook(lambda module, inputs, output: 2 * output)


def eps(attn: nn.Module) -> None:
    attn.norm_media.eps = 0.3


def another_norm(attn: nn.Module) -> None:
    attn.norm_media = nn.RMSNorm(16, dtype=torch.float64)


def parametrised(attn: nn.Module) -> None:
    nn.utils.parametrizations.spectral_norm(attn.to_kv)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, r"layers.1.attn.to_kv has hooks"),
        (eps, r"the eps of norm_media differ between layers: \[1e-05, 0.3\]"),
        (another_norm, r"layers.1.attn.norm_media is a torch.nn.modules.normalization.RMSNorm"),
        (parametrised, r"layers.1.attn.to_kv is a torch.*ParametrizedLinear"),
    ],
)
def test_what_has_to_be_called_is_called(change: Callable[[nn.Module], None], reason: str) -> None:
    """Then no norm is folded, and the output is that of the reference; impl="folded" says why it cannot run."""
    media, (reference, auto, folded) = draw(2, 7), (build(impl=impl).eval() for impl in ("reference", "auto", "folded"))
    before = auto(media)
    for resampler in (reference, auto, folded):
        torch.manual_seed(0)
        change(resampler.layers[1].attn)
    assert auto.implementation() == "fused"
    assert (auto(media) - before).abs().max() > 1e-3
    assert_close(auto(media), reference(media), 1e-12)
    for call in (folded.implementation, lambda: folded(media)):
        with pytest.raises(
            ImplementationUnavailable, match=rf"impl='folded' cannot run here: {reason}. Use impl='fused'"
        ):
            call()


def test_folding_reads_eps_and_biases_from_the_modules() -> None:
    folded, reference = build(impl="folded"), build(impl="reference")
    for resampler in (folded, reference):
        torch.manual_seed(0)
        for layer in resampler.layers:
            layer.attn.norm_media = nn.LayerNorm(16, eps=0.5, bias=False, dtype=torch.float64)
            layer.attn.to_kv = nn.Linear(16, 32, dtype=torch.float64)
            nn.init.normal_(layer.attn.norm_media.weight)
    media = draw(2, 7)
    assert_close(folded(media), reference(media), 1e-12)
    assert_close(folded.routing(media).weights, reference.routing(media).weights, 1e-12)


def test_a_folded_layer_keeps_less_for_backward() -> None:
    media = draw(4, 200)

    def kept(impl: str) -> int:
        resampler = build(impl=impl)
        return saved_for_backward(lambda: resampler(media), exclude=resampler.parameters())

    # A normalised copy in each of two layers, against one for both.
    assert kept("fused") - kept("folded") > media.numel() * media.element_size()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_are_drawn_in_float32_whatever_they_are(dtype: torch.dtype) -> None:
    """Drawn in bfloat16, a truncated normal has outliers 100 standard deviations away, where uniform numbers are 1."""
    torch.manual_seed(0)
    low = PerceiverResampler(16, depth=1, num_latents=4096, dtype=dtype)
    torch.manual_seed(0)
    full = PerceiverResampler(16, depth=1, num_latents=4096)
    assert low.latents.dtype == dtype
    assert_close(low.latents.float(), full.latents, 0.02 * 5 * torch.finfo(dtype).eps)


def test_squared_relu_is_the_papers_activation() -> None:
    x = torch.randn(5, 16)
    assert_close(SquaredReLU()(x), relu(x) ** 2, 0.0)
    assert isinstance(PerceiverResampler(16, depth=1, activation="squared_relu").layers[0].ff[2], SquaredReLU)
    assert isinstance(PerceiverResampler(16, depth=1).layers[0].ff[2], nn.GELU)


def test_the_layout_says_what_the_media_are() -> None:
    """[B, N, D] is one image, [B, M, N, D] are images, [B, M, F, N, D] are clips; an image is a clip of one frame."""
    resampler, images = build(), draw(2, 3, 5)
    latents = resampler(images)
    assert latents.shape == (2, 3, 3, 16)
    assert_close(resampler(images[:, :, None]), latents, 1e-12)
    for m in range(3):
        assert_close(resampler(images[:, m]), latents[:, m], 1e-12)


def test_frames_of_a_clip_go_into_one_set_of_latents() -> None:
    """Upstream gives each frame latents of its own; the paper flattens a clip's frames."""
    resampler, clips = build(), draw(2, 1, 4, 5)
    latents = resampler(clips)
    assert latents.shape == (2, 1, 3, 16)
    frames_moved = clips.clone()
    frames_moved[:, :, 3] += draw(5)
    assert (resampler(frames_moved) != latents).all(-1).all()
    reversed_in_time = resampler(clips.flip(2))
    assert (reversed_in_time - latents).abs().max() > 1e-3
    with torch.no_grad():
        resampler.time_embeddings.zero_()
    assert_close(resampler(clips.flip(2)), resampler(clips), 1e-12)
    assert_close(resampler(clips)[:, 0], resampler(clips.flatten(1, 3)), 1e-12)


def test_an_image_encodes_the_same_wherever_it_stands() -> None:
    """Upstream embeds the index of the medium, so that the same image differs by slot; time_axis="media" does that."""
    image = draw(1, 1, 5)
    same = image.expand(1, 4, 5, 16)
    latents = build()(same)
    assert_close(latents, latents[:, :1].expand_as(latents), 1e-12)

    torch.manual_seed(0)
    theirs = UpstreamResampler(dim=16, depth=2).double()(same)
    assert (theirs[:, 1] - theirs[:, 0]).abs().max() > 0.1
    ours = build_over_media()(same)
    assert (ours[:, 1] - ours[:, 0]).abs().max() > 0.1


def build_over_media() -> nn.Module:
    resampler = PerceiverResampler(16, depth=1, num_latents=3, num_time_embeddings=4, time_axis="media").double()
    for parameter in (resampler.latents, resampler.time_embeddings):
        nn.init.normal_(parameter)
    return resampler


@pytest.mark.parametrize("num_media", [4, 5, 32])
def test_any_number_of_media(num_media: int) -> None:
    """Upstream fails on a fifth medium."""
    media = draw(1, num_media, 5)
    for resampler in (build(), build_over_media()):
        latents = resampler(media)
        assert latents.shape[:2] == (1, num_media)
        assert torch.isfinite(latents).all()
    if num_media > 4:
        with pytest.raises(RuntimeError, match="must match the size"):
            UpstreamResampler(dim=16, depth=1)(media.float())


def test_time_is_interpolated_beyond_the_trained_length() -> None:
    """4 embeddings run on 7 frames: every second frame stands where one of the 4 was trained."""
    resampler, clip = build(), draw(1, 1, 7, 2)
    embeddings = resampler.time_embeddings.detach()
    between = (embeddings[1:] + embeddings[:-1]) / 2
    stretched = torch.stack((embeddings[:3], between), 1).flatten(0, 1)
    stretched = torch.cat((stretched, embeddings[3:]))
    expected = resampler(clip)
    longer = deepcopy(resampler)
    longer.time_embeddings = nn.Parameter(stretched)
    assert_close(longer(clip), expected, 1e-12)


@every_impl
def test_padded_frames_change_nothing_beyond_the_trained_length_too(impl: str) -> None:
    resampler = build(impl=impl)
    for frames in (1, 3, 4, 6):
        clip = draw(1, 1, frames, 2)
        padded = torch.cat((clip, torch.full((1, 1, 9 - frames, 2, 16), torch.nan, dtype=torch.float64)), 2)
        mask = (torch.arange(9) < frames)[None, None, :, None].expand(1, 1, 9, 2)
        assert_close(resampler(padded, mask), resampler(clip), 1e-12)


@pytest.mark.compiled
@pytest.mark.parametrize("time_axis", ["frames", "media"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_one_exported_program_takes_any_number_of_frames_and_of_media(time_axis: str, masked: bool) -> None:
    resampler = PerceiverResampler(16, depth=1, num_latents=3, num_time_embeddings=4, time_axis=time_axis).double()
    names = ("batch", "media", "frames", "tokens")
    dynamic = {axis: torch.export.Dim(name, min=1, max=64) for axis, name in enumerate(names)}

    def arguments(*shape: int) -> dict[str, Tensor]:
        return {"media": draw(*shape), **({"mask": torch.rand(shape) > 0.3} if masked else {})}

    example = arguments(2, 3, 5, 7)
    shapes = dict.fromkeys(example, dynamic)
    with torch.no_grad():
        program = torch.export.export(resampler, (), kwargs=example, dynamic_shapes=shapes, strict=False).module()
        for shape in [(1, 9, 2, 3), (3, 2, 11, 2), (4, 1, 1, 1)]:
            others = arguments(*shape)
            assert_close(program(**others), resampler(**others), 1e-12)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 3, 2, 7), (2, 3, 0, 7), (2, 3, 2, 0), (0, 0, 7)])
@every_impl
def test_nothing_to_resample_is_no_error(impl: str, shape: tuple[int, ...]) -> None:
    resampler, media = build(impl=impl), draw(*shape).requires_grad_()
    latents = resampler(media, torch.ones(shape, dtype=torch.bool))
    assert latents.shape == (*shape[: 1 if len(shape) == 2 else 2], 3, 16)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(latents, media, *resampler.parameters()))


def test_a_missing_frame_in_the_middle_keeps_the_time_of_the_others() -> None:
    resampler, clip = build(), draw(1, 1, 3, 2)
    mask = torch.tensor([True, False, True])[None, None, :, None].expand(1, 1, 3, 2)
    with torch.no_grad():
        embedded = (clip + resampler.time_embeddings[:3, None])[:, :, [0, 2]]
        timeless = deepcopy(resampler)
        timeless.time_embeddings.zero_()
    assert_close(resampler(clip, mask), timeless(embedded), 1e-12)


def test_padded_media_do_not_stretch_the_time_of_media() -> None:
    resampler, media = build_over_media(), draw(1, 6, 5)
    padded = torch.cat((media, draw(1, 3, 5)), 1)
    mask = (torch.arange(9) < 6)[None, :, None].expand(1, 9, 5)
    assert_close(resampler(padded, mask)[:, :6], resampler(media), 1e-12)


@every_impl
def test_latents_of_a_medium_that_is_not_there_read_only_each_other(impl: str) -> None:
    resampler, media = build(impl=impl), draw(2, 3, 5)
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = False
    poisoned = media.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    latents = resampler(poisoned, mask)
    assert_close(latents[0, 1], latents[1, 2], 1e-12)
    assert_close(latents[0, 1], resampler(media[:1, 0, :0])[0], 1e-12)
    assert_close(latents[0, 0], resampler(media)[0, 0], 1e-12)
    of_media, *of_parameters = gradients(latents, poisoned, *resampler.parameters())
    assert (of_media[~mask] == 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in (of_media, *of_parameters))


@pytest.fixture
def in_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of all layers are made as on a GPU."""
    monkeypatch.setattr(perceiver_resampler, "_in_one_product", lambda tokens: True)


@pytest.mark.usefixtures("in_one_product")
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "bare"])
def test_one_product_for_all_layers_has_the_numbers_of_each(biased: bool) -> None:
    resampler, reference, clips = build(), build(impl="reference"), draw(2, 3, 4, 5).requires_grad_()
    for layer, other in zip(resampler.layers, reference.layers, strict=True):
        layer.attn.to_kv = nn.Linear(16, 32, bias=biased, dtype=torch.float64)
        layer.attn.norm_media = nn.LayerNorm(16, elementwise_affine=biased, dtype=torch.float64)
        for parameter in layer.attn.norm_media.parameters():
            nn.init.normal_(parameter)
        other.attn = layer.attn
    mask = torch.arange(5).expand(2, 3, 4, 5) < 3
    assert resampler.implementation() == "folded"
    assert_close(resampler(clips, mask), reference(clips, mask), 1e-12)
    inputs, others = ((clips, *module.parameters()) for module in (resampler, reference))
    for ours, theirs in zip(
        gradients(resampler(clips, mask), *inputs), gradients(reference(clips, mask), *others), strict=True
    ):
        assert_close(ours, theirs, 1e-12)


@pytest.mark.usefixtures("in_one_product")
def test_one_product_can_be_transformed_and_cast() -> None:
    resampler, media = build(), draw(2, 7)
    expected = resampler(media)
    assert_close(torch.func.vmap(resampler)(torch.stack((media, 2 * media)))[0], expected, 1e-12)
    assert_close(torch.func.vmap(lambda x: x * resampler(media))(torch.ones(2, 1))[1], expected, 1e-12)
    values = {name: parameter.detach() for name, parameter in resampler.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(resampler, values, (media,)).square().sum()

    loss(dict(resampler.named_parameters())).backward()
    for name, gradient in torch.func.grad(loss)(values).items():
        assert_close(gradient, resampler.get_parameter(name).grad, 1e-9)

    single = deepcopy(resampler).float()
    single.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        single(media.float()).float().square().sum().backward()
    for name, parameter in single.named_parameters():
        true = resampler.get_parameter(name).grad
        assert (parameter.grad - true).norm() <= 0.05 * true.norm() + 0.05, name


@pytest.mark.compiled
@pytest.mark.usefixtures("in_one_product")
def test_one_product_is_one_graph_for_any_number_of_images_and_tokens() -> None:
    resampler = build()
    torch._dynamo.reset()
    compiled = torch.compile(resampler, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in [(2, 7), (3, 9), (5, 4)]:
            media = draw(*shape).requires_grad_()
            ours, theirs = (gradients(run(media), media, *resampler.parameters()) for run in (compiled, resampler))
            for gradient, expected in zip(ours, theirs, strict=True):
                assert_close(gradient, expected, 1e-10)


def test_an_offloaded_resampler_has_a_routing() -> None:
    """Its latents and time embeddings are on the device inside its forward only."""
    resampler, clips = build(), draw(2, 3, 4, 5)
    expected = resampler.routing(clips).weights
    cpu_offload(resampler, execution_device=torch.device("cpu"))
    assert resampler.latents.is_meta
    assert_close(resampler.routing(clips).weights, expected, 1e-12)


def test_layers_that_differ_in_shape_or_bias_are_called() -> None:
    for change in (lambda attn: nn.Linear(16, 32, dtype=torch.float64), lambda attn: attn.to_kv.float()):
        resampler = build()
        resampler.layers[1].attn.to_kv = change(resampler.layers[1].attn)
        assert resampler.implementation() == "fused"
    resampler = build(impl="folded")
    resampler.layers[0].attn.norm_media = nn.LayerNorm(16, bias=False, dtype=torch.float64)
    with pytest.raises(ImplementationUnavailable, match="norm_media or to_kv differ between layers in shape, dtype or"):
        resampler(draw(2, 7))


@every_impl
def test_norms_and_maps_may_have_no_parameters_but_a_weight(impl: str) -> None:
    resampler, reference = build(impl=impl), build(impl="reference")
    for changed in (resampler, reference):
        for layer in changed.layers:
            layer.attn.norm_media = nn.LayerNorm(16, elementwise_affine=False, dtype=torch.float64)
    media = draw(2, 7).requires_grad_()
    for ours, theirs in zip(
        gradients(resampler(media), media, *resampler.parameters()),
        gradients(reference(media), media, *reference.parameters()),
        strict=True,
    ):
        assert_close(ours, theirs, 1e-10)


def test_routing_is_what_the_last_layer_reads() -> None:
    resampler, image = build(), draw(2, 7)
    mask = torch.arange(7).expand(2, 7) < torch.tensor([[7], [4]])
    routing = resampler.routing(image, mask)
    assert (routing.carriers, routing.weights.shape) == ("latents", (2, 2, 3, 7))
    assert (routing.weights[1, ..., 4:] == 0).all()
    # One layer only, so that its attention can be taken apart by hand.
    single = PerceiverResampler(16, depth=1, num_latents=3, heads=1, head_dim=16).double()
    tokens = single.layers[0].attn.norm_media(image + single.time_embeddings[0])
    x = single.layers[0].attn.norm_latents(single.latents).expand(2, -1, -1)
    query = x @ single.layers[0].attn.to_q.weight.T
    key = torch.cat((tokens, x), 1) @ single.layers[0].attn.to_kv.weight[:16].T
    expected = (query @ key.transpose(1, 2) / 4).softmax(-1)[..., :7]
    assert_close(single.routing(image).weights[:, 0], expected, 1e-12)


def test_routing_of_several_media_is_one_sample_for_each() -> None:
    resampler, clips = build(), draw(2, 3, 4, 5)
    routing = resampler.routing(clips)
    assert routing.weights.shape == (6, 2, 3, 20)
    assert_close(routing.weights[4:5], resampler.routing(clips[1:, 1:2]).weights, 1e-12)
    assert routing.with_grid((4, 5)).maps().shape == (6, 3, 4, 5)


def test_what_is_wrong_is_said() -> None:
    resampler = PerceiverResampler(16, depth=1)
    with pytest.raises(InvalidArgument, match=r"media: expected one of \['\[B, N, D\]'.* got \(1, 1, 1, 1, 2, 16\)"):
        resampler(torch.randn(1, 1, 1, 1, 2, 16))
    with pytest.raises(
        InvalidArgument, match=r"media: expected shape \[B, M, N, D\] with D = 16, got .*\(1, 2, 3, 8\)"
    ):
        resampler(torch.randn(1, 2, 3, 8))
    with pytest.raises(InvalidArgument, match="time_axis: expected one of"):
        PerceiverResampler(16, depth=1, time_axis="time")
    with pytest.raises(InvalidArgument, match=r"activation: expected one of .*'squared_relu'.*, got 'swish'"):
        PerceiverResampler(16, depth=1, activation="swish")
    with pytest.raises(InvalidArgument, match="mlp_ratio: expected a positive number of token widths, got 0"):
        PerceiverResampler(16, depth=1, mlp_ratio=0)
    for name in ("depth", "num_latents", "heads", "head_dim", "num_time_embeddings"):
        with pytest.raises(InvalidArgument, match=f"{name}: expected a positive integer, got 0"):
            PerceiverResampler(16, **{"depth": 1, name: 0})


@pytest.mark.compiled  # jaxtyping would speak first
def test_what_is_wrong_with_a_mask_is_said() -> None:
    resampler = PerceiverResampler(16, depth=1)
    with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, M, N\] = \(1, 2, 3\), got shape \(1, 2\)"):
        resampler(torch.randn(1, 2, 3, 16), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(InvalidType, match="mask: expected a boolean tensor"):
        resampler(torch.randn(1, 3, 16), torch.ones(1, 3))
