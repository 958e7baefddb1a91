import pytest
import torch

from narrows.errors import InvalidArgument
from narrows.jobs.fit_flamingo import flamingo
from tests.hub.flamingo_parts import FLAMINGO, save_parts


def test_bad_input_is_explained(tmp_path):
    language_model, encoder = save_parts(tmp_path)
    for options, message in (
        ({"language_model": str(tmp_path / "nope")}, "language_model: expected a folder or a hub name"),
        ({"vision_encoder": str(tmp_path / "nope")}, "model: expected timm:<name>, hf:<name or folder>, a folder"),
        ({"vision_encoder": language_model}, "config.json: expected 'architecture' among"),
        ({"flamingo": FLAMINGO, "schedule": "linear"}, "schedule: expected one of"),
        (
            {"new_tokens": ["<video>"], "flamingo": FLAMINGO},
            "new_tokens: expected tokens of the tokenizer, with rows in the language",
        ),
        ({"flamingo": {"every": 9}}, "every: expected a number up to 2"),
    ):
        with pytest.raises(InvalidArgument) as raised:
            flamingo(**({"language_model": language_model, "vision_encoder": encoder} | options))
        assert message in str(raised.value)


def test_the_precision_of_what_trains_is_a_word_of_the_configuration(tmp_path):
    language_model, encoder = save_parts(tmp_path)
    for given, kind in (({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)):
        task = flamingo(language_model, encoder, flamingo={**FLAMINGO, **given})
        assert {parameter.dtype for parameter in task.flamingo.blocks.parameters()} == {kind}
