import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.routing import Routing
from narrows.visualize import reading
from narrows.visualize.canvas import CARRIERS, to_hex

WORDS = ("an", "image", "shows", "a", "seven")


def routing(media: int = 2, words: int = 5, samples: int = 2) -> Routing:
    return Routing(torch.rand(samples, 3, media, words), "media")


def test_a_word_has_the_colour_of_the_medium_it_reads_most():
    columns = {"reads": routing(), "moves": routing(media=3)}
    figure = reading(WORDS, torch.rand(2, 1, 8, 8), columns, sample=1, title="Two images")
    media, texts = figure.axes[:2], figure.axes[2:]
    assert [axis.get_title(loc="left") for axis in texts] == ["reads", "moves"]
    assert all(axis.images for axis in media)
    for axis, given in zip(texts, columns.values(), strict=True):
        assert [text.get_text() for text in axis.texts] == list(WORDS)
        weights = given.weights[1].mean(0)[:2]
        for box, column in zip(axis.patches, weights.T, strict=True):
            assert to_hex(torch.tensor(box.get_facecolor()[:3])) == CARRIERS[int(column.argmax())]
            assert box.get_alpha() == pytest.approx((column.max() / weights.max()).item())


def test_long_texts_are_broken_between_words_and_stay_in_the_picture():
    words = [f"word{number}" for number in range(60)]
    figure = reading(words, torch.rand(9, 3, 8, 8), {"reads": routing(media=9, words=60)})
    figure.draw_without_rendering()
    axis = figure.axes[-1]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len({box.y0 for box in boxes}) > 1
    assert max(box.x1 for box in boxes) <= figure.bbox.x1
    assert min(box.y0 for box in boxes) >= 0


def test_media_stand_in_the_text_where_they_are_known_to():
    words = ["look", "<image>", *(f"word{number}" for number in range(12)), "<image>", "seven"]
    given = routing(words=16)
    figure = reading(words, torch.rand(2, 1, 8, 8), {"reads": given, "moves": given}, locations=[1, 14])
    figure.draw_without_rendering()
    for axis in figure.axes:
        assert [text.get_text() for text in axis.texts] == [word for word in words if word != "<image>"]
        shown = {text.get_text(): text.get_window_extent() for text in axis.texts}
        # The axis counts lines downwards, and so its images' extents.
        (first_top, first_end), (second_top, second_end) = (
            sorted(axis.transData.transform([(0, y) for y in image.get_extent()[2:]])[:, 1], reverse=True)
            for image in axis.images
        )
        assert shown["look"].y0 > first_top, "what stands before the first image is above it"
        assert first_top > shown["word0"].y1 > shown["word11"].y0 > first_end > second_top
        assert second_top > shown["seven"].y1 > shown["seven"].y0 > second_end
        assert shown["seven"].x0 > axis.transData.transform((axis.images[1].get_extent()[1], 0))[0]
        assert len({shown[f"word{number}"].y0 for number in range(12)}) > 1, "a long text is broken"
        assert max(box.x1 for box in shown.values()) <= figure.bbox.x1
        weights = given.weights[0].mean(0)
        boxes = [patch for patch in axis.patches if patch.get_fill()]
        assert to_hex(torch.tensor(boxes[-1].get_facecolor()[:3])) == CARRIERS[int(weights[:, 15].argmax())]


@pytest.mark.parametrize("locations", [[0], [1, 0], [0, 0], [0, 5]])
def test_locations_are_one_for_each_medium_in_order(locations):
    with pytest.raises(InvalidArgument, match="locations: expected 2 ascending places in the text"):
        reading(WORDS, torch.rand(2, 3, 8, 8), {"reads": routing()}, locations=locations)


@pytest.mark.parametrize(
    ("media", "columns", "options", "message"),
    [
        (0, {"reads": routing()}, {}, "media: expected at least one image, got none"),
        (2, {}, {}, "columns: expected at least one routing, got none"),
        (3, {"reads": routing()}, {}, r"columns\['reads'\]: expected weights \[B, H, M, T\] with M = 3, T = 5"),
        (2, {"reads": routing(words=4)}, {}, "T = 5"),
        (2, {"reads": routing()}, {"sample": 2}, "a sample 2"),
    ],
)
def test_bad_input_is_explained(media, columns, options, message):
    with pytest.raises(InvalidArgument, match=message):
        reading(WORDS, torch.rand(media, 3, 8, 8), columns, **options)
