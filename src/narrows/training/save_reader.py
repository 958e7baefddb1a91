"""What `narrows fit` leaves behind of a `Flamingo`."""

import tempfile
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from narrows.data.document_module import InterleavedDataModule
from narrows.hub.parts import VisionEncoder
from narrows.hub.readers import Reader, ReaderFormat
from narrows.training.flamingo import FlamingoTraining


class SaveReader(Callback):
    """Writes what was added into `<run>/model`, from the best checkpoint; `narrows generate --checkpoint` takes it.

    It is the last state where nothing says which is best, or where checkpoints are sharded.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        assert isinstance(pl_module, FlamingoTraining)
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(data, InterleavedDataModule)
        folder = trainer.log_dir  # every process has to ask
        if folder is None:
            return
        best = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        if best.is_file():
            weights = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(weights, strict=False)
        encoder = pl_module.vision_encoder
        name = encoder.name if isinstance(encoder, VisionEncoder) else ""
        written = ReaderFormat(data.image_token, data.end_of_chunk, name, pl_module.new_tokens)
        reader = Reader(pl_module.flamingo, pl_module.tokenizer, written)
        # Sharded weights are gathered from every process; only one of them writes where the run is.
        with tempfile.TemporaryDirectory() as elsewhere:
            reader.save(Path(folder) / "model" if trainer.is_global_zero else elsewhere)
