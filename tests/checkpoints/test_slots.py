"""Synthetic checkpoints with the names, shapes and computations of the published models."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.checkpoints.slots import read_objects
from narrows.errors import InvalidArgument
from narrows.layers.slot_decoders import AutoregressiveDecoder, MLPDecoder
from tests.layers.test_slot_decoders import reading_orders

D, S, HIDDEN, K, GRID = 24, 16, 20, 5, (4, 4)
N = GRID[0] * GRID[1]


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.LayerNorm(widths[0])] if norm else []
    for incoming, outgoing in pairwise(widths):
        layers += [nn.Linear(incoming, outgoing), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def named(**parts: nn.Module | nn.Parameter) -> nn.Module:
    """A module with these attributes."""
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def slots_of(
    maps: Sequence[Any], gru: nn.GRUCell, change: nn.Module, norms: Sequence[Any], tokens: Tensor, slots: Tensor
) -> Tensor:
    """Algorithm 1, three iterations, as in all of these codes."""
    (q, k, v), tokens = maps, norms[0](tokens)
    for _ in range(3):
        logits = k(tokens) @ q(norms[1](slots)).mT / q.out_features**0.5
        attention = logits.softmax(-1)
        shares = attention + 1e-8
        updates = (shares / shares.sum(1, keepdim=True)).mT @ v(tokens)
        slots = gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + change(slots)
    return slots


class Dinosaur:
    """FT-DINOSAUR's modules."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.residual = mlp(S, HIDDEN, S, norm=True)
        attention = named(
            to_q=nn.Linear(S, S, bias=False),
            to_k=nn.Linear(S, S, bias=False),
            to_v=nn.Linear(S, S, bias=False),
            gru=nn.GRUCell(S, S),
            norm_input=nn.LayerNorm(S),
            norm_slots=nn.LayerNorm(S),
            ff_mlp=named(module=self.residual),
        )
        self.root = named(
            encoder=named(patch=nn.Linear(2, 3)),
            slot_init=named(
                slots_mu=nn.Parameter(torch.randn(1, 1, S)), slots_logsigma=nn.Parameter(torch.randn(1, 1, S))
            ),
            slot_attention=named(slot_attention=attention, feature_transform=mlp(D, 2 * D, S, norm=True)),
            decoder=named(decoder=mlp(S, 32, 32, 32, D + 1), pos_embed=nn.Parameter(torch.randn(1, N, S))),
        )

    def run(self, features: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        root = cast(Any, self.root)
        inner = root.slot_attention.slot_attention
        maps, norms = (inner.to_q, inner.to_k, inner.to_v), (inner.norm_input, inner.norm_slots)
        tokens = root.slot_attention.feature_transform(features)
        slots = slots_of(maps, inner.gru, self.residual, norms, tokens, slots)
        decoded = root.decoder.decoder(slots.unsqueeze(2) + root.decoder.pos_embed)
        masks = decoded[..., -1:].softmax(1)
        return slots, (decoded[..., :-1] * masks).sum(1), masks.squeeze(-1)


class Spot:
    """SPOT's modules, with its transformer decoder."""

    def __init__(self, orders: int, learned: bool) -> None:
        torch.manual_seed(1)
        block = [self.block() for _ in range(2)]
        start = {"slots_init": nn.Embedding(K, S)} if learned else {
            "slot_mu": nn.Parameter(torch.randn(1, 1, S)), "slot_log_sigma": nn.Parameter(torch.randn(1, 1, S))
        }  # fmt: skip
        attention = named(
            project_q=nn.Linear(S, S, bias=False),
            project_k=nn.Linear(D, S, bias=False),
            project_v=nn.Linear(D, S, bias=False),
            gru=nn.GRUCell(S, S),
            norm_inputs=nn.LayerNorm(D),
            norm_slots=nn.LayerNorm(S),
            norm_mlp=nn.LayerNorm(S),
            mlp=mlp(S, HIDDEN, S),
        )
        self.root = named(
            encoder=named(patch=nn.Linear(2, 3)),
            slot_attn=named(layer_norm=nn.LayerNorm(D), mlp=mlp(D, D, D), slot_attention=attention, **start),
            input_proj=nn.Sequential(nn.Linear(D, D, bias=False), nn.LayerNorm(D)),
            slot_proj=nn.Sequential(nn.Linear(S, D, bias=False), nn.LayerNorm(D)),
            bos_tokens=nn.Parameter(torch.randn(orders, 1, 1, D)),
            dec=named(blocks=nn.ModuleList(block), layer_norm=nn.LayerNorm(D)),
        )

    @staticmethod
    def block() -> nn.Module:
        def attention() -> nn.Module:
            return named(**{f"proj_{name}": nn.Linear(D, D, bias=False) for name in "qkvo"})

        return named(
            self_attn_layer_norm=nn.LayerNorm(D),
            self_attn=attention(),
            self_attn_mask=nn.Parameter(torch.ones(N, N, dtype=torch.bool).triu(1), requires_grad=False),
            encoder_decoder_attn_layer_norm=nn.LayerNorm(D),
            encoder_decoder_attn=attention(),
            ffn_layer_norm=nn.LayerNorm(D),
            ffn=mlp(D, 4 * D, D),
        )

    def run(self, features: Tensor, slots: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
        root = cast(Any, self.root)
        inner = root.slot_attn.slot_attention
        tokens = root.slot_attn.mlp(root.slot_attn.layer_norm(features))
        maps, norms = (inner.project_q, inner.project_k, inner.project_v), (inner.norm_inputs, inner.norm_slots)
        slots = slots_of(maps, inner.gru, nn.Sequential(inner.norm_mlp, inner.mlp), norms, tokens, slots)
        path = reading_orders(GRID)[order]
        first = root.bos_tokens[order].expand(len(features), 1, D)
        text = root.input_proj(torch.cat((first, features[:, path][:, :-1]), 1))
        read, weights = root.slot_proj(slots), torch.empty(0)
        for index, block in enumerate(root.dec.blocks):
            normed = block.self_attn_layer_norm(text)
            text = (text if index else normed) + self.attend(block.self_attn, normed, normed, block.self_attn_mask)[0]
            change_, weights = self.attend(
                block.encoder_decoder_attn, block.encoder_decoder_attn_layer_norm(text), read
            )
            text = text + change_
            text = text + block.ffn(block.ffn_layer_norm(text))
        back = path.argsort()
        summed = weights.sum(1)
        masks = (summed / summed.sum(2, keepdim=True))[:, back].mT
        return slots, root.dec.layer_norm(text)[:, back], masks

    @staticmethod
    def attend(maps: nn.Module, readers: Tensor, read: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (
            getattr(maps, f"proj_{name}")(x).unflatten(2, (6, -1)).transpose(1, 2)
            for name, x in zip("qkv", (readers, read, read), strict=True)
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5
        weights = (logits if mask is None else logits.masked_fill(mask, -torch.inf)).softmax(-1)
        return maps.proj_o((weights @ v).transpose(1, 2).flatten(2)), weights  # pyright: ignore


class Video:
    """The modules of VideoSAUR (slot mixer, no MLP of slots) and of SlotContrast (MLP decoder, learned slots)."""

    HEADS, OUT = 4, D + N

    def __init__(self, kind: str) -> None:
        torch.manual_seed(2)
        mixer = kind == "VideoSAUR"
        maps = {f"to_{name}": nn.Linear(S, S, bias=False) for name in "qkv"}
        corrector = named(**maps, gru=nn.GRUCell(S, S), norm_features=nn.LayerNorm(S), norm_slots=nn.LayerNorm(S))
        if not mixer:
            corrector.mlp = named(layers=mlp(S, HIDDEN, S, norm=True))
        predictor = named(blocks=nn.ModuleList([self.block()]))
        decoder = named(mlp=named(layers=mlp(S, 32, 32, D + 1)), pos_emb=nn.Parameter(torch.randn(1, 1, N, S)))
        if mixer:
            decoder = named(
                allocator=named(blocks=nn.ModuleList([self.block(), self.block()])),
                to_q=nn.Linear(S, S, bias=False),
                to_k=nn.Linear(S, S, bias=False),
                **{f"norm_{name}": nn.LayerNorm(S) for name in ("q", "k", "memory")},
                renderer=named(layers=nn.Sequential(nn.Linear(S, 32), nn.ReLU(), nn.Linear(32, 40), nn.ReLU())),
                output_transform=nn.Linear(40, self.OUT),
                pos_emb=nn.Parameter(torch.randn(1, N, S)),
            )
        start = {"mean": nn.Parameter(torch.randn(1, 1, S)), "log_std": nn.Parameter(torch.randn(1, 1, S))}
        self.root = named(
            initializer=named(**start) if mixer else named(slots=nn.Parameter(torch.randn(1, K, S))),
            encoder=named(
                module=named(
                    backbone=named(model=nn.Linear(2, 3)), output_transform=named(layers=mlp(D, 2 * D, S, norm=True))
                )
            ),
            processor=named(module=named(corrector=corrector, predictor=predictor)),
            decoder=named(module=decoder),
        )
        for parameter in self.root.parameters():  # biases and norms away from 0 and 1
            parameter.data += 0.2 * torch.randn_like(parameter)

    @staticmethod
    def block() -> nn.Module:
        return named(
            self_attn=named(qkv=nn.Linear(S, 3 * S), out_proj=nn.Linear(S, S)),
            linear1=nn.Linear(S, 4 * S), linear2=nn.Linear(4 * S, S), norm1=nn.LayerNorm(S), norm2=nn.LayerNorm(S),
        )  # fmt: skip

    @classmethod
    def through(cls, block: Any, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Norms come first; logits are multiplied by the root of the heads' width."""
        rows = block.norm1(x)
        weight, bias = block.self_attn.qkv.weight.chunk(3), block.self_attn.qkv.bias.chunk(3)
        read = rows if memory is None else memory
        q, k, v = (F.linear(y, w, b) for y, w, b in zip((rows, read, read), weight, bias, strict=True))
        width, heads = S // cls.HEADS, []
        for h in range(cls.HEADS):
            part = slice(h * width, (h + 1) * width)
            heads.append((q[..., part] @ k[..., part].mT * width**0.5).softmax(-1) @ v[..., part])
        x = x + block.self_attn.out_proj(torch.cat(heads, -1))
        return x + block.linear2(F.relu(block.linear1(block.norm2(x))))

    def slots(self, tokens: Tensor, slots: Tensor, iterations: int) -> Tensor:
        it = cast(Any, self.root).processor.module.corrector
        tokens = it.norm_features(tokens)
        for _ in range(iterations):
            slots = it.norm_slots(slots)  # and the GRU starts from these
            attention = (it.to_q(slots) @ it.to_k(tokens).mT / S**0.5).softmax(1) + 1e-8
            updates = attention / attention.sum(-1, keepdim=True) @ it.to_v(tokens)
            slots = it.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + it.mlp.layers(slots) if hasattr(it, "mlp") else slots
        return slots

    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        it = cast(Any, self.root).decoder.module
        if hasattr(it, "mlp"):
            made = it.mlp.layers(slots.unsqueeze(2) + it.pos_emb)
            masks = made[..., -1:].softmax(1)
            return (made[..., :-1] * masks).sum(1), masks.squeeze(-1)
        positions, memory = it.pos_emb.expand(len(slots), -1, -1), it.norm_memory(slots)
        x = positions
        for block in it.allocator.blocks:
            x = self.through(block, x, memory)
        shares = (it.to_q(it.norm_q(x)) @ it.to_k(it.norm_k(slots)).mT / S**0.5).softmax(-1)
        return it.output_transform(it.renderer.layers(shares @ slots + positions)), shares.mT


@pytest.mark.parametrize("kind", ["VideoSAUR", "SlotContrast"])
def test_videosaur_computes_what_it_did(kind: str) -> None:
    theirs, (features, slots) = Video(kind), inputs()
    state = theirs.root.state_dict()
    parts = read_objects({"state_dict": state, "epoch": 3})
    assert parts.family == "VideoSAUR"
    assert set(parts.encoder) == {"backbone.model.weight", "backbone.model.bias"}
    root = cast(Any, theirs.root)
    if kind == "SlotContrast":
        slots = root.initializer.slots.expand(2, -1, -1)
        torch.testing.assert_close(parts.slots.initial_slots(2), slots)
    tokens = root.encoder.module.output_transform.layers(features)
    torch.testing.assert_close(parts.features(features), tokens, rtol=1e-4, atol=1e-5)
    first = theirs.slots(tokens, slots, 3)
    found = parts.slots(tokens, slots=slots).slots
    torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-5)
    predicted = theirs.through(root.processor.module.predictor.blocks[0], first)
    torch.testing.assert_close(parts.predictor(first), predicted, rtol=1e-4, atol=1e-5)  # pyright: ignore
    second = theirs.slots(tokens.flip(1), predicted, 2)
    found = parts.slots(tokens.flip(1), slots=predicted, num_iterations=2).slots
    torch.testing.assert_close(found, second, rtol=1e-4, atol=1e-5)
    decoded, expected = parts.decoder(second), theirs.decode(second)  # pyright: ignore
    torch.testing.assert_close(decoded.features, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded.masks, expected[1], rtol=1e-4, atol=1e-5)
    of_images = {name.replace(".module.", "."): value for name, value in state.items() if ".predictor." not in name}
    without = read_objects(of_images)
    assert without.predictor is None
    torch.testing.assert_close(without.slots(tokens, slots=slots).slots, first, rtol=1e-4, atol=1e-5)


def test_a_weight_of_videosaur_that_does_not_fit_is_named() -> None:
    state = Video("VideoSAUR").root.state_dict()
    for missing in ("processor.module.corrector.gru.bias_ih", "decoder.module.norm_k.weight"):
        ours = {"processor.module.corrector.gru.bias_ih": "gru.bias_ih", "decoder.module.norm_k.weight": "norm_slots"}
        with pytest.raises(InvalidArgument, match=f"no {ours[missing]}"):
            read_objects({name: value for name, value in state.items() if name != missing})
    more = state | {"processor.module.predictor.blocks.1.linear1.weight": torch.zeros(2, 2)}
    with pytest.raises(InvalidArgument, match=r"processor\.module\.predictor\.blocks\.1\.linear1\.weight"):
        read_objects(more)
    wrong = state | {"decoder.module.to_q.weight": torch.zeros(3, 3)}
    with pytest.raises(InvalidArgument, match=r"decoder\.module\.to_q\.weight"):
        read_objects(wrong)
    with pytest.raises(InvalidArgument, match="16 positions"):
        read_objects(state, grid=(4, 5))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, N, D, generator=generator), torch.randn(2, K, S, generator=generator)


def in_oclf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names OCLF has for the same weights."""
    prefixes = {
        "encoder.": "models.feature_extractor.model.",
        "slot_init.": "models.conditioning.",
        "slot_attention.feature_transform.": "models.perceptual_grouping.positional_embedding.layers.1.",
        "slot_attention.slot_attention.": "models.perceptual_grouping.slot_attention.",
        "decoder.": "models.object_decoder.",
    }
    return {
        theirs + name.removeprefix(ours): value
        for name, value in state.items()
        for ours, theirs in prefixes.items()
        if name.startswith(ours)
    }


@pytest.mark.parametrize("family", ["FT-DINOSAUR", "OCLF"])
def test_dinosaur_computes_what_it_did(family: str) -> None:
    theirs, (features, slots) = Dinosaur(), inputs()
    state = theirs.root.state_dict()
    parts = read_objects({"state_dict": in_oclf(state)} if family == "OCLF" else state)
    assert parts.family == family
    assert set(parts.encoder) == {"patch.weight", "patch.bias"}
    assert isinstance(parts.decoder, MLPDecoder)
    expected = theirs.run(features, slots)
    found = parts.slots(parts.features(features), slots=slots).slots
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
    decoded = parts.decoder(found)
    torch.testing.assert_close(decoded.features, expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded.masks, expected[2], rtol=1e-4, atol=1e-5)
    drawn = parts.slots.initial_slots(1, num_slots=50000).std((0, 1))
    assert torch.allclose(drawn, state["slot_init.slots_logsigma"].flatten().exp(), rtol=0.05)


@pytest.mark.parametrize(("orders", "learned"), [(1, False), (9, True)])
def test_spot_computes_what_it_did(orders: int, learned: bool) -> None:
    theirs, (features, slots) = Spot(orders, learned), inputs()
    parts = read_objects(theirs.root.state_dict())
    decoder = cast(AutoregressiveDecoder, parts.decoder).eval()
    if learned:
        slots = theirs.root.slot_attn.slots_init.weight.expand(2, -1, -1)  # pyright: ignore
    for order in {0, orders - 1}:
        expected = theirs.run(features, slots, order)
        found = parts.slots(parts.features(features), slots=None if learned else slots).slots
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
        decoded = decoder(found, features, grid=GRID, order=order)
        torch.testing.assert_close(decoded.features, expected[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decoded.masks, expected[2], rtol=1e-4, atol=1e-5)


def in_keras() -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32) / 3

    arrays = {
        **{f"project_{name}/kernel": draw(S, S) for name in "qkv"},
        **{f"norm_{what}/{part}": draw(S) for what in ("inputs", "slots", "mlp") for part in ("gamma", "beta")},
        "gru/kernel": draw(S, 3 * S), "gru/recurrent_kernel": draw(S, 3 * S), "gru/bias": draw(2, 3 * S),
        "mlp/layer_with_weights-0/kernel": draw(S, HIDDEN), "mlp/layer_with_weights-0/bias": draw(HIDDEN),
        "mlp/layer_with_weights-1/kernel": draw(HIDDEN, S), "mlp/layer_with_weights-1/bias": draw(S),
        "slots_mu": draw(1, 1, S), "slots_log_sigma": draw(1, 1, S),
    }  # fmt: skip
    torches = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {f"network/slot_attention/{name}/.ATTRIBUTES/VARIABLE_VALUE": a for name, a in arrays.items()}, torches


def keras_slots(w: dict[str, Tensor], tokens: Tensor, slots: Tensor) -> Tensor:
    """Slot attention with Keras's LayerNorm (epsilon 1e-3) and GRU (gates z, r, h; reset after the product)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (S,), w[f"{name}/gamma"], w[f"{name}/beta"], 1e-3)

    tokens = norm(tokens, "norm_inputs")
    for _ in range(3):
        query = norm(slots, "norm_slots") @ w["project_q/kernel"] / S**0.5
        attention = ((tokens @ w["project_k/kernel"]) @ query.mT).softmax(-1) + 1e-8
        updates = (attention / attention.sum(1, keepdim=True)).mT @ (tokens @ w["project_v/kernel"])
        x = (updates @ w["gru/kernel"] + w["gru/bias"][0]).chunk(3, -1)
        h = (slots @ w["gru/recurrent_kernel"] + w["gru/bias"][1]).chunk(3, -1)
        z, r = (x[0] + h[0]).sigmoid(), (x[1] + h[1]).sigmoid()
        slots = z * slots + (1 - z) * (x[2] + r * h[2]).tanh()
        first, second = (f"mlp/layer_with_weights-{index}" for index in (0, 1))
        hidden = F.relu(norm(slots, "norm_mlp") @ w[f"{first}/kernel"] + w[f"{first}/bias"])
        slots = slots + hidden @ w[f"{second}/kernel"] + w[f"{second}/bias"]
    return slots


def test_googles_slot_attention_computes_what_it_did(tmp_path) -> None:
    arrays, weights = in_keras()
    np.savez(tmp_path / "slots.npz", **arrays)  # pyright: ignore
    tokens, slots = torch.randn(2, 30, S), torch.randn(2, K, S)
    for state in (arrays, tmp_path / "slots.npz"):
        parts = read_objects(state, num_slots=K)
        assert parts.family == "Google"
        found = parts.slots(tokens, slots=slots).slots
        torch.testing.assert_close(found, keras_slots(weights, tokens, slots), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_named() -> None:
    state = Dinosaur().root.state_dict()
    with pytest.raises(InvalidArgument, match=r"no gru\.weight_hh"):
        read_objects({k: v for k, v in state.items() if not k.endswith("gru.weight_hh")})
    with pytest.raises(InvalidArgument, match="surplus"):
        read_objects(state | {"surplus": torch.zeros(2)})
    with pytest.raises(InvalidArgument, match="16 positions"):
        read_objects(state, grid=(4, 5))
    with pytest.raises(InvalidArgument, match="SPOT, FT-DINOSAUR, OCLF, Google"):
        read_objects({"head.weight": torch.zeros(2)})
    spot = Spot(1, learned=True).root.state_dict()
    with pytest.raises(InvalidArgument, match=r"no blocks\.1\.patches\.to_k\.weight"):
        read_objects({k: v for k, v in spot.items() if k != "dec.blocks.1.self_attn.proj_k.weight"})
