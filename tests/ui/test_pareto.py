"""The plot of speed against quality: scales, series, the front, buttons, and text that is escaped."""

import re

import pytest

from ui.pareto import HEIGHT, WIDTH, Point, Scale, pareto_plot

POINTS = [
    Point(1.0, 1.0, "plain steps", "50 steps", "a" * 32),
    Point(2.0, 0.95, "plain steps", "25 steps", "b" * 32),
    Point(1.9, 0.99, "interval 2", "interval 2, 50 steps", "c" * 32),
    Point(3.0, 0.97, "interval 3", "interval 3, 50 steps"),
]


def plot(points, connected=frozenset({"plain steps"})) -> str:
    return str(pareto_plot(points, "speed-up", "SSIM", connected))


def test_a_point_with_an_id_is_a_button_and_one_without_can_have_the_focus():
    html = plot(POINTS)
    assert re.findall(r'<button type="button" class="hit" data-id="(\w)', html) == ["a", "b", "c"]
    assert html.count('tabindex="0" role="img"') == 1
    assert 'aria-label="Open interval 2, 50 steps"' in html


def test_the_front_goes_through_the_points_that_no_other_point_beats():
    (front,) = re.findall(r'<polyline class="front" points="([^"]*)"', plot(POINTS))
    assert len(front.split()) == 3  # not the 25 plain steps


def test_connected_series_are_lines_in_their_order_and_the_others_have_shapes_and_colours_of_their_own():
    html = plot(POINTS)
    (line,) = re.findall(r'<polyline class="line"[^>]*points="([^"]*)"', html)
    assert len(line.split()) == 2
    marks = re.findall(r'<path class="mark"[^>]* d="([^"]*)" style="fill:([^"]*)"', html)
    assert len(marks) == 4 and len(set(marks)) == 3
    assert all(name in html for name in ("plain steps", "interval 2", "interval 3"))


def test_everything_is_inside_the_drawing():
    for x, y in re.findall(r'translate\(([\d.]+) ([\d.]+)\)" d=', plot(POINTS)):
        assert 0 < float(x) < WIDTH and 0 < float(y) < HEIGHT


@pytest.mark.parametrize("points", [POINTS[:1], [POINTS[0]._replace(y=None)], [POINTS[0], POINTS[1]._replace(y=None)]])
def test_one_point_and_a_video_equal_to_its_reference_can_be_drawn(points):
    html = plot(points)
    assert html.count('class="mark"') == len(points) and "nan" not in html and "inf" not in html


def test_nothing_measured_gives_no_plot_or_the_words_for_it():
    assert plot([]) == "" and "Nothing yet." in pareto_plot([], "x", "y", empty="Nothing yet.")


def test_labels_are_escaped():
    html = plot([Point(1, 1, "<b>s", "<img src=x>\n\"' onclick=1", "d" * 32)])
    assert "<b>s" not in html and "<img" not in html and "&lt;img" in html and "\"' onclick" not in html


@pytest.mark.parametrize(
    "low, high, log, ticks",
    [
        (0.9, 10.5, True, [1, 1.5, 2, 3, 4, 5, 7, 10]),
        (1.4, 2.1, True, [1.4, 1.6, 1.8, 2.0]),
        (0.93, 1.0, False, [0.94, 0.96, 0.98, 1.0]),
        (19.0, 41.0, False, [20, 25, 30, 35, 40]),
    ],
)
def test_ticks_are_round_numbers(low, high, log, ticks):
    assert Scale(low, high, 0, 100, log).ticks() == ticks


def test_a_log_scale_has_equal_ratios_at_equal_distances():
    scale = Scale(1, 16, 0, 100, log=True)
    assert [scale(value) for value in (1, 4, 16, 99)] == pytest.approx([0, 50, 100, 100])
