"""The suite with the oldest or the newest versions that pyproject.toml allows: `python -m tests.versions oldest`.

Makes an environment of its own with uv, runs the tests that were asked for in it, and says what failed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("timm", "transformers", "train", "onnx", "gguf", "objects")
SHOWN = ("torch", "torchvision", "timm", "transformers", "lightning", "safetensors", "huggingface-hub", "jaxtyping")
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
# Takes no NumPy 1.26, which the package index is not told.
CONSTRAINTS = {"oldest": "pyarrow<26\n", "newest": ""}


def make_environment(which: str, folder: Path, uv: str) -> Path:
    """Resolve, install, and name what matters; the environment's Python."""
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    requirements, python = folder / "requirements.txt", folder / "venv" / "bin" / "python"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    resolve = [uv, "pip", "compile", "pyproject.toml", "--resolution", RESOLUTIONS[which], *extras, "--group", "dev"]
    quiet = ["--quiet", "--no-annotate", "--no-header"]
    (folder / "constraints.txt").write_text(CONSTRAINTS[which])
    resolve += ["--constraints", folder / "constraints.txt"]
    subprocess.run([*resolve, "--python-version", version, *quiet, "--output-file", requirements], cwd=ROOT, check=True)
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder / "venv"], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "-r", requirements], check=True)
    found = dict(re.findall(r"^([\w.-]+)==(\S+)", requirements.read_text(), re.MULTILINE))
    print(f"{which}: " + ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found), flush=True)
    return python


def main() -> int:
    """Make, run, tell; the exit code of pytest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=RESOLUTIONS)
    parser.add_argument("--folder", type=Path, help="where the environment is made; by default a new one")
    parser.add_argument("--uv", default="uv", help="the program uv")
    asked, tests = parser.parse_known_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix=f"narrows-{asked.which}-"))
    folder.mkdir(parents=True, exist_ok=True)
    python = make_environment(asked.which, folder, asked.uv)
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", *(tests or ["tests"])]
    # A missing module keeps a file from being collected: the others still say what they know.
    done = subprocess.run([*command, "--continue-on-collection-errors"], cwd=ROOT, env=environment)
    print(f"{asked.which}: {'all passed' if done.returncode == 0 else 'something failed, see above'} ({folder})")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
