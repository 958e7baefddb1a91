import pytest
import torch

from narrows.data.documents import END_OF_CHUNK, IMAGE, questions_of
from narrows.data.object_scenes import COLOURS, SHAPES
from narrows.data.positions import Position
from narrows.data.scene_documents import (
    DIGITS,
    PLACES,
    DigitChats,
    DigitPrompts,
    ShapeChats,
    described,
    description,
    digit_sentences,
    load_scene_documents,
    questions,
)
from narrows.errors import InvalidArgument


def test_every_caption_names_the_digit_of_its_own_image():
    prompts = DigitPrompts("held_out", size=16)
    for document in prompts.documents(range(20)):
        asked = questions(document.text)
        assert [question.image for question in asked] == list(range(len(document.images)))
    (document,) = prompts.documents([3])
    places = [3 * prompts.max_images + question.image for question in questions(document.text)]
    scenes = prompts.scenes.render(places)
    assert [question.answer for question in questions(document.text)] == [DIGITS[label] for label in scenes.labels]
    assert torch.equal(document.images, scenes.images / 255)


def test_a_prompt_depends_on_its_index_epoch_and_seed_alone():
    train = DigitPrompts("train", size=16, seed=1)
    (alone,), among = train.documents([5], epoch=2), train.documents([4, 5, 6], epoch=2)
    assert alone.text == among[1].text
    assert torch.equal(alone.images, among[1].images)
    assert not torch.equal(alone.images[0], train.documents([5], epoch=3)[0].images[0])
    assert not torch.equal(alone.images[0], DigitPrompts("train", size=16, seed=2).documents([5], 2)[0].images[0])
    held_out = DigitPrompts("held_out", size=16)
    assert held_out.documents([1], epoch=0)[0].text == held_out.documents([1], epoch=7)[0].text


def test_prompts_have_from_one_image_to_as_many_as_asked_for():
    counts = [len(d.images) for d in DigitPrompts("train", size=16, max_images=4, channels=3).documents(range(80))]
    assert set(counts) == {1, 2, 3, 4}


def test_a_question_stops_before_the_digit():
    text = f"{IMAGE}the first image shows a seven{END_OF_CHUNK}{IMAGE}here is a two{END_OF_CHUNK}"
    first, second = questions(text)
    assert first == (f"{IMAGE}the first image shows a", "seven", 0)
    assert second == (f"{IMAGE}the first image shows a seven{END_OF_CHUNK}{IMAGE}here is a", "two", 1)


def test_text_alone_says_nothing_about_the_digits_of_captions():
    sentences = digit_sentences(4000, seed=0)
    assert sentences == digit_sentences(4000, seed=0)
    answers = [question.answer for text in sentences for question in questions(text) if IMAGE in text]
    shares = torch.tensor([answers.count(digit) / len(answers) for digit in DIGITS])
    assert (shares - 0.1).abs().max() < 0.02
    assert any("plus one is" in text and IMAGE not in text for text in sentences)


@pytest.mark.parametrize("options", [{"max_images": 0}, {"max_images": 5}, {"channels": 2}, {"split": "both"}])
def test_bad_input_is_explained(options):
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        DigitPrompts(**options)


def test_padding_documents_are_marked():
    prompts = DigitPrompts("held_out", size=16)
    real, filler = prompts.__getitems__([Position(0), Position(0, counts=False)])
    assert real.counts
    assert not filler.counts


def test_a_conversation_asks_about_each_image_in_a_turn_of_its_own():
    chats, prompts = (kind("held_out", size=16) for kind in (DigitChats, DigitPrompts))
    for chat, captions in zip(chats.documents(range(9)), prompts.documents(range(9)), strict=True):
        assert torch.equal(chat.images, captions.images)
        asked = questions_of(chat)
        assert [answer for _, answer in asked] == [question.answer for question in questions(captions.text)]
        assert [len(prompt.images) for prompt, _ in asked] == list(range(1, len(chat.images) + 1))
        assert all(prompt.messages[-1].content.startswith(IMAGE) for prompt, _ in asked)


def test_a_description_names_every_object_where_it_stands():
    chats = ShapeChats("held_out")
    scenes = chats.scenes.render(range(40))
    for index, document in enumerate(chats.documents(range(40))):
        ((_, answer),) = questions_of(document)
        count = int((scenes.shapes[index] >= 0).sum())
        seen = described(answer)
        assert len(seen) == count in (2, 3)
        assert [PLACES.index(one.place) for one in seen] == sorted(PLACES.index(one.place) for one in seen)
        for number in range(count):
            x, y = scenes.centres[index, number].tolist()
            place = PLACES[int(y * 3) * 3 + int(x * 3)]
            assert (place, COLOURS[scenes.colours[index, number]], SHAPES[scenes.shapes[index, number]]) in seen
            inside = document.images[0][:, int(y * 32), int(x * 32)]
            outside = document.images[0][:, scenes.masks[index] == 0].mean(1)
            assert (inside - outside).abs().max() > 0.1
        assert description([[PLACES.index(p), COLOURS.index(c), SHAPES.index(s)] for p, c, s in seen[::-1]]) == answer


def test_words_that_are_no_description_name_nothing():
    assert described("The top left holds a red dog, the sky a blue square.") == []
    assert len(described("The top left holds a red disc, the top left a red disc, the middle")) == 2


def test_shapes_have_colours():
    with pytest.raises(InvalidArgument, match="channels: expected 3 for shape_chats"):
        load_scene_documents("shape_chats", "train", size=32, channels=1)
