"""The frozen parts of the offline job: a language model of a few dozen words, and an encoder of digit scenes.

Each is trained when it is not in its folder yet, the one on text alone, the other on images alone.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from narrows.data import ImageDataModule
from narrows.data.documents import END_OF_CHUNK, IMAGE
from narrows.data.scene_documents import digit_sentences
from narrows.errors import MissingExtra
from narrows.hub.parts import without_bars
from narrows.training.classification import Classification
from narrows.training.optimisation import warmup_cosine
from narrows.training.run import quiet_lightning, train

FOLDER = Path("runs") / "flamingo_digits"
ENCODER = "sepvit_mini"
ENCODER_EPOCHS = 12
LANGUAGE_MODEL: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
LANGUAGE_STEPS = 400
SENTENCES = 20_000
PADDING, BEGIN = "<pad>", "<s>"


def digits_vision_encoder(folder: Path = FOLDER, *, epochs: int = ENCODER_EPOCHS, accelerator: str = "cpu") -> Path:
    """The folder of a classifier of digit scenes, trained as `narrows compare` does unless it is there already."""
    saved = folder / "models" / f"{ENCODER}-seed0"
    if not (saved / "config.json").is_file():
        torch.manual_seed(0)
        task, images = Classification(ENCODER, channels=1), ImageDataModule("digits")
        with quiet_lightning():
            train(
                task, ENCODER, images, folder, label="vision encoder, on images", epochs=epochs, accelerator=accelerator
            )
    return saved


def digits_language_model(folder: Path = FOLDER, *, steps: int = LANGUAGE_STEPS) -> Path:
    """The folder of a small Llama and its tokenizer, trained from scratch on text about digits unless it is there.

    In that text digits of captions are drawn at random: what an image shows cannot be learned from it.
    """
    saved = folder / "language_model"
    if not (saved / "config.json").is_file():
        texts = digit_sentences(SENTENCES, seed=0)
        tokenizer = digits_tokenizer(texts)
        model = _trained(tokenizer, texts, steps)
        begun = folder / "language_model.begun"
        with without_bars():
            tokenizer.save_pretrained(begun)
            model.save_pretrained(begun)
        begun.rename(saved)  # at once: a run that is cut short leaves nothing that looks whole
    return saved


def digits_tokenizer(texts: list[str]) -> Any:
    """A tokenizer of transformers whose tokens are the words of `texts`."""
    try:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingExtra("transformers", extra="transformers", purpose="make a language model") from error
    special = [PADDING, BEGIN, IMAGE, END_OF_CHUNK]
    spaced = " ".join(texts).replace(IMAGE, " ").replace(END_OF_CHUNK, " ")
    ids = {token: index for index, token in enumerate([*special, *sorted(set(spaced.split()))])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=PADDING))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        bos_token=BEGIN,
        eos_token=END_OF_CHUNK,
        unk_token=PADDING,
        extra_special_tokens=[IMAGE],
    )


def _trained(tokenizer: Any, texts: list[str], steps: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = LlamaConfig(**LANGUAGE_MODEL, **ends, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = warmup_cosine(optimizer, total_steps=steps)
    pause = 0.5 if sys.stderr.isatty() else 10
    bar = tqdm(range(steps), desc="language model, on text", unit="step", dynamic_ncols=True, mininterval=pause)
    for _ in bar:
        chosen = torch.randint(len(texts), (32,)).tolist()
        batch = tokenizer([texts[index] for index in chosen], return_tensors="pt", padding=True)
        padded = batch["attention_mask"] == 0
        loss = model(**batch, labels=batch["input_ids"].masked_fill(padded, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    return model.eval()
