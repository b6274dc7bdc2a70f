"""Many processes that train one network, as torchrun starts them: who this one is, and what they tell each other.

group, device = join(pick_device("auto"))   # alone, or one of torchrun's processes
start, stop = group.share(0, 128)           # this one's part of a batch
"""

import contextlib
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from errors import InputError

TIMEOUT = timedelta(hours=2)  # the first process of a machine may decode a large set while the others wait


@dataclass(frozen=True)
class Group:
    """The processes of one run. This one has number `rank` of `size`, on this machine `local_rank` of `local_size`;
    `before` are the process numbers of those of lower rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    before: tuple[int, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This process's part of the positions from `start` to `stop`; parts differ in size by one at most."""
        count = stop - start
        return start + self.rank * count // self.size, start + (self.rank + 1) * count // self.size

    def gather(self, value) -> list:
        """That of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def together(self, work: Callable, *, one_first: bool = False):
        """What `work()` returns here; where it raises InputError in one process, it is raised in all of them.

        With `one_first` the first process of each machine goes ahead, and the others follow once it is through.
        """
        if self.size == 1:
            return work()
        result = failure = None
        for is_mine in (self.local_rank == 0, self.local_rank > 0) if one_first else (True,):
            if is_mine:
                try:
                    result = work()
                except InputError as error:
                    failure = str(error)
            failures = list(filter(None, self.gather(failure)))
            if failures:
                raise InputError(failures[0])
        return result

    def check_same(self, value, what: str) -> None:
        """InputError where the processes don't hold the same `value`."""
        if any(other != value for other in self.gather(value)):
            raise InputError(f"the processes of this run have not the same {what}")

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

    def is_lowest_alive(self) -> bool:
        """Whether no process of lower rank lives on this machine: the one to speak when others have died."""
        if os.name == "nt":  # where os.kill has no such question
            return self.is_main
        for process in self.before:
            with contextlib.suppress(OSError):
                os.kill(process, 0)
                return False
        return True


ALONE = Group()


def join(device: torch.device) -> tuple[Group, torch.device]:
    """This process's group, and its own device of the kind of `device`: by torchrun's variables, or else alone.

    With CUDA every process of a machine takes a GPU of its own, and NCCL carries the gradients; else gloo does.
    Raises InputError where there are fewer GPUs than processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE, device
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    if device.type == "mps" or device.index is not None:
        raise InputError(f"--device {device}: processes of torchrun take cuda, each its own GPU, or cpu")
    options = {"timeout": TIMEOUT}
    if device.type == "cuda":
        if local_size > torch.cuda.device_count():
            raise InputError(f"{local_size} processes, but {torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group("nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo", **options)
    own = (socket.gethostname(), os.getpid())
    everyone = Group(rank, size).gather(own)
    before = tuple(process for host, process in everyone[:rank] if host == own[0])
    return Group(rank, size, local_rank, local_size, before), device


def leave() -> None:
    """Ends the group; for a run that is through, since it may wait for the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def when_terminated(act: Callable[[], None]) -> None:
    """Calls `act` and ends the process once torchrun ends it (SIGTERM), mostly because another one has died.

    In a thread, because the main one may wait for the dead in a call that no signal handler interrupts.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # so that its number is written
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        while signal.SIGTERM not in reading.recv(64):
            pass
        act()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    _held.append(writing)  # or it would be closed


_held: list[socket.socket] = []


def is_loss_of_others(error: BaseException) -> bool:
    """Whether `error` may be what a process sees when another one of its run has ended."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl"))
