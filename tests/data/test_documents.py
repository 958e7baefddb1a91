import pytest
import torch

from narrows.data.documents import (
    END_OF_CHUNK,
    IMAGE,
    Document,
    InterleavedCollate,
    Message,
    conversation,
    questions_of,
    with_chunk_ends,
    without_labels,
)
from narrows.errors import InvalidArgument
from tests.data.tokenizers import word_tokenizer

# <pad> 0, <s> 1, <image> 2, <|endofchunk|> 3, <unk> 4
WORDS = ("a", "cat", "dog", "two")
A, CAT, DOG, TWO = 5, 6, 7, 8


def document(text: str, first: float = 1.0) -> Document:
    count = text.count(IMAGE)
    return Document(text, (torch.arange(count) + first).view(-1, 1, 1, 1).expand(count, 3, 2, 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image> a cat <image>a dog", "<image>a cat<e><image>a dog<e>"),
        ("two <image><image>a cat", "two<e><image><image>a cat<e>"),
        ("<image>a cat<e> <image>a dog<e>", "<image>a cat<e><image>a dog<e>"),
        ("a cat", "a cat<e>"),
        ("a cat <image>", "a cat<e><image>"),
        ("", ""),
    ],
)
def test_text_about_an_image_ends_with_end_of_chunk(text, expected):
    assert with_chunk_ends(text.replace("<e>", END_OF_CHUNK)) == expected.replace("<e>", END_OF_CHUNK)


def test_a_batch_of_different_numbers_of_images():
    texts = ["<image>a cat<image>a dog", "two", "<image>a dog"]
    batch = InterleavedCollate(word_tokenizer(WORDS))([document(text, 10.0 * i + 1) for i, text in enumerate(texts)])
    assert batch["input_ids"].tolist() == [
        [2, A, CAT, 3, 2, A, DOG, 3],
        [TWO, 3, 0, 0, 0, 0, 0, 0],
        [2, A, DOG, 3, 0, 0, 0, 0],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [8, 2, 4]
    assert batch["media_locations"].nonzero().tolist() == [[0, 0], [0, 4], [2, 0]]
    assert batch["media_mask"].tolist() == [[True, True], [False, False], [True, False]]
    assert batch["media"][:, :, 0, 0, 0].tolist() == [[1, 2], [0, 0], [21, 0]]
    expected = (
        batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100).masked_fill(batch["input_ids"] == 2, -100)
    )
    assert torch.equal(batch["labels"], expected)


def test_padding_on_the_left_and_no_new_end_for_a_prompt():
    collate = InterleavedCollate(word_tokenizer(WORDS), padding_side="left")
    batch = collate.prompts([document("<image>a"), document("<image>a cat<image>a")])
    assert batch["input_ids"].tolist() == [[0, 0, 0, 2, A], [2, A, CAT, 2, A]]
    assert batch["media_locations"].nonzero().tolist() == [[0, 3], [1, 0], [1, 3]]


def test_a_batch_without_images_has_one_that_is_masked():
    batch = InterleavedCollate(word_tokenizer(WORDS))([document("a cat"), document("two")])
    assert batch["media"].shape == (2, 1, 3, 2, 2)
    assert not batch["media_mask"].any()
    assert not batch["media_locations"].any()


def test_text_before_the_first_image_can_be_left_out_of_the_loss():
    documents = [document("two a <image>a cat"), document("a dog")]
    masked = InterleavedCollate(word_tokenizer(WORDS), mask_before_first_image=True)(documents)["labels"]
    plain = InterleavedCollate(word_tokenizer(WORDS))(documents)["labels"]
    assert masked[0].tolist() == [-100] * 4 + [A, CAT, 3]
    assert plain[0].tolist() == [TWO, A, 3, -100, A, CAT, 3]
    assert masked[1, :3].tolist() == [A, DOG, 3]  # no image, hence no first one


def test_padding_documents_have_no_labels():
    filler = Document("<image>a", torch.zeros(1, 3, 2, 2), counts=False)
    labels = InterleavedCollate(word_tokenizer(WORDS))([filler, document("a")])["labels"]
    assert (labels[0] == -100).all()
    assert (labels[1] != -100).any()


def test_long_documents_lose_the_images_beyond_the_cut():
    texts = [document("<image>a cat<image>a dog<image>two")]
    batch = InterleavedCollate(word_tokenizer(WORDS), max_tokens=6)(texts)
    assert batch["input_ids"].tolist() == [[2, A, CAT, 3, 2, A]]
    assert batch["media"][0, :, 0, 0, 0].tolist() == [1, 2]
    batch = InterleavedCollate(word_tokenizer(WORDS), max_images=1)(texts)
    assert batch["input_ids"].tolist() == [[2, A, CAT, 3]]
    assert batch["media"].shape[1] == 1


