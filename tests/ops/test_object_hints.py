import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.ops.object_hints import object_hints

SCENE = torch.tensor(
    [
        [0, 0, 7, 7, 0],
        [0, 0, 7, 7, 0],
        [3, 0, 0, 0, -100],
        [3, 3, 0, 0, -100],
    ]
)


def test_boxes_are_shares_of_the_image_in_the_order_of_labels() -> None:
    found = object_hints(SCENE[None], 4)
    expected = torch.tensor([[0, 0, 0, 0], [0.5, 0, 1, 0.4], [0, 0.4, 0.5, 0.8], [0, 0, 0, 0]])
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(object_hints(SCENE[None], 2)[0], expected[:2])


def test_points_are_the_middles_of_boxes_and_scenes_do_not_mix() -> None:
    empty = torch.zeros_like(SCENE)
    found = object_hints(torch.stack((SCENE, empty)), 3, kind="points")
    torch.testing.assert_close(found[0], torch.tensor([[0, 0], [0.75, 0.2], [0.25, 0.6]]))
    assert not found[1].any()


@pytest.mark.compiled  # shape checks of the test run would answer first
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: object_hints(SCENE, 3), "labels: expected shape"),
        (lambda: object_hints(SCENE[None], 0), "number: expected"),
        (lambda: object_hints(SCENE[None], 3, kind="lines"), "kind: expected"),
    ],
)
def test_errors_say_what_is_wrong(call, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        call()
