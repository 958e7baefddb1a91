"""Training images mixed with each other."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torchvision.transforms import v2

from narrows.errors import InvalidArgument


@dataclass(frozen=True)
class Mixing:
    """Every image of a batch is mixed with its neighbour, all of them in the same way: mixup or CutMix, at even odds.

    Mixup (Zhang et al. 2018, arXiv 1710.09412) adds the images, λ x_i + (1 - λ) x_(i-1); CutMix (Yun et al. 2019,
    arXiv 1905.04899) puts a rectangle of one over the other, 1 - λ of its area. λ ~ Beta(α, α). The classes are mixed
    as the images are.

    Args:
        mixup: α of mixup.
        cutmix: α of CutMix.
    """

    mixup: float = 0.8
    cutmix: float = 1.0

    def __post_init__(self) -> None:
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if alpha <= 0:
                raise InvalidArgument(name, expected="a positive number", got=alpha)

    def __call__(
        self, images: Float[Tensor, "B C H W"], labels: Int[Tensor, "B"], num_classes: int
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B classes"]]:
        """Mixed images, and the share that each class has of them."""
        kinds = (
            v2.MixUp(alpha=self.mixup, num_classes=num_classes),
            v2.CutMix(alpha=self.cutmix, num_classes=num_classes),
        )
        return v2.RandomChoice(kinds)(images, labels)
