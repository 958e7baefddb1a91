import contextlib
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from narrows.data.document_files import StoredDocuments, read_jsonl, read_shards
from narrows.errors import DataError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour: str, size: tuple[int, int] = (12, 9)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(buffer, "png")
    return buffer.getvalue()


def write_folder(folder: Path, *lines: object, name: str = "train.jsonl") -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        (folder / "images" / f"{colour}.png").write_bytes(png(colour))
    (folder / "images" / "broken.png").write_bytes(b"not a picture")
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def write_shard(path: Path, members: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return path


def entry(text: str, *colours: str) -> dict[str, object]:
    return {"text": text, "images": [f"images/{colour}.png" for colour in colours]}


def colours_of(images: torch.Tensor) -> list[list[float]]:
    return images.mean((2, 3)).round().tolist()


def test_conversations_in_files(tmp_path):
    said = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red"}]
    line = {"messages": said, "images": "images/red.png"}
    records = read_jsonl(write_folder(tmp_path, line))
    members = {"1.json": json.dumps({"messages": said}), "1.png": png("red")}
    records += read_shards([write_shard(tmp_path / "a.tar", members)])
    for document in StoredDocuments(records, image_size=8).documents([0, 1]):
        assert [message._asdict() for message in document.messages] == said
        assert colours_of(document.images) == [[1, 0, 0]]
    for wrong in ("hello", [{"role": "user"}], said[:1], []):
        with pytest.raises(DataError, match='line 1: expected "messages" as'):
            read_jsonl(write_folder(tmp_path, {**line, "messages": wrong}))


def test_a_jsonl_file_beside_its_images(tmp_path):
    lines = (entry("<image>red <image>blue", "red", "blue"), "", entry("no image at all"))
    records = read_jsonl(write_folder(tmp_path, *lines))
    documents = StoredDocuments(records, image_size=8)
    first, second = documents.documents([0, 1])
    assert first.text == "<image>red <image>blue"
    assert first.images.shape == (2, 3, 8, 8)
    assert colours_of(first.images) == [[1, 0, 0], [0, 0, 1]]
    assert second.images.shape == (0, 3, 8, 8)
    assert documents.name(1) == f"{tmp_path / 'train.jsonl'}, line 3"


def test_shards_of_webdataset(tmp_path):
    shard = write_shard(
        tmp_path / "train-000.tar",
        {
            "a/0001.json": json.dumps({"text": "<image>green <image>red"}),
            "a/0001.10.png": png("red"),
            "a/0001.2.png": png("green"),
            "a/0002.txt": " a blue one",
            "a/0002.png": png("blue"),
            "b/0001.json": json.dumps({"text": "<image>", "images": ["right.PNG"]}),
            "b/0001.left.png": png("red"),
            "b/0001.right.PNG": png("blue"),
            "README": "no sample",
        },
    )
    records = read_shards([shard])
    assert [record.row for record in records] == [f"{shard}, sample {key}" for key in ("a/0001", "a/0002", "b/0001")]
    first, caption, chosen = StoredDocuments(records, image_size=4).documents([0, 1, 2])
    assert colours_of(first.images) == [[0, 1, 0], [1, 0, 0]]
    assert caption.text == "<image> a blue one"
    assert colours_of(caption.images) == colours_of(chosen.images) == [[0, 0, 1]]


def test_images_are_squares_of_the_size_and_channels_asked_for(tmp_path):
    record = read_jsonl(write_folder(tmp_path, entry("<image>", "green")))
    (document,) = StoredDocuments(record, image_size=6, channels=1).documents([0])
    assert document.images.shape == (1, 1, 6, 6)
    assert 0.5 < document.images.mean() < 0.7


def test_an_image_that_cannot_be_read_is_named_with_its_row(tmp_path):
    records = read_jsonl(write_folder(tmp_path, entry("<image>", "broken"), entry("<image>two", "broken")))
    with pytest.raises(DataError, match=r"train.jsonl, line 2: images/broken.png cannot be read as an image: it is n"):
        StoredDocuments(records, image_size=8).documents([0, 1])
    shard = write_shard(tmp_path / "a.tar", {"7.txt": "a cat", "7.jpg": b"\xff\xd8 cut off"})
    with pytest.raises(DataError, match="no image of 1 documents can be read"):
        StoredDocuments(read_shards([shard]), image_size=8).documents([0])


def test_documents_with_unreadable_images_are_skipped_up_to_a_share_and_named_once(tmp_path, caplog):
    lines = [entry(f"<image>{number}", "broken" if number == 3 else "red") for number in range(10)]
    documents = StoredDocuments(read_jsonl(write_folder(tmp_path, *lines)), image_size=8)
    for _ in range(2):
        assert [document.text[7:] for document in documents.documents(range(10))] == list("0124456789")
    assert caplog.text.count("line 4: images/broken.png cannot be read") == 1
    lines[9] = entry("<image>9", "broken")
    documents = StoredDocuments(read_jsonl(write_folder(tmp_path, *lines)), image_size=8)
    with pytest.raises(DataError, match=r"2 of 10 documents have an image that cannot be read.*line 4: .*line 10: "):
        documents.documents(range(10))


def test_only_a_line_feed_ends_a_line_and_a_byte_order_mark_is_none(tmp_path):
    text = "one\u2028two\u2029three\x85four"
    path = write_folder(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b'\r\n{"text": "b"}\n')
    assert [record.text for record in read_jsonl(path)] == [text, "b"]


@pytest.mark.parametrize(
    ("line", "text", "colours"),
    [
        ({"text": "none", "images": None}, "none", []),
        ({"text": "<image>one", "images": "images/red.png"}, "<image>one", ["red"]),
        (
            {"texts": ["A", None, "B", None], "images": [None, "images/red.png", None, "images/blue.png"]},
            "A<image>B<image>",
            ["red", "blue"],
        ),
        (
            {
                "text_list": ["First.", "Second."],
                "image_info": [
                    {"image_name": "images/blue.png", "matched_text_index": 1},
                    {"image_name": "images/red.png", "matched_text_index": 0},
                    {"image_name": "images/green.png", "matched_text_index": 1},
                ],
                "similarity_matrix": [],
            },
            "<image>First. <image><image>Second.",
            ["red", "blue", "green"],
        ),
    ],
)
def test_records_as_they_are_published(tmp_path, line, text, colours):
    (record,) = read_jsonl(write_folder(tmp_path, line))
    assert record.text == text
    assert [image.name for image in record.images] == [f"images/{colour}.png" for colour in colours]


@pytest.mark.parametrize(
    "line",
    [
        {"texts": ["A", None], "images": ["images/red.png"]},
        {"texts": ["A", 3], "images": [None, None]},
        {"text_list": ["A"], "image_info": [{"image_name": "images/red.png", "matched_text_index": 1}]},
        {"text_list": ["A"], "image_info": [{"matched_text_index": 0}]},
    ],
)
def test_records_that_do_not_fit_together_are_named(tmp_path, line):
    with pytest.raises(DataError, match=r"line 1: expected \{\"text\".*OBELICS.*MMC4"):
        read_jsonl(write_folder(tmp_path, line))


def test_addresses_in_place_of_files_are_named(tmp_path):
    line = {"texts": [None], "images": ["https://example.org/a.png"]}
    with pytest.raises(DataError, match=r"line 1: the image https://example.org/a.png is an address. Download"):
        read_jsonl(write_folder(tmp_path, line))


def test_triples_of_img2dataset_and_members_of_no_sample(tmp_path, caplog):
    about = json.dumps({"caption": "a red one", "url": "https://example.org", "key": "000", "status": "success"})
    members = {
        "._000.png": b"resource fork",
        "README.md": "about",
        "readme.txt": "about",
        "000.json": about,
        "000.png": png("red"),
        "000.txt": " a red one",
    }
    (record,) = read_shards([write_shard(tmp_path / "00000.tar", members)])
    assert record.text == "<image> a red one"
    assert [image.name for image in record.images] == ["000.png"]
    assert "left out 3 members that belong to no sample" in caplog.text


def test_an_archive_that_is_cut_anywhere_is_an_error(tmp_path):
    members = {
        f"{number}.{kind}": png("red") if kind == "png" else "x" for number in range(3) for kind in ("png", "txt")
    }
    path = write_shard(tmp_path / "a.tar", members)
    whole = path.read_bytes()
    end = 6 * 1024
    assert len(read_shards([path])) == 3
    for length in (*range(1, end, 300), end, end + 100):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.tar"):
            read_shards([path])
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="holds a second archive after its end"):
        read_shards([path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "line 1: not JSON: "),
        ('["a"]', 'line 1: expected {"text": "... <image> ...", "images"'),
        ({"images": []}, 'expected {"text"'),
        ({"text": "a", "images": [3]}, 'expected {"text"'),
        (entry("<image> and <image>", "red"), "line 1: 1 images, and 2 <image> in the text"),
        (entry("text", "red"), "line 1: 1 images, and 0 <image>"),
        (entry("<image>", "purple"), "line 1: the image images/purple.png does not exist beside train.jsonl"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, message):
    with pytest.raises(DataError) as raised:
        read_jsonl(write_folder(tmp_path, line))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": png("red")}, "sample 1: neither 1.json nor 1.txt"),
        ({"1.json": '{"text": "<image>", "images": ["x.png"]}'}, "sample 1: the image x.png is not among"),
        ({"1.json": "{"}, "sample 1: not JSON"),
        ({"1.txt": "a caption"}, "sample 1: 0 images, and 1 <image>"),
    ],
)
def test_a_sample_that_is_wrong_is_named(tmp_path, members, message):
    with pytest.raises(DataError) as raised:
        read_shards([write_shard(tmp_path / "s.tar", members)])
    assert message in str(raised.value)


