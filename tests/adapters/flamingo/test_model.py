"""What a call takes, and what it leaves behind: nothing."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from narrows.adapters.flamingo import PRESETS, Flamingo
from narrows.adapters.flamingo.call import CALL, PASS
from narrows.adapters.flamingo.memory import read_memory
from narrows.errors import InvalidArgument, InvalidType, NarrowsError
from narrows.ops.media_attention import AllPrevious
from tests.adapters.flamingo.hosts import LATENT_DIM, MEDIA_TOKEN, flamingo, language_model, media, text
from tests.support import assert_close


class Encoder(nn.Module):
    """Images of 8 x 8 pixels to a map of 2 x 2 tokens; counts what it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features, self.encoded = LATENT_DIM, 0
        self.patches, self.norm = nn.Conv2d(3, LATENT_DIM, 4, 4), nn.BatchNorm2d(LATENT_DIM)

    def forward(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return self.norm(self.patches(images))


@pytest.fixture(scope="module")
def model() -> Flamingo:
    return flamingo(language_model("llama"), vision_encoder=Encoder(), media_dim=None)


def logits(model: Flamingo, tokens: Tensor, images: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, media=images, **{"use_cache": False, **kwargs}).logits


def added(model: Flamingo) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith(("resampler", "blocks"))}


def tokens_of(model: Flamingo, images: Tensor) -> Tensor:
    """`[B, M, (F,) N, D]`"""
    features = model.vision_encoder(images.flatten(0, -4)).flatten(2).transpose(1, 2)
    return features.unflatten(0, images.shape[:-3])


def test_images_clips_and_encoded_media(model: Flamingo) -> None:
    tokens = text("ab#cd#e", "#fg#hij")
    images = torch.randn(2, 2, 3, 8, 8)
    read = logits(model, tokens, images)
    assert_close(logits(model, tokens, tokens_of(model, images)), read, 1e-6)
    assert_close(logits(model, tokens, images[:, :, None]), read, 1e-6)  # a clip of one frame
    clips = torch.randn(2, 2, 10, 3, 8, 8)  # more frames than there are time embeddings
    bare = flamingo(language_model("llama"))
    bare.load_state_dict(added(model), strict=False)
    assert_close(logits(model, tokens, clips), logits(bare, tokens, tokens_of(model, clips)), 1e-6)
    assert (logits(model, tokens, clips) - logits(model, tokens, clips.flip(2))).abs().max() > 1e-4


def test_only_real_media_are_encoded_each_once(model: Flamingo) -> None:
    tokens, mask = text("ab#cd#e#", "#fghijk.", "abcdefgh"), torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()
    images = torch.randn(3, 3, 3, 8, 8)
    images[~mask] = torch.nan
    model.vision_encoder.encoded = 0
    together = logits(model, tokens, images, media_mask=mask)
    assert model.vision_encoder.encoded == 4
    for row, count in enumerate((3, 1, 0)):
        alone = images[row : row + 1][:, mask[row]] if count else None
        assert_close(together[row : row + 1], logits(model, tokens[row : row + 1], alone), 1e-5)


def test_encoded_media_may_have_different_lengths(model: Flamingo) -> None:
    sounds, mask = media(1, 2, tokens=6), torch.ones(1, 2, 6, dtype=torch.bool)
    mask[0, 1, 4:] = False
    sounds[~mask] = torch.nan
    short = torch.ones(1, 1, 4, dtype=torch.bool)
    one = logits(model, text("abc#ef"), sounds[:, 1:], media_mask=mask[:, 1:])
    assert_close(one, logits(model, text("abc#ef"), sounds[:, 1:, :4], media_mask=short), 1e-6)


def test_media_locations_in_place_of_tokens_and_embeddings_in_place_of_ids(model: Flamingo) -> None:
    tokens, images = text("ab#cd#e"), torch.randn(1, 2, 3, 8, 8)
    read, locations = logits(model, tokens, images), tokens == MEDIA_TOKEN
    embeddings = model.language_model.get_input_embeddings()(tokens)
    assert torch.equal(logits(model, None, images, inputs_embeds=embeddings, media_locations=locations), read)
    without = flamingo(model.language_model, media_token_id=None, opened=False)
    without.load_state_dict(added(model), strict=False)
    encoded = tokens_of(model, images)
    elsewhere = text("abxcdxe")
    model_locations = logits(model, elsewhere, images, media_locations=locations)
    assert_close(logits(without, elsewhere, encoded, media_locations=locations), model_locations, 1e-5)
    without.remove()


