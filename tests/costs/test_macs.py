"""What is counted, against counts by hand."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

from narrows.costs import CarriesPadding, count_macs, macs_per_sample
from narrows.costs.macs import _FORMULAS
from tests.support import needs

BATCH, TOKENS, DIM = 2, 5, 8
ROWS = BATCH * TOKENS


def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, DIM)


def attention(heads: int = 2) -> int:
    return BATCH * heads * TOKENS * TOKENS * (DIM // heads) * 2


class Block(nn.Module):
    """A pre-norm transformer block without biases on the way in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


MODULES = {
    "linear": (nn.Linear(DIM, 3), ROWS * DIM * 3),
    "linear-no-bias": (nn.Linear(DIM, 3, bias=False), ROWS * DIM * 3),
    "gru": (nn.GRU(DIM, 6, batch_first=True), ROWS * 3 * 6 * (DIM + 6)),
    "lstm": (nn.LSTM(DIM, 6, batch_first=True), ROWS * 4 * 6 * (DIM + 6)),
    "lstm-two-layers-both-ways": (
        nn.LSTM(DIM, 6, num_layers=2, bidirectional=True, batch_first=True),
        ROWS * 2 * 4 * 6 * (DIM + 6 + 12 + 6),
    ),
    "block": (Block(), ROWS * DIM * DIM * (3 + 1 + 8) + attention()),
    "encoder-layer": (
        nn.TransformerEncoderLayer(DIM, 2, 4 * DIM, batch_first=True),
        ROWS * DIM * DIM * (3 + 1 + 8) + attention(),
    ),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_count_as_by_hand(name: str, grad: bool) -> None:
    module, expected = MODULES[name]
    with torch.set_grad_enabled(grad):
        assert count_macs(lambda: module.eval()(tokens())) == expected


def test_gru_cell_counts_both_products() -> None:
    cell = nn.GRUCell(DIM, 6)
    assert count_macs(lambda: cell(torch.randn(TOKENS, DIM), torch.randn(TOKENS, 6))) == TOKENS * 3 * 6 * (DIM + 6)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 1), (2, 2)])
