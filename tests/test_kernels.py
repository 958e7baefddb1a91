"""Numbers of every kernel of ours, by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(str(path.relative_to(HERE)) for path in HERE.rglob("interpreted_*.py"))


@pytest.mark.compiled  # Shape checks would wrap what Triton reads the source of.
@pytest.mark.parametrize("file", FILES)
def test_kernels_are_right_by_the_interpreter(file: str) -> None:
    options = ["-m", "pytest", "--quiet", "--no-header", "-p", "no:cacheprovider", str(HERE / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, *options], capture_output=True, text=True, env=environment, cwd=HERE.parent, check=False
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
