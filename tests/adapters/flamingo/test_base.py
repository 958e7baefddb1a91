"""A `Flamingo` in the Trainer of transformers: trained, evaluated, saved, resumed, opened again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from narrows.adapters.flamingo import Flamingo
from narrows.errors import InvalidArgument
from tests.adapters.flamingo.hosts import flamingo, language_model, media, text

PADDED = text("ab#c#de.")[0]


def examples() -> list[dict[str, Tensor]]:
    """Texts of seven tokens and one of padding, with two media each."""
    real = PADDED != 0
    one = {"input_ids": PADDED, "attention_mask": real.long(), "labels": PADDED.masked_fill(~real, -100)}
    return [{**one, "media": media(1, 2)[0].roll(number, 0)} for number in range(8)]


def trained(
    model: Flamingo, folder: Path, *, resume: str | None = None, **options: Any
) -> tuple[Trainer, list[float], list[float]]:
    """A trainer after four steps, its losses and those of evaluation."""
    arguments = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    own = {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    settings = TrainingArguments(output_dir=str(folder), disable_tqdm=True, **arguments, **own, **options)
    trainer = Trainer(model=model, args=settings, train_dataset=examples(), eval_dataset=examples()[:3])
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    losses = [[entry[kind] for entry in history if kind in entry] for kind in ("loss", "eval_loss")]
    return trainer, losses[0], losses[1]


def read(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(text("ab#c#d"), media=media(1, 2)).logits


def test_it_is_a_model_of_transformers() -> None:
    lm = language_model("llama")
    model = flamingo(lm)
    assert isinstance(model, PreTrainedModel)
    assert model.config is lm.config
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.get_input_embeddings() is lm.get_input_embeddings()
    assert model.get_output_embeddings() is lm.get_output_embeddings()
    assert repr(model).startswith("Flamingo(")
    assert lm.config._attn_implementation == "sdpa"


def test_the_trainer_trains_saves_what_was_added_and_resumes_exactly(tmp_path: Path) -> None:
    tied = language_model("llama", tie_word_embeddings=True)
    frozen = {name: value.clone() for name, value in tied.state_dict().items()}
    model = flamingo(tied)
    trainer, losses, held_out = trained(model, tmp_path)
    assert losses[-1] < losses[0]
    assert held_out[-1] < held_out[0]
    assert all(torch.equal(value, frozen[name]) for name, value in tied.state_dict().items())

    # The first loss is that of the seven real tokens, given their media.
    fresh = flamingo(language_model("llama", tie_word_embeddings=True))
    rows = [next(iter(trainer.get_train_dataloader()))]
    assert set(rows[0]) == {"input_ids", "attention_mask", "labels", "media"}
    logits = fresh(**{name: value for name, value in rows[0].items() if name != "labels"}).logits
    flat = logits[:, :-1].flatten(0, 1), rows[0]["labels"][:, 1:].flatten()
    assert fresh(**rows[0]).loss.item() == pytest.approx(nn.functional.cross_entropy(*flat).item(), abs=1e-5)

    trainer.save_model(str(tmp_path / "final"))
    with safe_open(tmp_path / "final" / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"resampler", "blocks"}  # noqa: SIM118
    again = Flamingo.from_pretrained(
        tmp_path / "final", language_model=language_model("llama", tie_word_embeddings=True)
    )
    assert torch.equal(read(again), read(model))

    trained(fresh, tmp_path / "other", resume=str(tmp_path / "checkpoint-2"))
    assert torch.equal(read(fresh), read(model))


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"load_best_model_at_end": True},
    ],
    ids=str,
)
def test_options_of_the_trainer_change_no_step(options: dict[str, Any], tmp_path: Path) -> None:
    model, plain = flamingo(language_model("llama")), flamingo(language_model("llama"))
    _, losses, held_out = trained(model, tmp_path / "one", **options)
    _, expected, theirs = trained(plain, tmp_path / "other")
    assert losses == pytest.approx(expected, abs=1e-4)
    assert held_out == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_who_goes_through_the_head_themselves_gets_hidden_states_that_read_media(lora: bool) -> None:
    """TRL's trainers do, in pieces: tried with SFTTrainer 1.16, whose losses were those of the Trainer."""
    lm = language_model("llama")
    if lora:
        lm = get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = flamingo(lm).eval()
    given = {"input_ids": text("ab#c#de."), "attention_mask": (text("ab#c#de.") != 0).long(), "media": media(1, 2)}
    hidden = model.base_model(**given, use_cache=False).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**given).logits)
    blind = model.base_model(**given | {"media": media(1, 2).roll(1, 1)}).last_hidden_state
    assert not torch.allclose(blind, hidden)


def test_hidden_states_without_a_learned_prompt_are_refused() -> None:
    prompted = get_peft_model(language_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(InvalidArgument, match="no prompt of peft where hidden states are asked for"):
        flamingo(prompted).base_model(text("ab#c#de."), media=media(1, 2))


def test_smoothed_labels_are_those_of_the_next_token(tmp_path: Path) -> None:
    """The Trainer shifts the labels of what it knows for a causal language model, by the name of its class."""
    _, losses, _ = trained(flamingo(language_model("llama")), tmp_path / "one", label_smoothing_factor=1e-6)
    _, expected, _ = trained(flamingo(language_model("llama")), tmp_path / "other")
    assert losses == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_low_precision_of_the_language_model_leaves_what_trains_in_float32(kind: str, tmp_path: Path) -> None:
    model = flamingo(language_model("llama").to(getattr(torch, kind)))
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    _, losses, _ = trained(model, tmp_path, bf16=kind == "bfloat16", max_grad_norm=1.0)
    assert losses[-1] < losses[0]
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert value.dtype == torch.float32
            assert value.isfinite().all()
            if name != "resampler.time_embeddings":  # images use the first of them
                assert (value != before[name]).float().mean() > 0.99  # no step is lost in rounding


@pytest.mark.parametrize("order", ["lora inside", "lora afterwards"])
def test_lora_trains_is_saved_and_comes_back_with_it(order: str, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    if order == "lora inside":
        model = flamingo(get_peft_model(language_model("llama"), lora), freeze=False)
    else:
        model = flamingo(language_model("llama"))
        get_peft_model(model.language_model, lora)
    trainer, losses, _ = trained(model, tmp_path)
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "final"))
    with safe_open(tmp_path / "final" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"lora" in name or name.startswith(("resampler.", "blocks.")) for name in names} == {True}
    assert sum("lora" in name for name in names) == 12
    assert json.loads((tmp_path / "final" / "adapter_config.json").read_text())["r"] == 2
    again = Flamingo.from_pretrained(tmp_path / "final", language_model=language_model("llama"))
    assert torch.equal(read(again), read(model))
    with again.language_model.disable_adapter():
        assert not torch.equal(read(again), read(model))


def test_a_language_model_that_trains_is_saved_with_it(tmp_path: Path) -> None:
    model = flamingo(language_model("llama", tie_word_embeddings=True), freeze=False)
    nn.init.normal_(model.language_model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(tmp_path)
    again = Flamingo.from_pretrained(tmp_path, language_model=language_model("llama", tie_word_embeddings=True))
    assert torch.equal(read(again), read(model))


def test_sharded_weights_that_somebody_else_gathered_are_the_ones_saved(tmp_path: Path) -> None:
    model = flamingo(language_model("llama"))
    given = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "other", state_dict=given, is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path, state_dict=given)
    again = Flamingo.from_pretrained(tmp_path, language_model=language_model("llama"))
    assert torch.equal(again.resampler.latents, model.resampler.latents + 1)
