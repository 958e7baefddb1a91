"""What is particular to models of transformers: hidden states, attention weights, masks, backbones, checkpointing."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from narrows.adapters.token_reduction import reduce_tokens
from narrows.costs import saved_for_backward
from narrows.errors import InvalidArgument, InvalidType
from tests.adapters.token_reduction.families import awake
from tests.adapters.token_reduction.hosts import HOSTS, PATCH, SIDE, config, inputs, outputs
from tests.adapters.token_reduction.test_every_host import BUDGETS, Everything, assert_all_close, kept, run
from tests.support import assert_close

every_model = pytest.mark.parametrize("name", [name for name in HOSTS if name.startswith("transformers")])
INTERPOLATES = ("transformers vit", "transformers deit", "transformers clip", "transformers siglip")


@every_model
def test_hidden_states_are_on_the_full_grid(name: str) -> None:
    """Carried tokens in place, dropped ones as they were last; nothing changes before the first block that reduces."""
    model = HOSTS[name]()
    arguments = inputs(model, 2)
    with torch.no_grad():
        untouched = model(**arguments, output_hidden_states=True).hidden_states
        with reduce_tokens(model, method="topk", budget={2: 0.5}) as reduction:
            states = model(**arguments, output_hidden_states=True).hidden_states
            (carried,) = kept(reduction)
    assert [state.shape for state in states] == [state.shape for state in untouched]
    assert all(map(torch.equal, states[:3], untouched[:3]))
    for state in states[3:]:
        assert torch.equal(state[~carried], states[2][~carried])
        assert (state[carried] != states[2][carried]).any(-1).all()


@every_model
def test_attention_weights_are_refused_until_the_reduction_is_removed(name: str) -> None:
    model = HOSTS[name]()
    model.set_attn_implementation("eager")
    arguments = inputs(model, 2)
    with reduce_tokens(model, budget=0.5):
        with pytest.raises(InvalidArgument, match=r"output_attentions: expected False .* Call remove\(\)"):
            model(**arguments, output_attentions=True)
        run(model, arguments, output_attentions=False)
    assert len(model(**arguments, output_attentions=True).attentions) == 4


def test_attention_weights_asked_for_in_the_configuration_are_refused() -> None:
    model = transformers.ViTModel(config("ViTConfig", attn_implementation="eager", output_attentions=True))
    with pytest.raises(InvalidArgument, match="output_attentions"):
        reduce_tokens(model, budget=0.5)
    assert len(model(**inputs(model, 1)).attentions) == 4


@every_model
def test_attention_without_fused_kernels_is_the_same(name: str) -> None:
    model = HOSTS[name]()
    model.set_attn_implementation("eager")
    arguments = inputs(model, 2)
    untouched = run(model, arguments)
    with reduce_tokens(model, method=Everything(), budget=1.0):
        assert_all_close(run(model, arguments), untouched)


@every_model
def test_checkpointing_gives_the_same_gradients_from_less_memory(name: str) -> None:
    model = HOSTS[name]().train()
    arguments = inputs(model, 2)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss() -> Tensor:
        torch.manual_seed(0)  # DINOv3 draws its positions anew while training
        return torch.stack([tensor.square().mean() for tensor in outputs(model, arguments)]).sum()

    def measured() -> tuple[int, list[Tensor | None]]:
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        return saved_for_backward(loss, exclude=parameters), list(gradients)

    with reduce_tokens(model, budget=0.5):
        plain_bytes, plain = measured()
        model.activation_checkpointing_enable()
        bytes_, checkpointed = measured()
    assert bytes_ < 0.7 * plain_bytes
    for ours, theirs in zip(checkpointed, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViT", {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}),
        ("Dinov2", {"drop_path_rate": 0.5}),
        ("DINOv3ViT", {"drop_path_rate": 0.5, "pos_embed_jitter": 2.0}),
    ],
)
def test_training_draws_what_the_untouched_model_draws(kind: str, settings: dict[str, float]) -> None:
    model = getattr(transformers, f"{kind}Model")(config(f"{kind}Config", **settings)).train()
    arguments = inputs(model, 4)
    torch.manual_seed(0)
    untouched = run(model, arguments)
    with reduce_tokens(model, method="topk", budget=1.0):
        torch.manual_seed(0)
        assert_all_close(run(model, arguments), untouched)
        torch.manual_seed(1)
        assert not torch.equal(run(model, arguments)[0], untouched[0])


@pytest.mark.parametrize("name", INTERPOLATES)
def test_images_of_another_size(name: str) -> None:
    model = HOSTS[name]()
    larger = SIDE + 2 * PATCH
    arguments = {**inputs(model, 2, side=larger), "interpolate_pos_encoding": True}
    results = []
    for execution in ("static", "ragged"):
        with reduce_tokens(model, budget=0.5, execution=execution) as reduction:
            results.append(run(model, arguments))
            assert reduction.routing[0].grid == (larger // PATCH, larger // PATCH)
    assert_all_close(*results)


def test_feature_maps_of_a_backbone() -> None:
    stages = {"out_features": ["stage1", "stage3", "stage4"], "apply_layernorm": False}
    model = transformers.Dinov2Backbone(config("Dinov2Config", **stages)).eval()
    arguments = inputs(model, 2)
    untouched = run(model, arguments)
    with reduce_tokens(model, method="topk", budget={2: 0.5}) as reduction:
        maps = run(model, arguments)
        carried = kept(reduction)[0][:, 1:].unflatten(1, (SIDE // PATCH, SIDE // PATCH))
    assert [tensor.shape for tensor in maps] == [(2, 32, SIDE // PATCH, SIDE // PATCH)] * 3
    assert torch.equal(maps[0], untouched[0])
    moved = (maps[2] - maps[1]).abs().sum(1) > 0
    assert torch.equal(moved, carried)


@pytest.mark.parametrize("method", ["topk", "ats"])
def test_padding_of_siglip2_is_read_by_no_token(method: str) -> None:
    model = HOSTS["transformers siglip2"]()
    arguments = inputs(model, 2)
    arguments["spatial_shapes"][1] = torch.tensor([3, 4])
    arguments["pixel_attention_mask"][1, 12:] = 0
    other = {**arguments, "pixel_values": arguments["pixel_values"].clone()}
    other["pixel_values"][1, 12:] = 5.0
    untouched = model(**arguments)
    with reduce_tokens(model, method=Everything(), budget=1.0, execution="static"):
        assert_close(model(**arguments).pooler_output, untouched.pooler_output, 1e-5)
    for budget in BUDGETS:
        with reduce_tokens(model, method=method, budget=budget, execution="static"):
            assert_close(model(**other).pooler_output, model(**arguments).pooler_output, 1e-5)


@pytest.mark.parametrize("name", ["transformers siglip", "transformers siglip2"])
def test_attention_pooling_uses_kept_tokens_only(name: str) -> None:
    model = HOSTS[name]()
    with torch.no_grad():
        with reduce_tokens(model, budget=0.5) as reduction:
            result = model(**inputs(model, 2))
            carried = kept(reduction)[-1]
        alone = [model.head(tokens[keep][None]) for tokens, keep in zip(result.last_hidden_state, carried, strict=True)]
    assert_close(result.pooler_output, torch.cat(alone), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters", "CLIP", "Siglip", "Siglip2"])
def test_heads_that_average_by_themselves_see_kept_tokens_only(family: str) -> None:
    vision = config(family + ("Config" if family.startswith("Dino") else "VisionConfig"))
    whole = vision
    if not family.startswith("Dino"):
        whole = getattr(transformers, f"{family}Config")(vision_config=vision.to_dict())
    model = awake(getattr(transformers, f"{family}ForImageClassification")(whole))
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tower = model.vision_model if hasattr(model, "vision_model") else model.base_model
    given = inputs(tower, 2)
    for method in ("topk", "ats", "tome", "evit"):
        with reduce_tokens(model, method=method, budget=0.5) as reduction:
            model(**given)
            states, prefix = reduction.host.module(**given).last_hidden_state, reduction.host.prefix
            carried = kept(reduction)[-1]
        means = [tokens[prefix:][keep[prefix:]].mean(0) for tokens, keep in zip(states, carried, strict=True)]
        assert_close(seen[-1][:, -vision.hidden_size :], torch.stack(means), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", ["topk", "ats"])
def test_padding_of_siglip2_has_no_say_where_queries_are_averaged(method: str) -> None:
    model = transformers.Siglip2VisionModel(config("Siglip2VisionConfig", vision_use_head=False)).eval()
    given = inputs(model, 2)
    given["spatial_shapes"][1] = torch.tensor([3, 4])
    given["pixel_attention_mask"][1, 12:] = 0
    other = {**given, "pixel_values": given["pixel_values"].clone()}
    other["pixel_values"][1, 12:] = 5.0
    with reduce_tokens(model, method=method, budget=6, execution="static") as reduction:
        first, positions = model(**given).last_hidden_state[:, :12], kept(reduction)
        assert_close(model(**other).last_hidden_state[:, :12], first, 1e-5)
        assert all(map(torch.equal, kept(reduction), positions))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_of_two_towers_the_one_that_sees_is_reduced(kind: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    text = {**sizes, "vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    both = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**sizes, "image_size": SIDE, "patch_size": PATCH}
    )
    model = getattr(transformers, f"{kind}Model")(both).eval()
    arguments = {"input_ids": torch.tensor([[1, 5, 7, 2]]), "pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    with torch.no_grad():
        untouched = model(**arguments)
        with reduce_tokens(model, budget=0.25) as reduction:
            reduced = model(**arguments)
            assert reduction.routing[0].name == "vision_model.encoder.layers.1"
    assert torch.equal(reduced.text_embeds, untouched.text_embeds)
    assert not torch.equal(reduced.image_embeds, untouched.image_embeds)


def test_a_layer_of_another_class_is_named_and_the_model_left_alone() -> None:
    class Odd(nn.Module):
        def forward(self, tokens: Tensor, *_: object, **__: object) -> Tensor:
            return tokens

    model = HOSTS["transformers vit"]()
    model.layers[2] = Odd()
    arguments = inputs(model, 2)
    untouched = run(model, arguments)
    with pytest.raises(InvalidType, match=r"layer 2: expected ViTLayer.*, got .*Odd, which is not supported"):
        reduce_tokens(model, budget=0.5)
    assert all(map(torch.equal, run(model, arguments), untouched))
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_unknown_arguments_of_a_layer_are_refused() -> None:
    model = HOSTS["transformers vit"]()
    tokens = torch.randn(2, 17, 32)
    with reduce_tokens(model, budget={0: 0.5}):
        with pytest.raises(
            InvalidArgument, match=r"attention_mask: .*\[B, 1, N, N\].*set_attn_implementation\('sdpa'\)"
        ):
            model.layers[0](tokens, torch.ones(2, 17))
        with pytest.raises(InvalidArgument, match="position_bias: expected no such argument"):
            model.layers[0](tokens, None, position_bias=torch.zeros(1))


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("transformers dinov3", "ats"),
        ("transformers siglip", "topk"),
        ("transformers beit", "topk"),  # relative positions of each block
        ("hub dinov3", "topk"),  # tokens and positions in lists, made for each block
    ],
)
def test_one_graph(name: str, method: str) -> None:
    model = HOSTS[name]()
    arguments = inputs(model, 2)
    with reduce_tokens(model, method=method, budget=0.5, execution="static"), torch.no_grad():
        expected = run(model, arguments)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_all_close(run(compiled, arguments), expected)
        exported = torch.export.export(model, (), arguments).module()
        assert_all_close(run(exported, arguments), expected)
