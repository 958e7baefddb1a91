"""The offline job: a language model that knows words alone learns to read images, by what is added to it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from tqdm import tqdm

from narrows.data.document_module import InterleavedDataModule
from narrows.data.documents import Document
from narrows.data.scene_documents import DigitPrompts, questions
from narrows.demo.reader_parts import FOLDER, digits_language_model, digits_vision_encoder
from narrows.hub.parts import VisionEncoder
from narrows.hub.readers import FORMAT_FILE, Reader, open_reader
from narrows.training.flamingo import FlamingoTraining
from narrows.training.progress import RunProgress
from narrows.training.run import fit, quiet_lightning

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


def digits_reader(folder: Path = FOLDER, *, epochs: int = EPOCHS, accelerator: str = "cpu") -> Reader:
    """The trained reader of digit scenes; whatever of it is not in `folder` yet is trained, each part once."""
    language_model = digits_language_model(folder)
    encoder = digits_vision_encoder(folder, accelerator=accelerator)
    saved = folder / "flamingo"
    if not (saved / FORMAT_FILE).is_file():
        torch.manual_seed(0)
        task = FlamingoTraining(str(language_model), str(encoder), flamingo=FLAMINGO, **TRAINING)
        seen = task.vision_encoder
        assert isinstance(seen, VisionEncoder)
        data = InterleavedDataModule(
            "digits", tokenizer=task.tokenizer, image_size=seen.image_size, channels=seen.channels
        )
        with quiet_lightning():
            fit(_trainer(folder, epochs, accelerator), task, data)
        Reader(task.flamingo, task.tokenizer).save(saved)
    return open_reader(language_model, saved)


def examine(reader: Reader, prompts: DigitPrompts, *, batch_size: int = 64) -> Answers:
    """Ask about every image of `prompts`."""
    documents = prompts.documents(range(len(prompts)))
    asked, truth = _asked(documents)
    turned = [replace(document, images=document.images.flip(0)) for document in documents]
    turned_truth = [answer for document in documents for answer in reversed(_answers(document))]
    moved = [index for index, (one, other) in enumerate(zip(truth, turned_truth, strict=True)) if one != other]
    turned_asked, _ = _asked(turned)

    def share(given: Sequence[str], right: Sequence[str]) -> float:
        return sum(map(str.__eq__, given, right)) / max(1, len(right))

    def answers(label: str, of: Sequence[Document], **options: Any) -> list[str]:
        batches = [of[start : start + batch_size] for start in range(0, len(of), batch_size)]
        bar = tqdm(batches, desc=label, unit="batch", leave=False)
        return [answer for batch in bar for answer in reader.generate(batch, max_new_tokens=4, **options)]

    return Answers(
        questions=len(truth),
        exact=share(answers("asking", asked), truth),
        swapped=share(
            answers("images swapped", [turned_asked[index] for index in moved]),
            [turned_truth[index] for index in moved],
        ),
        alone=share(answers("without images", asked, blind=True), truth),
    )


def _asked(documents: Sequence[Document]) -> tuple[list[Document], list[str]]:
    """A prompt for each image of the documents, and its answer."""
    found = [(document, question) for document in documents for question in questions(document.text)]
    prompts = [Document(question.text, document.images[: question.image + 1]) for document, question in found]
    return prompts, [question.answer for _, question in found]


def _answers(document: Document) -> list[str]:
    return [question.answer for question in questions(document.text)]


def _trainer(folder: Path, epochs: int, accelerator: str) -> Trainer:
    logs = folder / "logs" / "flamingo"
    shutil.rmtree(logs, ignore_errors=True)
    return Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=1,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        callbacks=[RunProgress("what is added, on both")],
        logger=CSVLogger(folder / "logs", name="flamingo", version=""),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
