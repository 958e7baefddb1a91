import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from narrows import ObjectDiscovery, create_model, list_models, load_model
from narrows.data import SpriteScenes
from narrows.errors import InvalidArgument, InvalidType
from narrows.layers.slot_gate import SlotGate
from narrows.layers.slot_mixer import SlotBlock
from narrows.layers.slot_transition import SlotTransition
from narrows.models.object_parts import (
    BroadcastDecoder,
    ConvEncoder,
    FeatureEncoder,
    PatchTransformer,
    SoftPositions,
)
from narrows.ops.object_hints import object_hints

SMALL = {"num_slots": 3, "slot_dim": 16}
CONVOLUTIONS = {"kind": "convolutions", "width": 8}
BROADCAST = {"kind": "broadcast", "image_size": 16, "width": 8}
FEATURES = {"kind": "features", "feature_dim": 12}
MLP = {"kind": "mlp", "feature_dim": 12, "grid": [3, 3], "hidden_dims": [24, 24]}
TRANSFORMER = {"kind": "transformer", "feature_dim": 12, "num_orders": 9, "depth": 2, "heads": 2}
BUILDS = {
    "images": (CONVOLUTIONS, BROADCAST, {}),
    "clips": (CONVOLUTIONS, BROADCAST, {"predictor_heads": 2}),
    "features": (FEATURES, MLP, {"mlp_dim": 32}),
    "mixed clips": (
        FEATURES,
        {"kind": "mixer", "feature_dim": 12, "grid": [3, 3], "heads": 2, "hidden_dims": [24], "transitions": True},
        {"mlp_dim": 0, "normed_state": True, "predictor_heads": 2, "predictor_pre_norm": True},
    ),
    "in order": (FEATURES, TRANSFORMER, {"initial_slots": "learned", "gradient": "bilevel"}),
}


def build(name: str, **options: object) -> ObjectDiscovery:
    torch.manual_seed(0)
    encoder, decoder, own = BUILDS[name]
    return ObjectDiscovery(encoder, decoder, **{**SMALL, **own, **options})


