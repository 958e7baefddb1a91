"""The paper's sizes, counted on the meta device."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrows.adapters.flamingo import PRESETS, Flamingo

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
