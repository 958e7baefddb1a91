"""A training step of DINOSAUR on cached features against the same step with slot-attention's layer."""

from typing import Any

import torch
from torch import Tensor, nn

from narrows.bench.case import NEVER_SLOWER, BenchCase, Contest
from narrows.checkpoints import from_upstream
from narrows.models import create_model


class Dinosaur(nn.Module):
    """Encoder, slots and decoder of a `dinosaur`, written out for a layer that gives slots alone."""

    def __init__(self, encoder: nn.Module, slots: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.slots, self.decoder = encoder, slots, decoder

    def forward(self, features: Tensor) -> Tensor:
        """The error of the features that are rebuilt, of each sample."""
        encoded = self.encoder(features)
        rebuilt = self.decoder(self.slots(encoded.tokens), encoded.target).reconstruction
        return (rebuilt - encoded.target).square().flatten(1).mean(1)


def dinosaur(batch: int, side: int, *, hidden_dims: tuple[int, ...], device: str | None = None) -> BenchCase:
    """A step on `side * side` tokens of 384 numbers; encoder and decoder are the same modules on both sides.

    The features were cached and have no gradient. What is compared, besides the errors, is the gradient of the first
    map that the tokens go through.
    """

    def prepare(device: torch.device) -> Contest:
        import slot_attention

        torch.manual_seed(0)
        decoder = {"kind": "mlp", "feature_dim": 384, "grid": [side, side], "hidden_dims": list(hidden_dims)}
        model = create_model("dinosaur", decoder=decoder).to(device)
        theirs = slot_attention.SlotAttention(7, 256, hidden_dim=1024).to(device)
        layer: Any = from_upstream(theirs)
        model.slot_attention = layer
        encoder: Any = model.encoder
        features = torch.randn(batch, side * side, 384, device=device)

        def call(module: nn.Module) -> Tensor:
            if module is not model:
                return module(features)
            found = model(features)
            return (found.reconstruction - found.target).square().flatten(1).mean(1)

        rival = Dinosaur(model.encoder, theirs, model.decoder)
        return Contest(model, rival, call, (encoder.head.expand.weight,), others=(features,))

    name = f"object_discovery/dinosaur/{batch}x{side * side}/hidden{'x'.join(map(str, hidden_dims))}"
    return BenchCase(name, "slot_attention.SlotAttention", prepare, NEVER_SLOWER, device=device)


CASES = (
    dinosaur(64, 28, hidden_dims=(512,), device="cpu"),  # with the paper's decoder a step has 20 TFLOP
    dinosaur(64, 28, hidden_dims=(2048, 2048, 2048), device="cuda"),
)