def inputs(name: str, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = {"images": (3, 16, 16), "clips": (3, 3, 16, 16), "mixed clips": (3, 9, 12)}
    shape = shapes.get(name, (9, 12))
    return torch.randn(batch, *shape, generator=generator)


def starts(batch: int = 2, number: int = 3) -> Tensor:
    return torch.randn(batch, number, 16, generator=torch.Generator().manual_seed(2))


every_build = pytest.mark.parametrize("name", BUILDS)


@every_build
def test_masks_and_attention_divide_every_cell_among_the_slots(name: str) -> None:
    found = build(name)(inputs(name), slots=starts())
    for maps in (found.masks, found.attention):
        assert (maps >= 0).all()
        assert_close(maps.sum(-3), torch.ones_like(maps.sum(-3)))
    if found.parts is not None:
        assert_close((found.parts * found.masks.unsqueeze(-3)).sum(-4), found.reconstruction)
    assert_close(found.loss, (found.reconstruction - found.target).square().mean())
    assert (found.transitions is None) == (name != "mixed clips")
    if found.transitions is not None:
        assert found.transitions.shape == (2, 3, 9, 9)


@every_build
def test_a_step_lowers_the_loss_and_reaches_every_parameter(name: str) -> None:
    model, x = build(name), inputs(name)
    before = model(x, slots=None if name == "in order" else starts()).loss
    before.backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    # Given slots are not drawn; orders that were not drawn have no beginning.
    assert not [key for key in without if not key.startswith(("slot_attention.initial_slots", "decoder.begin"))]
    with torch.no_grad():
        for value in model.parameters():
            if value.grad is not None:
                value -= 1e-3 * value.grad
    model.eval()
    reference = build(name).eval()
    options = {} if name == "in order" else {"slots": starts()}
    assert model(x, **options).loss < reference(x, **options).loss


@every_build
def test_a_sample_gets_with_masked_slots_what_it_gets_with_its_real_ones_alone(name: str) -> None:
    model, x, slots = build(name).double().eval(), inputs(name).double(), starts().double()
    real = torch.tensor([[True, True, False], [True, True, True]])
    together = model(x, slots=slots, slot_mask=real)
    alone = model(x[:1], slots=slots[:1, :2])
    assert_close(together.slots[:1, ..., :2, :], alone.slots)
    assert_close(together.masks[:1, ..., :2, :, :], alone.masks)
    assert_close(together.reconstruction[:1], alone.reconstruction)
    assert not together.slots[0, ..., 2, :].any()
    assert not together.masks[0, ..., 2, :, :].any()
    nothing = model(x, slots=slots, slot_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert nothing.reconstruction.isfinite().all()


@every_build
def test_dropped_slots_take_no_part_in_decoding(name: str) -> None:
    model, x, slots = build(name, adaptive=True).double().eval(), inputs(name).double(), starts().double()
    drawn = {} if name == "in order" else {"slots": slots}
    before = build(name).double().eval()
    before.load_state_dict(model.state_dict(), strict=False)
    whole = before(x, **drawn)
    with torch.no_grad():  # one half of the slots goes
        model.gate.contract.bias -= model.gate.contract(model.gate.expand(model.gate.norm(whole.slots)).relu()).median()
    found = model(x, **drawn)
    assert set(found.kept.unique().tolist()) == {0.0, 1.0}
    kept = found.kept.bool()
    assert_close(whole.attention, found.attention)
    assert not found.slots[~kept].any()
    assert not found.masks[~kept].any()
    frames, keeps = found.slots.flatten(0, -3), kept.flatten(0, -2)
    targets = found.target.flatten(0, -4)
    rebuilt, masks = found.reconstruction.flatten(0, -4), found.masks.flatten(0, -4)
    for index, keep in enumerate(keeps):
        alone = model.decoder(frames[index : index + 1, keep], targets[index : index + 1])
        assert_close(rebuilt[index : index + 1], alone.reconstruction)
        assert_close(masks[index : index + 1, keep], alone.masks)
    found.loss.backward()
    assert model.gate.contract.weight.grad.any()  # dropped or kept, the error says what it would be the other way


@pytest.mark.parametrize("name", ["images", "clips", "in order"])
def test_preheated_slots_are_guessed_from_the_tokens_of_the_first_frame(name: str) -> None:
    model, x = build(name, preheated=True).double(), inputs(name).double()
    model.eval()
    found = model(x, generator=torch.Generator().manual_seed(0))
    again = model(x, slots=found.guess.detach())  # given slots are taken as they are
    assert again.guess is None
    assert_close(found.slots, again.slots)
    (of_tokens, block) = model.encoder(x.flatten(0, 1) if name == "clips" else x).tokens, model.preheat
    first = of_tokens.unflatten(0, (2, -1))[:, 0] if name == "clips" else of_tokens
    begin = model.slot_attention.initial_slots(2, generator=torch.Generator().manual_seed(0))
    memory = F.linear(first, block.to_memory.weight, block.to_memory.bias)

    def read(heads: nn.Module, rows: Tensor, of: Tensor) -> Tensor:
        parts = []
        for h in range(4):
            part = slice(4 * h, 4 * h + 4)
            q, k, v = (
                F.linear(y, to.weight[part]) for to, y in ((heads.to_q, rows), (heads.to_k, of), (heads.to_v, of))
            )
            parts.append((q @ k.mT / 2).softmax(-1) @ v)
        return F.linear(torch.cat(parts, -1), heads.to_out.weight)

    guess = begin + read(block.tokens, begin, memory)
    normed = F.layer_norm(guess, (16,), block.norm_slots.weight)
    guess = guess + read(block.slots, normed, normed)
    hidden = F.gelu(F.linear(F.layer_norm(guess, (16,), block.norm_mlp.weight), block.expand.weight))
    assert_close(found.guess, guess + F.linear(hidden, block.contract.weight), rtol=1e-5, atol=1e-5)


def test_preheating_learns_by_distillation_alone() -> None:
    model, x = build("features", preheated=True).double().train(), inputs("features").double()
    found = model(x, generator=torch.Generator().manual_seed(0))
    found.loss.backward(retain_graph=True)
    own = [value for key, value in model.preheat.named_parameters() if key != "log_scale"]
    assert all(value.grad is None or not value.grad.any() for value in own)
    assert model.preheat.log_scale.grad.any()  # of the noise, through slot attention
    model.zero_grad()
    F.mse_loss(found.guess, found.slots.detach()).backward()
    assert all(value.grad.any() for value in own)
    assert all(value.grad is None for value in model.encoder.parameters())
    assert all(value.grad is None for key, value in model.slot_attention.named_parameters() if "initial" not in key)
    other = model(x, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(other.slots, found.slots)
    assert model(x, hints=None, slots=starts().double()).guess is None


def test_a_transition_reads_the_slots_before_and_the_tokens_of_the_frame() -> None:
    torch.manual_seed(0)
    layer = SlotTransition(8, 2, window=4).double().eval()
    slots, tokens = torch.randn(2, 5, 3, 8).double(), torch.randn(2, 6, 9, 8).double()

    def read(heads: nn.Module, rows: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        parts = []
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            maps = ((heads.to_q, rows), (heads.to_k, of), (heads.to_v, of))
            q, k, v = (F.linear(y, to.weight[part]) for to, y in maps)
            parts.append((q @ k.mT / 2).softmax(-1) @ v)
        return F.linear(torch.cat(parts, -1), heads.to_out.weight)

    def expected(sample: int, of_slots: int, of_tokens: int) -> torch.Tensor:
        x = slots[sample, of_slots] + layer.lag.weight[5 - of_slots]
        memory = layer.to_memory(tokens[sample, of_tokens]) + layer.lag.weight[5 - of_tokens]
        x = layer.norm_slots(x + read(layer.slots, x, x))
        x = layer.norm_tokens(x + read(layer.tokens, x, memory))
        return layer.norm_mlp(x + layer.contract(F.gelu(layer.expand(x))))

    found = layer(slots, tokens)
    for sample in range(2):
        assert_close(found[sample], expected(sample, 4, 5), rtol=1e-5, atol=1e-5)
    layer.dropout = 0.0
    noise = torch.tensor(
        [[0.0, 0.0], [0.99, 0.5]]
    )  # of the three frames in the window; tokens of those after the first
    found = layer.train()(slots, tokens, noise=noise)
    assert_close(found[0], expected(0, 2, 3), rtol=1e-5, atol=1e-5)
    assert_close(found[1], expected(1, 4, 4), rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidArgument, match="tokens: expected 6 frames, got 5"):
        layer(slots, tokens[:, 1:])


def test_clips_with_a_transition_train_without_a_gradient_through_time() -> None:
    model, x = build("clips", predictor_window=3).double().train(), inputs("clips").double()
    found = model(x, slots=starts().double(), generator=torch.Generator().manual_seed(0))
    assert found.slots.shape == (2, 3, 3, 16)
    (early,) = torch.autograd.grad(found.slots[:, 2].sum(), model.predictor.lag.weight, retain_graph=True)
    assert early.any()
    found.loss.backward()
    assert all(value.grad is not None and value.grad.any() for value in model.predictor.parameters())
    model.eval()
    again = [model(x, slots=starts().double()).slots for _ in range(2)]
    assert torch.equal(*again)
    longer = torch.cat((x, x), 1)  # past the window
    assert model(longer, slots=starts().double()).slots.shape == (2, 6, 3, 16)
    with pytest.raises(InvalidArgument, match="predictor_window: expected 2 frames at least, got 1"):
        build("clips", predictor_window=1)


def test_the_gradient_of_a_gate_is_that_of_its_share() -> None:
    torch.manual_seed(0)
    model = build("features").double()
    slots, target = torch.randn(1, 3, 16).double(), torch.randn(1, 12, 3, 3).double()
    keep = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    decoded = model.decoder(slots, target, keep)
    (found,) = torch.autograd.grad(decoded.reconstruction[0, 0, 0, 0], keep)
    every = model.decoder(slots, target)
    weights = every.masks[0, :, 0, 0].double() * keep[0]
    parts = torch.stack([model.decoder(slots[:, k : k + 1], target).reconstruction[0, 0, 0, 0] for k in range(3)])
    share = every.masks[0, :, 0, 0].double() / weights.sum()
    expected = share * (parts - (weights * parts).sum() / weights.sum())
    assert_close(found[0], expected.detach())


def test_a_gate_is_drawn_in_training_and_certain_in_evaluation() -> None:
    torch.manual_seed(0)
    gate, slots = SlotGate(8), torch.randn(400, 5, 8)
    logits = gate.contract(gate.expand(gate.norm(slots)).relu()).squeeze(-1)
    mask = torch.ones(400, 5, dtype=torch.bool)
    mask[:, 4] = False
    best = logits[:, :4].argmax(1)
    for training in (True, False):
        kept = gate.train(training)(slots, mask, torch.Generator().manual_seed(0))
        assert set(kept.unique().tolist()) == {0.0, 1.0}
        assert not kept[:, 4].any()
        assert kept.gather(1, best[:, None]).all()
        others = torch.ones(400, 4, dtype=torch.bool).scatter(1, best[:, None], False)
        if training:
            expected = logits[:, :4].sigmoid()[others].mean()
            assert abs(kept[:, :4][others].mean() - expected) < 0.05
            assert not torch.equal(kept, gate(slots, mask, torch.Generator().manual_seed(1)))
        else:
            assert torch.equal(kept[:, :4][others] > 0, logits[:, :4][others] > 0)


@every_build
def test_no_sample_depends_on_the_others_and_an_empty_batch_works(name: str) -> None:
    model, x, slots = build(name).double().eval(), inputs(name).double(), starts().double()
    together = model(x, slots=slots)
    for alone, all_of_it in zip(model(x[1:], slots=slots[1:]), together, strict=True):
        assert (alone is None) == (all_of_it is None)
        if alone is not None:
            assert_close(alone, all_of_it[1:])
    assert model(x[:0], slots=slots[:0]).masks.shape == (0, *together.masks.shape[1:])


def test_padded_tokens_are_not_read() -> None:
    model, x, slots = build("features").double(), inputs("features").double(), starts().double()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    other = x.clone()
    other[0, 6:] = 100
    first, second = (model(each, mask, slots) for each in (x, other))
    assert_close(first.slots, second.slots)
    assert not first.attention.flatten(2)[0, :, 6:].any()


def test_a_clip_is_its_frames_one_after_another() -> None:
    model, x, slots = build("clips").double(), inputs("clips").double(), starts().double()
    whole = model(x, slots=slots)
    state = slots
    for frame in range(3):
        if frame:
            model.slot_attention.num_iterations = model.later_iterations
            state = model.predictor(state)
        alone = model(x[:, frame], slots=state)
        assert_close(whole.slots[:, frame], alone.slots)
        assert_close(whole.masks[:, frame], alone.masks)
        state = alone.slots


def test_the_number_of_slots_of_a_call_and_the_size_of_masks() -> None:
    found = build("images")(inputs("images"), num_slots=5, size=(24, 20))
    assert found.masks.shape == found.attention.shape == (2, 5, 24, 20)
    assert found.slots.shape == (2, 5, 16)
    assert_close(found.masks.sum(1), torch.ones(2, 24, 20))


@pytest.mark.parametrize("gradient", ["full", "last"])
def test_the_iterations_of_a_call_are_those_it_asks_for(gradient: str) -> None:
    model, x, slots = build("clips", gradient=gradient), inputs("clips"), starts()
    asked, own = model(x, slots=slots, num_iterations=6), model(x, slots=slots)
    model.slot_attention.num_iterations = 6
    assert_close(asked.slots, model(x, slots=slots).slots)
    assert not torch.allclose(asked.slots, own.slots)


def test_the_bilevel_gradient_is_that_of_the_last_iteration_at_the_settled_slots() -> None:
    model, x = build("features", initial_slots="learned", gradient="bilevel").double(), inputs("features").double()
    learned = model.slot_attention.initial_slots.slots
    (found,) = torch.autograd.grad(model(x).loss, learned)
    with torch.no_grad():
        settled, _ = model.slot_attention(model.encoder(x).tokens, num_iterations=2)
    settled.requires_grad_()
    tokens, _, target = model.encoder(x)
    slots, _ = model.slot_attention(tokens, slots=settled, num_iterations=1)
    rebuilt = model.decoder(slots, target).reconstruction
    (expected,) = torch.autograd.grad((rebuilt - target).square().mean(), settled)
    assert_close(found, expected.sum(0))
    last = build("features", initial_slots="learned", gradient="last").double()
    assert torch.autograd.grad(last(x).loss, last.slot_attention.initial_slots.slots, allow_unused=True) == (None,)
    assert_close(last(x).slots, build("features", initial_slots="learned").double()(x).slots)


@pytest.mark.parametrize("gradient", ["full", "last", "bilevel"])
@pytest.mark.parametrize("later", [1, 2])
def test_frames_learn_from_those_after_them_unless_their_gradient_stops_at_settled_slots(
    gradient: str, later: int
) -> None:
    model = build("clips", gradient=gradient, later_iterations=later)
    clips = inputs("clips").requires_grad_()
    model(clips, slots=starts()).slots[:, 2].square().sum().backward()
    assert bool(clips.grad[:, 0].any()) == (gradient != "last" or later == 1)
    assert clips.grad[:, 2].any()


def test_a_frozen_backbone_has_no_gradient_and_stays_in_evaluation_mode() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.drop = nn.Conv2d(3, 12, 4, 4), nn.Dropout(0.5)

        def forward(self, images: Tensor) -> Tensor:
            features = self.drop(self.map(images))
            return torch.cat((features.new_zeros(len(images), 1, 12), features.flatten(2).mT), 1)  # a class token

    images = torch.randn(2, 3, 12, 12)
    frozen = ObjectDiscovery(FEATURES, MLP, backbone=Backbone(), **SMALL).train()
    assert not frozen.encoder.backbone.training
    frozen(images).loss.backward()
    assert all(value.grad is None for value in frozen.encoder.backbone.parameters())
    tokens, slots = frozen.encoder.backbone(images), starts()
    assert_close(frozen(images, slots=slots).masks, frozen(tokens, slots=slots).masks)
    trained = ObjectDiscovery({**FEATURES, "trained": True}, MLP, backbone=Backbone(), **SMALL).train()
    trained(images).loss.backward()
    assert all(value.grad is not None for value in trained.encoder.backbone.parameters())


def test_in_any_order_a_cell_sees_those_before_it_and_no_other() -> None:
    torch.manual_seed(0)
    decoder = PatchTransformer(5, feature_dim=4, num_orders=9, depth=2, heads=2).double().train()
    slots, target = torch.randn(1, 3, 5).double(), torch.randn(1, 4, 2, 3).double().requires_grad_()
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        rebuilt = decoder(slots, target).reconstruction.flatten(2)
        reads = torch.stack(
            [
                torch.autograd.grad(rebuilt[:, 0, n].sum(), target, retain_graph=True)[0].flatten(2)[0].abs().sum(0) > 0
                for n in range(6)
            ]
        )
        counts = reads.sum(1)
        assert sorted(counts.tolist()) == [0, 1, 2, 3, 4, 5]
        order = counts.argsort()
        assert all(
            set(reads[cell].nonzero().flatten().tolist()) == set(order[:place].tolist())
            for place, cell in enumerate(order.tolist())
        )
        seen.add(tuple(order.tolist()))
    assert len(seen) > 3
    assert torch.equal(decoder.eval()(slots, target).masks, decoder(slots, target).masks)


@pytest.mark.parametrize(("kind", "numbers"), [("boxes", 4), ("points", 2)])
def test_slots_begin_at_hints_and_keep_their_order(kind: str, numbers: int) -> None:
    model, clips = build("clips", initial_slots=kind).double(), inputs("clips").double()
    hints = torch.rand(2, 3, numbers, dtype=torch.float64, requires_grad=True)
    found = model(clips, hints=hints)
    begin = model.slot_attention.initial_slots
    expected = begin.contract(begin.expand(hints).relu())
    assert_close(found.slots, model(clips, slots=expected).slots)
    order = [2, 0, 1]
    swapped = model(clips, hints=hints[:, order])
    assert_close(swapped.slots, found.slots[:, :, order])
    assert_close(swapped.masks, found.masks[:, :, order])
    (gradient,) = torch.autograd.grad(found.loss, hints)
    assert (gradient.abs().sum((0, 2)) > 0).all()
    assert model(clips, hints=torch.rand(2, 5, numbers).double()).slots.shape == (
        2,
        3,
        5,
        16,
    )  # another number of slots


@pytest.mark.slow
def test_a_slot_holds_the_object_in_its_box() -> None:
    torch.manual_seed(1)
    options = {"size": 16, "objects": (2, 2), "radius": (0.2, 0.25)}
    train, held_out = SpriteScenes(**options), SpriteScenes("held_out", **options)
    model = ObjectDiscovery(
        {"kind": "convolutions", "width": 16, "position_scale": 1.0},
        {"kind": "broadcast", "image_size": 16, "width": 16},
        num_slots=3,
        slot_dim=32,
        initial_slots="boxes",
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(1000):
        images, labels = train.batch(range(16 * step % 6400, 16 * step % 6400 + 16))
        optimizer.zero_grad()
        model(images, hints=object_hints(labels, 3)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    images, labels = held_out.batch(range(64))
    with torch.no_grad():
        found = model(images, hints=object_hints(labels, 3), size=(16, 16))
    for masks in (found.masks, found.attention):
        assert (masks.argmax(1) == labels)[labels > 0].float().mean() > 0.75  # by chance: a third


def test_positions_are_distances_to_the_four_borders() -> None:
    positions = SoftPositions(4, scale=2.0)
    with torch.no_grad():
        positions.project.weight.copy_(torch.eye(4))
        positions.project.bias.zero_()
    added = positions(torch.zeros(1, 3, 5, 4))[0]
    assert_close(added[0, 0], torch.tensor([0.0, 0, 2, 2]))
    assert_close(added[2, 1], torch.tensor([2.0, 0.5, 0, 1.5]))


@every_build
def test_bfloat16_autocast_is_close_and_trains(name: str) -> None:
    model, x = build(name).eval(), inputs(name)
    options = {} if name == "in order" else {"slots": starts()}
    exact = model(x, **options)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, **options)
    rounded.loss.backward()
    assert rounded.masks.dtype == torch.float32
    assert_close(rounded.loss, exact.loss, rtol=0.02, atol=0)
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


@every_build
def test_is_saved_whole(name: str, tmp_path: Path) -> None:
    model, x = build(name).eval(), inputs(name)
    model.save_pretrained(tmp_path / "model")
    back = load_model(tmp_path / "model")
    options = {} if name == "in order" else {"slots": starts()}
    assert_close(back(x, **options).masks, model(x, **options).masks, rtol=0, atol=0)


@every_build
def test_is_made_on_the_meta_device_and_drawn_anew(name: str) -> None:
    encoder, decoder, own = BUILDS[name]
    model = ObjectDiscovery(encoder, decoder, **SMALL, **own, device="meta", dtype=torch.bfloat16)
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {("meta", torch.bfloat16)}
    model = model.to_empty(device="cpu").float()
    for value in model.parameters():
        nn.init.constant_(value, torch.nan)
    model.reset_parameters()
    assert all(value.isfinite().all() for value in model.parameters())
    assert build(name).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", list_models(task="objects"))
def test_state_dict_keys_of_presets_are_what_they_were(name: str) -> None:
    snapshot = json.loads((Path(__file__).parents[1] / "snapshots/model_state_dict_keys.json").read_text())
    model = create_model(name, device="meta")
    assert name in snapshot, f"add {name}: python -m tests.snapshots"
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == snapshot[name]


@pytest.mark.compiled  # shape checks of the test run would answer first
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("images")(torch.randn(2, 3, 12, 12)), "images: expected 16 x 16 pixels"),
        (lambda: build("images")(torch.randn(2, 1, 16, 16)), r"images: expected shape \[B, C, H, W\] with C = 3"),
        (lambda: build("images")(torch.randn(3, 16)), "images: expected images"),
        (lambda: build("images")("photo"), "images: expected a tensor"),
        (lambda: build("features")(torch.randn(2, 3, 12, 14)), "images: expected cached tokens"),
        (lambda: build("in order")(inputs("in order"), num_slots=4), "num_slots: expected None or the 3 learned"),
        (lambda: build("clips")(inputs("clips"), torch.ones(2, 64, dtype=torch.bool)), "mask: expected None for clips"),
        (lambda: build("images", gradient="some"), "gradient: expected"),
        (lambda: build("images", initial_slots="zero"), "initial_slots: expected"),
        (lambda: build("images", num_slots=0), "num_slots: expected"),
        (lambda: build("images")(inputs("images"), num_iterations=0), "num_iterations: expected"),
        (lambda: build("features", num_slots=10), "num_slots: expected at most the 9 positions of the decoder, got 10"),
        (lambda: build("mixed clips", num_slots=10), "num_slots: expected at most the 9 positions of the decoder"),
        (lambda: build("images", num_slots=65), "num_slots: expected at most the 64 positions of the decoder"),
        (
            lambda: build("in order", num_slots=10)(inputs("in order")),
            "num_slots: expected at most the 9 positions of the decoder",
        ),
        (lambda: build("images", initial_slots="boxes")(inputs("images")), "hints: expected boxes for the slots"),
        (lambda: build("images")(inputs("images"), hints=torch.rand(2, 3, 4)), "hints: expected None: initial slots"),
        (
            lambda: build("images", initial_slots="boxes")(inputs("images"), hints=torch.rand(2, 3, 2)),
            r"hints: expected shape \[B, K, C\] with D = 4",
        ),
        (lambda: build("clips", predictor_heads=3), "predictor_heads: expected a divisor of slot_dim = 16"),
        (lambda: ObjectDiscovery({}, MLP, **SMALL), "encoder: expected a module, or a dictionary with a 'kind'"),
        (lambda: ObjectDiscovery({"kind": "conv"}, MLP, **SMALL), r"encoder\['kind'\]: expected"),
        (lambda: ObjectDiscovery({**FEATURES, "depth": 2}, MLP, **SMALL), "encoder: expected arguments of a Feature"),
        (lambda: BroadcastDecoder(8, image_size=24), "image_size: expected 8 times a power of two, 16 at least"),
        (lambda: ConvEncoder(8, kernels=(4,), strides=(1,)), "kernels: expected odd numbers"),
        (lambda: create_model("slot_autoencodr"), "Did you mean 'slot_autoencoder'"),
        (lambda: create_model("dinosaur", slots=3), "got 'slots'"),
        (lambda: list_models(task="everything"), "task: expected"),
    ],
)
def test_errors_say_what_is_wrong(call, message) -> None:
    with pytest.raises((InvalidArgument, InvalidType), match=message):
        call()


def test_the_predictor_leaves_out_masked_slots() -> None:
    torch.manual_seed(0)
    predictor, slots = SlotBlock(16, 2).double(), starts().double()
    mask = torch.tensor([[True, True, False]] * 2)
    assert_close(predictor(slots, mask)[:, :2], predictor(slots[:, :2]))


def test_cached_tokens_need_no_backbone_and_other_widths_are_refused() -> None:
    encoder = FeatureEncoder(8, feature_dim=12)
    tokens, grid, target = encoder(torch.randn(2, 10, 12))  # a class token before 3 x 3
    assert tokens.shape == (2, 9, 8)
    assert grid == (3, 3)
    assert target.shape == (2, 12, 3, 3)
    with pytest.raises(InvalidArgument, match="tokens: expected"):
        encoder(torch.randn(2, 9, 13))