def test_a_text_begins_as_the_tokenizer_begins_texts():
    batch = InterleavedCollate(word_tokenizer(WORDS, begin=True))([document("<image>a cat")])
    assert batch["input_ids"].tolist() == [[1, 2, A, CAT, 3]]


def test_a_language_model_without_tokens_for_images_can_lend_others():
    tokenizer = word_tokenizer(WORDS, special=("<eos>",), pad_token=None, eos_token="<eos>")
    batch = InterleavedCollate(tokenizer, image_token="<eos>", end_of_chunk="<eos>")(
        [document("<image>two"), document("two two <image>two")]
    )
    assert batch["media_locations"].nonzero().tolist() == [[0, 0], [1, 3]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 6]
    assert batch["labels"][1, 3] == -100
    assert batch["labels"][1, 5] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_token": "<img>"},
            "image_token: expected a token of the tokenizer, got '<img>'. Name one that is there",
        ),
        ({"end_of_chunk": "<end>"}, "end_of_chunk: expected a token"),
        ({"max_tokens": 0}, "max_tokens: expected a positive integer"),
        ({"max_images": 0}, "max_images: expected a positive integer"),
        ({"padding_side": "top"}, "padding_side: expected one of"),
    ],
)
def test_bad_input_is_explained(options, message):
    with pytest.raises(InvalidArgument, match=message):
        InterleavedCollate(word_tokenizer(WORDS), **options)


TEMPLATE = (
    "{% for message in messages %}{{ '<turn> ' + message.role + ' ' + message.content + ' </turn> ' }}{% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)


def chat_tokenizer(template: str = TEMPLATE):
    tokenizer = word_tokenizer([*WORDS, "<turn>", "</turn>", "user", "assistant", "system"])
    tokenizer.chat_template = template
    return tokenizer


def chat() -> Document:
    turns = [("user", "<image> a"), ("assistant", "cat"), ("user", "<image> a"), ("assistant", "a dog")]
    return conversation([Message("system", "two"), *(Message(*one) for one in turns)], document(IMAGE * 2).images)


def words(tokenizer, ids: torch.Tensor) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens([one for one in ids.tolist() if one != -100]))


def test_of_a_conversation_the_answers_are_learned():
    tokenizer = chat_tokenizer()
    batch = InterleavedCollate(tokenizer)([chat()])
    written = tokenizer.apply_chat_template([one._asdict() for one in chat().messages], tokenize=False)
    assert words(tokenizer, batch["input_ids"][0]) == written.strip()
    assert words(tokenizer, batch["labels"][0]) == "cat </turn> a dog </turn>"
    assert (batch["input_ids"] == 2).equal(batch["media_locations"])
    assert "weights" not in batch


def test_the_rest_of_a_conversation_has_a_weight():
    tokenizer = chat_tokenizer()
    batch = InterleavedCollate(tokenizer, rest_weight=0.25)([chat(), document("<image>a cat")])
    counted = batch["labels"] != -100
    learned = batch["labels"].where(batch["weights"] == 1, torch.tensor(-100))
    assert words(tokenizer, learned[0]) == "cat </turn> a dog </turn>"
    assert set(batch["weights"][0][counted[0]].tolist()) == {0.25, 1.0}
    assert words(tokenizer, learned[1]) == f"a cat {END_OF_CHUNK}"  # of a text, everything
    assert set(without_labels(batch)) == {"input_ids", "attention_mask", "media", "media_mask", "media_locations"}
    with pytest.raises(InvalidArgument, match="rest_weight"):
        InterleavedCollate(tokenizer, rest_weight=-1)


def test_a_question_is_tokenised_as_its_conversation_is():
    tokenizer = chat_tokenizer()
    collate = InterleavedCollate(tokenizer)
    whole = collate([chat()])["input_ids"][0].tolist()
    for prompt, answer in questions_of(chat()):
        ids = collate.prompts([prompt])["input_ids"][0].tolist()
        assert whole[: len(ids)] == ids
        following = words(tokenizer, torch.tensor(whole[len(ids) :]))
        assert following.startswith(f"{answer} </turn>")


def test_a_template_that_takes_back_what_was_said_is_refused():
    forgetful = "{% for message in messages[-1:] %}{{ message.role + ' ' + message.content + ' ' }}{% endfor %}"
    with pytest.raises(InvalidArgument, match="tokenizer: expected a chat template that leaves what is said"):
        InterleavedCollate(chat_tokenizer(forgetful))([chat()])