def test_text_alone_reads_nothing(model: Flamingo) -> None:
    tokens = text("abcdef", "ghijkl")
    alone = logits(model, tokens)
    assert torch.equal(alone, logits(model, tokens, torch.randn(2, 0, 3, 8, 8)))
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert torch.equal(alone, logits(model, tokens, torch.randn(2, 2, 3, 8, 8), media_mask=nothing))
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 9)


@pytest.mark.parametrize("images", [None, torch.randn(2, 1, 3, 8, 8)], ids=["no media", "media"])
def test_every_added_parameter_takes_part_in_every_step(images: Tensor | None) -> None:
    """DDP waits for the gradient of each of them."""
    model = flamingo(language_model("llama"), vision_encoder=Encoder(), media_dim=None)
    model.train()
    tokens = text("abcdef", "ghijkl") if images is None else text("ab#def", "gh#jkl")
    assert (model(tokens, media=images, labels=tokens).loss * 1).requires_grad
    model(tokens, media=images, labels=tokens).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"resampler", "blocks"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained)


def test_what_is_frozen_stays_as_it_is() -> None:
    encoder = Encoder()
    model = flamingo(language_model("opt", dropout=0.5), vision_encoder=encoder, media_dim=None).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    tokens, images = text("ab#cde"), torch.randn(1, 1, 3, 8, 8)
    assert torch.equal(model(tokens, media=images).logits, model(tokens, media=images).logits)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    loose = flamingo(language_model("opt", dropout=0.5), freeze=False).train()
    assert all(parameter.requires_grad for parameter in loose.parameters())
    assert all(module.training for module in loose.modules())


def test_a_block_after_its_layer_leaves_text_without_media_alone() -> None:
    lm, tokens, images = language_model("gpt2"), text("ab#cde", "fghijk"), media(2, 1)
    hidden: list[Tensor] = []
    lm.transformer.ln_f.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    bare = lm(input_ids=tokens).logits
    behind = flamingo(lm, every=(2,), placement="after", block={"feed_forward_without_media": False})
    read = logits(behind, tokens, images, media_mask=torch.tensor([[True], [False]]))
    assert torch.equal(read[1], bare[1])
    assert torch.equal(read[0, :2], bare[0, :2])
    assert (read[0, 2:] != bare[0, 2:]).any(-1).all()
    latents = behind.resampler(images[:1])
    expected = behind.blocks[0](hidden[0][:1], latents, tokens[:1] == MEDIA_TOKEN)
    assert_close(hidden[1][:1], expected)  # the block behind the last layer is the last to act


@pytest.mark.parametrize("family", ["gpt2", "llama", "mpt"])  # layers that return a tensor, and one that returns more
def test_blocks_after_their_layers_work_with_a_cache(family: str) -> None:
    behind = flamingo(language_model(family), placement="after", attend=AllPrevious())
    options = {"media": media(1, 2), "max_new_tokens": 5, "do_sample": False}
    cached = behind.generate(text("ab#c#de"), **options)
    assert torch.equal(cached, behind.generate(text("ab#c#de"), use_cache=False, **options))


def test_routing_tells_what_each_token_reads(model: Flamingo) -> None:
    tokens, images = text("ab#cd#e"), torch.randn(1, 2, 3, 8, 8)
    first, last = model.routing(tokens, media=images)
    assert first.weights.shape == (1, 2, 2, 7)
    assert first.carriers == "media"
    for routing in (first, last):
        shown = routing.weights.mean(1)[0].round().tolist()
        assert shown == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]


