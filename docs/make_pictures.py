"""Redraws the pictures of the documentation: trains what `narrows compare` trains, then draws with `narrows.visualize`.

Run it with `make pictures`; `python docs/make_pictures.py runs/<time> runs/<time>` draws from a comparison and from
object models (of `narrows discover`) that are there already.
`segmentation.png` is the `predictions.png` that the commands of `dense.md` leave behind.
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from skimage.data import astronaut, chelsea, coffee, rocket

from narrows import GatedCrossAttentionBlock, load_model, reduce_tokens
from narrows.data import DigitScenes, SpriteScenes, picture
from narrows.jobs.compare import compare
from narrows.jobs.discover import discover
from narrows.jobs.generate import generate
from narrows.jobs.object_models import object_picture
from narrows.jobs.reduce import reduce
from narrows.models import ObjectDiscovery
from narrows.visualize import overlay, reading, save

PICTURES = Path(__file__).parent / "pictures"
SAMPLE = 6
OBJECT_SCENES = (1, 2, 3, 4)

# Which of a model's bottlenecks stands for its mechanism.
MECHANISMS = {
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


def draw_objects(folder: Path) -> None:
    """Objects that slots found without a label: which tokens each slot takes, and what a decoder makes of it."""
    model = load_model(folder)
    assert isinstance(model, ObjectDiscovery)
    scenes = SpriteScenes("held_out")
    save(object_picture(model, *scenes.batch(OBJECT_SCENES)), PICTURES / "objects.png")
    shrink(PICTURES / "objects.png", PICTURES / "objects.png")
    images, _ = scenes.batch(OBJECT_SCENES[:1])
    encoded, generator = model.encoder(images), torch.Generator().manual_seed(0)
    routing = model.slot_attention.routing(encoded.tokens, generator=generator).with_grid(encoded.grid)
    save(overlay(picture(images)[0], routing), PICTURES / "slot_attention.png")


def draw_text_and_media() -> None:
    """Which of four photographs each word reads, by the rule that it reads the one before it."""
    sentence = (
        "<image> a cat , half asleep . <image> a cup of coffee beside its spoon . <image> a rocket about to leave , "
        "and <image> someone who may have flown it ."
    )
    words = sentence.split()
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(64, media_dim=48)
    locations = torch.tensor([[word == "<image>" for word in words]])
    routing = block.routing(torch.randn(1, len(words), 64), torch.randn(1, 4, 16, 48), locations)
    photographs = [Image.fromarray(take()).resize((160, 160)) for take in (chelsea, coffee, rocket, astronaut)]
    stand = [index for index, word in enumerate(words) if word == "<image>"]
    figure = reading(words, photographs, {"Each word reads the image before it": routing}, locations=stand)
    save(figure, PICTURES / "gated_cross_attention.png")
    shrink(PICTURES / "gated_cross_attention.png", PICTURES / "gated_cross_attention.png")


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
    objects = Path(sys.argv[2]) if len(sys.argv) > 2 else discover(output="runs").folder
    PICTURES.mkdir(exist_ok=True)
    draw_mechanisms(folder / "models")
    draw_objects(objects / "models" / "slot_autoencoder-seed0")
    draw_text_and_media()
    draw_merged_tokens()
    generate(picture=PICTURES / "flamingo_digits.png")
    for name in ("gallery", "pareto"):
        (PICTURES / f"{name}.png").write_bytes((folder / "pictures" / f"{name}.png").read_bytes())
    reduced = reduce(output="runs").folder
    shrink(reduced / "pictures" / "methods.png", PICTURES / "token_reduction.png", by=2)


if __name__ == "__main__":
    main()
