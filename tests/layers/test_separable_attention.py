import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from narrows.errors import InvalidArgument, InvalidType
from narrows.layers.separable_attention import SeparableAttention, UpstreamSeparableAttention
from narrows.ops.separable_attention import WindowOrder, from_windows, to_windows
from tests.support import assert_close, gradients


def random_layer(**kwargs: object) -> SeparableAttention:
    layer = SeparableAttention(**{"dim": 12, "heads": 3, "window_size": 3, **kwargs}).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def textbook(layer: SeparableAttention, feature_map: Tensor) -> Tensor:
    """One image whose windows need no padding, window by window, as section 3.2 of the paper says it."""
    size, heads = layer.window_size, layer.heads
    rows, columns = feature_map.shape[1] // size, feature_map.shape[2] // size

    def split(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (heads, -1)).transpose(0, 1)

    def attention(query: Tensor, key: Tensor) -> Tensor:
        return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)

    maps, tokens = [], []
    for y in range(rows):
        for x in range(columns):
            window = feature_map[0, y * size : (y + 1) * size, x * size : (x + 1) * size].flatten(0, 1)
            normed = layer.norm(torch.cat((layer.window_token[0, 0].unsqueeze(0), window)))
            query, key, value = (split(part) for part in layer.qkv(normed).chunk(3, -1))
            attended = (attention(query, key) @ value).transpose(0, 1).flatten(1) + normed
            tokens.append(attended[0])
            maps.append(attended[1:])
    query, key = layer.window_query_key(nn.functional.gelu(layer.window_norm(torch.stack(tokens)))).chunk(2, -1)
    shares = attention(split(query), split(key))  # [heads, K, K]
    values = torch.stack([split(one) for one in maps], 1)  # [heads, K, n, d]
    mixed = torch.einsum("hkl,hlnd->hknd", shares, values) + values
    result = torch.empty_like(feature_map)
    for y in range(rows):
        for x in range(columns):
            window = layer.out(mixed[:, y * columns + x].transpose(0, 1).flatten(1))
            result[0, y * size : (y + 1) * size, x * size : (x + 1) * size] = window.unflatten(0, (size, size))
    return result


def test_it_is_the_paper() -> None:
    layer, feature_map = random_layer(), torch.randn(1, 6, 9, 12).double()
    assert_close(layer(feature_map), textbook(layer, feature_map), 1e-12)


def test_window_tokens_start_at_zero_and_shared_ones_have_one_row() -> None:
    assert SeparableAttention(8, heads=2, window_size=2).window_token.tolist() == [[[0.0] * 8]]
    assert SeparableAttention(8, heads=2, window_size=2, window_grid=(3, 4)).window_token.shape == (3, 4, 8)


