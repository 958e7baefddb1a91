from pathlib import Path

import pytest
import torch

from narrows.data.document_module import InterleavedDataModule, load_interleaved
from narrows.data.scene_documents import digit_sentences
from narrows.errors import DataError, InvalidArgument
from tests.data.test_document_files import entry, write_folder
from tests.data.tokenizers import word_tokenizer

LETTERS = sorted(
    {word for text in digit_sentences(300, 0) for word in text.replace("<", " <").replace(">", "> ").split()}
)


def small_module(**options) -> InterleavedDataModule:
    return InterleavedDataModule(image_size=16, tokenizer=word_tokenizer(LETTERS), **options)


def test_the_data_module_makes_batches():
    module = small_module(batch_size=6)
    batch = next(iter(module.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "media", "media_mask", "media_locations", "labels"}
    assert batch["media"].shape[2:] == (1, 16, 16)
    assert torch.equal(batch["media_mask"].sum(1), batch["media_locations"].sum(1))
    assert (batch["input_ids"] != 4).all()  # every word is known
    assert sum(len(batch["labels"]) for batch in module.val_dataloader()) == 480


def test_too_few_documents_for_a_batch():
    with pytest.raises(DataError, match="digits has 3000 training documents, 3000 for each process: fewer than"):
        small_module(batch_size=4000).train_dataloader()


def test_documents_are_held_out_by_the_names_of_files(tmp_path):
    write_folder(tmp_path, entry("a"), entry("b"))
    write_folder(tmp_path, entry("c"), name="validation.jsonl")
    found = load_interleaved(tmp_path, image_size=8)
    assert [found.train[i].text for i in range(len(found.train))] == ["a", "b"]
    assert [document.text for document in found.held_out.documents([0])] == ["c"]
    assert "validation.jsonl" in found.held_out_rule


def test_documents_are_held_out_by_a_hash_that_others_do_not_change(tmp_path):
    def held_out(count: int, folder: Path) -> set[str]:
        found = load_interleaved(write_folder(folder, *(entry(str(i)) for i in range(count))), image_size=8)
        texts = [{d.text for d in part.documents(range(len(part)))} for part in (found.train, found.held_out)]
        assert len(texts[0] | texts[1]) == count
        assert not texts[0] & texts[1]
        return texts[1]

    few = held_out(40, tmp_path / "a")
    assert len(few) == 2
    assert few == held_out(40, tmp_path / "moved" / "elsewhere")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nowhere", InvalidArgument, "'digits', a .jsonl file, a .tar shard, or a folder of them"),
        ("images", InvalidArgument, "which is or holds none"),
        ("train.jsonl", DataError, "0 documents to train on and 1 to hold out"),
    ],
)
def test_data_that_cannot_be_used_are_explained(tmp_path, name, kind, message):
    write_folder(tmp_path, entry("a"))
    with pytest.raises(kind, match=message):
        load_interleaved(tmp_path / name, image_size=8)


def test_files_are_held_out_by_whole_words(tmp_path):
    for name in ("train.jsonl", "valentine.jsonl", "val-0.jsonl", "._val.jsonl"):
        write_folder(tmp_path, entry(name), name=name)
    data = load_interleaved(tmp_path)
    assert data.held_out_rule == "the files val-0.jsonl"
    assert len(data.train) == 2


def test_documents_that_are_all_without_text_are_an_error(tmp_path):
    write_folder(tmp_path, *(entry("<image>", "red") for _ in range(4)))
    with pytest.raises(DataError, match="all 3 documents to train on are without text"):
        load_interleaved(tmp_path)
