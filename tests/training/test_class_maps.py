import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from narrows.data.module import SegmentationDataModule
from narrows.training.class_maps import ClassMaps
from narrows.training.segmentation import Segmentation
from tests.data.folders import write_image
from tests.training.small import small_trainer


def _predict(folder, processes: int = 1, **kwargs) -> ClassMaps:
    """A segmenter that answers by brightness, on seven held-out scenes or the images given."""
    model = torch.nn.Conv2d(1, 11, 1)
    torch.nn.init.zeros_(model.weight)
    model.weight.data[3], model.bias.data[:] = 1.0, 0.5
    data = SegmentationDataModule(image_size=32, batch_size=3, **kwargs)
    data.loaded.held_out._length = 7
    writer = ClassMaps()
    options = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
    logger = CSVLogger(folder, name="", version="")
    trainer = small_trainer(folder, callbacks=[writer], logger=logger, **options)
    trainer.predict(Segmentation(model), data, return_predictions=False)
    return writer


def test_maps_hold_the_predicted_classes_and_a_palette(tmp_path):
    _predict(tmp_path)
    files = sorted((tmp_path / "predictions").iterdir())
    assert [file.name for file in files] == [f"{index:05}_scene {index}.png" for index in range(7)]
    images, _ = SegmentationDataModule(image_size=32).loaded.held_out.batch([6])
    with Image.open(files[6]) as written:
        assert written.mode == "P"
        bright = np.asarray(written)
        colours = np.asarray(written.convert("RGB"))
    expected = torch.where(images[0, 0] > 0, 3, 0)
    assert np.array_equal(bright, expected)
    assert len(np.unique(colours[bright == 3], axis=0)) == 1
    assert (colours[bright == 0] == 0).all()


def test_the_picture_shows_the_truth_where_it_is_known(tmp_path):
    _predict(tmp_path / "known")
    image = write_image(tmp_path / "new" / "x.jpg", size=(50, 30))
    _predict(tmp_path / "unknown", images=[str(image)])
    assert [file.name for file in (tmp_path / "unknown" / "predictions").iterdir()] == ["00000_x.png"]
    known, unknown = (Image.open(tmp_path / name / "predictions.png") for name in ("known", "unknown"))
    assert known.height > 1.2 * unknown.height


def test_two_processes_write_what_one_writes(tmp_path):
    for processes in (1, 2):
        _predict(tmp_path / str(processes), processes)
    one, two = (sorted((tmp_path / str(processes) / "predictions").iterdir()) for processes in (1, 2))
    assert [file.name for file in one] == [file.name for file in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