@pytest.mark.parametrize("window_size", [1, 2, 3, 4, 5, 7])
def test_without_pointwise_attention_a_token_sees_its_window(window_size: int) -> None:
    layer = random_layer(window_size=window_size, pointwise=False)
    feature_map = torch.randn(1, 6, 12, 12).double().requires_grad_()
    (gradient,) = gradients(layer(feature_map)[0, -1, -1], feature_map)
    inside = torch.zeros(6, 12, dtype=torch.bool)
    inside[5 // window_size * window_size :, 11 // window_size * window_size :] = True
    assert torch.equal(gradient.abs().sum(-1)[0] > 0, inside)


def test_with_it_a_token_sees_everything() -> None:
    layer = random_layer()
    feature_map = torch.randn(1, 7, 8, 12).double().requires_grad_()
    (gradient,) = gradients(layer(feature_map)[0, 0, 0], feature_map)
    assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("options", [{}, {"pointwise": False}], ids=str)
@pytest.mark.parametrize("size", [(6, 9), (5, 7), (2, 10), (1, 1)], ids=str)
def test_a_map_gets_the_same_however_far_it_is_padded(size: tuple[int, int], options: dict[str, object]) -> None:
    layer, feature_map = random_layer(**options), torch.randn(1, *size, 12).double()
    expected = layer(feature_map)
    for rows, columns in [(6, 12), (7, 11), (30, 10)]:
        padded = torch.full((1, rows, columns, 12), 1e3).double()
        mask = torch.zeros(1, rows, columns, dtype=torch.bool)
        padded[:, : size[0], : size[1]], mask[:, : size[0], : size[1]] = feature_map, True
        output = layer(padded, mask)
        assert_close(output[:, : size[0], : size[1]], expected, 1e-12)
        assert (output[~mask] == 0).all()


def test_tokens_in_an_order_get_what_the_map_gets() -> None:
    for layer, (height, width) in [(random_layer(window_size=2), (8, 12)), (random_layer(window_size=4), (8, 10))]:
        order, feature_map = WindowOrder(height, width, (2, 4)), torch.randn(2, height, width, 12).double()
        in_order = order.restore(layer(order.arrange(feature_map), None, order))
        assert_close(in_order, layer(feature_map), 1e-12)


def test_window_tokens_of_their_own_stand_at_their_windows() -> None:
    """On their grid a token for each window, in any order of the windows; on another grid they are interpolated."""
    layer = random_layer(window_size=2, window_grid=(4, 6))
    feature_map = torch.randn(1, 8, 12, 12).double()
    output = layer(feature_map)
    nested = WindowOrder(8, 12, (2, 4))
    assert_close(nested.restore(layer(nested.arrange(feature_map), None, nested)), output, 1e-12)
    with torch.no_grad():
        layer.window_token[0, 5].normal_()
    changed = (layer(feature_map) - output).abs().sum(-1)[0]
    assert changed[:2, 10:].mean() > 10 * changed[4:, :4].mean(), "its own window reads it most"
    assert (changed > 0).all(), "the others read it through the attention between windows"
    assert layer(torch.randn(1, 6, 20, 12).double()).isfinite().all()

    shared, same = random_layer(), random_layer(window_grid=(2, 3))
    same.load_state_dict({**shared.state_dict(), "window_token": shared.window_token.expand(2, 3, 12)})
    for size in [(6, 9), (12, 3), (7, 7)]:
        x = torch.randn(1, *size, 12).double()
        assert_close(same(x), shared(x), 1e-12)


def test_without_pointwise_attention_there_are_no_parameters_for_it() -> None:
    assert {name.split(".")[0] for name, _ in random_layer(pointwise=False).named_parameters()} == {
        "norm", "qkv", "out",
    }  # fmt: skip


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("size", [(6, 9), (5, 7)], ids=str)
def test_routing_shows_what_each_window_reads(size: tuple[int, int], pointwise: bool) -> None:
    layer, feature_map = random_layer(pointwise=pointwise), torch.randn(2, *size, 12).double()
    routing = layer.routing(feature_map)
    assert routing.carriers == "windows"
    assert routing.grid == size
    assert routing.weights.shape == (2, 3, 6, size[0] * size[1])
    totals = routing.weights.sum(-1)
    assert (totals < 1).all() if pointwise else torch.allclose(totals, torch.ones_like(totals))

    weights, normed = routing.weights.unflatten(-1, size), layer.norm(feature_map)
    query, key = layer.qkv.weight.view(3, 3, 4, 12)[:2]
    query_bias, key_bias = layer.qkv.bias.view(3, 3, 4)[:2]
    for window in range(6):
        top, left = window // 3 * 3, window % 3 * 3
        inside = normed[:, top : top + 3, left : left + 3].flatten(1, 2)
        token = layer.norm(layer.window_token).expand(2, 1, 12) if pointwise else inside[:, :0]
        rows = torch.cat((token, inside), 1)
        queries = torch.einsum("hed,bnd->bhne", query, rows) + query_bias[:, None]
        keys = torch.einsum("hed,bnd->bhne", key, rows) + key_bias[:, None]
        attention = (queries @ keys.mT / 2).softmax(-1)
        reads = attention[:, :, 0, 1:] if pointwise else attention.mean(2)
        expected = torch.zeros_like(weights[:, :, window])
        area = expected[:, :, top : top + 3, left : left + 3]
        area.copy_(reads.view(area.shape))
        assert_close(weights[:, :, window], expected, 1e-12)


def test_routing_leaves_padding_out() -> None:
    layer, feature_map = random_layer(), torch.randn(1, 6, 9, 12).double()
    mask = torch.zeros(1, 6, 9, dtype=torch.bool)
    mask[:, :4, :5] = True
    weights = layer.routing(feature_map, mask).weights.unflatten(-1, (6, 9))
    alone = layer.routing(feature_map[:, :4, :5]).weights.unflatten(-1, (4, 5))
    assert_close(weights[:, :, [0, 1, 3, 4], :4, :5], alone, 1e-12)
    assert (weights[:, :, :, ~mask[0]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half_precision_and_large_inputs_finite(dtype: torch.dtype) -> None:
    layer = random_layer().to(dtype)
    output = layer(1e4 * torch.randn(1, 7, 6, 12).to(dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()


def test_device_and_dtype_reach_every_parameter() -> None:
    layer = SeparableAttention(8, heads=2, window_size=2, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads: expected a positive integer, got 0"),
        ({"heads": 5}, "heads: expected a divisor of dim = 12, got 5"),
        ({"window_size": -1}, "window_size: expected a positive integer, got -1"),
        ({"dim": 0}, "dim: expected a positive integer, got 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_messages_of_the_constructor(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        random_layer(**arguments)


def test_messages_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    layer, x = random_layer(), torch.zeros(1, 6, 9, 12).double()
    with pytest.raises(InvalidArgument, match=r"feature_map: expected shape \[B, H, W, D\] with D = 12, got shape"):
        layer(x[..., :11])
    with pytest.raises(InvalidArgument, match=r"feature_map: expected shape \[B, H, W, D\] with D = 12, got shape"):
        layer.routing(x[0])
    with pytest.raises(InvalidArgument, match=r"feature_map: expected shape \[B, N, D\] with D = 12, got shape"):
        layer(x, None, WindowOrder(6, 9, (3,)))
    with pytest.raises(InvalidArgument, match=r"mask: expected shape \[B, H, W\] = \(1, 6, 9\), got shape \(1, 54\)"):
        layer(x, torch.ones(1, 54, dtype=torch.bool))
    with pytest.raises(InvalidType, match=r"feature_map: expected a floating-point tensor"):
        layer(x.long())


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (2, 2)], ids=str)
def test_the_flop_counter_of_torch_counts_with_and_without_gradients(grid: tuple[int, int]) -> None:
    """Its module tracker refuses a view of a parameter made without gradients as the input of a module."""
    layers = random_layer(window_grid=grid), random_layer(pointwise=False), random_upstream_layer()
    for layer in layers:
        counts = []
        for enabled in (True, False):
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(enabled):
                layer(torch.randn(1, 6, 9, 12).double())
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


# The form that `vit-pytorch` published


def random_upstream_layer(**kwargs: object) -> UpstreamSeparableAttention:
    layer = UpstreamSeparableAttention(**{"dim": 12, "heads": 3, "head_dim": 4, "window_size": 3, **kwargs}).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


def test_a_whole_map_and_its_windows_give_the_same() -> None:
    layer, feature_map = random_upstream_layer(), torch.randn(2, 6, 9, 12).double()
    windows = layer(to_windows(feature_map, 3))
    assert_close(layer(feature_map), from_windows(windows, 3), 1e-12)


@pytest.mark.parametrize("window_size", [1, 2, 3, 6])
def test_upstream_form_honours_the_window_size(window_size: int) -> None:
    """Upstream builds windows of 7 whatever it is asked for (S1)."""
    layer = random_upstream_layer(window_size=window_size, pointwise=False)
    feature_map = torch.randn(1, 6, 12, 12).double().requires_grad_()
    (gradient,) = gradients(layer(feature_map)[0, 0, 0], feature_map)
    reached = gradient.abs().sum(-1)[0] > 0
    inside = torch.zeros(6, 12, dtype=torch.bool)
    inside[:window_size, :window_size] = True
    assert torch.equal(reached, inside)


def test_upstream_form_with_pointwise_attention_sees_everything() -> None:
    layer = random_upstream_layer()
    feature_map = torch.randn(1, 6, 9, 12).double().requires_grad_()
    (gradient,) = gradients(layer(feature_map)[0, 0, 0], feature_map)
    assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 5), (2, 32), (5, 3)])
def test_heads_and_head_dim_need_not_divide_the_width(heads: int, head_dim: int) -> None:
    """Upstream builds heads of width 32 whatever it is asked for (S1)."""
    layer = random_upstream_layer(heads=heads, head_dim=head_dim)
    assert layer.qkv.weight.shape == (3 * heads * head_dim, 12)
    assert layer.window_norm is not None
    assert layer.window_norm.normalized_shape == (head_dim,)
    assert layer(torch.randn(1, 3, 6, 12).double()).isfinite().all()


def test_upstream_form_without_pointwise_attention_has_no_parameters_for_it() -> None:
    """Upstream's last stage has eight tensors that no image of its size trains (S4)."""
    assert {name for name, _ in random_upstream_layer(pointwise=False).named_parameters()} == {
        "window_token", "qkv.weight", "out.weight", "out.bias",
    }  # fmt: skip


def test_dropout_is_for_training_only() -> None:
    layer, feature_map = random_upstream_layer(dropout=0.5), torch.randn(1, 3, 6, 12).double()
    plain = random_upstream_layer(dropout=0.0)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(feature_map), plain(feature_map))
    dropped = layer.train()(feature_map)
    assert ((dropped == 0).double().mean() - 0.5).abs() < 0.2
    assert not torch.equal(dropped, layer(feature_map))


@pytest.mark.parametrize("cut", [False, True])
def test_upstream_form_routing_shows_what_each_window_token_reads(cut: bool) -> None:
    layer, feature_map = random_upstream_layer(), torch.randn(2, 6, 9, 12).double()
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
def test_upstream_form_keeps_half_precision(dtype: torch.dtype) -> None:
    layer = random_upstream_layer().to(dtype)
    assert layer(torch.randn(1, 6, 6, 12, dtype=dtype)).dtype == dtype


def test_device_and_dtype_reach_every_parameter_of_the_upstream_form() -> None:
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
def test_messages_of_the_upstream_constructor(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        random_upstream_layer(**arguments)


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
def test_messages_of_the_upstream_call(shape: tuple[int, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidArgument, match=message):
        random_upstream_layer()(torch.zeros(shape).double())
    with pytest.raises(InvalidArgument, match=message):
        random_upstream_layer().routing(torch.zeros(shape).double())


def test_integers_are_no_feature_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidType, match=r"feature_map: expected a floating-point tensor .*, got dtype torch.int64"):
        random_upstream_layer()(torch.zeros(1, 3, 3, 12, dtype=torch.long))
