"""Redraws the pictures of the documentation: trains what `narrows compare` trains, then draws with `narrows.visualize`.

Run it with `make pictures`; `python docs/make_pictures.py runs/<time>` draws from a comparison that is there already.
`segmentation.png` is the `predictions.png` that the commands of `dense.md` leave behind.
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage.data import astronaut

from narrows import GatedCrossAttentionBlock, load_model, reduce_tokens
from narrows.data import DigitScenes, picture
from narrows.jobs.compare import compare
from narrows.jobs.generate import generate
from narrows.jobs.reduce import reduce
from narrows.visualize import overlay, save

PICTURES = Path(__file__).parent / "pictures"
SAMPLE = 6

# Which of a model's bottlenecks stands for its mechanism.
MECHANISMS = {
    "slot_attention": ("slot_vit_mini", -1),
    "soft_moe": ("soft_moe_vit_mini", -1),
    "sepvit": ("sepvit_mini", 1),
    "perceiver_resampler": ("resampler_vit_mini", -1),
    "token_sampling": ("ats_vit_mini", -1),
}


def draw_mechanisms(models: Path) -> None:
    """One overlay for each mechanism, on the same held-out scene."""
    images, _ = DigitScenes("held_out").batch([SAMPLE])
    for name, (model, bottleneck) in MECHANISMS.items():
        routing = load_model(models / f"{model}-seed0").routing(images)[bottleneck]
        save(overlay(picture(images)[0], routing), PICTURES / f"{name}.png")


def draw_text_and_media() -> None:
    """Which medium each text token reads, of four media in a text of 32 tokens, two of them side by side."""
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(64, media_dim=48)
    locations = torch.zeros(1, 32, dtype=torch.bool)
    locations[0, [4, 12, 13, 23]] = True
    routing = block.routing(torch.randn(1, 32, 64), torch.randn(1, 4, 16, 48), locations)
    figure = Figure(figsize=(9, 2), layout="constrained")
    axis = figure.subplots()
    axis.imshow(routing.detach().weights[0].mean(0), cmap="Blues", aspect="auto")
    axis.set_yticks(range(4), [f"medium {index}" for index in range(4)])
    axis.set_xticks(range(32), ["▲" if here else "·" for here in locations[0]])
    axis.set_xlabel("text tokens; ▲ where a medium stands")
    save(figure, PICTURES / "gated_cross_attention.png")


def draw_merged_tokens() -> None:
    """A photograph before and after ToMe. The network is untrained: no pretrained weights come with a package."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_384", pretrained=False).eval()
    photograph = Image.fromarray(astronaut()).resize((384, 384))
    image = torch.from_numpy(np.array(photograph)).movedim(-1, 0) / 255
    budget = {0: 0.7, 2: 0.45, 4: 0.25, 6: 0.15, 8: 0.1}
    with torch.no_grad(), reduce_tokens(model, method="tome", budget=budget) as reduction:
        model((image[None] - 0.5) / 0.5)
        save(overlay(image, reduction.routing[-1]), PICTURES / "merged_tokens.png")
    shrink(PICTURES / "merged_tokens.png", PICTURES / "merged_tokens.png")


def shrink(picture: Path, target: Path, *, by: int = 1) -> None:
    """The same picture in 256 colours and smaller."""
    with Image.open(picture) as large:
        few = large.convert("RGB").reduce(by).quantize(256, method=Image.Quantize.FASTOCTREE)
    few.save(target, optimize=True)


def main() -> None:
    """Draw them all."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else compare(output="runs").folder
    PICTURES.mkdir(exist_ok=True)
    draw_mechanisms(folder / "models")
    draw_text_and_media()
    draw_merged_tokens()
    generate(picture=PICTURES / "flamingo_digits.png")
    for name in ("gallery", "pareto"):
        (PICTURES / f"{name}.png").write_bytes((folder / "pictures" / f"{name}.png").read_bytes())
    reduced = reduce(output="runs").folder
    shrink(reduced / "pictures" / "methods.png", PICTURES / "token_reduction.png", by=2)


if __name__ == "__main__":
    main()
