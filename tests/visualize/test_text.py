import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.routing import Routing
from narrows.visualize import reading

WORDS = ("an", "image", "shows", "a", "seven")


def routing(media: int = 2, words: int = 5, samples: int = 2) -> Routing:
    return Routing(torch.rand(samples, 3, media, words), "media")


def test_a_panel_for_each_routing_and_a_row_for_each_medium():
    columns = {"reads": routing(), "moves": routing(media=3)}
    figure = reading(WORDS, torch.rand(2, 1, 8, 8), columns, sample=1, title="Two images")
    images = [axis.images[0] for axis in figure.axes]
    assert [tuple(image.get_array().shape) for image in images] == [(8, 8, 3), (8, 8, 3), (2, 5), (2, 5)]
    expected = columns["reads"].weights[1].mean(0)
    assert torch.equal(torch.as_tensor(images[2].get_array()), expected)
    assert images[2].get_clim() == (0.0, pytest.approx(expected.max().item()))
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == list(WORDS)
    assert [axis.get_title(loc="left") for axis in figure.axes[2:]] == ["reads", "moves"]


@pytest.mark.parametrize(
    ("media", "columns", "options", "message"),
    [
        (0, {"reads": routing()}, {}, "media: expected at least one image, got none"),
        (3, {"reads": routing()}, {}, r"columns\['reads'\]: expected weights \[B, H, M, T\] with M = 3, T = 5"),
        (2, {"reads": routing(words=4)}, {}, "T = 5"),
        (2, {"reads": routing()}, {"sample": 2}, "a sample 2"),
    ],
)
def test_bad_input_is_explained(media, columns, options, message):
    with pytest.raises(InvalidArgument, match=message):
        reading(WORDS, torch.rand(media, 3, 8, 8), columns, **options)
