"""`narrows bench` for a machine with torch and the rivals and nothing else. See benchmarks/README.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from narrows.bench.rows import table
from narrows.bench.runner import DTYPES, MODES, run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pattern", nargs="?", default="*", help="shell wildcard over the names of cases")
parser.add_argument("--device", default="cpu")
parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on CUDA and float32 elsewhere by default")
parser.add_argument("--modes", type=lambda text: text.split(","), default=(), help=f"some of {','.join(MODES)}")
parser.add_argument("--repeats", type=int, default=9)
parser.add_argument("--quick", action="store_true", help="end within six minutes")
parser.add_argument("--record", type=Path, help="folder to append the rows to")
rows = run(**vars(parser.parse_args()))
print(table(rows))
sys.exit(any(row.verdict in ("disagrees", "failed", "missed") for row in rows))
