"""The small language model of `narrows generate`: it knows words, and learns to read images of digits.

Three parts are trained, each where it is not in its folder yet: a Llama of a few dozen words on text alone, a
classifier of digit scenes on images alone, and what makes the one read the other, on both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from narrows.adapters.flamingo import Flamingo
from narrows.data import ImageDataModule
from narrows.data.document_module import InterleavedDataModule
from narrows.data.documents import END_OF_CHUNK, IMAGE, Document, InterleavedSet, questions_of
from narrows.data.scene_documents import digit_sentences, questions
from narrows.demo.cache import kept
from narrows.errors import MissingExtra
from narrows.files import replacing_folder
from narrows.hub.readers import (
    Reader,
    open_language_model,
    open_reader,
    open_vision_encoder,
    without_bars,
)
from narrows.models import create_model
from narrows.screen import Bar, track
from narrows.training.classification import Classification
from narrows.training.flamingo import FlamingoTraining
from narrows.training.run import LAST, fit, progress_trainer, quiet_lightning, train
from narrows.training.task import about_run, warmup_schedule

FOLDER = Path("runs") / "flamingo_digits"
ENCODER = "sepvit_mini"
ENCODER_EPOCHS = 20
LANGUAGE_MODEL: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
LANGUAGE_STEPS = 400
SENTENCES = 20_000
PADDING, BEGIN = "<pad>", "<s>"
FLAMINGO: dict[str, Any] = {
    "every": 2,
    "resampler": {"depth": 1, "num_latents": 4, "heads": 2, "head_dim": 32, "mlp_ratio": 2, "num_time_embeddings": 1},
    "block": {"heads": 2, "head_dim": 32, "mlp_ratio": 2},
}
TRAINING: dict[str, Any] = {"learning_rate": 3e-3, "weight_decay": 0.1, "warmup_steps": 30, "schedule": "cosine"}
EPOCHS = 5


@dataclass(frozen=True)
class Answers:
    """How questions about held-out scenes were answered, one word each.

    Args:
        questions: how many.
        exact: share answered with the right word and nothing else.
        swapped: the same when the images of a text change places, over words that have to change: it is high only if
            each word looks at its own image.
        alone: share that the language model answers without images; 0.1 is chance.
    """

    questions: int
    exact: float
    swapped: float
    alone: float

    def __str__(self) -> str:
        return (
            f"{self.questions} questions about held-out images, answered exactly: {self.exact:.1%}. "
            f"With the images of a text swapped: {self.swapped:.1%}. "
            f"By the same language model without images: {self.alone:.1%} (chance: 10 %)."
        )


def digits_reader(folder: Path = FOLDER, *, epochs: int = EPOCHS, device: str | torch.device = "cpu") -> Reader:
    """The reader of digit scenes; parts of it that are not in `folder` yet are trained."""
    language_model = digits_language_model(folder)
    encoder = digits_vision_encoder(folder, device=device)
    saved = folder / "flamingo"

    def make() -> None:
        torch.manual_seed(0)
        (text, tokenizer), seen = open_language_model(language_model), open_vision_encoder(encoder)
        task = FlamingoTraining(Flamingo(text, vision_encoder=seen, **FLAMINGO), tokenizer, **TRAINING)
        data = InterleavedDataModule("digits", tokenizer=tokenizer, image_size=seen.image_size, channels=seen.channels)
        trainer = _trainer(folder, epochs, device)
        with quiet_lightning():
            fit(trainer, task, data)
        Reader(task.flamingo, tokenizer).save(saved, about=about_run(trainer, best=False))
        (folder / "logs" / "flamingo" / LAST).unlink(missing_ok=True)

    return kept(saved, make, lambda: open_reader(language_model, saved))


def digits_vision_encoder(
    folder: Path = FOLDER, *, epochs: int = ENCODER_EPOCHS, device: str | torch.device = "cpu"
) -> Path:
    """The folder of a classifier of digit scenes, trained as `narrows compare` does unless it is there already."""
    saved = folder / "models" / f"{ENCODER}-seed0"

    def make() -> None:
        torch.manual_seed(0)
        task, images = Classification(create_model(ENCODER, channels=1)), ImageDataModule("digits")
        with quiet_lightning():
            train(task, ENCODER, images, folder, label="vision encoder, on images", epochs=epochs, device=device)
        (folder / "logs" / saved.name / LAST).unlink(missing_ok=True)

    kept(saved, make, lambda: open_vision_encoder(saved))
    return saved


def digits_language_model(folder: Path = FOLDER, *, steps: int = LANGUAGE_STEPS) -> Path:
    """The folder of a small Llama and its tokenizer, trained from scratch on text about digits unless it is there.

    In that text digits of captions are drawn at random: what an image shows cannot be learned from it.
    """
    saved = folder / "language_model"

    def make() -> None:
        texts = digit_sentences(SENTENCES, seed=0)
        tokenizer = digits_tokenizer(texts)
        model = _trained(tokenizer, texts, steps)
        with replacing_folder(saved) as unfinished, without_bars():
            tokenizer.save_pretrained(unfinished)
            model.save_pretrained(unfinished)

    kept(saved, make, lambda: open_language_model(saved))
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
    schedule = warmup_schedule(optimizer, warmup_steps=max(1, round(0.1 * steps)), total_steps=steps)
    with Bar("language model, on text", steps) as bar:
        for _ in range(steps):
            chosen = torch.randint(len(texts), (32,)).tolist()
            batch = tokenizer([texts[index] for index in chosen], return_tensors="pt", padding=True)
            padded = batch["attention_mask"] == 0
            loss = model(**batch, labels=batch["input_ids"].masked_fill(padded, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.tail(f"loss {loss.item():.2f}")
            bar.advance()
    return model.eval()


def examine(reader: Reader, prompts: InterleavedSet, *, batch_size: int = 64) -> Answers:
    """Ask about every image of `prompts`: captions (`DigitPrompts`), or conversations (`DigitChats`)."""
    documents = prompts.documents(range(len(prompts)))
    by_document = [_questions(document) for document in documents]
    asked = [prompt for found in by_document for prompt, _ in found]
    truth = [answer for found in by_document for _, answer in found]
    flipped = [replace(document, images=document.images.flip(0)) for document in documents]
    other_asked = [prompt for document in flipped for prompt, _ in _questions(document)]
    other_truth = [answer for found in by_document for _, answer in reversed(found)]
    moved = [index for index, (one, other) in enumerate(zip(truth, other_truth, strict=True)) if one != other]

    def share(given: Sequence[str], right: Sequence[str]) -> float:
        return sum(map(str.__eq__, given, right)) / max(1, len(right))

    def answers(label: str, of: Sequence[Document], **options: Any) -> list[str]:
        batches = [of[start : start + batch_size] for start in range(0, len(of), batch_size)]
        shown = track(batches, label, unit="batches")
        return [answer for batch in shown for answer in reader.generate(batch, max_new_tokens=4, **options)]

    return Answers(
        questions=len(truth),
        exact=share(answers("asking", asked), truth),
        swapped=share(
            answers("images swapped", [other_asked[index] for index in moved]),
            [other_truth[index] for index in moved],
        ),
        alone=share(answers("without images", asked, blind=True), truth),
    )


def _questions(document: Document) -> list[tuple[Document, str]]:
    """A prompt for each image of a document, and its answer."""
    if document.messages:
        return questions_of(document)
    return [(Document(one.text, document.images[: one.image + 1]), one.answer) for one in questions(document.text)]


def _trainer(folder: Path, epochs: int, device: str | torch.device) -> Trainer:
    logs = folder / "logs" / "flamingo"
    return progress_trainer(logs, label="Flamingo, on text and images", max_epochs=epochs, device=device)
