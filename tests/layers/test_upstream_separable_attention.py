import jaxtyping
import pytest
import torch
from torch import nn

from narrows.errors import InvalidArgument, InvalidType
from narrows.layers.upstream_separable_attention import UpstreamSeparableAttention
from narrows.ops.separable_attention import from_windows, to_windows
from tests.support import assert_close, gradients


def random_layer(**kwargs: object) -> UpstreamSeparableAttention:
    layer = UpstreamSeparableAttention(**{"dim": 12, "heads": 3, "head_dim": 4, "window_size": 3, **kwargs}).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def test_a_whole_map_and_its_windows_give_the_same() -> None:
    layer, feature_map = random_layer(), torch.randn(2, 6, 9, 12).double()
    windows = layer(to_windows(feature_map, 3))
    assert_close(layer(feature_map), from_windows(windows, 3), 1e-12)


@pytest.mark.parametrize("window_size", [1, 2, 3, 6])
def test_window_size_is_honoured(window_size: int) -> None:
    """Upstream builds windows of 7 whatever it is asked for (S1)."""
    layer = random_layer(window_size=window_size, pointwise=False)
    feature_map = torch.randn(1, 6, 12, 12).double().requires_grad_()
    (gradient,) = gradients(layer(feature_map)[0, 0, 0], feature_map)
    reached = gradient.abs().sum(-1)[0] > 0
    inside = torch.zeros(6, 12, dtype=torch.bool)
    inside[:window_size, :window_size] = True
    assert torch.equal(reached, inside)


def test_pointwise_attention_lets_a_token_see_its_place_in_every_window() -> None:
    layer = random_layer()
    feature_map = torch.randn(1, 6, 9, 12).double().requires_grad_()
    (gradient,) = gradients(layer(feature_map)[0, 0, 0], feature_map)
    assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 5), (2, 32), (5, 3)])
def test_heads_and_head_dim_need_not_divide_the_width(heads: int, head_dim: int) -> None:
    """Upstream builds heads of width 32 whatever it is asked for (S1)."""
    layer = random_layer(heads=heads, head_dim=head_dim)
    assert layer.qkv.weight.shape == (3 * heads * head_dim, 12)
    assert layer.window_norm is not None
    assert layer.window_norm.normalized_shape == (head_dim,)
    assert layer(torch.randn(1, 3, 6, 12).double()).isfinite().all()


def test_without_pointwise_attention_there_are_no_parameters_for_it() -> None:
    """Upstream's last stage has eight tensors that no image of its size trains (S4)."""
    assert {name for name, _ in random_layer(pointwise=False).named_parameters()} == {
        "window_token", "qkv.weight", "out.weight", "out.bias",
    }  # fmt: skip


def test_dropout_is_for_training_only() -> None:
    layer, feature_map = random_layer(dropout=0.5), torch.randn(1, 3, 6, 12).double()
    plain = random_layer(dropout=0.0)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(feature_map), plain(feature_map))
    dropped = layer.train()(feature_map)
    assert ((dropped == 0).double().mean() - 0.5).abs() < 0.2
    assert not torch.equal(dropped, layer(feature_map))


@pytest.mark.parametrize("cut", [False, True])
def test_routing_shows_what_each_window_token_reads(cut: bool) -> None:
    layer, feature_map = random_layer(), torch.randn(2, 6, 9, 12).double()
    routing = layer.routing(to_windows(feature_map, 3) if cut else feature_map)
    assert routing.carriers == "windows"
    assert routing.grid == (6, 9)
    assert routing.weights.shape == (2, 3, 6, 54)

    query, key = layer.qkv.weight.view(3, 3, 4, 12)[:2]
    for window in range(6):
        top, left = window // 3 * 3, window % 3 * 3
        inside = feature_map[:, top : top + 3, left : left + 3].flatten(1, 2)
        rows = torch.cat((layer.window_token.expand(2, 1, 12), inside), 1)
        scores = torch.einsum("hed,d,hef,bnf->bhn", query, layer.window_token, key, rows) / 2
        expected = torch.zeros(2, 3, 6, 9).double()
        expected[:, :, top : top + 3, left : left + 3] = scores.softmax(-1)[..., 1:].unflatten(-1, (3, 3))
        assert_close(routing.weights[:, :, window].unflatten(-1, (6, 9)), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half_precision(dtype: torch.dtype) -> None:
    layer = random_layer().to(dtype)
    assert layer(torch.randn(1, 6, 6, 12, dtype=dtype)).dtype == dtype


def test_device_and_dtype_reach_every_parameter() -> None:
    layer = UpstreamSeparableAttention(8, heads=2, window_size=2, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads: expected a positive integer, got 0"),
        ({"window_size": -1}, "window_size: expected a positive integer, got -1"),
        ({"head_dim": 0}, "head_dim: expected a positive integer, got 0"),
        ({"dim": 0}, "dim: expected a positive integer, got 0"),
        ({"dropout": 1.0}, r"dropout: expected a share in \[0, 1\), got 1.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_messages_of_the_constructor(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        random_layer(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 6, 9, 11), r"feature_map: expected shape \[B, H, W, D\] with D = 12, got shape \(1, 6, 9, 11\)"),
        ((6, 9, 12), r"feature_map: expected shape \[B, H, W, D\] with D = 12, got shape \(6, 9, 12\)"),
        ((1, 6, 8, 12), r"multiples of window_size = 3, got 6 x 8\. The nearest usable size is 6 x 9"),
        ((1, 2, 2, 9, 11), r"feature_map: expected shape \[B, Y, X, n, D\] with D = 12"),
        ((1, 2, 2, 4, 12), r"feature_map: expected windows of 3 x 3 tokens, got shape \(1, 2, 2, 4, 12\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_messages_of_the_call(shape: tuple[int, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidArgument, match=message):
        random_layer()(torch.zeros(shape).double())
    with pytest.raises(InvalidArgument, match=message):
        random_layer().routing(torch.zeros(shape).double())


def test_integers_are_no_feature_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidType, match=r"feature_map: expected a floating-point tensor .*, got dtype torch.int64"):
        random_layer()(torch.zeros(1, 3, 3, 12, dtype=torch.long))
