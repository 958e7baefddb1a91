"""Interleaved documents for Lightning's trainer."""

from functools import cached_property
from typing import Any

from torch.utils.data import DataLoader

from narrows.data.interleaved import END_OF_CHUNK, IMAGE
from narrows.data.interleaved_batch import InterleavedCollate
from narrows.data.interleaved_load import InterleavedData, load_interleaved
from narrows.data.positioned import PositionedDataModule


class InterleavedDataModule(PositionedDataModule):
    """Text with images in it, in an order that is a pure function of (seed, epoch, position).

    Args:
        data: "digits", or where documents are: see `narrows.data.interleaved_load.load_interleaved`.
        tokenizer: of the language model, from transformers; `narrows fit` takes the model's.
        image_size: side of the square images, as the vision encoder takes them; `narrows fit` asks the encoder.
        channels: 3, or 1 for grey images; likewise.
        image_token, end_of_chunk, max_tokens, max_images, mask_before_first_image: how documents become tokens, see
            `InterleavedCollate`.
        batch_size: documents in a batch of one process.
        num_workers: processes that prepare documents; 0 prepares them in the training process.
        seed: of scenes and order.
    """

    def __init__(
        self,
        data: str = "digits",
        *,
        tokenizer: Any,
        image_size: int = 32,
        channels: int = 1,
        image_token: str = IMAGE,
        end_of_chunk: str = END_OF_CHUNK,
        max_tokens: int = 256,
        max_images: int | None = None,
        mask_before_first_image: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        collate = InterleavedCollate(
            tokenizer,
            image_token=image_token,
            end_of_chunk=end_of_chunk,
            max_tokens=max_tokens,
            max_images=max_images,
            mask_before_first_image=mask_before_first_image,
        )
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, collate=collate)
        self.data, self.image_size, self.channels = data, image_size, channels
        self.image_token, self.end_of_chunk = image_token, end_of_chunk

    @cached_property
    def loaded(self) -> InterleavedData:
        """The documents, listed when first asked for."""
        return load_interleaved(self.data, image_size=self.image_size, channels=self.channels, seed=self.seed)

    def train_dataloader(self) -> DataLoader[Any]:
        """Full batches of an epoch's documents in an order of their own."""
        return self.in_new_order(self.loaded.train, self.loaded.name, "documents")

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out documents."""
        return self.in_order(self.loaded.held_out)

    def test_dataloader(self) -> DataLoader[Any]:
        """The held-out documents."""
        return self.in_order(self.loaded.held_out)
