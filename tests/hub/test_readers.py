import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from narrows.data.documents import END_OF_CHUNK, IMAGE, Document
from narrows.data.images import MEAN_AND_STD
from narrows.errors import DataError, InvalidArgument
from narrows.hub import readers
from narrows.hub.models import open_model
from narrows.hub.readers import (
    Reader,
    ReaderFormat,
    VisionEncoder,
    open_language_model,
    open_reader,
    open_vision_encoder,
    read_pictures,
)
from narrows.models import create_model
from narrows.weights import CHECKSUM
from tests.data.folders import write_image
from tests.hub.flamingo_parts import ENCODER, TOKENIZER, open_gates, save_parts, small_encoder, small_task
from tests.support import assert_close


@pytest.fixture
def reader() -> Reader:
    task = open_gates(small_task())
    for parameter in task.flamingo.language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Reader(task.flamingo, TOKENIZER)


def prompt(text: str, seed: int = 0) -> Document:
    generator = torch.Generator().manual_seed(seed)
    return Document(text, torch.rand(text.count(IMAGE), 1, 16, 16, generator=generator))


PROMPTS = [
    prompt(f"{IMAGE}the first"),
    prompt(f"{IMAGE}here is a two{END_OF_CHUNK}{IMAGE}the second", 1),
    prompt("two"),
]


def test_prompts_in_a_batch_are_answered_as_alone(reader):
    together = reader.generate(PROMPTS, max_new_tokens=6)
    assert together == [reader.generate([one], max_new_tokens=6)[0] for one in PROMPTS]
    assert len(set(together)) > 1


def test_it_writes_what_uncached_decoding_writes(reader):
    arguments, words = reader.arguments(PROMPTS[:1]), []
    end = TOKENIZER.eos_token_id
    with torch.no_grad():
        for _ in range(6):
            token = reader.model(**arguments).logits[:, -1:].argmax(-1)
            if token.item() == end:
                break
            words.append(token.item())
            arguments["input_ids"] = torch.cat((arguments["input_ids"], token), 1)
            arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
            places = arguments["media_locations"]
            arguments["media_locations"] = torch.cat((places, torch.zeros(1, 1, dtype=torch.bool)), 1)
    assert reader.generate(PROMPTS[:1], max_new_tokens=6) == [TOKENIZER.decode(words, skip_special_tokens=True)]


