from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import jaxtyping
import pytest
import soft_moe_pytorch as upstream
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from narrows.errors import InvalidArgument, InvalidType
from narrows.layers.soft_moe import DynamicSlotsSoftMoE, ExpertList, SoftMoE, StackedExperts, make_experts
from narrows.models import create_model, load_model
from tests.launches import launches
from tests.support import assert_close, gradients

DIM = 16
Layer = SoftMoE | DynamicSlotsSoftMoE

every_form = pytest.mark.parametrize(
    "make",
    [
        lambda **options: SoftMoE(DIM, num_experts=3, slots_per_expert=2, **options),
        lambda **options: DynamicSlotsSoftMoE(DIM, num_experts=3, **options),
        lambda **options: DynamicSlotsSoftMoE(DIM, num_experts=3, capacity_factor=0.4, **options),
        lambda **options: DynamicSlotsSoftMoE(DIM, num_experts=3, slots_per_expert=2, **options),
    ],
    ids=["fixed", "dynamic", "dynamic, fewer slots", "dynamic, 2 slots"],
)
every_normalization = pytest.mark.parametrize("normalization", ["unit", "rms", "layer"])
every_impl = pytest.mark.parametrize("impl", ["reference", "shared", "chunked"])


class CountOperations(TorchDispatchMode):
    """How many operations reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def by_hand(layer: SoftMoE, x: Tensor) -> Tensor:
    """Algorithm 1 and 2 of the paper for one image of tokens `[N, D]`, expert by expert and slot by slot."""
    phi = layer.slots.flatten(0, 1)
    x_unit = x / x.norm(dim=-1, keepdim=True)
    logits = x_unit @ (layer.norm_slots.scale * phi / phi.norm(dim=-1, keepdim=True)).T
    slots = logits.softmax(0).T @ x
    experts = layer.experts
    outputs = []
    for index, slot in enumerate(slots):
        e = index // layer.slots.shape[1]
        hidden = F.gelu(slot @ experts.expand.weight[e].T + experts.expand.bias[e])
        outputs.append(hidden @ experts.contract.weight[e].T + experts.contract.bias[e])
    return logits.softmax(1) @ torch.stack(outputs)


def test_soft_moe_is_the_algorithm_of_the_paper() -> None:
    layer = SoftMoE(DIM, num_experts=3, slots_per_expert=2).double()
    nn.init.constant_(layer.norm_slots.scale, 1.7)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    assert_close(layer(x), torch.stack([by_hand(layer, sample) for sample in x]), 1e-6)


@every_form
@every_impl
@every_normalization
def test_a_masked_token_is_as_if_it_were_not_there_even_with_holes_and_nan(
    make: object, impl: str, normalization: str
) -> None:
    layer = make(impl=impl, normalization=normalization).double()  # type: ignore[operator]
    x = torch.randn(2, 14, DIM, dtype=torch.float64)
    mask = torch.rand(2, 14) < 0.6
    x = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    output = layer(x, mask)
    assert (output.masked_select(~mask[..., None]) == 0).all()
    input_gradient, *others = gradients(output, x, *layer.parameters())
    assert (input_gradient.masked_select(~mask[..., None]) == 0).all()
    assert all(torch.isfinite(gradient).all() for gradient in (input_gradient, *others))
    for b in range(2):
        assert_close(output[b, mask[b]], layer(x[b : b + 1, mask[b]])[0], 1e-9)


@every_form
def test_a_sample_without_any_token_gives_zeros_and_no_gradient(make: object) -> None:
    layer = make()  # type: ignore[operator]
    x = torch.randn(2, 9, DIM)
    mask = torch.tensor([True, False])[:, None].expand(2, 9)
    output = layer(x, mask)
    assert (output[1] == 0).all()
    for both, first in zip(
        gradients(output[:1], *layer.parameters()), gradients(layer(x[:1]), *layer.parameters()), strict=True
    ):
        assert_close(both, first, 1e-5)
    empty = layer(x, torch.zeros(2, 9, dtype=torch.bool))
    assert (empty == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(empty, *layer.parameters()))


@every_form
@every_impl
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 6, 31])
def test_any_number_of_tokens_is_taken_and_mixed(make: object, impl: str, num_tokens: int) -> None:
    layer = make(impl=impl)  # type: ignore[operator]
    output = layer(torch.randn(2, num_tokens, DIM))
    assert output.shape == (2, num_tokens, DIM)
    assert (output.abs().amax(-1) > 0).all()


@every_form
def test_an_image_is_its_pixels_in_rows(make: object) -> None:
    layer = make()  # type: ignore[operator]
    image, mask = torch.randn(2, DIM, 3, 5), torch.rand(2, 3, 5) < 0.7
    for own_mask in (None, mask):
        tokens = layer(image.flatten(2).mT, None if own_mask is None else own_mask.flatten(1))
        assert_close(layer(image, own_mask).flatten(2).mT, tokens, 1e-6)


@every_normalization
def test_permuting_tokens_permutes_what_fixed_slots_give(normalization: str) -> None:
    layer, x, order = (
        SoftMoE(DIM, num_experts=3, normalization=normalization).double(),
        torch.randn(2, 9, DIM).double(),
        torch.randperm(9),
    )
    assert_close(layer(x[:, order]), layer(x)[:, order], 1e-12)


def test_permuting_the_parts_of_even_segments_permutes_what_dynamic_slots_give() -> None:
    """Segments are sets: only the order between segments matters (M8), and that order only names the slots."""
    layer, x = DynamicSlotsSoftMoE(DIM, num_experts=3).double(), torch.randn(1, 9, DIM).double()
    inside = torch.tensor([2, 0, 1, 4, 3, 5, 6, 8, 7])
    between = torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5])
    for order in (inside, between):
        assert_close(layer(x[:, order]), layer(x)[:, order], 1e-12)
    across = torch.tensor([3, 1, 2, 0, 4, 5, 6, 7, 8])
    assert (layer(x[:, across]) - layer(x)[:, across]).abs().max() > 1e-6


def test_slots_per_expert_by_capacity_are_never_zero() -> None:
    counts = {
        n: SoftMoE.for_tokens(DIM, num_tokens=n, num_experts=4, capacity_factor=1.5).slots.shape[1] for n in (1, 4, 5)
    }
    assert counts == {1: 1, 4: 2, 5: 2}
    assert SoftMoE.for_tokens(DIM, num_tokens=196, num_experts=8, experts="geglu").slots.shape == (8, 25, DIM)


@pytest.mark.parametrize(("capacity_factor", "slots"), [(None, 12), (1.0, 12), (2.0, 24), (0.5, 8), (100.0, 44)])
def test_dynamic_slots_by_capacity(capacity_factor: float | None, slots: int) -> None:
    layer = DynamicSlotsSoftMoE(DIM, num_experts=4, capacity_factor=capacity_factor)
    assert layer.routing(torch.randn(1, 11, DIM)).num_carriers == slots


def test_any_module_can_be_an_expert() -> None:
    layer = SoftMoE(DIM, num_experts=3, slots_per_expert=2, experts=lambda index: nn.Linear(DIM, DIM))
    x = torch.randn(2, 5, DIM)
    assert len(list(layer.experts)) == 3
    _, token_keys, slot_keys, *_ = layer._keys(x, None)
    logits = token_keys @ slot_keys.mT
    slots = (logits.softmax(1).mT @ x).unflatten(1, (2, 3))
    outputs = torch.stack([layer.experts[e](slots[:, :, e]) for e in range(3)], 2).flatten(1, 2)
    assert_close(layer(x), logits.softmax(-1) @ outputs, 1e-6)


def test_routing_is_what_slots_read() -> None:
    layer, x = SoftMoE(DIM, num_experts=3, slots_per_expert=2), torch.randn(2, DIM, 3, 4)
    routing = layer.routing(x)
    assert routing.carriers == "expert slots"
    assert routing.grid == (3, 4)
    assert routing.weights.shape == (2, 1, 6, 12)
    read: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    layer(x)
    assert_close(routing.weights[:, 0] @ x.flatten(2).mT, read[0].flatten(1, 2), 1e-5)
    assert_close(layer.combine_weights(x) @ layer.experts(read[0]).flatten(1, 2), layer(x).flatten(2).mT, 1e-5)


@every_form
@every_normalization
def test_outputs_are_what_combine_weights_say_of_the_experts(make: object, normalization: str) -> None:
    layer = make(normalization=normalization).double()  # type: ignore[operator]
    x, mask = torch.randn(2, 9, DIM, dtype=torch.float64), torch.rand(2, 9) < 0.7
    ran: list[Tensor] = []
    layer.experts.register_forward_hook(lambda module, args, output: ran.append(output))
    output = layer(x, mask)
    assert_close(layer.combine_weights(x, mask) @ ran[0].flatten(1, 2), output, 1e-9)


@every_form
def test_expert_shares_sum_to_one_at_real_tokens(make: object) -> None:
    layer = make()  # type: ignore[operator]
    image, mask = torch.randn(2, DIM, 3, 4), torch.rand(2, 3, 4) < 0.7
    shares = layer.expert_shares(image, mask)
    assert shares.shape == (2, 12, 3)
    assert_close(shares.sum(-1), mask.flatten(1).float(), 1e-6)
    slots = layer.combine_weights(image, mask).unflatten(-1, (3, -1))
    assert_close(shares[..., 1], slots[:, :, 1].sum(-1), 1e-6)


def test_an_expert_that_every_token_prefers_has_the_greatest_share() -> None:
    layer, x = SoftMoE(DIM, num_experts=3), torch.randn(2, 9, DIM) + 3
    with torch.no_grad():
        layer.norm_slots.scale.fill_(20.0)
        layer.slots[1] = 1.0
    assert (layer.expert_shares(x).argmax(-1) == 1).all()


def test_a_slot_whose_tokens_are_all_masked_takes_no_part() -> None:
    layer, mask = DynamicSlotsSoftMoE(DIM, num_experts=3), torch.arange(9)[None] < 4
    weights = layer.routing(torch.randn(1, 9, DIM), mask).weights[0, 0].unflatten(0, (3, 3))
    assert_close(weights.sum(-1), torch.tensor([1.0, 1.0, 0.0]).expand(3, 3), 1e-5)
    assert (weights[..., 4:] == 0).all()


# Precision.


@every_form
@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("num_tokens", [1024, 20_000])
def test_many_equal_tokens_in_low_precision_get_what_one_gets(
    make: object, impl: str, dtype: torch.dtype, autocast: bool, num_tokens: int
) -> None:
    layer = make(impl=impl)  # type: ignore[operator]
    if isinstance(layer, DynamicSlotsSoftMoE) and layer.slots_per_expert is None:
        layer.segment_length = num_tokens // 4  # else it would have as many slots as tokens
    x = torch.randn(1, 1, DIM)
    exact = layer.double()(x.double())[0, 0]
    layer, x = (layer.float(), x) if autocast else (layer.to(dtype), x.to(dtype))
    with torch.autocast("cpu", dtype=dtype if autocast else None, enabled=autocast), torch.no_grad():
        single, many = layer(x), layer(x.expand(1, num_tokens, DIM))
    assert single.dtype == many.dtype == dtype
    error = (single[0, 0] - exact).abs().max()
    assert (many[0] - exact).abs().max() <= 2 * error + 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("options", [{}, {"slots_per_expert": 2}], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_large_tokens_in_float16_do_not_overflow_where_slots_are_made_of_them(
    options: dict[str, int], autocast: bool
) -> None:
    layer = DynamicSlotsSoftMoE(DIM, num_experts=32, **options)
    x = 2500 + torch.randn(1, 32, DIM)
    exact = layer(x)
    if not autocast:
        layer, x = layer.half(), x.half()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        output = layer(x)
    # Weights and tokens are rounded, then five products: to_slots, two of the experts, dispatch and combine.
    assert (output - exact).norm() <= 7 * torch.finfo(torch.float16).eps * exact.norm()


@every_form
@every_impl
@every_normalization
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_tokens_of_another_dtype_are_computed_in_the_layers_and_come_back_in_their_own(
    make: object, impl: str, normalization: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    of_layer, of_tokens = dtypes
    layer = make(impl=impl, normalization=normalization).to(of_layer)  # type: ignore[operator]
    x, mask = torch.randn(2, 9, DIM, dtype=of_tokens), torch.rand(2, 9) < 0.7
    output = layer(x, mask)
    assert output.dtype == of_tokens
    assert torch.equal(output, layer(x.to(of_layer), mask).to(of_tokens))
    for tokens in (x, x.to(of_layer)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(tokens, mask).dtype == torch.bfloat16


def unit_norms(dim: int) -> tuple[nn.Module, nn.Module]:
    layer = SoftMoE(dim, num_experts=2)
    return layer.norm_tokens, layer.norm_slots


def test_logits_are_the_scale_times_the_cosine_and_smooth_at_zero() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    of_tokens, of_slots = unit_norms(5)
    of_slots.double()
    assert_close((of_tokens(x) * of_slots(x)).sum(-1), torch.ones(3, dtype=torch.float64), 1e-6)
    nn.init.constant_(of_slots.scale, 2.5)
    assert_close((of_tokens(x) * of_slots(x)).sum(-1), torch.full((3,), 2.5, dtype=torch.float64), 1e-6)
    assert_close(of_tokens(x).norm(dim=-1), torch.full((3,), 5**0.5, dtype=torch.float64), 1e-6)
    zeros = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    for norm in (of_tokens, of_slots):
        assert torch.autograd.gradcheck(norm, (x,))
        assert torch.autograd.gradgradcheck(norm, (x,))
        assert torch.autograd.gradcheck(norm, (zeros,), eps=1e-7)
    zeros = torch.zeros(1, 5, dtype=torch.float16, requires_grad=True)
    of_tokens(zeros).sum().backward()
    assert torch.isfinite(zeros.grad).all()
    of_slots.half()(zeros).sum().backward()
    assert torch.isfinite(zeros.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_vectors_are_normalised_in_low_precision(dtype: torch.dtype) -> None:
    x = torch.full((1, 64), 1000.0, dtype=dtype)
    of_tokens, of_slots = unit_norms(64)
    assert_close(of_tokens(x).float(), torch.ones(1, 64), 1e-3)
    assert_close(of_slots.to(dtype)(x).float(), torch.full((1, 64), 1 / 64), 1e-3)
    norm = SoftMoE(64, num_experts=2, normalization="rms").norm_tokens
    vectors = norm.to(dtype)(x).float()
    assert_close(vectors / vectors[0, 0], torch.ones(1, 64), 1e-3)
    assert_close(SoftMoE(64, num_experts=2, normalization="rms").norm_tokens(x.float()), torch.ones(1, 64), 1e-6)


def test_rms_norms_are_those_of_upstream_for_small_vectors_too() -> None:
    norm, x = SoftMoE(5, num_experts=2, normalization="rms").norm_tokens.double(), torch.randn(3, 5).double()
    for size in (1.0, 1e-4):
        assert_close(norm(size * x), upstream.soft_moe.RMSNorm(5).double()(size * x), 1e-3)


# Experts.


def one_by_one(experts: StackedExperts, slots: Tensor) -> Tensor:
    outputs = []
    for e in range(slots.shape[1]):
        hidden = F.linear(slots[:, e], experts.expand.weight[e], experts.expand.bias[e])
        if experts.gated:
            half = hidden.shape[-1] // 2
            hidden = hidden[..., :half] * F.gelu(hidden[..., half:])
        else:
            hidden = F.gelu(hidden)
        outputs.append(F.linear(hidden, experts.contract.weight[e], experts.contract.bias[e]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("kind", ["gelu", "geglu"])
def test_stacked_experts_are_the_experts_one_by_one(kind: str) -> None:
    experts = StackedExperts(6, 3, kind=kind, mult=2.5).double()
    slots = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    ours, theirs = experts(slots), one_by_one(experts, slots)
    assert_close(ours, theirs, 1e-12)
    tensors = (slots, *experts.parameters())
    for a, b in zip(gradients(ours, *tensors), gradients(theirs, *tensors), strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("kind", ["gelu", "geglu"])
def test_the_number_of_operations_does_not_grow_with_the_number_of_experts(kind: str) -> None:
    counts = []
    for num_experts in (4, 64):
        experts, slots = (
            StackedExperts(8, num_experts, kind=kind),
            torch.randn(2, num_experts, 1, 8, requires_grad=True),
        )
        with CountOperations() as operations:
            experts(slots).sum().backward()
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_dropout_is_for_training_only() -> None:
    experts, slots = StackedExperts(8, 2, dropout=0.5), torch.randn(2, 2, 3, 8)
    assert not torch.equal(experts(slots), experts(slots))
    experts.eval()
    assert_close(experts(slots), one_by_one(experts, slots), 1e-6)


def test_any_module_is_an_expert_and_knows_its_number() -> None:
    experts = make_experts(lambda index: nn.Linear(4, 4, bias=index == 0), 4, 2, mult=4.0, dropout=0.0)
    assert isinstance(experts, ExpertList)
    assert experts[0].bias is not None
    assert experts[1].bias is None
    slots = torch.randn(3, 2, 5, 4)
    assert_close(experts(slots), torch.stack([experts[0](slots[:, 0]), experts[1](slots[:, 1])], 1), 1e-6)


def test_a_gated_expert_has_as_many_parameters_as_a_plain_one() -> None:
    counts = [sum(p.numel() for p in StackedExperts(96, 2, kind=kind).parameters()) for kind in ("gelu", "geglu")]
    assert abs(counts[0] - counts[1]) < 0.01 * counts[0]


def test_each_expert_starts_like_a_linear_layer_of_its_own() -> None:
    experts = StackedExperts(64, 8)
    for weight, fan_in in ((experts.expand.weight, 64), (experts.contract.weight, 256)):
        assert weight.abs().max() <= fan_in**-0.5
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)


def test_what_does_not_fit_experts_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"experts: expected one of \('gelu', 'geglu'\), got 'relu'"):
        make_experts("relu", 4, 2, mult=4.0, dropout=0.0)
    with pytest.raises(InvalidArgument, match=r"dropout: expected a share in \[0, 1\), got 1.5"):
        StackedExperts(4, 2, dropout=1.5)
    with pytest.raises(
        InvalidArgument, match=r"expert_mult: expected a multiple of dim that leaves a hidden width, got 0.1"
    ):
        StackedExperts(4, 2, mult=0.1)


def test_a_module_in_place_of_a_function_is_named() -> None:
    with pytest.raises(
        InvalidType, match=r"experts: .*got ModuleList. From a list of modules: experts=modules.__getitem__"
    ):
        make_experts(nn.ModuleList([nn.Identity()]), 4, 1, mult=4.0, dropout=0.0)  # type: ignore[arg-type]


# Weights saved by older releases.


OLDER = {
    "experts.expand.weight": "experts.weight_in",
    "experts.expand.bias": "experts.bias_in",
    "experts.contract.weight": "experts.weight_out",
    "experts.contract.bias": "experts.bias_out",
    "norm_slots.scale": "normalization.scale",
    "norm_tokens.weight": "normalization.token_gain",
    "norm_slots.weight": "normalization.slot_gain",
}


def as_saved_before(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The older keys, and the layout of experts then: weights `[out, E, in]`."""
    older = {}
    for name, value in state.items():
        key = next((key for key in OLDER if name.endswith(key)), None)
        name = name if key is None else name.removesuffix(key) + OLDER[key]
        older[name] = value.transpose(0, 1).contiguous() if "experts.weight" in name else value
    return older


@pytest.mark.parametrize("kind", ["gelu", "geglu"])
@pytest.mark.parametrize("normalization", ["unit", "rms", "layer"])
@pytest.mark.parametrize("num_experts", [3, 4], ids=["", "as many experts as features"])
def test_layers_saved_by_older_releases_open(num_experts: int, normalization: str, kind: str) -> None:
    def make() -> nn.Module:
        mult = 1.5 if kind == "geglu" else 1.0
        layer = SoftMoE(4, num_experts=num_experts, experts=kind, expert_mult=mult, normalization=normalization)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        return layer

    saved, opened = make(), make()
    older = as_saved_before(saved.state_dict())
    keys = set(older)
    assert keys >= {"slots", "experts.weight_in", "experts.bias_in", "experts.weight_out", "experts.bias_out"}
    assert keys & {"normalization.scale", "normalization.token_gain"}
    opened.load_state_dict(older)
    assert set(older) == keys
    for name, value in opened.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name
    deepcopy(opened).load_state_dict(opened.state_dict())


def test_a_folder_of_a_model_saved_by_an_older_release_opens(tmp_path: Path) -> None:
    model = create_model("soft_moe_vit_mini").eval()
    model.save_pretrained(tmp_path)
    save_file(as_saved_before(model.state_dict()), tmp_path / "model.safetensors")
    opened = load_model(tmp_path)
    for name, value in opened.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


