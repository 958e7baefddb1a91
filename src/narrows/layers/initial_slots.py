"""How slots begin: drawn around one learned mean, learned one by one, or made of boxes or points."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from narrows.errors import InvalidArgument
from narrows.layers.initialisation import detached_under_no_grad, draw_, reset_submodules
from narrows.validation import check_generator, check_mask, check_positive, check_tokens


class GaussianSlots(nn.Module):
    """Initial slots drawn around one mean that all slots share: `mean + exp(log_scale) * noise`.

    Args:
        num_slots: K, unless a call says otherwise.
        slot_dim: S.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_slots=num_slots, slot_dim=slot_dim)
        self.num_slots, self.slot_dim = int(num_slots), int(slot_dim)
        self.mean = nn.Parameter(torch.empty(slot_dim, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(slot_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot, of the shape `[1, S]` the published code gives both parameters."""
        bound = (6 / (1 + self.mean.shape[0])) ** 0.5
        for parameter in (self.mean, self.log_scale):
            draw_(parameter, lambda drawn: nn.init.uniform_(drawn, -bound, bound))

    def forward(
        self,
        batch: int,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B K S"]:
        """Given `slots` in the dtype of the parameters, or fresh ones from one normal sample `[B, K, S]`.

        The sample is drawn in float32 whatever the dtype, so that one seed gives the same slots in every precision.
        """
        if slots is not None:
            return _given(slots, num_slots, like=self.mean)
        num_slots = self.num_slots if num_slots is None else num_slots
        check_positive(num_slots=num_slots)
        options = {"device": self.mean.device, "dtype": torch.float32}
        if generator is None:  # The overload with a generator, even if it is None, does not export an open batch.
            noise = torch.randn(batch, num_slots, self.slot_dim, **options)
        else:
            noise = torch.randn(batch, num_slots, self.slot_dim, generator=generator, **options)
        return self.mean + self.log_scale.exp() * noise.to(self.mean.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"num_slots={self.num_slots}, slot_dim={self.slot_dim}"


class LearnedSlots(nn.Module):
    """Initial slots that are parameters, one for each slot: the same for every sample, and deterministic.

    A call that asks for another number of slots than were learned is an error. (BO-QSA, arXiv 2210.08990.)

    Args:
        num_slots: K.
        slot_dim: S.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_slots=num_slots, slot_dim=slot_dim)
        self.num_slots, self.slot_dim = int(num_slots), int(slot_dim)
        self.slots = nn.Parameter(torch.empty(num_slots, slot_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A normal sample: slots that start alike would stay alike."""
        draw_(self.slots, nn.init.normal_)

    def forward(
        self,
        batch: int,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B K S"]:
        """Given `slots` in the dtype of the parameters, or the learned ones; nothing is drawn."""
        if slots is not None:
            return _given(slots, num_slots, like=self.slots)
        if num_slots is not None and num_slots != self.num_slots:
            raise InvalidArgument("num_slots", expected=f"None or the {self.num_slots} learned", got=num_slots)
        return detached_under_no_grad(self.slots).expand(batch, -1, -1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"num_slots={self.num_slots}, slot_dim={self.slot_dim}"


class HintedSlots(nn.Module):
    """Initial slots that a two-layer MLP makes of a hint for each slot, a box or a point: the slot of a hint holds its
    object (SAVi, Kipf et al. 2022). Nothing is drawn. Slots with the same hint are the same.

    `narrows.ops.object_hints.object_hints` makes hints of labelled pixels.

    Args:
        num_slots: K, of the hints a model makes of labels; a call may bring another number.
        slot_dim: S.
        hint_dim: C, 4 for boxes and 2 for points.
        hidden_dim: of the MLP.
        device: where parameters are made.
        dtype: of the parameters.

    https://arxiv.org/abs/2111.12594
    """

    def __init__(
        self,
        num_slots: int,
        slot_dim: int,
        *,
        hint_dim: int = 4,
        hidden_dim: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_slots=num_slots, slot_dim=slot_dim, hint_dim=hint_dim, hidden_dim=hidden_dim)
        self.num_slots, self.slot_dim, self.hint_dim = int(num_slots), int(slot_dim), int(hint_dim)
        self.expand = nn.Linear(hint_dim, hidden_dim, device=device, dtype=dtype)
        self.contract = nn.Linear(hidden_dim, slot_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """As torch draws linear maps."""
        reset_submodules(self)

    def of(self, hints: Float[Tensor, "B K C"]) -> Float[Tensor, "B K S"]:
        """The slots that begin at these hints."""
        check_tokens("hints", hints, dim=self.hint_dim, layout="[B, K, C]")
        return self.contract(self.expand(hints.to(self.expand.weight.dtype)).relu())

    def forward(
        self,
        batch: int,
        slots: Float[Tensor, "B K S"] | None = None,
        num_slots: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B K S"]:
        """Given `slots` in the dtype of the parameters.

        Raises:
            InvalidArgument: none were given.
        """
        if slots is None:
            expected = "slots that begin at hints, `initial_slots.of(hints)`"
            raise InvalidArgument("slots", expected=expected, got=None)
        return _given(slots, num_slots, like=self.contract.bias)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"num_slots={self.num_slots}, slot_dim={self.slot_dim}, hint_dim={self.hint_dim}"


def _given(slots: Tensor, num_slots: int | None, *, like: Tensor) -> Tensor:
    """Slots a call brings, checked, in the dtype of the parameter `like`."""
    check_tokens("slots", slots, dim=like.shape[-1], layout="[B, K, S]")
    if num_slots is not None and num_slots != slots.shape[1]:
        raise InvalidArgument("num_slots", expected=f"None or the {slots.shape[1]} slots given", got=num_slots)
    return slots.to(like.dtype)


def make_initial_slots(
    initial_slots: nn.Module | None,
    num_slots: int | None,
    slot_dim: int,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """`initial_slots`, which must have the number and width asked for where they say theirs; Gaussian ones if None."""
    if initial_slots is None:
        if num_slots is None:
            raise InvalidArgument("num_slots", expected="a positive integer, or initial_slots", got=None)
        return GaussianSlots(num_slots, slot_dim, device=device, dtype=dtype)
    if num_slots is not None:
        check_positive(num_slots=num_slots)
    for name, asked in (("num_slots", num_slots), ("slot_dim", slot_dim)):
        own = getattr(initial_slots, name, None)
        if asked is not None and own is not None and own != asked:
            raise InvalidArgument(name, expected=f"{own}, as the initial_slots have", got=asked)
    return initial_slots


def starting_slots(
    initial_slots: nn.Module,
    batch: int,
    slots: Float[Tensor, "B K S"] | None,
    num_slots: int | None,
    generator: torch.Generator | None,
    slot_mask: Bool[Tensor, "B K"] | None,
) -> Float[Tensor, "B K S"]:
    """The slots before the first iteration: given or drawn, with 0 in those that are masked."""
    check_generator(generator)
    start: Tensor = initial_slots(batch, slots, num_slots, generator)
    if start.shape[0] != batch:
        raise InvalidArgument("slots", expected=f"as many samples as tokens, {batch}", got=start.shape[0])
    check_mask("slot_mask", slot_mask, start.shape[:2], layout="[B, K]")
    return start if slot_mask is None else start.masked_fill(~slot_mask[..., None], 0)


def reset_initial_slots(initial_slots: nn.Module) -> None:
    """Draw the parameters of initial slots anew, by their own `reset_parameters` or those of their parts."""
    reset = getattr(initial_slots, "reset_parameters", None)
    if reset is None:
        reset_submodules(initial_slots)
    else:
        reset()
