import pytest

from narrows.errors import InvalidArgument
from narrows.jobs.fit import classification, segmentation
from narrows.models.segmenter import Segmenter
from tests.hub.small_models import SHAPE, save_ours

BACKBONE = {"dims": [8, 16], "depths": [1, 1], "heads": [1, 2], "window_size": 4}


def test_a_classifier_is_built_for_the_images_and_takes_the_options_of_its_task(tmp_path):
    task = classification("vit_mini", num_classes=3, image_size=16, channels=1, model_args={"depth": 1}, warmup=0.5)
    assert (task.model.head.out_features, len(task.model.blocks), task.warmup) == (3, 1, 0.5)
    assert task.model.training
    saved = {name: SHAPE[name] for name in ("num_classes", "image_size", "channels")}
    assert classification(save_ours(tmp_path), **saved).model.training


def test_an_unknown_model_is_an_error_that_names_the_nearest():
    with pytest.raises(InvalidArgument, match="Did you mean 'vit_mini'"):
        classification("vit_mni")


def test_the_backbone_is_built_for_the_size_of_the_images():
    # At 32 pixels the second stage is a single window of 4: nothing would train attention between its windows.
    small = segmentation(image_size=32, dim=16, model_args=BACKBONE)
    assert isinstance(small.model, Segmenter)
    assert not any("stages.1" in name and "window_token" in name for name, _ in small.named_parameters())
    larger = segmentation(image_size=64, dim=16, model_args=BACKBONE)
    assert any("stages.1" in name and "window_token" in name for name, _ in larger.named_parameters())