def test_a_file_that_is_no_archive_is_named(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"nothing" * 100)
    with pytest.raises(DataError, match=r"s.tar cannot be read as a tar archive"):
        read_shards([tmp_path / "s.tar"])


def test_images_outside_the_folder_are_read_by_option_only(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "docs" / "x").mkdir(parents=True)
    (tmp_path / "docs" / "link").symlink_to(tmp_path / "images")
    for name in ("../images/red.png", str(tmp_path / "images" / "red.png"), "x/../../images/red.png"):
        file = tmp_path / "docs" / "train.jsonl"
        file.write_text(json.dumps({"text": "<image>", "images": [name]}))
        with pytest.raises(
            DataError, match=r"line 1: the image .*red.png stands outside the folder of train.jsonl.*outs"
        ):
            read_jsonl(file)
        assert len(read_jsonl(file, outside=True)) == 1
    file.write_text(json.dumps({"text": "<image>", "images": ["link/../link/red.png"]}))
    assert len(read_jsonl(file)) == 1
    file.write_text(json.dumps({"text": "<image>", "images": ["link/../images/red.png"]}))
    with pytest.raises(DataError, match="does not exist beside"):  # where the link leads, ".." is another folder
        read_jsonl(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is in UTF-16. Save it in UTF-8"),
        (b'{"text": "caf\xe9"}', "line 1: the text is not UTF-8"),
        (b'{"text": "a", "images": 5}', "line 1: expected"),
        (b'{"text": "a", "images": "x.png"}', "line 1: the image x.png does not exist"),
        (b'{"text": "<image>", "images": ["' + b"w" * 5000 + b'"]}', "does not exist"),
        (b'{"text": "<image>", "images": ["a\\u0000b"]}', "does not exist"),
        (b"[" * 10**5, "line 1: not JSON"),
    ],
)
def test_lines_that_are_none_are_named(content, message, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_jsonl(tmp_path / "train.jsonl")


def test_a_shard_that_claims_more_than_it_holds_is_refused_before_it_is_read(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {"1.json": '{"text": "a", "images": []}'})
    header = tarfile.TarInfo("1.json")
    header.size = 6 * 2**30
    shard.write_bytes(header.tobuf() + b"{}" + bytes(2000))
    with pytest.raises(DataError, match=r"a.tar: 1.json claims 6,442,450,944 bytes, more than there are"):
        read_shards([shard])
    with shard.open("r+b") as file:  # a file with a hole
        file.truncate(header.size + 2048)
    with pytest.raises(DataError, match=r"1.json has 6,442,450,944 bytes, and texts at most 16,777,216"):
        read_shards([shard])
    draw, whole = random.Random(0), write_shard(tmp_path / "b.tar", {"1.txt": "cat", "1.png": png("red")}).read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        place = draw.randrange(len(whole) // 4)
        damaged[place : place + 8] = draw.randbytes(8)
        shard.write_bytes(damaged[: draw.randrange(100, len(whole))])
        with contextlib.suppress(DataError):
            StoredDocuments(read_shards([shard]), image_size=8).documents([0])
