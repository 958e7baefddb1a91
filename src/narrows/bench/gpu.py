"""What only a GPU can tell: how many kernels a call launches, and the time of a call captured as a CUDA graph."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# Before its capture a call has to allocate, choose kernels and set up autograd; PyTorch asks for a few rounds.
ROUNDS = 3


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Replays what `call` does on the GPU, without the host's part in it.

    Raises:
        RuntimeError: the call cannot be captured, for instance because it waits for the GPU.
    """
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(ROUNDS):
            call()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def kernels_of(call: Callable[[], object], device: torch.device) -> int | None:
    """How many kernels a call launches; copies and fills of memory are none. None where the profiler sees nothing."""
    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    names = [event.name for event in profiler.events() or () if str(event.device_type).endswith("CUDA")]
    return len([name for name in names if not name.startswith(("Memcpy", "Memset"))]) or None
