"""Records weights, inputs and outputs of the modules of `open-flamingo` 2.0.1 and `otter-ai` 0.0.0a8.

Neither package goes beside a current torch (they pin 2.0.1), so that the tests compare with what this wrote:

    pip download --no-deps open-flamingo==2.0.1 otter-ai==0.0.0a8 --dest wheels
    python -m tests.checkpoints.record_open_flamingo wheels

The classes run are those in the wheels, word for word; what is around them (open_clip, peft ...) is not imported.
"""

import ast
import importlib
import sys
import types
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

RECORDED = Path(__file__).parent / "open_flamingo.safetensors"
SIZES = {"dim_head": 4, "heads": 2}
LANGUAGE_MODEL = {
    "vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2,
}  # fmt: skip
MEDIA_TOKEN, END_OF_CHUNK = 17, 18
LOCATIONS = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 1, 0, 1, 0, 0]]).bool()


def open_flamingo(wheel: Path) -> dict[str, Any]:
    """Its modules, without running the package's own `__init__`, which imports open_clip."""
    package = types.ModuleType("open_flamingo")
    package.__path__ = [f"{wheel}/open_flamingo"]
    sys.modules["open_flamingo"] = package
    names = ("helpers", "flamingo", "flamingo_lm", "utils")
    return {name: importlib.import_module(f"open_flamingo.src.{name}") for name in names}


def otter(wheel: Path) -> dict[str, Any]:
    """The module classes of its `modeling_otter.py`, which imports peft, accelerate and old transformers at its top."""
    source = zipfile.ZipFile(wheel).read("otter_ai/models/otter/modeling_otter.py").decode()
    wanted = ("exists", "OtterPerceiver", "OtterMasked", "OtterGated")
    parts = [part for part in ast.parse(source).body if getattr(part, "name", "").startswith(wanted)]
    names: dict[str, Any] = {"torch": torch, "nn": nn, "rearrange": rearrange, "repeat": repeat}
    names |= {"Optional": Optional, "XFORMERS_AVAIL": False}
    exec(compile(ast.Module(parts, []), "modeling_otter.py", "exec"), names)
    return names


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew, gates and norms included, so that each one counts."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


class Visual(nn.Module):
    """Stands for CLIP: an image of 3 x 4 x 4 pixels is 4 tokens of width 6."""

    def forward(self, images: Tensor) -> tuple[None, Tensor]:
        """OpenFlamingo reads the second of two."""
        return None, tokens_of(images)


def tokens_of(images: Tensor) -> Tensor:
    """`[B, 3, 4, 4]` to `[B, 4, 6]`."""
    return images.flatten(1)[:, :24].unflatten(1, (4, 6))


def whole_model(package: dict[str, Any]) -> dict[str, Tensor]:
    """A whole OpenFlamingo on a small Llama: the weights its trainer keeps, those of the Llama, and the logits."""
    helpers = package["helpers"]
    resampler = partial(helpers.PerceiverResampler, depth=2, num_latents=3, **SIZES)
    block = partial(helpers.GatedCrossAttentionBlock, **SIZES)
    package["flamingo"].PerceiverResampler, package["flamingo_lm"].GatedCrossAttentionBlock = resampler, block
    language_model = randomised(LlamaForCausalLM(LlamaConfig(**LANGUAGE_MODEL)))
    recorded = {f"llama.{name}": value for name, value in language_model.state_dict().items()}
    package["utils"].extend_instance(language_model, package["flamingo_lm"].FlamingoLMMixin)
    language_model.set_decoder_layers_attr_name("model.layers")
    model = package["flamingo"].Flamingo(
        SimpleNamespace(visual=Visual()), language_model, END_OF_CHUNK, MEDIA_TOKEN, 6, cross_attn_every_n_layers=2
    )
    added = {name: value for name, value in model.state_dict().items() if "gated" in name or "perceiver" in name}
    for value in added.values():
        nn.init.normal_(value, std=0.5)
    kept = {name: value for name, value in added.items() if "gated_cross_attn_layers" not in name}
    ids = torch.randint(0, MEDIA_TOKEN, LOCATIONS.shape).masked_fill(LOCATIONS, MEDIA_TOKEN)
    images = torch.randn(2, 3, 1, 3, 4, 4)
    logits = model(images, ids, attention_mask=torch.ones_like(ids)).logits
    features = tokens_of(images.flatten(0, 2)).unflatten(0, (2, 3))
    recorded |= {f"checkpoint.{name}": value for name, value in kept.items()}
    return recorded | {"input_ids": ids, "features": features, "logits": logits}


def main(wheels: Path) -> None:
    """Run every module once and keep it."""
    torch.manual_seed(0)
    package = open_flamingo(next(wheels.glob("open_flamingo-2.0.1-*.whl")))
    theirs, helpers = otter(next(wheels.glob("otter_ai-0.0.0a8-*.whl"))), package["helpers"]
    small = {"dim": 6, "depth": 2, "num_latents": 3, "ff_mult": 2, **SIZES}
    clips, text, latents = torch.randn(2, 3, 2, 4, 6), torch.randn(2, 9, 8), torch.randn(2, 3, 3, 6)
    wide = {"dim": 8, "dim_visual": 6, **SIZES}
    resamplers = {
        "open_flamingo.resampler": helpers.PerceiverResampler(**small),
        "open_flamingo.resampler.frames": helpers.PerceiverResampler(**small, max_num_frames=5),
        "open_flamingo.resampler.media": helpers.PerceiverResampler(**small, max_num_media=3),
        "otter.resampler": theirs["OtterPerceiverResampler"](**small),
        "otter.resampler.frames": theirs["OtterPerceiverResampler"](**small, max_num_frames=2),
        "otter.resampler.media": theirs["OtterPerceiverResampler"](**small, max_num_media=4),
    }
    blocks = {
        "open_flamingo.block": helpers.GatedCrossAttentionBlock(**wide),
        "otter.block": theirs["OtterGatedCrossAttentionBlock"](**wide),
        "open_flamingo.block.previous": helpers.GatedCrossAttentionBlock(**wide, only_attend_immediate_media=False),
    }
    recorded = {"clips": clips, "text": text, "latents": latents, "locations": LOCATIONS}
    with torch.no_grad():
        for name, module in (resamplers | blocks).items():
            randomised(module)
            # All previous media: theirs is right only where the text starts with a medium, as its second row does.
            output = module(clips) if name in resamplers else module(text, latents, media_locations=LOCATIONS)
            recorded |= {f"{name}/output": output}
            recorded |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
        recorded |= {f"model/{name}": value for name, value in whole_model(package).items()}
    save_file({name: value.detach().clone().contiguous() for name, value in recorded.items()}, RECORDED)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
