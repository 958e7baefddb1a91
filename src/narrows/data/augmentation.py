"""How training images are varied."""

from dataclasses import dataclass

from torch import nn

from narrows.data.image_set import MEAN_AND_STD
from narrows.errors import InvalidArgument


@dataclass(frozen=True)
class Augmentation:
    """Random crops and mirror images, and what else is asked for; the same random numbers give the same image.

    Args:
        least_area: least share of the image's area that a crop keeps.
        operations: how many operations of RandAugment (Cubuk et al. 2019, arXiv 1909.13719) change a crop; 0 for none.
        magnitude: of these operations, 0 to 30.
        erasing: how likely a rectangle of the crop becomes noise (Zhong et al. 2017, arXiv 1708.04896).
    """

    least_area: float = 0.4
    operations: int = 0
    magnitude: int = 9
    erasing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.least_area <= 1:
            raise InvalidArgument("least_area", expected="a share in (0, 1]", got=self.least_area)
        if not 0 <= self.erasing <= 1:
            raise InvalidArgument("erasing", expected="a share in [0, 1]", got=self.erasing)
        if self.operations < 0:
            raise InvalidArgument("operations", expected="0 or more", got=self.operations)
        if not 0 <= self.magnitude <= 30:
            raise InvalidArgument("magnitude", expected="0 to 30", got=self.magnitude)

    def of_pictures(self, image_size: int) -> list[nn.Module]:
        """What comes first: a picture to a square picture."""
        from torchvision.transforms import v2

        modules: list[nn.Module] = [
            v2.RandomResizedCrop(image_size, scale=(self.least_area, 1.0)),
            v2.RandomHorizontalFlip(),
        ]
        if self.operations:
            grey = [round(255 * mean) for mean in MEAN_AND_STD[3][0]]
            modules.append(v2.RandAugment(self.operations, self.magnitude, fill=grey))
        return modules

    def of_numbers(self) -> list[nn.Module]:
        """What comes last: a normalised image to another."""
        from torchvision.transforms import v2

        return [v2.RandomErasing(self.erasing, value="random")] if self.erasing else []  # pyright: ignore