def test_convolutions(groups: int, stride: int) -> None:
    convolution = nn.Conv2d(4, 8, 3, padding=1, stride=stride, groups=groups)
    expected = BATCH * (6 // stride) ** 2 * 8 * (4 // groups) * 9
    assert count_macs(lambda: convolution(torch.randn(BATCH, 4, 6, 6))) == expected


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_attention_on_cpu(mode: type, masked: bool) -> None:
    query, key = torch.randn(BATCH, 2, 3, 4), torch.randn(BATCH, 2, TOKENS, 4)
    mask = torch.ones(BATCH, 1, 3, TOKENS, dtype=torch.bool) if masked else None
    with mode():
        counted = count_macs(lambda: F.scaled_dot_product_attention(query, key, key, attn_mask=mask))
    assert counted == BATCH * 2 * 3 * TOKENS * 4 * 2


def test_attention_backward_on_cpu_forms_the_scores_again() -> None:
    query, key = torch.randn(BATCH, 2, 3, 4, requires_grad=True), torch.randn(BATCH, 2, TOKENS, 4, requires_grad=True)
    product = BATCH * 2 * 3 * TOKENS * 4
    counted = count_macs(lambda: F.scaled_dot_product_attention(query, key, key).sum().backward())
    assert counted == (2 + 5) * product


def test_cudnn_recurrent_layers_count_every_matrix() -> None:
    weights = [(24, DIM), (24, 6), (24,), (24,), (24, 12), (24, 6), (24,), (24,)]
    flops = _FORMULAS[torch.ops.aten._cudnn_rnn]((BATCH, TOKENS, DIM), weights, 4, None)
    assert flops == 2 * ROWS * 24 * (DIM + 6 + 12 + 6)


def test_products_that_torch_itself_counts_as_nothing() -> None:
    matrix, vector, batch = torch.randn(3, DIM), torch.randn(DIM), tokens()
    zeros = torch.zeros(())
    assert count_macs(lambda: matrix @ vector) == 3 * DIM
    assert count_macs(lambda: vector @ vector) == DIM
    assert count_macs(lambda: torch.vdot(vector, vector)) == DIM
    assert count_macs(lambda: torch.addmv(torch.zeros(3), matrix, vector)) == 3 * DIM
    assert count_macs(lambda: torch.addbmm(zeros, batch, batch.mT)) == ROWS * DIM * TOKENS
    assert count_macs(lambda: torch.baddbmm(zeros, batch, batch.mT)) == ROWS * DIM * TOKENS
    assert count_macs(lambda: torch.einsum("bnd,bmd->bnm", batch, batch)) == ROWS * DIM * TOKENS
    assert count_macs(lambda: torch.zeros(3, 3).addmm_(matrix, matrix.T)) == 3 * DIM * 3
    assert count_macs(lambda: torch.zeros(2, 5, 5).baddbmm_(batch, batch.mT)) == ROWS * DIM * TOKENS
    assert count_macs(lambda: torch.zeros(5, 5).addbmm_(batch, batch.mT)) == ROWS * DIM * TOKENS
    assert count_macs(lambda: torch.zeros(3).addmv_(matrix, vector)) == 3 * DIM
    assert count_macs(lambda: torch._addmm_activation(torch.zeros(3), batch[0], matrix.T)) == TOKENS * DIM * 3


def test_products_in_groups_in_integers_and_with_packed_weights() -> None:
    rows, weights = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(3, 16, 32, dtype=torch.bfloat16)
    ends = torch.tensor([2, 5, 8], dtype=torch.int32)
    batches, columns = torch.randn(3, 8, 16, dtype=torch.bfloat16), weights[0].contiguous()
    assert count_macs(lambda: F.grouped_mm(rows, weights, offs=ends)) == 8 * 16 * 32
    assert count_macs(lambda: F.grouped_mm(batches, weights)) == 3 * 8 * 16 * 32
    assert count_macs(lambda: F.grouped_mm(rows.mT.contiguous(), rows, offs=ends)) == 16 * 8 * 16
    assert _FORMULAS[torch.ops.aten._grouped_mm](batches.shape, columns.shape) == 2 * 8 * 16 * 32
    whole = torch.ones(32, 32, dtype=torch.int8)
    assert count_macs(lambda: torch._int_mm(whole, whole[:, :16])) == 32 * 32 * 16
    packed, scales = torch.ones(32, 16, dtype=torch.int8), torch.ones(32, dtype=torch.bfloat16)
    assert count_macs(lambda: torch.ops.aten._weight_int8pack_mm(rows, packed, scales)) == 8 * 16 * 32


def test_bilinear_maps_and_convolutions_of_steps_count_forward_and_backward() -> None:
    bilinear = nn.Bilinear(4, 5, 6)
    assert count_macs(lambda: bilinear(torch.randn(3, 4), torch.randn(3, 5))) == 3 * 4 * 5 * 6
    steps, weight = torch.randn(10, 2, 4, requires_grad=True), torch.randn(3, 4, 5, requires_grad=True)
    once = 8 * 2 * 3 * 4 * 5
    assert count_macs(lambda: torch.conv_tbc(steps, weight, torch.randn(5), 0)) == once
    assert count_macs(lambda: torch.conv_tbc(steps, weight, torch.randn(5), 0).sum().backward()) == 3 * once


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_conditions_and_exported_programs_count_what_runs() -> None:
    x = torch.randn(4, 4)
    assert count_macs(lambda: torch.cond(x.sum() > 9, lambda x: x @ x, lambda x: x @ x, (x,))) == 64
    program = torch.export.export(nn.Linear(4, 5), (x,)).module()
    assert count_macs(lambda: program(x)) == 80


def test_flex_attention_counts_its_products() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    needs("torch", "2.15")  # where torch's own counter takes it; not that of 2.11
    query = torch.randn(1, 2, 16, 8)
    assert count_macs(lambda: flex_attention(query, query, query)) == 2 * 2 * 16 * 16 * 8


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda: torch.linalg.inv(torch.eye(4)), "aten.linalg_inv_ex"),
        (lambda: torch.fft.rfft(torch.ones(8)), "aten._fft_r2c"),
        (lambda: torch.cdist(torch.randn(40, 8), torch.randn(50, 8)), "aten._euclidean_dist"),
        (
            lambda: while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x @ x), (torch.tensor(0), torch.eye(3))),
            "while_loop",
        ),
    ],
)
def test_operations_of_torch_that_may_hold_products_are_named(function: Any, name: str) -> None:
    with pytest.warns(UserWarning, match=rf"{name} has no formula and counted as 0 MACs"):
        count_macs(function)


