"""Settings every test shares."""

import os

# Two workers on two cores: more threads in each only make them wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
