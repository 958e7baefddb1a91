"""What `narrows fit --task flamingo` trains. A module of its own: no other task needs transformers."""

from collections.abc import Mapping
from typing import Any

from narrows.adapters.flamingo import Flamingo
from narrows.demo.reader import digits_language_model, digits_vision_encoder
from narrows.hub.readers import open_language_model, open_vision_encoder
from narrows.training.flamingo import FlamingoTraining

DIGITS = "digits"


def flamingo(
    language_model: str,
    vision_encoder: str,
    *,
    flamingo: Mapping[str, Any] | None = None,
    **options: Any,
) -> FlamingoTraining:
    """A language model that learns to read images, by what is added to it.

    Args:
        language_model: a folder or a hub name of a causal language model; "digits": the small one of `narrows
            generate`, trained first where it is not there yet.
        vision_encoder: "timm:<name>", "hf:<name or folder>" or a folder with a model of narrows; "digits" likewise.
        flamingo: further arguments of `Flamingo`: `every`, `resampler`, `block`.
        options: those of `FlamingoTraining`.

    Raises:
        InvalidArgument: a language model or an encoder that is not there, or that cannot be supported.
    """
    text, tokenizer = open_language_model(digits_language_model() if language_model == DIGITS else language_model)
    encoder = open_vision_encoder(digits_vision_encoder() if vision_encoder == DIGITS else vision_encoder)
    return FlamingoTraining(Flamingo(text, vision_encoder=encoder, **(flamingo or {})), tokenizer, **options)
