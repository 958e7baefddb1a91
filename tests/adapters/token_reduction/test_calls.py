"""A reduced model called by several at once, copied to devices, sharded."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from narrows.adapters.token_reduction import METHODS, reduce_tokens
from narrows.errors import InvalidArgument
from tests.adapters.token_reduction.families import FAMILIES, images, vit
from tests.adapters.token_reduction.hosts import HOSTS, inputs, outputs
from tests.adapters.token_reduction.test_reduce import state
from tests.support import assert_close


def replica(module: Any, factor: float) -> nn.Module:
    """As `DataParallel` copies a module to another device, its weights multiplied so that they can be told apart."""
    copied = module._replicate_for_data_parallel()
    copied._modules = {name: replica(child, factor) for name, child in module._modules.items() if child is not None}
    copied._modules |= {name: None for name, child in module._modules.items() if child is None}
    copied._parameters = {
        name: None if parameter is None else nn.Parameter(factor * parameter.detach())
        for name, parameter in module._parameters.items()
    }
    return copied


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "siglip", "greatest_pooled"])
def test_a_replica_uses_its_own_weights(family: str) -> None:
    model: Any = FAMILIES[family]()
    scaled = copy.deepcopy(model)
    for parameter in scaled.parameters():
        parameter.mul_(1.5)
    given = images(2, model.patch_embed.img_size[0])
    for method in ("topk", "ats", "tome"):
        with reduce_tokens(scaled, method=method):
            expected = scaled(given)
        with reduce_tokens(model, method=method):
            assert_close(replica(model, 1.5)(given), expected)


@torch.no_grad()
def test_threads_do_not_mix_up_their_tokens() -> None:
    model = vit()
    results: list[Tensor | None] = [None] * 4
    with reduce_tokens(model, method="ats", budget=0.4):
        alone = [model(images(size + 1)) for size in range(4)]

        def work(size: int) -> None:
            with torch.no_grad():
                for _ in range(3):
                    model.forward_intermediates(images(size + 1))
                    results[size] = model(images(size + 1))

        threads = [threading.Thread(target=work, args=(size,)) for size in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result, expected in zip(results, alone, strict=True):
        assert result is not None
        assert_close(result, expected)


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[dist.device_mesh.DeviceMesh]:
    """One process that shards with itself."""
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["shard", "reduce"])
@pytest.mark.parametrize("method", ["topk", "ats", "tome"])
def test_fully_sharded_before_or_after(mesh: dist.device_mesh.DeviceMesh, method: str, first: str) -> None:
    model = vit()
    untouched = model(images())
    with reduce_tokens(model, method=method):
        expected = model(images())

    def shard() -> None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    if first == "shard":
        shard()
    reduction = reduce_tokens(model, method=method)
    if first == "reduce":
        shard()
    reduced = model(images())
    assert_close(reduced, expected)
    reduced.sum().backward()
    reduction.remove()
    assert_close(model(images()), untouched)


class OwnLoop(nn.Module):
    """Somebody's call of the blocks, one after another, who reads what each returns."""

    def __init__(self) -> None:
        super().__init__()
        self.tower: Any = vit()

    def forward(self, images: Tensor) -> list[Tensor]:
        """After each block."""
        tokens, states = self.tower.norm_pre(self.tower._pos_embed(self.tower.patch_embed(images))), []
        for block in self.tower.blocks:
            tokens = block(tokens)
            states.append(tokens)
        return states


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_whoever_calls_the_blocks_reads_the_whole_grid(method: str) -> None:
    model = OwnLoop().eval()
    untouched = model(images(2))
    with reduce_tokens(model, method=method, budget={1: 0.5}):
        states = model(images(2))
        expected = model.tower.forward_intermediates(images(2), intermediates_only=True, output_fmt="NLC", norm=False)
    for of_loop, of_tower, before in zip(states, expected, untouched, strict=True):
        assert of_loop.shape == before.shape
        assert torch.equal(of_loop[:, 1:], of_tower)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_call_in_the_place_of_the_models_own_gets_hidden_states_on_the_grid(when: str) -> None:
    model = HOSTS["transformers vit"]()
    arguments = inputs(model, 2)
    own = model.forward
    if when == "before":
        model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with reduce_tokens(model, method="topk", budget={1: 0.5}):
        if when == "after":
            driven = model.forward
            model.forward = lambda *args, **kwargs: driven(*args, **kwargs)
        states = model(**arguments, output_hidden_states=True).hidden_states
        assert [state.shape for state in states] == [(2, 17, 32)] * 5


LORA = {
    "timm vit": ("qkv", "proj"),
    "timm eva_grouped_queries": ("q_proj", "v_proj"),
    "transformers vit": ("q_proj", "v_proj"),
    "transformers data2vec": ("query", "value"),
    "open_clip": ("c_fc",),
    "torchvision": ("mlp.0",),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LORA)
def test_lora_may_come_before_or_after_and_be_merged_while_reduced(name: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(LORA[name]), init_lora_weights=False)
    arguments = inputs(HOSTS[name](), 2)

    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()

    merged = adapted(HOSTS[name]()).merge_and_unload()
    with reduce_tokens(merged, method="topk"):
        (expected, *_) = outputs(merged, arguments)
    before = adapted(HOSTS[name]())
    reduction = reduce_tokens(before, method="topk")
    assert not type(reduction.host.module).__module__.startswith("peft")
    after = HOSTS[name]()
    reduce_tokens(after, method="topk")
    for model in (before, adapted(after)):
        assert_close(outputs(model, arguments)[0], expected, 1e-5)
        assert_close(outputs(model.merge_and_unload(), arguments)[0], expected, 1e-5)


def test_blocks_that_are_one_module_are_refused() -> None:
    model = vit()
    model.blocks[2] = model.blocks[1]
    before = state(model)
    with pytest.raises(InvalidArgument, match="tied weights"):
        reduce_tokens(model)
    assert state(model) == before


@torch.no_grad()
def test_blocks_may_be_left_early() -> None:
    model = vit()
    with reduce_tokens(model, method="topk"):
        whole = model.forward_intermediates(images(), indices=[2], intermediates_only=True)
        early = model.forward_intermediates(images(), indices=[2], intermediates_only=True, stop_early=True)
        assert torch.equal(early[0], whole[0])


def test_attaching_is_all_or_nothing() -> None:
    model = vit()
    reduction = reduce_tokens(model)
    reduction.remove()
    before, kinds = state(model), [type(module) for module in model.modules()]
    model.blocks[3].forward = lambda tokens: tokens
    with pytest.raises(InvalidArgument, match="block 3 with"):
        reduction.attach()
    del model.blocks[3].forward
    assert state(model) == before
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("name", ["timm vit", "transformers dinov3", "transformers siglip2", "narrows vit"])
def test_reducing_draws_no_random_number_and_sets_no_global_switch(name: str) -> None:
    model = HOSTS[name]()
    seed, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    for method in METHODS:
        reduce_tokens(model, method=method).remove()
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.get_float32_matmul_precision() == precision
