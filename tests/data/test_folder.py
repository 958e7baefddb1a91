import pytest

from narrows.data.folder import find_unreadable
from narrows.errors import DataError
from tests.data.folders import truncate, write_image


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_truncated_images_are_found_named_counted_and_skipped(tmp_path, suffix, caplog):
    paths = [write_image(tmp_path / f"{i}{suffix}", seed=i, size=(64, 64)) for i in range(5)]
    assert find_unreadable(paths) == set()
    truncate(paths[3])
    assert find_unreadable(paths) == {paths[3]}
    assert "1 of 5 images cannot be read and are skipped" in caplog.text
    assert f"3{suffix}" in caplog.text


def test_more_unreadable_images_than_the_share_are_an_error_that_names_some(tmp_path):
    paths = [write_image(tmp_path / f"{i}.png") for i in range(30)]
    paths[4].write_text("no image")
    paths[9].write_bytes(b"")
    assert find_unreadable(paths, allowed_share=0.1) == {paths[4], paths[9]}
    with pytest.raises(
        DataError, match=r"2 of 30 images cannot be read, more than may be skipped \(1%, or one\): .*4\.png"
    ):
        find_unreadable(paths)
