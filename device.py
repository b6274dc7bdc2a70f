"""Device, precision, threads and memory: what the hardware offers, and how torch is kept to it."""

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from errors import InputError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`. "auto" is CUDA, then MPS, then the CPU.

    Under torchrun, "auto" and "cuda" are the GPU of this process's local rank. Raises InputError for a device that
    this machine does not have.
    """
    ranks = torchrun_ranks()
    if ranks and name in ("auto", "cuda") and ranks[2] < torch.cuda.device_count():
        torch.cuda.set_device(ranks[2])
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise InputError(f"--device {name}: this machine or this build of PyTorch has no such device") from None
    return device


def torchrun_ranks() -> tuple[int, int, int, int] | None:
    """(rank, world size, local rank, local world size) as torchrun gives them to each of its processes.

    None without torchrun, and if only a part of its variables is left in a shell.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, world_size, local_rank, local_world_size = ranks = tuple(int(os.environ[name]) for name in names)
    except (KeyError, ValueError):
        return None
    is_whole = {"TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    in_range = 0 <= local_rank < local_world_size <= world_size and local_rank <= rank < world_size
    return ranks if is_whole and in_range else None


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast: "auto" is bfloat16 if the hardware multiplies in it, else float32.

    Raises InputError for fp16 on a device other than CUDA.
    """
    if name == "auto":
        name = "bf16" if _has_bf16(device) else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16 needs a CUDA device, and this is {device.type}; bf16 and fp32 work here")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():  # without oneDNN it is slower than float32
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last, in which convolutions run fastest, except on MPS, which wants contiguous tensors."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def limit_threads(processes: int = 1) -> None:
    """Limits torch to its share of the CPUs that the machine and its container (cgroup v2) allow.

    More threads than CPUs slow each other down. With one process, OMP_NUM_THREADS decides if it is set; torchrun sets
    it to 1.
    """
    if processes == 1 and "OMP_NUM_THREADS" in os.environ:
        return
    cpus = torch.get_num_threads() if processes == 1 else _count_cpus()
    with contextlib.suppress(OSError, ValueError):  # no such cgroup
        cpus = min(cpus, cpu_limit(Path("/sys/fs/cgroup/cpu.max").read_text()) or cpus)
    torch.set_num_threads(max(1, cpus // processes))


@contextlib.contextmanager
def one_thread() -> Iterator[int]:
    """Inside, torch uses one thread, and so does every thread that starts there. Yields how many it used before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _count_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_limit(text: str) -> int | None:
    """CPUs that a cgroup's cpu.max ("QUOTA PERIOD", both in microseconds) allows, rounded up; None if unlimited."""
    quota, period = text.split()
    return None if quota == "max" else math.ceil(int(quota) / int(period))


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, for the whole process; does nothing with another C library.

    By default glibc returns large blocks to the system and fetches them anew, page by page, at every step: a tenth
    (cnn6_bn) to a quarter (cnn4_bn) of a training step on two cores.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the top of the heap stays


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is what torch or Python raise if the memory of the device or the machine is used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )
