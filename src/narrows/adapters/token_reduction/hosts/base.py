"""The interface through which a reduction finds the blocks of another library's model and takes attention apart.

A block that keeps every token runs its own `forward`, so a host says little: where the blocks are and what stands
before the grid (`HostModel`), and, for blocks that choose or merge, the steps of one block (`HostBlock`).

    class MyBlock(HostBlock):
        takes_bias = False  # its own forward takes no mask
        def arguments(self, x): return BlockCall()
        def normed(self, tokens): return self.module.norm1(tokens)
        def query_key_value(self, normed):
            attn = self.module.attn
            return QueryKeyValue(*attn.qkv(normed).unflatten(-1, (3, attn.heads, -1)).unbind(-3))
        def attention_update(self, attended, normed): return self.module.attn.proj(attended)
        def feed_forward_update(self, tokens): return self.module.mlp(self.module.norm2(tokens))

    class MyModel(HostModel):
        def block(self, index): return MyBlock(self.blocks[index])
        def token_grid(self, height, width): return height // 16, width // 16
        def example(self, batch): return {"images": self.random_images(batch, 3)}

    reduce_tokens(MyModel(model, blocks=model.blocks, prefix=1, embedding=model.patch_embed, image_size=(224, 224)))

That is a whole host. Blocks that differ from others in names alone are a table of these names (`parts`). Besides, a
model may have rotary or relative positions and masks (`BlockCall`, `rotary_rows`, `mask_of`, `narrowed`), heads that
average over tokens (`pool`, `pools`, `pooling_logits`) and callers that read the tokens after each block (`entries`,
`reader`). The self-test compares each step with the block's own `forward` and names the block whose steps forgot
something.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.adapters.token_reduction.tokens import Call
from narrows.errors import InvalidArgument, InvalidType


class BlockCall(NamedTuple):
    """The arguments of a block beside its tokens, as the host gives them.

    Args:
        rotary: rotary embeddings, which `HostBlock.rotary_rows` brings to one form; None without.
        bias: the attention mask, which `HostBlock.mask_of` brings to one form; None without.
        relative: `[H, N, N]` or `[1, H, N, N]`, added to the logits by the positions of query and key, of which a
            merged token keeps one; None without.
    """

    rotary: Any = None
    bias: Any = None
    relative: Tensor | None = None


class QueryKeyValue(NamedTuple):
    """Query, key and value `[R, n, H, d]`, after the norms of query and key, before rotary positions."""

    query: Float[Tensor, "R n H d"]
    key: Float[Tensor, "R n H d"]
    value: Float[Tensor, "R n H d"]


class HostBlock(ABC):
    """One transformer block as separate steps, which composed with attention compute what its own `forward` does.

    Steps call the block's own modules, so that hooks, adapters (LoRA) and quantised layers keep working. Rows are
    `[R, n, ...]`, padded (R images) or packed (R = 1): a step treats every row for itself. Everything is read from
    `module` when it is needed, which may be a replica.

    Args:
        module: the block.
    """

    # Whether the block's own forward takes a mask: padding, and how often merged tokens count, reach it that way.
    takes_bias: bool = True
    # Whether its own forward knows where fewer tokens stand: one that works out relative positions by itself does not.
    takes_positions: bool = True
    # Whether tokens of the host are [N, B, D].
    sequence_first: bool = False

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def of(self, module: nn.Module) -> "HostBlock":
        """The same for a replica of the block."""
        other = copy(self)
        other.module = module
        return other

    @property
    def scale(self) -> float | None:
        """Factor of the attention logits; None for one over the root of the heads' width."""
        return None

    @property
    def dropout(self) -> float:
        """Dropout probability of attention weights, 0 in evaluation."""
        return 0.0

    @property
    def fused(self) -> bool:
        """Whether attention may run by a fused kernel."""
        return True

    @property
    def gated(self) -> bool:
        """Whether `attention_update` reads the normalised tokens."""
        return False

    @property
    def bypassed(self) -> Sequence[nn.Module]:
        """Modules that the block calls and that its steps do not: what hooks on them wait for does not happen."""
        return ()

    @abstractmethod
    def arguments(self, *args: Any, **kwargs: Any) -> BlockCall:
        """The call's arguments, the tokens first; raises for one that a reduction cannot honour."""

    def unmasked(self, call: BlockCall) -> BlockCall:
        """The call without its mask, where an exporter made a full one of none."""
        return call._replace(bias=None)

    def narrowed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Tensor | None, bias: Tensor | None, prefix: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the block's own forward on fewer tokens, which are in their place already.

        Args:
            args: as the block was called.
            kwargs: as the block was called.
            rotary: `[B or 1, K, H or 1, R]`: `rotary_rows` of these tokens.
            bias: `[B or 1, H or 1, 1 or K, K]`, boolean or added to the logits.
            prefix: tokens before the grid.
        """
        assert rotary is None
        assert bias is None
        return args, kwargs

    def result(self, given: Any, tokens: Float[Tensor, "B N D"]) -> Any:
        """What the block returns for these tokens, where it was given `given`."""
        return self.with_tokens(given, tokens)

    def tokens(self, holder: Any) -> Float[Tensor, "B N D"]:
        """The tokens in what the block is given first, or returned."""
        return holder[0] if isinstance(holder, tuple | list) else holder

    def with_tokens(self, holder: Any, tokens: Float[Tensor, "B N D"]) -> Any:
        """What the block is given first, or returned, with other tokens."""
        if isinstance(holder, tuple):
            return (tokens, *holder[1:])
        return [tokens] if isinstance(holder, list) else tokens

    @abstractmethod
    def normed(self, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n D"]:
        """The input of attention: the normalised tokens."""

    @abstractmethod
    def query_key_value(self, normed: Float[Tensor, "R n D"]) -> QueryKeyValue:
        """Queries, keys and values after their norms, before rotary positions."""

    def rotary_rows(self, rotary: Any, width: int, prefix: int) -> Float[Tensor, "B M H R"]:
        """`[B or 1, width + 1, H or 1, R]`: the rotary embedding of each position, prefix included.

        Those of the prefix and the last row, for a fused token without a position, do not rotate.
        """
        raise NotImplementedError

    def rotate(self, heads: Float[Tensor, "R n H d"], rotary: Float[Tensor, "R n H R"]) -> Float[Tensor, "R n H d"]:
        """Queries or keys with the rotary embeddings of their positions applied."""
        raise NotImplementedError

    def mask_of(self, bias: Any, width: int) -> Tensor:
        """The mask as `[B or 1, H or 1, N, N]`, boolean or added to the logits."""
        return bias

    @abstractmethod
    def attention_update(
        self, attended: Float[Tensor, "R m HD"], normed: Float[Tensor, "R m D"] | None
    ) -> Float[Tensor, "R m D"]:
        """What attention adds to the tokens: gate, output projection, norm, layer scale; without stochastic depth.

        `normed` is what `normed` gave for these tokens, None unless the block is `gated`.
        """

    @abstractmethod
    def feed_forward_update(self, tokens: Float[Tensor, "R m D"]) -> Float[Tensor, "R m D"]:
        """What the feed-forward adds to the tokens, without stochastic depth."""

    def drop_paths(self) -> tuple[nn.Module, nn.Module]:
        """Stochastic depth of the two updates: modules that keep or drop each image (axis 0)."""
        return _KEEP, _KEEP

    def check_unobserved(self, index: int) -> None:
        """Raise if somebody waits for a call of a module that the steps of this block do without."""
        for module in self.bypassed:
            hooks = [
                *module._forward_hooks.values(),
                *module._forward_pre_hooks.values(),
                *module._backward_hooks.values(),
                *module._backward_pre_hooks.values(),
            ]
            # Hooks of transformers that collect outputs stay once they were asked for; they do nothing by themselves.
            waiting = [hook for hook in hooks if "output_capturing" not in getattr(hook, "__module__", "")]
            what = f"a hook ({waiting[0]!r})" if waiting else "a forward in place of its own"
            if waiting or "forward" in module.__dict__:
                raise InvalidArgument(
                    "model",
                    expected=f"nothing on the {type(module).__name__} of block {index}, which reduces: it computes "
                    "attention of the tokens that go on and calls the parts of this module, not the module",
                    got=what,
                    hint="Put it on the block or on the projections, or reduce in another block.",
                )


_KEEP = nn.Identity()


class RunsItself(HostBlock):
    """A block of any class that keeps every token: it is called with fewer, and with nothing else that is per token."""

    takes_bias = False

    def arguments(self, tokens: Tensor, *args: Any, **kwargs: Any) -> BlockCall:
        for name, value in (*enumerate(args, 1), *kwargs.items()):
            if isinstance(value, Tensor | tuple | list):
                raise InvalidArgument(
                    f"argument {name}",
                    expected=f"none of {type(self.module).__name__}, a class that narrows does not know",
                    got=type(value).__name__,
                    hint="Reduce after this block.",
                )
        return BlockCall()

    def normed(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def query_key_value(self, normed: Tensor) -> QueryKeyValue:
        raise NotImplementedError

    def attention_update(self, attended: Tensor, normed: Tensor | None) -> Tensor:
        raise NotImplementedError

    def feed_forward_update(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError


class HostModel(ABC):
    """A vision transformer of another library.

    Args:
        module: the model.
        blocks: its blocks, in the order they run.
        prefix: tokens before the grid: class token, distillation token, registers.
        embedding: the module that turns images into tokens, called with the images as its first argument.
        image_size: `(height, width)` of the images it was trained on.
    """

    # Methods of `module` by which it is called.
    entries: Sequence[str] = ("forward",)

    def __init__(
        self,
        module: nn.Module,
        *,
        blocks: Iterable[nn.Module],
        prefix: int,
        embedding: nn.Module,
        image_size: tuple[int, int],
    ) -> None:
        self.module: Any = module
        self.blocks, self.prefix = tuple(blocks), prefix
        self.embedding, self.image_size = embedding, image_size

    @property
    def class_token(self) -> bool:
        """Whether the first token is a class token that the head reads, so that its attention says what matters."""
        return self.prefix > 0

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def num_tokens(self) -> int:
        """Tokens after the prefix, for images of `image_size`."""
        height, width = self.token_grid(*self.image_size)
        return height * width

    @abstractmethod
    def block(self, index: int) -> HostBlock:
        """The block at `index`.

        Raises:
            InvalidType: it is of a class that is not supported.
        """

    @abstractmethod
    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """`(height, width)` of the grid after the prefix for images of this height and width."""

    def grid_of(self, images: Tensor) -> tuple[int, int] | None:
        """The grid that these images become, as the embedding is given them."""
        return self.token_grid(images.shape[-2], images.shape[-1])

    @abstractmethod
    def example(self, batch: int) -> dict[str, Tensor]:
        """Random inputs the model can be called with, on its device and in its precision; see `random_images`."""

    def random_images(self, batch: int, channels: int, *size: int) -> Tensor:
        """`[batch, channels, *size]`, by default of the model's own size; always the same."""
        # Weights that were quantised are integers.
        like = next(parameter for parameter in self.module.parameters() if parameter.is_floating_point())
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, channels, *(size or self.image_size), generator=generator).to(like.device, like.dtype)

    def reader(self, module: Any, name: str, kwargs: dict[str, Any]) -> str:
        """Who reads the tokens when the model is called by the method `name`: see `Call.reader`."""
        return "grid"

    @property
    def pools(self) -> Sequence[tuple[nn.Module, str]]:
        """Methods that pool all tokens of the grid and must see kept ones only, as `(module, name)`; see `pool`.

        Tokens dropped early were never brought to the last block, and including them in the mean costs accuracy.
        """
        return ()

    def pool(self, module: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answers a method of `pools`: pool the tokens that `kept_mask_of` names; `own` is the method itself."""
        return own(*args, **kwargs)

    @property
    def between(self) -> Sequence[nn.Module]:
        """Modules between the last block and the pooling, through which the mask of kept tokens is passed on."""
        return ()

    def pooling_logits(self, module: Any, tokens: Float[Tensor, "R n D"]) -> Float[Tensor, "R n H"] | None:
        """Logits that pooling after the last block would give these tokens; None where it weighs all equally.

        Attention pooling has one query for each of H heads. Max pooling is hard attention with one head for each
        channel: its logits are the channels. `module` is the model, or a replica of it.
        """
        return None

    def averaging(self, model: nn.Module) -> Sequence[nn.Module]:
        """Modules of `model` that hold the host and average what it returns over the grid, in their own forward."""
        return ()

    def averageable(self, result: Any, kwargs: dict[str, Any]) -> Any:
        """What the host returned when called with `kwargs`, so changed that its mean is that of kept tokens alone."""
        return result

    def stale_heads(self, model: nn.Module) -> Sequence[str]:
        """What else in `model` may average over tokens by itself: it sees dropped ones as they were."""
        return ()

    @property
    def drops_patches(self) -> bool:
        """Whether the model itself leaves out patches in this call, so that their number cannot be foretold."""
        return False

    def check_count(self, width: int, call: Call) -> None:
        """Raise unless so many tokens came to the first block that reduces as prefix and grid make."""
        if isinstance(width, torch.SymInt) or self.drops_patches:
            return
        grid = self.token_grid(*self.image_size) if call.grid is None else call.grid
        expected = self.prefix + grid[0] * grid[1]
        if width != expected:
            raise InvalidArgument(
                "tokens",
                expected=f"{self.prefix} special ones and a grid of {grid[0]} x {grid[1]}",
                got=f"{width} tokens",
                hint="Something adds or leaves out tokens that narrows does not know of (prompts, registers, masks): "
                "it cannot tell which may be dropped. Pass a HostModel that counts them to its prefix.",
            )


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a block was given first: tokens, or a list that holds them."""
    return args[0] if args else next(iter(kwargs.values()))


def with_first(args: tuple[Any, ...], kwargs: dict[str, Any], first: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with another first one."""
    return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): first})


def added_for(mask: Bool[Tensor, "B H n m"], dtype: torch.dtype) -> Float[Tensor, "B H n m"]:
    """What attention of tokens of this dtype adds to its logits in place of the mask."""
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """`(height, width)` of a size that may be the side of a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def unsupported(argument: str, module: nn.Module, known: str) -> InvalidType:
    """The error for a part of a model whose class is not supported."""
    return InvalidType(
        argument,
        expected=known,
        got=f"{type(module).__module__}.{type(module).__qualname__}, which is not supported",
        hint="Reduce the model before its blocks are wrapped."
        if hasattr(module, "_checkpoint_wrapped_module")
        else "To support it, write a HostBlock (narrows.adapters.token_reduction.hosts.base).",
    )
