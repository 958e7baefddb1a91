"""Triton kernels on a machine without a GPU: what one takes of a chip, and whether its numbers are right.

`compile_for` compiles a kernel for a chip and reads registers and spills. Whether numbers are right is shown by
Triton's interpreter, where a kernel is Python. It is chosen by `TRITON_INTERPRET=1` before Triton is imported, so such
tests run in a process of their own: they stand in files called `interpreted_*.py`, each of which
`tests/test_kernels.py` runs. By hand:

    TRITON_INTERPRET=1 pytest tests/ops/interpreted_slot_attention.py
"""

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CHIPS = (80, 90)  # the A100 and the H100


class Usage(NamedTuple):
    """What one thread of a compiled kernel takes, and what its program takes.

    Args:
        registers: of 255.
        spilled: bytes of memory in place of registers.
        shared: bytes of shared memory; an A100 has 163 KiB, an H100 227 KiB.
    """

    registers: int
    spilled: int
    shared: int


def compile_for(
    chip: int,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    multiples_of_16: Collection[str] = (),
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
) -> Usage:
    """Compile `kernel` for `chip`, as Triton would when it is launched.

    Args:
        chip: 80 or 90.
        kernel: what `triton.jit` made.
        types: of its arguments, as Triton writes them: "*bf16", "*fp32", "*i1", "i32", "fp32".
        constants: the other arguments, by value.
        multiples_of_16: the integers that are. Pointers always are.
        num_warps: of a program.
        num_stages: of its loops.
        maxnreg: registers that a thread may take; by default ptxas makes room for another program beside this one.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = {name: place for place, name in enumerate(kernel.arg_names)}
    assert set(order) == {*types, *constants}, set(order) ^ {*types, *constants}
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in multiples_of_16]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in order},
        constexprs={(order[name],): value for name, value in constants.items()},
        attrs={(order[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return Usage(registers, spilled, compiled.metadata.shared)
