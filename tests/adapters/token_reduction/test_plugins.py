"""Methods and hosts of another package, which is installed as its metadata says."""

import sys
from pathlib import Path

import pytest
import torch

import narrows
from narrows.adapters.token_reduction import METHODS
from narrows.errors import InvalidArgument, InvalidType, NarrowsError
from narrows.models import create_model

METHOD = """
import torch
from narrows.adapters.token_reduction import Scoring

class First(Scoring):
    def scores(self, signals):
        return -torch.arange(signals.tokens.shape[1]).expand(signals.tokens.shape[:2]).float()
"""

HOST = """
import torch
from torch import nn
from narrows.adapters.token_reduction.hosts import BlockCall, HostBlock, HostModel, QueryKeyValue

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.head_dim = 2, 4
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(8), Attention(), nn.LayerNorm(8), nn.Linear(8, 8)
    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x

class TheirBlock(HostBlock):
    takes_bias = False
    @property
    def scale(self):
        return 0.5
    def arguments(self, x):
        return BlockCall()
    def normed(self, tokens):
        return self.module.norm1(tokens)
    def query_key_value(self, normed):
        return QueryKeyValue(*self.module.attn.qkv(normed).unflatten(-1, (3, 2, 4)).unbind(-3))
    def attention_update(self, attended, normed):
        return self.module.attn.proj(attended)
    def feed_forward_update(self, tokens):
        return self.module.mlp(self.module.norm2(tokens))

class TheirModel(HostModel):
    def block(self, index):
        return TheirBlock(self.blocks[index])
    def token_grid(self, height, width):
        return height // 4, width // 4
    def example(self, batch):
        return {"images": self.random_images(batch, 3)}

def recognise(module):
    if isinstance(module, Transformer):
        return TheirModel(module, blocks=module.blocks, prefix=0, embedding=module.patch_embed, image_size=(16, 16))
"""


def install(folder: Path, name: str, entry_points: str, source: str) -> None:
    """A package as an installer leaves it."""
    (folder / f"{name}.py").write_text(source)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where packages are installed."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def small_vit() -> torch.nn.Module:
    return create_model("vit_mini", depth=4, dim=16, heads=2, mlp_dim=16).eval()


def test_a_method_of_another_package_works_by_its_name(site: Path) -> None:
    install(site, "theirs_first", "[narrows.methods]\nfirst = theirs_first:First\n", METHOD)
    assert "first" in METHODS
    assert "theirs_first" not in sys.modules, "loaded before it was asked for"
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    with narrows.reduce_tokens(model, method="first", budget={1: 10}) as reduction:
        model(images)
        kept = reduction.routing[-1].weights.amax((1, 2)).nonzero()[:, 1].view(2, -1)
    assert torch.equal(kept, torch.arange(10).expand(2, -1)), "the first ten tokens"


def test_a_host_of_another_package_is_found_by_the_class_of_the_model(site: Path) -> None:
    install(site, "theirs_vits", "[narrows.hosts]\ntheirs_vits = theirs_vits:recognise\n", HOST)
    narrows.reduce_tokens(small_vit(), method="topk").remove()
    assert "theirs_vits" not in sys.modules, "loaded for a model of another package"
    import theirs_vits  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model, images = theirs_vits.Transformer().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        whole = model(images)
        with narrows.reduce_tokens(model, method="tome", budget={1: 9}) as reduction:
            assert model(images).shape == whole.shape
            assert reduction.routing[-1].num_carriers == 9
        assert torch.equal(model(images), whole)


def test_names_that_are_taken_and_packages_that_are_broken_are_named(site: Path) -> None:
    install(
        site,
        "theirs_broken",
        "[narrows.methods]\nbroken = theirs_broken:Missing\nnumber = theirs_broken:three\n",
        "three = int\n",
    )
    with pytest.raises(NarrowsError, match=r"theirs_broken:Missing, which theirs_broken brings as 'broken' .*Missing"):
        narrows.reduce_tokens(small_vit(), method="broken")
    with pytest.raises(InvalidType, match="method 'number': expected an entry point that makes an instance of Pruning"):
        narrows.reduce_tokens(small_vit(), method="number")
    with pytest.raises(InvalidArgument, match=r"method: expected one of .*'random'.*'broken'.* got 'nothing'"):
        narrows.reduce_tokens(small_vit(), method="nothing")


def test_a_name_of_narrows_is_not_taken_over(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "theirs_tome", "[narrows.methods]\ntome = theirs_tome:First\n", METHOD)
    with pytest.raises(
        InvalidArgument, match=r"entry point 'tome' of theirs_tome: expected a name in 'narrows.methods'"
    ):
        narrows.reduce_tokens(small_vit(), method="topk")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    narrows.reduce_tokens(small_vit(), method="topk").remove()


def test_a_host_that_gives_something_else_is_named(site: Path) -> None:
    source = "from torch import nn\nclass Transformer(nn.Linear): pass\ndef recognise(module): return 3\n"
    install(site, "theirs_wrong", "[narrows.hosts]\ntheirs_wrong = theirs_wrong:recognise\n", source)
    import theirs_wrong  # type: ignore[import-not-found]

    with pytest.raises(InvalidType, match=r"the host that is brought for 'theirs_wrong': expected a function .* got 3"):
        narrows.reduce_tokens(theirs_wrong.Transformer(2, 2))
