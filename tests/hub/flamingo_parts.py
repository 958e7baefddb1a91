"""Small parts: a Llama of two layers, its tokenizer, an encoder of 16-pixel digit scenes, all untrained."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrows.adapters.flamingo import Flamingo
from narrows.data.document_module import InterleavedDataModule
from narrows.data.images import MEAN_AND_STD
from narrows.data.scene_documents import digit_sentences
from narrows.demo.reader import digits_tokenizer
from narrows.hub.models import LoadedModel
from narrows.hub.readers import VisionEncoder
from narrows.models import create_model
from narrows.training.flamingo import FlamingoTraining

TOKENIZER = digits_tokenizer(digit_sentences(300, seed=0))
ENCODER = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "image_size": 16, "channels": 1}
FLAMINGO = {
    "every": 1,
    "resampler": {"depth": 1, "num_latents": 2, "heads": 1, "head_dim": 8},
    "block": {"heads": 1, "head_dim": 8},
}


def small_language_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(TOKENIZER), max_position_embeddings=128))


def small_encoder() -> VisionEncoder:
    mean, std = MEAN_AND_STD[1]
    return VisionEncoder(LoadedModel("small", create_model("vit_mini", **ENCODER).eval(), (16, 16), mean, std))


def small_task(**options: Any) -> FlamingoTraining:
    flamingo = Flamingo(small_language_model(), vision_encoder=small_encoder(), **FLAMINGO)
    return FlamingoTraining(flamingo, TOKENIZER, **{"learning_rate": 1e-2, "warmup_steps": 2, **options})


def small_data(**options: Any) -> InterleavedDataModule:
    return InterleavedDataModule("digits", **{"tokenizer": TOKENIZER, "image_size": 16, "batch_size": 4, **options})


def open_gates(task: FlamingoTraining) -> FlamingoTraining:
    """As if it had learned something: with closed gates nothing can be seen of images."""
    for block in task.flamingo.blocks:
        torch.nn.init.constant_(block.attn_gate, 0.8)
        torch.nn.init.constant_(block.ff_gate, -0.5)
    return task


def save_parts(folder: Path) -> tuple[str, str]:
    """The language model with its tokenizer, and the encoder's classifier, as folders."""
    TOKENIZER.save_pretrained(folder / "lm")
    small_language_model().save_pretrained(folder / "lm")
    create_model("vit_mini", **ENCODER).save_pretrained(folder / "encoder")
    return str(folder / "lm"), str(folder / "encoder")
