import pytest

from narrows.errors import InvalidArgument
from narrows.visualize import ParetoPoint, curves

WHOLE = ParetoPoint("untouched", 100, 95)


def test_a_line_for_each_method_from_cheap_to_dear_and_the_reference_across():
    lines = {
        "ats": [ParetoPoint("ats 0.7", 70, 94.8), ParetoPoint("ats 0.5", 50, 94.5)],
        "random": [ParetoPoint("random 0.5", 50, 90)],
    }
    (axes,) = curves(lines, WHOLE, x="MACs per image", y="accuracy (%)").axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["ats"].get_xdata()) == [50, 70]
    assert list(drawn["ats"].get_ydata()) == [94.5, 94.8]
    assert list(drawn["untouched"].get_xdata()) == [100]
    assert list(axes.lines[0].get_ydata()) == [95, 95]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["untouched", "ats", "random"]
    low, high = axes.get_ylim()
    assert high - low < 8
    low, high = curves(lines, WHOLE, x="MACs per image", y="accuracy (%)", least_span=20.0).axes[0].get_ylim()
    assert high - low == pytest.approx(20)
    assert len({line.get_color() for line in (drawn["ats"], drawn["random"])}) == 2


@pytest.mark.parametrize("lines", [{}, {"ats": []}])
def test_nothing_to_draw_is_an_error(lines):
    with pytest.raises(InvalidArgument, match="lines: expected at least one line with at least one point"):
        curves(lines, WHOLE, x="cost", y="quality")
