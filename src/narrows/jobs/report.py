"""What the reports of all jobs share."""

import platform

import torch

from narrows._version import __version__


def machine() -> str:
    """What a speed was measured on, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, {platform.machine()}, torch {torch.__version__}, narrows {__version__}"