def test_blind_is_the_language_model_alone(reader):
    seen = [reader.generate([prompt(PROMPTS[0].text, seed)], max_new_tokens=6, blind=True) for seed in range(3)]
    assert seen[0] == seen[1] == seen[2]
    arguments = reader.arguments(PROMPTS[:1])
    alone = reader.model.language_model.generate(
        arguments["input_ids"], attention_mask=arguments["attention_mask"], max_new_tokens=6, do_sample=False,
        eos_token_id=TOKENIZER.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    assert seen[0] == [TOKENIZER.decode(alone[0, arguments["input_ids"].shape[1] :], skip_special_tokens=True)]


def test_what_is_saved_opens_again(reader, tmp_path):
    language_model, _ = save_parts(tmp_path)
    reader.model.language_model.save_pretrained(language_model)
    reader.save(tmp_path / "model")
    again = open_reader(language_model, tmp_path / "model")
    assert again.generate(PROMPTS, max_new_tokens=6) == reader.generate(PROMPTS, max_new_tokens=6)


def test_pictures_and_places_have_to_agree(reader):
    with pytest.raises(InvalidArgument, match=r"media: expected 2 pictures, one for each <image> of prompt 0, got 1"):
        reader.generate([Document(f"{IMAGE}{IMAGE}a", torch.rand(1, 1, 16, 16))])


def test_a_folder_without_a_reader_and_a_language_model_of_another_kind(reader, tmp_path):
    language_model, _ = save_parts(tmp_path)
    with pytest.raises(InvalidArgument, match=r"checkpoint: expected a folder with reader.json, the 'model' of a run"):
        open_reader(language_model, tmp_path)
    reader.save(tmp_path / "model")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(InvalidArgument, match="language_model"):
        open_reader(language_model, tmp_path / "model")


def test_a_token_the_tokenizer_does_not_have_is_named(reader):
    strange = Reader(reader.model, TOKENIZER, ReaderFormat(image_token="<img>"))
    with pytest.raises(InvalidArgument, match="image_token: expected a token of the tokenizer, got '<img>'"):
        strange.generate(PROMPTS[:1])


def test_pictures_are_read_as_the_encoder_takes_them(tmp_path):
    files = [write_image(tmp_path / name, size=(40, 30)) for name in ("a.png", "b.jpg")]
    assert read_pictures(files, small_encoder()).shape == (2, 1, 16, 16)
    assert read_pictures([], small_encoder()).shape == (0, 1, 16, 16)
    with pytest.raises(InvalidArgument, match=r"media: expected picture files, got '.*c.png', which does not exist"):
        read_pictures([*files, tmp_path / "c.png"], small_encoder())
    (tmp_path / "d.png").write_text("no picture")
    with pytest.raises(DataError, match=r"d.png cannot be read as an image"):
        read_pictures([tmp_path / "d.png"], small_encoder())


@pytest.mark.parametrize(
    ("name", "tokens"), [("vit_mini", 64), ("slot_vit_mini", 8), ("resampler_vit_mini", 8), ("sepvit_mini", 16)]
)
def test_a_classifier_gives_the_tokens_that_its_head_reads_the_mean_of(name, tokens, tmp_path):
    classifier = create_model(name, channels=1, image_size=32).eval()
    classifier.save_pretrained(tmp_path)
    encoder, pictures = open_vision_encoder(tmp_path), torch.rand(2, 1, 32, 32)
    found = encoder(pictures)
    (mean,), (std,) = MEAN_AND_STD[1]
    assert found.shape[:2] == (2, tokens)
    features = classifier.forward_features((pictures - mean) / std)
    assert_close(found.mean(1), features if features.ndim == 2 else features.mean((1, 2)))
    assert encoder.num_features == found.shape[-1]
    assert (encoder.image_size, encoder.channels) == (32, 1)


def test_a_model_that_samples_tokens_gives_them_on_its_full_grid():
    loaded = open_model("ats_vit_mini")
    images = torch.rand(2, 3, 32, 32)
    assert_close(loaded.tokens(images), loaded.module.eval().feature_map(images).flatten(1, 2))


@pytest.mark.parametrize(("name", "tokens"), [("test_vit", 101), ("test_resnet", 25)])
def test_a_timm_model_gives_its_last_features_as_tokens(name, tokens, tmp_path):
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pth")
    encoder = VisionEncoder(open_model(f"timm:{name}", tmp_path / "weights.pth")).eval()
    pictures = torch.rand(2, encoder.channels, encoder.image_size, encoder.image_size)
    found = encoder(pictures)
    assert found.shape == (2, tokens, encoder.num_features)
    assert encoder.loaded.name == f"timm:{name}"
    features = encoder.module.forward_features((pictures - encoder.mean) / encoder.std)
    assert_close(found, features.flatten(2).transpose(1, 2) if features.ndim == 4 else features)


def test_a_folder_is_opened_frozen_and_in_evaluation_mode(tmp_path):
    _, folder = save_parts(tmp_path)
    encoder = open_vision_encoder(folder)
    assert encoder.image_size == ENCODER["image_size"]
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_language_model_comes_with_its_tokenizer(tmp_path):
    folder, _ = save_parts(tmp_path)
    model, tokenizer = open_language_model(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert not model.training


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match=r"model: expected timm:<name>, hf:<name or folder>, a folder"):
        open_vision_encoder(tmp_path / "nope")
    with pytest.raises(InvalidArgument, match=r"model: expected a model of timm's, got 'no_such'"):
        open_vision_encoder("timm:no_such")
    with pytest.raises(InvalidArgument, match=r"called timm:vit_small, with a colon"):
        open_vision_encoder("timm/vit_small")
    with pytest.raises(InvalidArgument, match=r"language_model: expected a folder or a hub name"):
        open_language_model(tmp_path)


def test_a_language_model_may_be_spelled_as_models_of_transformers_are(tmp_path):
    folder, _ = save_parts(tmp_path)
    assert open_language_model(f"hf:{folder}")[0].config.vocab_size == len(TOKENIZER)


def test_an_encoder_that_was_saved_with_the_old_spelling_opens(reader, tmp_path, monkeypatch):
    language_model, _ = save_parts(tmp_path)
    reader.save(tmp_path / "model")
    written = json.loads((tmp_path / "model" / "reader.json").read_text())
    del written[CHECKSUM]  # earlier versions wrote none
    assert written["vision_encoder"] == ""
    (tmp_path / "model" / "reader.json").write_text(json.dumps(written | {"vision_encoder": "timm/some"}))
    asked = []
    monkeypatch.setattr(readers, "open_vision_encoder", lambda name: asked.append(name) or small_encoder())
    open_reader(language_model, tmp_path / "model")
    assert asked == ["timm:some"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_token": "<img>"}, r"reader.json: expected the configuration that was written .*checksum differs"),
        ({"image_tokens": "<img>", CHECKSUM: None}, r"reader.json: expected keys among .*got 'image_tokens'"),
        ({"new_tokens": 5, CHECKSUM: None}, r"reader.json: new_tokens: expected list, got 5"),
    ],
)
def test_a_reader_that_was_changed_is_named(reader, tmp_path, changes, message):
    language_model, _ = save_parts(tmp_path)
    reader.save(tmp_path / "model")
    file = tmp_path / "model" / "reader.json"
    written = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    with pytest.raises(InvalidArgument, match=message):
        open_reader(language_model, tmp_path / "model")


def test_a_language_model_without_some_of_its_weights_is_not_opened(tmp_path):
    folder, _ = save_parts(tmp_path)
    weights = load_file(f"{folder}/model.safetensors")
    lost = sorted(weights)[0]
    save_file(
        {name: value for name, value in weights.items() if name != lost},
        f"{folder}/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InvalidArgument, match=r"language_model: expected all weights of it, got '.*' without"):
        open_language_model(folder)