# On a GPU.


@pytest.mark.parametrize(
    ("layer", "shape", "forward", "training"),
    [
        (lambda: SoftMoE(768, num_experts=128, slots_per_expert=2, normalization="rms"), (64, 256, 768), 20, 162),
        (lambda: SoftMoE(768, num_experts=128, slots_per_expert=2), (64, 256, 768), 21, 167),
        (lambda: SoftMoE(768, num_experts=128, slots_per_expert=2), (1, 256, 768), 15, 49),
        (lambda: DynamicSlotsSoftMoE(384, num_experts=28, normalization="rms"), (64, 196, 384), 22, 39),
        (lambda: DynamicSlotsSoftMoE(384, num_experts=28), (64, 196, 384), 23, 44),
        (lambda: DynamicSlotsSoftMoE(64, num_experts=4), (1, 4096, 64), 14, 38),
    ],
    ids=["fixed rms", "fixed", "one sample", "dynamic rms", "dynamic", "many tokens"],
)
def test_launches_of_a_step(layer: Callable[[], Layer], shape: tuple[int, ...], forward: int, training: int) -> None:
    def call(module: nn.Module, device: torch.device) -> Tensor:
        return module(torch.empty(shape, device=device, dtype=torch.bfloat16, requires_grad=True))

    with torch.device("meta"):
        module = layer()
    found = [launches(lambda: module, call, backward=backward, nested=False) for backward in (False, True)]
    assert [count.total for count in found] == [forward, training]
    assert not any(count.copies or count.waits for count in found)


