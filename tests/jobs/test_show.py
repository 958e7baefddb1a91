"""Pictures of where tokens go get names of their own."""

from narrows.jobs.show import _distinct_stems


def test_pictures_of_one_name_are_told_apart_by_folder_or_number() -> None:
    assert _distinct_stems(["a/x.png", "b/y.jpg"]) == ["x", "y"]
    assert _distinct_stems(["in/a/x.png", "in/b/x.png"]) == ["a-x", "b-x"]
    assert _distinct_stems(["a/x.png", "a/X.jpg", "a/y.png"]) == ["00000-x", "00001-X", "00002-y"]
