"""The Pareto plot: the right front, the right bars, names that can be read."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Annotation

from narrows.errors import InvalidArgument
from narrows.visualize import ParetoPoint, curves, pareto, pareto_front
from narrows.visualize.plots import Box, place_labels

POINTS = [
    ParetoPoint("vit", 21e6, 96.8, 0.4),
    ParetoPoint("ats", 14e6, 96.1),
    ParetoPoint("moe", 20e6, 97.2, 0.3),
    ParetoPoint("sepvit", 9e6, 95.2),
    ParetoPoint("slots", 18e6, 94.4),
]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    points = [ParetoPoint(str(i), cost, quality) for i, (cost, quality) in enumerate(pairs)]
    unbeaten = {
        pair
        for pair in pairs
        if not any(other[0] <= pair[0] and other[1] >= pair[1] and other != pair for other in pairs)
    }
    front = [(point.cost, point.quality) for point in pareto_front(points)]
    assert front == sorted(unbeaten)


def steps(figure) -> tuple[list[float], list[float]]:
    """The line of the front: the only one without marker that is no error bar."""
    axes = figure.axes[0]
    line = max(axes.lines, key=lambda line: len(line.get_xdata()))
    return list(line.get_xdata()), list(line.get_ydata())


def test_the_line_steps_up_at_each_point_of_the_front() -> None:
    figure = pareto(POINTS, x="MACs", y="accuracy")
    x, y = steps(figure)
    assert x[:-1] == [9e6, 14e6, 14e6, 20e6, 20e6]
    assert y == [95.2, 95.2, 96.1, 96.1, 97.2, 97.2]
    assert x[-1] == pytest.approx(figure.axes[0].get_xlim()[1])


def test_error_bars_reach_one_spread_up_and_down() -> None:
    axes = pareto(POINTS, x="MACs", y="accuracy").axes[0]
    bars = sorted(tuple(segment[:, 1]) for bar in axes.collections for segment in bar.get_segments())
    np.testing.assert_allclose(bars, [(96.4, 97.2), (96.9, 97.5)])


@pytest.mark.parametrize(("dearest", "scale"), [(8.0, "linear"), (8.1, "log")])
def test_costs_are_logarithmic_beyond_a_factor_of_eight(dearest: float, scale: str) -> None:
    figure = pareto([ParetoPoint("a", 1, 1), ParetoPoint("b", dearest, 2)], x="cost", y="quality", title="Choice")
    axes = figure.axes[0]
    assert axes.get_xscale() == scale
    assert (axes.get_xlabel(), axes.get_ylabel(), figure.get_suptitle()) == ("cost", "quality", "Choice")


def test_axis_and_bars_end_where_there_is_no_more_quality() -> None:
    points = [ParetoPoint("sure", 1e6, 99.5, 2.0), ParetoPoint("lost", 2e6, 1.0, 3.0)]
    (axes,) = pareto(points, x="MACs", y="accuracy (%)", bounds=(0.0, 100.0)).axes
    assert axes.get_ylim() == (0, 100)
    bars = sorted(tuple(segment[:, 1]) for bar in axes.collections for segment in bar.get_segments())
    np.testing.assert_allclose(bars, [(0, 4), (97.5, 100)])
    (free,) = pareto(points, x="MACs", y="score").axes
    assert free.get_ylim()[0] < -2
    assert free.get_ylim()[1] > 101.5
    lines = {"ats": [ParetoPoint("ats", 70, 99.8)]}
    low, high = (
        curves(lines, ParetoPoint("all", 90, 100), x="x", y="y", least_span=8.0, bounds=(0.0, 100.0)).axes[0].get_ylim()
    )
    assert (low, high) == (92, 100)


def test_costs_read_as_millions() -> None:
    figure = pareto(POINTS, x="MACs", y="accuracy")
    figure.canvas.draw()
    assert "15 M" in [label.get_text() for label in figure.axes[0].get_xticklabels()]


@pytest.mark.parametrize("seed", range(3))
def test_names_cover_neither_each_other_nor_points_in_a_crowd(seed: int) -> None:
    random = np.random.default_rng(seed)
    points = [
        ParetoPoint(f"a long name {i}", 10 ** random.uniform(8, 10), random.normal(80, 2), 0.2) for i in range(11)
    ]
    points += [ParetoPoint(f"twin {i}", 1e9, 80.0) for i in range(3)]
    figure = pareto(points, x="MACs", y="accuracy")
    figure.canvas.draw()
    axes = figure.axes[0]
    names = {text.get_text(): text for text in axes.texts}
    # Without its arrow: the line to the point may cross anything.
    boxes = {p.name: super(Annotation, names[p.name]).get_window_extent() for p in points}
    for a, b in combinations(boxes, 2):
        assert not boxes[a].overlaps(boxes[b]), f"{a} covers {b}"
    for name, box in boxes.items():
        assert axes.bbox.padded(1).contains(box.x0, box.y0)
        assert axes.bbox.padded(1).contains(box.x1, box.y1)
        for point in points:
            assert not box.contains(*axes.transData.transform((point.cost, point.quality))), f"{name} on {point.name}"


def test_a_label_with_no_free_place_takes_the_one_that_covers_least() -> None:
    area = Box(0.0, 0.0, 10.0, 10.0)
    wall = Box(0.0, 0.0, 10.0, 5.0)
    (box,) = place_labels([(5.0, 5.0)], [(20.0, 2.0)], [wall], area, distances=[1.0])
    assert box.overlap(wall) == 0
    assert box.overlap(area) == 20


def test_numbers_that_cannot_be_drawn_are_named() -> None:
    with pytest.raises(InvalidArgument, match="points: expected at least one ParetoPoint, got none"):
        pareto([], x="x", y="y")
    with pytest.raises(InvalidArgument, match="cost: expected a positive number, got 0 for 'vit'"):
        ParetoPoint("vit", 0, 1)
    with pytest.raises(InvalidArgument, match="quality: expected a finite number, got nan for 'vit'"):
        ParetoPoint("vit", 1, float("nan"))
    with pytest.raises(InvalidArgument, match=r"spread: expected a number, not negative, got -0\.1 for 'vit'"):
        ParetoPoint("vit", 1, 1, -0.1)


WHOLE = ParetoPoint("untouched", 100, 95)


def test_a_line_for_each_method_by_cost_and_the_reference_across():
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
