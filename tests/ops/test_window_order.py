from collections.abc import Sequence

import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.ops.separable_attention import WindowOrder, from_windows, to_windows
from tests.support import assert_close

MAPS = [
    (28, 56, (7, 14)),
    (14, 7, (7,)),
    (8, 16, (1, 2, 8)),
    (12, 24, (2, 4, 12)),
    (6, 9, (3,)),
    (10, 9, (3,)),
    (15, 28, (7, 14)),
    (5, 3, (7,)),
]
every_map = pytest.mark.parametrize(("height", "width", "sizes"), MAPS)


def numbered(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.arange(batch * height * width * 3.0).view(batch, height, width, 3)


@every_map
def test_what_is_arranged_is_restored(height: int, width: int, sizes: Sequence[int]) -> None:
    order, feature_map = WindowOrder(height, width, tuple(sizes)), numbered(height, width)
    tokens = order.arrange(feature_map)
    assert torch.equal(order.restore(tokens), feature_map)
    for size in sizes:
        assert torch.equal(order.tokens(order.windows(tokens, size), size), tokens)


@every_map
def test_a_map_is_added_to_tokens_where_they_stand(height: int, width: int, sizes: Sequence[int]) -> None:
    order, feature_map = WindowOrder(height, width, tuple(sizes)), numbered(height, width)
    tokens = torch.randn(2, height * width, 3)
    added = order.add(tokens, feature_map)
    assert torch.equal(added, tokens + order.arrange(feature_map))
    assert added.is_contiguous()


@every_map
def test_windows_are_the_squares_of_the_map(height: int, width: int, sizes: Sequence[int]) -> None:
    """Whatever their order, with tokens inside in an order that is the same in all, and zeros for padding."""
    order, feature_map = WindowOrder(height, width, tuple(sizes)), numbered(height, width)
    for size in sizes:
        rows, columns = order.grid(size)
        padded = torch.zeros(2, rows * size, columns * size, 3)
        padded[:, :height, :width] = feature_map
        expected = to_windows(padded, size).flatten(1, 2)
        windows = order.windows(order.arrange(feature_map), size)
        assert torch.equal(windows.sum((2, 3)).sort(-1).values, expected.sum((2, 3)).sort(-1).values)
        inside = [window.flatten().tolist() for window in windows[0]]
        assert sorted(sorted(one) for one in inside) == sorted(sorted(one.flatten().tolist()) for one in expected[0])


@pytest.mark.parametrize(("height", "width", "sizes"), [entry for entry in MAPS if WindowOrder(*entry).nested])
def test_nested_windows_are_views(height: int, width: int, sizes: Sequence[int]) -> None:
    order = WindowOrder(height, width, tuple(sizes))
    tokens = order.arrange(numbered(height, width))
    for size in sizes:
        windows = order.windows(tokens, size)
        assert windows.data_ptr() == tokens.data_ptr()
        assert windows.is_contiguous()
        assert order.tokens(windows, size).data_ptr() == tokens.data_ptr()


@every_map
def test_masks_say_which_tokens_of_the_windows_are_real(height: int, width: int, sizes: Sequence[int]) -> None:
    order = WindowOrder(height, width, tuple(sizes))
    tokens = order.arrange(numbered(height, width) + 1)
    assert (order.window_mask(tokens, None, sizes[0]) is None) == order.nested
    real = torch.rand(2, height, width) < 0.5
    mask = order.arrange(real.unsqueeze(-1)).squeeze(-1)
    for given in (None, mask) if not order.nested else (mask,):
        for size in sizes:
            window_mask = order.window_mask(tokens, given, size)
            hidden = tokens if given is None else tokens * given.unsqueeze(-1)
            assert torch.equal(window_mask, (order.windows(hidden, size) != 0).all(-1))


@every_map
def test_what_belongs_to_windows_goes_where_they_go(height: int, width: int, sizes: Sequence[int]) -> None:
    order = WindowOrder(height, width, tuple(sizes))
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)[None]
    for size in sizes:
        rows, columns = order.grid(size)
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
        arranged = order.arrange_windows(grid, size)
        first = order.windows(order.arrange(places), size)[0, :, 0]  # the upper left token is never padding
        assert torch.equal(first // size, arranged)


def test_padding_does_not_change_what_is_computed_from_the_rest() -> None:
    """Smaller maps than the largest window still have windows of every size."""
    order = WindowOrder(5, 9, (2, 4))
    feature_map = torch.randn(1, 5, 9, 3)
    for size in (2, 4):
        windows = order.windows(order.arrange(feature_map), size)
        assert_close(windows.sum((1, 2)), feature_map.sum((1, 2)), 1e-5)


@pytest.mark.parametrize("window_size", [1, 2, 3, 6])
def test_windows_are_the_squares_of_the_map_and_come_together_again(window_size: int) -> None:
    feature_map = torch.randn(2, 6, 12, 3)
    windows = to_windows(feature_map, window_size)
    for y in range(6):
        for x in range(12):
            inside = y % window_size * window_size + x % window_size
            assert torch.equal(windows[:, y // window_size, x // window_size, inside], feature_map[:, y, x])
    assert torch.equal(from_windows(windows, window_size), feature_map)


@pytest.mark.parametrize(
    ("size", "nearest"), [((56, 50), "56 x 49"), ((3, 56), "7 x 56"), ((60, 61), "63 x 63"), ((10, 11), "7 x 14")]
)
def test_a_map_that_windows_do_not_divide_is_told_the_nearest_size(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        to_windows(torch.zeros(1, *size, 2), 7)
    message = str(error.value)
    assert message.startswith("feature_map: expected height and width that are multiples of window_size = 7, got ")
    assert f"got {size[0]} x {size[1]}" in message
    assert f"nearest usable size is {nearest}" in message
