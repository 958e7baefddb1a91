"""The reader of digit scenes in small: what it trains once, and that its figures are what they say."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from narrows.data.documents import END_OF_CHUNK, IMAGE, Document
from narrows.data.scene_documents import DIGITS, DigitPrompts, questions
from narrows.demo import reader as digits
from narrows.demo.reader import (
    digits_language_model,
    digits_reader,
    digits_tokenizer,
    digits_vision_encoder,
    examine,
)
from narrows.hub.readers import Reader, open_language_model
from narrows.models import create_model


class Oracle(Reader):
    """Answers by a rule from the digits that the images really show."""

    def __init__(self, prompts: DigitPrompts, rule: Callable[[list[str]], str]) -> None:
        shown = {
            image.numpy().tobytes(): question.answer
            for document in prompts.documents(range(len(prompts)))
            for image, question in zip(document.images, questions(document.text), strict=True)
        }
        self.__dict__.update(rule=rule, shown=shown)

    def generate(self, prompts: Sequence[Document], *, blind: bool = False, **_: Any) -> list[str]:
        if blind:
            return ["three"] * len(prompts)
        return [self.rule([self.shown[image.numpy().tobytes()] for image in one.images]) for one in prompts]


PROMPTS = DigitPrompts("held_out", size=16, length=60)


def test_a_reader_that_looks_at_its_own_image_is_always_right():
    found = examine(Oracle(PROMPTS, lambda digits: digits[-1]), PROMPTS)
    assert found.exact == found.swapped == 1
    assert found.questions == sum(len(d.images) for d in PROMPTS.documents(range(60)))
    assert 0 < found.alone < 0.3
    assert "answered exactly: 100.0%" in str(found)


def test_a_reader_that_looks_at_the_wrong_image_is_found_out():
    found = examine(Oracle(PROMPTS, lambda digits: digits[0]), PROMPTS)
    assert 60 / found.questions <= found.exact < 0.8
    assert found.swapped < 0.6


def test_a_reader_that_says_too_much_is_not_exact():
    assert examine(Oracle(PROMPTS, lambda digits: f"{digits[-1]} {digits[-1]}"), PROMPTS).exact == 0


def test_the_tokenizer_knows_every_word_and_keeps_the_marks_whole():
    tokenizer = digits_tokenizer([f"{IMAGE}the first image shows a seven{END_OF_CHUNK}"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(f"{IMAGE}the seven{END_OF_CHUNK}").input_ids)
    assert tokens == ["<s>", IMAGE, "the", "seven", END_OF_CHUNK]
    assert tokenizer.eos_token == END_OF_CHUNK


def test_each_part_is_trained_once(tmp_path, monkeypatch):
    first = digits_language_model(tmp_path, steps=2)
    weights = (first / "model.safetensors").read_bytes()
    assert digits_language_model(tmp_path, steps=9) == first
    assert (first / "model.safetensors").read_bytes() == weights
    model, tokenizer = open_language_model(first)
    assert model.config.vocab_size == len(tokenizer)
    assert set(DIGITS) <= set(tokenizer.get_vocab())

    sizes = {"image_size": 16, "channels": 1, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}
    monkeypatch.setattr(digits, "ENCODER", "vit_mini")
    create_model("vit_mini", **sizes).save_pretrained(tmp_path / "models" / "vit_mini-seed0")
    monkeypatch.setattr(digits, "train", None)  # would be called only to train an encoder
    assert digits_vision_encoder(tmp_path) == tmp_path / "models" / "vit_mini-seed0"

    trainer = digits._trainer

    def short(*arguments: Any) -> Any:
        made = trainer(*arguments)
        made.limit_train_batches = made.limit_val_batches = 2
        return made

    monkeypatch.setattr(digits, "_trainer", short)
    reader = digits_reader(tmp_path, epochs=1)
    monkeypatch.setattr(digits, "fit", None)
    again = digits_reader(tmp_path)
    few = DigitPrompts("held_out", size=16, length=4)
    assert examine(reader, few) == examine(again, few)


@pytest.mark.parametrize("steps", [60])
def test_the_language_model_learns_the_language_but_not_the_digits(tmp_path, steps):
    import torch

    model, tokenizer = open_language_model(digits_language_model(tmp_path, steps=steps))
    ids = tokenizer(f"{IMAGE}the first image shows a", return_tensors="pt").input_ids
    with torch.no_grad():
        next_word = model(ids).logits[0, -1].softmax(-1)
    share = next_word[tokenizer.convert_tokens_to_ids(list(DIGITS))]
    assert share.sum() > 0.9
    assert share.max() < 0.2
