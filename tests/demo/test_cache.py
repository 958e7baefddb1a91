"""What is kept is made once, waited for, and made anew where it is damaged."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from narrows.demo.cache import kept
from narrows.demo.reader import digits_vision_encoder
from narrows.errors import InvalidArgument, MissingExtra
from narrows.files import replacing_folder
from narrows.models import create_model


def _keep(folder: Path, log: Path, until: Callable[[], object] = lambda: None) -> str:
    def make() -> None:
        with log.open("a") as file:
            file.write("made\n")
        until()
        with replacing_folder(folder) as unfinished:
            (unfinished / "model").write_text("good")

    def read() -> str:
        content = (folder / "model").read_text()
        if content != "good":
            raise InvalidArgument("model", expected="a good one", got=content)
        return content

    return kept(folder, make, read)


def test_several_processes_make_it_once(tmp_path, monkeypatch):
    """The one that makes it goes on once both others have said that they wait."""
    context = multiprocessing.get_context("fork")
    said, waiting = context.SimpleQueue(), context.Semaphore(0)

    def say(text: str) -> None:
        said.put(text)
        waiting.release()

    def both_others_wait() -> None:
        assert all(waiting.acquire(timeout=120) for _ in range(2))

    monkeypatch.setattr("narrows.files.say", say)
    arguments = (tmp_path / "cache", tmp_path / "log", both_others_wait)
    processes = [context.Process(target=_keep, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "made\n"
    assert {said.get() for _ in range(2)} == {f"Waiting for another process that makes {tmp_path / 'cache'}"}


@pytest.mark.parametrize("damage", ["bad content", None])
def test_what_is_damaged_is_named_set_aside_and_made_anew(tmp_path, monkeypatch, damage):
    said = []
    monkeypatch.setattr("narrows.demo.cache.say", said.append)
    folder = tmp_path / "cache"
    folder.mkdir()
    if damage:
        (folder / "model").write_text(damage)
    for number in ("", "1"):
        assert _keep(folder, tmp_path / "log") == "good"
        aside = tmp_path / f"cache.damaged{number}"
        assert sorted(path.name for path in aside.iterdir()) == (["model"] if damage else [])
        assert f"{folder} is damaged (" in said[-1]
        assert f"It is now {aside.name}, and is made anew." in said[-1]
        (folder / "model").write_text("bad") if damage else (folder / "model").unlink()


def test_what_is_whole_but_cannot_be_opened_here_stays(tmp_path):
    def read() -> None:
        raise MissingExtra("transformers", extra="transformers", purpose="open it")

    (tmp_path / "cache").mkdir()
    with pytest.raises(MissingExtra):
        kept(tmp_path / "cache", lambda: None, read)
    assert (tmp_path / "cache").is_dir()


def test_the_parts_of_the_reader_are_such_caches(tmp_path, monkeypatch):
    sizes = {"image_size": 16, "channels": 1, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}
    folder = tmp_path / "models" / "vit_mini-seed0"
    monkeypatch.setattr("narrows.demo.reader.ENCODER", "vit_mini")
    monkeypatch.setattr(
        "narrows.demo.reader.train", lambda *_, **__: create_model("vit_mini", **sizes).save_pretrained(folder)
    )
    digits_vision_encoder(tmp_path)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert digits_vision_encoder(tmp_path) == folder
    assert (folder.parent / "vit_mini-seed0.damaged" / "model.safetensors").read_bytes() == b"cut"