@pytest.mark.filterwarnings("error")
def test_operations_without_products_are_not_named() -> None:
    image = torch.randn(1, 3, 8, 8)
    count_macs(lambda: F.interpolate(image, scale_factor=2, mode="bilinear"))
    count_macs(lambda: torch.linalg.vector_norm(image).sum() + torch.linspace(0, 1, 5).roll(1).cumsum(0)[0])
    count_macs(lambda: nn.LSTMCell(3, 4)(torch.randn(2, 3)))


def test_elementwise_work_counts_nothing() -> None:
    assert count_macs(lambda: F.layer_norm(tokens().softmax(-1) * 2, (DIM,))) == 0


def test_backward_counts_twice_the_forward() -> None:
    linear, x = nn.Linear(DIM, 3), tokens().requires_grad_()
    assert count_macs(lambda: linear(x).sum().backward()) == 3 * ROWS * DIM * 3


@pytest.mark.compiled
def test_a_compiled_module_counts_as_its_eager_self() -> None:
    torch._dynamo.reset()
    linear = torch.compile(nn.Linear(DIM, 3), backend="eager")
    linear(tokens())
    assert count_macs(lambda: linear(tokens())) == ROWS * DIM * 3


def test_the_fused_transformer_layers_are_switched_on_again() -> None:
    def fails() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        count_macs(fails)
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_operation_without_formula_is_named() -> None:
    @torch.library.custom_op("narrows_test::product", mutates_args=())
    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    with pytest.warns(UserWarning, match=r"narrows_test.product has no formula and counted as 0 MACs"):
        assert count_macs(lambda: product(torch.randn(2, 3), torch.randn(3, 4))) == 0


def test_torch_operations_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_macs(lambda: Block()(tokens()))


class Halving(nn.Module):
    """Keeps as many tokens of a sample as its first entry says and pads the rest, all in static shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor, *, room: int | None = None) -> Tensor:
        return self.linear(x[:, :room])

    def without_padding(self, x: Tensor):
        for sample in x.split(1):
            yield partial(self, sample, room=int(sample[0, 0, 0]))


def test_macs_per_sample_of_a_static_model_is_what_runs() -> None:
    assert macs_per_sample(nn.Linear(DIM, DIM), tokens(), batch=BATCH) == TOKENS * DIM * DIM


def test_macs_per_sample_leave_padding_out() -> None:
    model, x = Halving(), tokens()
    x[0, 0, 0], x[1, 0, 0] = 1, 4
    assert isinstance(model, CarriesPadding)
    assert macs_per_sample(model, x, batch=BATCH) == (1 + 4) / 2 * DIM * DIM
    assert count_macs(lambda: model(x)) == BATCH * TOKENS * DIM * DIM


def test_a_parameter_expanded_without_gradients_may_enter_a_module() -> None:
    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(3, 4))
            self.linear = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.latents.expand(len(x), -1, -1))

    with torch.no_grad():
        assert count_macs(lambda: Latents()(torch.ones(2, 1))) == 2 * 3 * 4 * 5
