"""Many processes that train one network, as torchrun starts them: who this one is, and what they tell each other.

    group, device = join(pick_device("auto"))   # alone, or one of torchrun's processes
    start, stop = group.share(0, 128)           # this one's part of a batch
"""

import contextlib
import os
import signal
import socket
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from models import InputError


class Terminated(BaseException):
    """torchrun ends this process (SIGTERM), mostly because another one has ended."""


@dataclass(frozen=True)
class Group:
    """The processes of one run. This one has number `rank` of `size`; `before` are those of lower rank on this machine,
    as process numbers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    before: tuple[int, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This process's part of the positions from `start` to `stop`; parts differ in size by one at most."""
        count = stop - start
        return start + self.rank * count // self.size, start + (self.rank + 1) * count // self.size

    @contextlib.contextmanager
    def one_first(self) -> Iterator[None]:
        """The first process of each machine goes ahead, and the others follow once it is through."""
        if self.size > 1 and self.local_rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.local_rank == 0:
            dist.barrier()

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value) -> list:
        """That of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` such that a backward pass averages the gradients of all processes. It starts from rank 0's weights.

        Batch-norm's running statistics stay each process's own; `average_statistics` makes them one.
        """
        if self.size == 1:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch call broadcast_buffers something else
            return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def average_statistics(self, *models: nn.Module) -> None:
        """Makes batch-norm's running statistics their average over all processes, in place."""
        for buffer in (buffer for model in models for buffer in model.buffers() if self.size > 1):
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.size

    def check_same(self, value, what: str) -> None:
        """InputError where the processes don't hold the same `value`."""
        if any(other != value for other in self.gather(value)):
            raise InputError(f"the machines of this run have not the same {what}")

    def is_lowest_alive(self) -> bool:
        """Whether no process of lower rank lives on this machine: the one to speak when others have died."""
        for process in self.before:
            with contextlib.suppress(OSError):
                os.kill(process, 0)
                return False
        return True


ALONE = Group()


def join(device: torch.device) -> tuple[Group, torch.device]:
    """This process's group, and its own device of the kind of `device`: by torchrun's variables, or else alone.

    With CUDA every process of a machine takes a GPU of its own, and NCCL carries the gradients; else gloo does, and
    the processes share the cores. Raises InputError where there are fewer GPUs than processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE, device
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "mps" or device.index is not None:
        raise InputError(f"--device {device}: processes of torchrun take cuda, each its own GPU, or cpu")
    if device.type == "cuda":
        if local_size > torch.cuda.device_count():
            raise InputError(f"{local_size} processes, but {torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_size))  # torchrun itself allows one each
    signal.signal(signal.SIGTERM, _terminate)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    here = [(socket.gethostname(), os.getpid())]
    everyone = Group(rank, size).gather(here[0])
    before = tuple(process for host, process in everyone[:rank] if host == here[0][0])
    return Group(rank, size, local_rank, before), device


def _terminate(*_) -> None:
    raise Terminated


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_loss_of_others(error: BaseException) -> bool:
    """Whether `error` is what a process sees when another one of its run has ended."""
    if isinstance(error, Terminated | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl"))


def wait_for_the_dead() -> None:
    """Lets torchrun collect the processes that have ended, so that is_lowest_alive sees them gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1)
