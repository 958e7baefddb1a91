"""The networks of the SepViT paper by name, and small ones."""

from typing import Any

_PAPER: dict[str, Any] = {
    "image_size": 224, "num_classes": 1000, "channels": 3, "window_size": (7, (7, 14), (7, 14), 7),
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "sepvit_lite": {**_PAPER, "dims": (32, 64, 128, 256), "depths": (1, 2, 6, 2), "heads": (1, 2, 4, 8)},
    "sepvit_tiny": {**_PAPER, "dims": (96, 192, 384, 768), "depths": (1, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "sepvit_small": {**_PAPER, "dims": (96, 192, 384, 768), "depths": (1, 2, 14, 2), "heads": (3, 6, 12, 24)},
    "sepvit_base": {**_PAPER, "dims": (128, 256, 512, 1024), "depths": (1, 2, 14, 2), "heads": (4, 8, 16, 32)},
}

UPSTREAM_PRESETS: dict[str, dict[str, Any]] = {
    "sepvit_mini": {
        "image_size": 32, "num_classes": 10, "channels": 3, "patch_stride": 2, "window_size": 4,
        "dims": (32, 64, 128), "depths": (1, 1, 1), "heads": (1, 2, 4), "mlp_ratio": 2.0,
    },
    "sepvit_upstream_lite": {
        "image_size": 224, "num_classes": 1000, "channels": 3,
        "dims": (32, 64, 128, 256), "depths": (1, 2, 6, 2), "heads": (1, 2, 4, 8),
    },
}  # fmt: skip