def test_two_threads_do_not_see_each_other(model: Flamingo) -> None:
    prompts = [text("ab#cd#e"), text("f#g")]
    images = [torch.randn(1, 2, 3, 8, 8), torch.randn(1, 1, 3, 8, 8)]
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = [model.generate(p, media=i, **options) for p, i in zip(prompts, images, strict=True)]
    bare = model.language_model.generate(prompts[1], **options)
    results: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}

    def work(number: int) -> None:
        for _ in range(4):
            if number == 2:
                results[2].append(model.language_model.generate(prompts[1], **options))
            else:
                results[number].append(model.generate(prompts[number], media=images[number], **options))

    threads = [threading.Thread(target=work, args=(number,)) for number in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, right in enumerate((*expected, bare)):
        assert len(results[number]) == 4
        assert all(torch.equal(result, right) for result in results[number])


@pytest.fixture
def failing(model: Flamingo) -> Iterator[None]:
    """The language model fails behind its first layer."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = model.language_model.model.layers[1].register_forward_pre_hook(fail)
    yield
    hook.remove()


def test_an_exception_leaves_nothing_behind(model: Flamingo, request: pytest.FixtureRequest) -> None:
    tokens, images = text("ab#cd#e"), torch.randn(1, 2, 3, 8, 8)
    bare, read = model.language_model(input_ids=tokens).logits, logits(model, tokens, images)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    request.getfixturevalue("failing")
    for run in (model, model.generate):
        with pytest.raises(RuntimeError, match="out of memory"):
            run(tokens, media=images)
        assert CALL.get() is None
        assert PASS.get() is None
    hooks = model.language_model.model.layers[1]._forward_pre_hooks
    hooks.pop(next(reversed(hooks)))
    assert torch.equal(model.language_model(input_ids=tokens).logits, bare)
    assert torch.equal(logits(model, tokens, images), read)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_precisions_may_differ() -> None:
    lm = language_model("llama").bfloat16()
    tokens, images = text("ab#cd#e"), media(1, 2)
    bare = lm(input_ids=tokens).logits
    closed = flamingo(lm, opened=False, dtype=torch.float32)
    assert torch.equal(logits(closed, tokens, images), bare)
    assert {parameter.dtype for parameter in closed.blocks.parameters()} == {torch.float32}
    closed.remove()
    same = flamingo(lm, dtype="bfloat16")
    assert {parameter.dtype for parameter in same.blocks.parameters()} == {torch.bfloat16}
    assert logits(same, tokens, images).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_undoes_what_was_done_to_its_own_language_model(copied: Callable[[Flamingo], Flamingo]) -> None:
    model = flamingo(language_model("llama"))
    model(text("ab#cd#e"), media=media(1, 2), labels=text("ab#cd#e")).loss.backward()
    twin = copied(model)
    assert torch.equal(logits(twin, text("ab#cd#e"), media(1, 2)), logits(model, text("ab#cd#e"), media(1, 2)))
    lm = twin.remove()
    assert all(parameter.requires_grad for parameter in lm.parameters())
    assert not any(parameter.requires_grad for parameter in model.language_model.parameters())
    assert torch.equal(lm(input_ids=text("ab")).logits, language_model("llama")(input_ids=text("ab")).logits)
    model.remove()
    assert all(parameter.requires_grad for parameter in model.language_model.parameters())


GUIDED: dict[str, dict[str, Any]] = {
    "the last token of the prompt": {},
    "a text": {"negative_prompt_ids": text("zy#x")},
    "a text and its own media": {"negative_prompt_ids": text("zy#x"), "negative_media": media(1, 3)[:, 2:]},
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", GUIDED)
def test_guidance_compares_with_text_that_sees_no_media_or_its_own(negative: str, use_cache: bool) -> None:
    model, prompt, images, given = flamingo(language_model("llama")), text("ab#c#de"), media(1, 2), GUIDED[negative]
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": use_cache, "guidance_scale": 2.5}
    written = model.generate(prompt, media=images, return_dict_in_generate=True, output_scores=True, **options, **given)
    without = given.get("negative_prompt_ids", prompt[:, -1:])
    for step, scores in enumerate(written.scores):
        new = written.sequences[:, 7 : 7 + step]
        pairs = ((prompt, images), (without, given.get("negative_media")))
        likely = []
        for start, seen in pairs:
            places = (start == MEDIA_TOKEN) & (seen is not None)
            locations = torch.cat((places, torch.zeros_like(new, dtype=torch.bool)), 1)
            whole = logits(model, torch.cat((start, new), 1), seen, media_locations=locations)
            likely.append(whole[:, -1].log_softmax(-1))
        assert_close(scores, 2.5 * (likely[0] - likely[1]) + likely[1], 1e-5)
    by_config = GenerationConfig(max_new_tokens=3, do_sample=False, guidance_scale=2.5, use_cache=use_cache)
    assert torch.equal(model.generate(prompt, media=images, generation_config=by_config, **given), written.sequences)
    assert by_config.guidance_scale == 2.5


def test_texts_that_are_packed_and_read_elsewhere_are_refused(model: Flamingo) -> None:
    with pytest.raises(InvalidArgument, match=r"cache_implementation: .* got 'paged'"):
        model.generate(text("ab#"), media=torch.randn(1, 1, 3, 8, 8), cache_implementation="paged")


def test_two_on_one_language_model_read_their_own_media_in_one_cache() -> None:
    lm, first, second = language_model("llama"), text("ab#c"), text("de#f")
    images, sounds = flamingo(lm), flamingo(lm)
    for gated in sounds.blocks:
        nn.init.constant_(gated.attn_gate, -1.0)
    cache = DynamicCache(config=lm.config)
    options = {"past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        images(first, media=media(1, 1), **options)
        sounds(second, media=media(1, 1).flip(-1), **options)
        lm(input_ids=text("gh"), **options)
        images(text("i#j"), media=media(1, 2)[:, 1:], **options)
        assert cache.get_seq_length() == 13
        assert read_memory(cache, images._hooks.key).locations[0].nonzero().flatten().tolist() == [2, 11]
        assert read_memory(cache, sounds._hooks.key).locations[0].nonzero().flatten().tolist() == [6]
    with pytest.raises(InvalidArgument, match="language_model: expected a language model that no Flamingo is made of"):
        flamingo(images)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_float32_and_finite_in_any_mixed_precision(
    kind: torch.dtype, autocast: torch.dtype | None
) -> None:
    model = flamingo(language_model("llama").to(kind), vision_encoder=Encoder(), media_dim=None)
    tokens, images = text("ab#cd#e"), torch.randn(1, 2, 3, 8, 8)
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with context:
        output = model(tokens, media=images, labels=tokens, use_cache=False)
        written = model.generate(tokens, media=images, max_new_tokens=3, do_sample=False)
    output.loss.backward()
    assert written.shape == (1, 10)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            assert parameter.grad.isfinite().all()
            assert (parameter.grad != 0).any()


def test_a_copy_is_a_model_of_its_own() -> None:
    model = flamingo(language_model("llama"))
    tokens, images = text("ab#cd#e"), media(1, 2)
    read, twin = logits(model, tokens, images), copy.deepcopy(model)
    assert torch.equal(logits(twin, tokens, images), read)
    nn.init.zeros_(model.blocks[0].attn_gate)
    assert torch.equal(logits(twin, tokens, images), read)
    assert not torch.equal(logits(model, tokens, images), read)


def test_a_removed_flamingo_says_so() -> None:
    model = flamingo(language_model("llama"))
    model.remove()
    with pytest.raises(NarrowsError, match="was removed from its language model"):
        model(text("ab"))


def test_what_is_wrong_is_said(model: Flamingo) -> None:
    tokens, images = text("ab#cd#e", "#fghij#", "#klmnop"), torch.randn(3, 2, 3, 8, 8)
    with pytest.raises(
        InvalidArgument, match=r"media: expected 1 media in row 2.* got 2, and 1 of 3 rows wrong.*media_mask"
    ):
        model(tokens, media=images)
    with pytest.raises(InvalidArgument, match=r"expected 2 media in row 0.* got 0, and 3 of 3 rows wrong"):
        model(tokens)
    with pytest.raises(InvalidArgument, match="media for each of 3 rows of text, got 2"):
        model.generate(tokens, media=images[:2])
    with pytest.raises(
        InvalidArgument, match=r"media: expected shape \[B, M, N, D\] with D = 12, got shape \(3, 2, 5, 7\)"
    ):
        model(tokens, media=torch.randn(3, 2, 5, 7))
    with pytest.raises(InvalidArgument, match=r"media: expected one of \['\[B, M, 3, H, W\]', .*got shape \(3, 8, 8\)"):
        model(tokens, media=torch.randn(3, 8, 8))
    with pytest.raises(InvalidArgument, match="input_ids: expected the text, or inputs_embeds"):
        model(media=images)
    bare = flamingo(language_model("llama"))
    with pytest.raises(InvalidArgument, match=r"Images need a vision_encoder"):
        bare(tokens, media=torch.randn(3, 2, 1, 3, 8, 8))


@pytest.mark.compiled  # jaxtyping would speak first
def test_what_is_wrong_with_a_mask_or_a_type_is_said(model: Flamingo) -> None:
    tokens, images = text("ab#cd#e", "#fghij#"), torch.randn(2, 2, 3, 8, 8)
    with pytest.raises(InvalidArgument, match=r"media_mask: expected shape \[B, M\] = \(2, 2\)"):
        model(tokens, media=images, media_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(InvalidType, match="media: expected a floating-point tensor"):
        model(tokens, media=images.to(torch.uint8))


def test_what_is_wrong_with_the_arguments_is_said() -> None:
    lm = language_model("llama")
    with pytest.raises(InvalidArgument, match="media_dim: expected the width of the media's tokens"):
        Flamingo(lm)
    with pytest.raises(InvalidArgument, match="every: expected a number up to 3, or some of the layers 0 to 2, got 4"):
        Flamingo(lm, media_dim=4)
    with pytest.raises(InvalidArgument, match=r"every: .* got \(1, 3\)"):
        Flamingo(lm, media_dim=4, every=(1, 3))
    with pytest.raises(
        InvalidArgument, match="dtype: expected a floating-point dtype, such as 'bfloat16', got 'bfloat'"
    ):
        Flamingo(lm, media_dim=4, every=1, dtype="bfloat")
    with pytest.raises(InvalidArgument, match="placement: expected one of"):
        Flamingo(lm, media_dim=4, every=1, placement="inside")
    with pytest.raises(InvalidType, match=r"language_model: expected a causal .* of transformers, got Linear"):
        Flamingo(nn.Linear(2, 2), media_dim=4)
    assert not lm._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in lm.parameters())


# Table 1: billions of parameters of language model, vision encoder, gated blocks, resampler, and altogether.
PAPER = {
    "flamingo_3b": (24, 2048, 24, 1.4, 1.2, 3.2),
    "flamingo_9b": (40, 4096, 10, 7.1, 1.6, 9.3),
    "flamingo_80b": (80, 8192, 12, 70.0, 10.0, 80.0),
}
VISION, RESAMPLER = 0.435, 0.194


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_papers_shapes_and_near_its_table(name: str) -> None:
    num_layers, width, num_blocks, language, blocks, total = PAPER[name]
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=8, hidden_size=width, num_hidden_layers=num_layers, num_attention_heads=8, intermediate_size=8
        )
        model = Flamingo(LlamaForCausalLM(config), **PRESETS[name])
    assert len(model.blocks) == num_blocks

    def billions(module: torch.nn.Module) -> float:
        return sum(parameter.numel() for parameter in module.parameters()) / 1e9

    # Table 5: inner width = that of the text, keys and values from 1536, feed-forward of four widths; norms and gates.
    assert billions(model.blocks) * 1e9 == num_blocks * (width * (2 * width + 2 * 1536 + 8 * width) + 4 * width + 2)
    per_layer = 12 * 1536**2 + 6 * 1536
    assert billions(model.resampler) * 1e9 == 6 * per_layer + (64 + 8) * 1536 + 2 * 1536
    assert abs(language + VISION + billions(model.blocks) + billions(model.resampler) - total) / total < 0.025
    assert abs(billions(model.blocks) - blocks) / blocks < 0.17
    assert abs(billions(model.resampler) - RESAMPLER) / RESAMPLER < 0.13
