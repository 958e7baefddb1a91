"""Images that several trainings look at, drawn once."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from narrows.data.image_set import ImageSet


class RememberedImages(ImageSet):
    """The batches of another set, drawn or read when first asked for and handed out again from then on.

    Args:
        images: the other set.
        capacity: bytes of images that are remembered; batches beyond are drawn every time.
    """

    def __init__(self, images: ImageSet, *, capacity: int = 2**29) -> None:
        self.images, self.capacity = images, capacity
        self._batches: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """As in the other set."""
        return self.images.name(index)

    def batch(
        self, indices: Sequence[int], epoch: int = 0
    ) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, "B *pixels"]]:
        """Normalised images and labels, as of the other set."""
        which = epoch, tuple(indices)
        batch = self._batches.get(which)
        if batch is None:
            batch = self.images.batch(indices, epoch)
            if batch[0].nbytes <= self.capacity:
                self.capacity -= batch[0].nbytes
                self._batches[which] = batch
        return batch
