"""What kept tokens save a vision-language model, against averaging the grid of its features.

The LLaVA is made here, with random weights: agreement says how far an answer moves when tokens are left out, not how
good it is. Prints a table in Markdown and writes results/kept_tokens.csv.
"""

import csv
from pathlib import Path
from typing import Any

import torch
from skimage import data
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from narrows.adapters.token_reduction import METHODS, reduce_tokens
from narrows.adapters.token_reduction.kept_tokens import KeptTokens, downsample

IMAGE, SIDE, PATCH, PROMPTS, TEXT = 999, 96, 8, 24, 24
# Of the grid: what each block keeps. LLaVA reads the last block but one.
BUDGETS: dict[float, dict[int, int | float | None]] = {0.5: {2: 0.5}, 0.25: {2: 0.5, 4: 0.25}}


def made_llava() -> Any:
    """A LLaVA of eight blocks in the tower and six layers in the language model."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_factor=4.0,
    )
    text = LlamaConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        initializer_range=0.15,
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


def photographs() -> Tensor:
    """Crops of photographs, normalised."""
    generator, found = torch.Generator().manual_seed(0), []
    pictures = [
        torch.from_numpy(picture()).permute(2, 0, 1) / 255 for picture in (data.astronaut, data.coffee, data.cat)
    ]
    for index in range(PROMPTS):
        picture = pictures[index % len(pictures)]
        size = int(torch.randint(SIDE, 2 * SIDE, (), generator=generator))
        y, x = (int(torch.randint(0, side - size, (), generator=generator)) for side in picture.shape[1:])
        crop = picture[None, :, y : y + size, x : x + size]
        found.append(F.interpolate(crop, size=(SIDE, SIDE), mode="bilinear", antialias=True))
    images = torch.cat(found)
    return (images - 0.45) / 0.27


def cache_bytes(cache: Any) -> int:
    """Of keys and values."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def main() -> None:
    """Every method at every budget."""
    model, grid = made_llava(), (SIDE // PATCH) ** 2
    ids = torch.randint(0, 900, (PROMPTS, grid + TEXT), generator=torch.Generator().manual_seed(1))
    ids[:, 4 : 4 + grid] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": photographs()}
    after = TEXT - 4  # tokens of text that have read the image
    full = model(**inputs)
    expected = full.logits[:, -after:].log_softmax(-1)

    def row(name: str, share: float | None, kept: KeptTokens | None) -> list[object]:
        answer = full if kept is None else model(**kept.inputs)
        logits = answer.logits[:, -after:].log_softmax(-1)
        mask = inputs["attention_mask"] if kept is None else kept.prompt["attention_mask"]
        images = grid if kept is None else sum(map(len, kept.kept)) / PROMPTS
        same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
        divergence = (expected.exp() * (expected - logits)).sum(-1).mean().item()
        tokens, memory = mask.sum().item() / PROMPTS, cache_bytes(answer.past_key_values) / PROMPTS
        return [name, share, round(images, 1), round(tokens, 1), round(memory), round(same, 3), round(divergence, 4)]

    rows = [row("untouched", None, None)]
    for share, budget in BUDGETS.items():
        rows.append(row("average, as of a smaller image", share, downsample(model, share, inputs)))
        in_place = downsample(model, share, inputs, keep_positions=True)
        rows.append(row("average, at its positions", share, in_place))
        for method in METHODS:
            with reduce_tokens(model, method=method, budget=budget) as reduction:
                rows.append(row(method, share, reduction.kept_tokens(**inputs)))
    heads = ["method", "share", "image tokens", "prefill tokens", "KV bytes", "same next token", "KL"]
    with (Path(__file__).parent / "results" / "kept_tokens.csv").open("w", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    for line in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |")


if __name__ == "__main__":
    main()