# What soft-moe-pytorch gets wrong.


@pytest.mark.parametrize("size", [(4, 4), (16, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("layer", [SoftMoE(DIM, num_experts=4), DynamicSlotsSoftMoE(DIM, num_experts=4)], ids=type)
def test_m1_m2_images_keep_their_channels_and_may_have_any_size(layer: Layer, size: tuple[int, int]) -> None:
    image = torch.randn(2, DIM, *size)
    assert layer(image).shape == image.shape
    assert_close(layer(image), layer(image.flatten(2).mT).mT.unflatten(2, size), 1e-6)


def test_m3_padding_to_whole_segments_does_not_count_as_tokens() -> None:
    layer = DynamicSlotsSoftMoE(DIM, num_experts=4).double()
    x = torch.randn(2, 13, DIM, dtype=torch.float64)
    wide = F.pad(x, (0, 0, 0, 3))
    mask = (torch.arange(16) < 13).expand(2, 16)
    assert_close(layer(wide, mask)[:, :13], layer(x), 1e-12)
    assert_close(layer.routing(x).weights.sum(-1), torch.ones(2, 1, 16, dtype=torch.float64), 1e-12)
    assert (layer(wide)[:, :13] - layer(x)).abs().max() > 1e-6


@every_form
@every_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_m4_low_precision_takes_masks_and_any_number_of_tokens(make: object, impl: str, dtype: torch.dtype) -> None:
    layer, x = make(impl=impl).to(dtype), torch.randn(2, 13, DIM, dtype=dtype)  # type: ignore[operator]
    for mask in (None, torch.rand(2, 13) < 0.6):
        output = layer(x, mask)
        assert output.dtype == dtype
        assert all(torch.isfinite(g).all() for g in gradients(output, *layer.parameters()))


def test_m4_upstream_does_not() -> None:
    theirs = upstream.DynamicSlotsSoftMoE(DIM, num_experts=4).bfloat16()
    with pytest.raises(RuntimeError):
        theirs(torch.randn(2, 13, DIM, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "make",
    [lambda **o: SoftMoE(256, num_experts=8, **o), lambda **o: DynamicSlotsSoftMoE(256, num_experts=8, **o)],
    ids=["fixed", "dynamic"],
)
def test_m5_the_softmax_does_not_start_saturated(make: object) -> None:
    x = torch.randn(2, 196, 256)
    largest = {
        name: make(normalization=name).routing(x).weights.amax(-1).mean().item()  # type: ignore[operator]
        for name in ("unit", "rms")
    }
    assert largest["unit"] < 0.02
    assert largest["rms"] > 0.7


def test_m6_memory_for_backward_is_linear_in_the_number_of_tokens() -> None:
    layer = DynamicSlotsSoftMoE(8, num_experts=4, impl="chunked")

    def saved(num_tokens: int) -> int:
        sizes: dict[int, int] = {}
        x = torch.randn(1, num_tokens, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            layer(x)
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in own)

    assert saved(4096) < 4.2 * saved(1024)


@pytest.mark.parametrize("impl", ["shared", "chunked"])
def test_m7_the_number_of_operations_does_not_grow_with_the_number_of_experts(impl: str) -> None:
    counts = []
    for num_experts in (4, 64):
        layer, x = (
            DynamicSlotsSoftMoE(8, num_experts=num_experts, impl=impl),
            torch.randn(1, 256, 8, requires_grad=True),
        )
        with CountOperations() as operations:
            layer(x).sum().backward()
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_m9_m11_the_number_of_dynamic_slots_can_be_chosen_and_few_tokens_are_not_many_slots() -> None:
    layer = DynamicSlotsSoftMoE(DIM, num_experts=4, slots_per_expert=3)
    assert [layer.routing(torch.randn(1, n, DIM)).num_carriers for n in (1, 3, 50, 1000)] == [12] * 4


def test_m10_masked_tokens_get_zeros_where_upstream_gives_garbage() -> None:
    x, mask = torch.randn(2, 8, DIM), torch.tensor([[True] * 4 + [False] * 4, [False] * 8])
    for layer in (SoftMoE(DIM, num_experts=4), DynamicSlotsSoftMoE(DIM, num_experts=4)):
        assert (layer(x, mask).masked_select(~mask[..., None]) == 0).all()
    theirs = upstream.DynamicSlotsSoftMoE(DIM, num_experts=4)
    assert (theirs(x, mask=mask).masked_select(~mask[..., None]) != 0).any()


def test_m12_fewer_tokens_than_experts_still_have_slots() -> None:
    layer = SoftMoE.for_tokens(DIM, num_tokens=3, num_experts=8)
    assert layer.slots.shape == (8, 1, DIM)
    assert (layer(torch.randn(2, 3, DIM)) != 0).all()
    assert (upstream.SoftMoE(DIM, num_experts=8, seq_len=3)(torch.randn(2, 3, DIM)) == 0).all()


@pytest.mark.compiled
@pytest.mark.parametrize("impl", ["auto", "chunked"])
def test_dynamic_slots_export_for_any_number_of_tokens_above_one_segment(impl: str) -> None:
    layer, x = DynamicSlotsSoftMoE(DIM, num_experts=3, impl=impl).eval(), torch.randn(2, 11, DIM)
    shapes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in ("tokens", "mask")}
    with torch.no_grad():
        program = torch.export.export(
            layer, (x, torch.ones(2, 11, dtype=torch.bool)), dynamic_shapes=shapes, strict=False
        ).module()
        for batch, num_tokens in ((2, 4), (3, 12), (5, 50)):
            x, mask = torch.randn(batch, num_tokens, DIM), torch.rand(batch, num_tokens) < 0.7
            assert_close(program(x, mask), layer(x, mask), 1e-5)


@pytest.mark.compiled
@every_impl
def test_every_implementation_compiles_to_one_graph(impl: str) -> None:
    torch._dynamo.reset()
    layer, x = DynamicSlotsSoftMoE(DIM, num_experts=3, impl=impl), torch.randn(2, 11, DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output, expected = compiled(x), layer(x)
    assert_close(output, expected, 1e-5)
    for a, b in zip(gradients(output, *layer.parameters()), gradients(expected, *layer.parameters()), strict=True):
        assert_close(a, b, 1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


@pytest.mark.compiled
def test_other_numbers_of_samples_and_tokens_and_other_masks_are_not_compiled_anew() -> None:
    torch._dynamo.reset()
    graphs: list[object] = []
    layer = DynamicSlotsSoftMoE(DIM, num_experts=3, impl="shared").eval()
    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for batch, num_tokens in ((2, 11), (3, 12), (5, 70)):
        x, mask = torch.randn(batch, num_tokens, DIM), torch.rand(batch, num_tokens) < 0.7
        assert_close(compiled(x, mask), layer(x, mask), 1e-5)
    assert len(graphs) == 1


# What users are told.


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages to users come from narrows itself, not from the checks the tests run under."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected a positive integer, got 0"),
        ({"slots_per_expert": 0}, "slots_per_expert: expected a positive integer, got 0"),
        ({"normalization": "l2"}, r"normalization: expected one of \('unit', 'rms', 'layer'\), got 'l2'"),
        ({"experts": "relu"}, r"experts: expected one of \('gelu', 'geglu'\), got 'relu'"),
        ({"dropout": -0.1}, r"dropout: expected a share in \[0, 1\), got -0.1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", [SoftMoE, DynamicSlotsSoftMoE])
def test_a_constructor_names_what_does_not_fit(layer: type[Layer], options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        layer(DIM, **{"num_experts": 4, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity_factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_capacity_factor_is_positive(capacity_factor: float) -> None:
    message = rf"capacity_factor: expected a (positive|finite) number.*, got {capacity_factor}"
    with pytest.raises(InvalidArgument, match=message):
        DynamicSlotsSoftMoE(DIM, num_experts=4, capacity_factor=capacity_factor)
    with pytest.raises(InvalidArgument, match=message):
        SoftMoE.for_tokens(DIM, num_tokens=8, num_experts=4, capacity_factor=capacity_factor)


def test_slots_are_given_by_number_or_by_capacity() -> None:
    with pytest.raises(
        InvalidArgument, match=r"capacity_factor: expected None where slots_per_expert is given, got 2.0"
    ):
        DynamicSlotsSoftMoE(DIM, num_experts=4, slots_per_expert=2, capacity_factor=2.0)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_call_names_what_does_not_fit() -> None:
    layer = DynamicSlotsSoftMoE(DIM, num_experts=4)
    with pytest.raises(InvalidArgument, match=r"tokens: expected shape \[B, N, D\] with D = 16, got shape \(2, 5, 8\)"):
        layer(torch.randn(2, 5, 8))
    with pytest.raises(InvalidArgument, match=r"tokens: expected images \[B, 16, H, W\], got shape \(2, 8, 3, 3\)"):
        layer(torch.randn(2, 8, 3, 3))
    with pytest.raises(InvalidArgument, match=r"tokens: expected shape \[B, N, D\] with D = 16, got shape \(5, 16\)"):
        layer(torch.randn(5, DIM))
    with pytest.raises(InvalidType, match=r"tokens: expected a floating-point tensor .* got dtype torch.int64"):
        layer(torch.ones(2, 5, DIM, dtype=torch.long))
    with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, H, W\] = \(2, 3, 3\), got shape \(2, 9\)"):
        layer(torch.randn(2, DIM, 3, 3), torch.ones(2, 9, dtype=torch.bool))
    with pytest.raises(InvalidType, match=r"mask: expected a boolean tensor.*Use mask.bool\(\)"):
        layer(torch.randn(2, 5, DIM), torch.ones(2, 5))
    with pytest.raises(InvalidArgument, match=r"impl: expected one of \('auto', .*'chunked'.*\), got 'fast'"):
        SoftMoE(DIM, num_experts=2, impl="fast")(torch.randn(1, 2, DIM))
