"""Several processes that train one model, as torchrun starts them: who this one is, and what they exchange.

Example::

    group, device = init(pick_device("auto"))   # one process alone, or one of torchrun's
    total = group.sum([loss], device)
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from device import limit_threads, torchrun_ranks
from errors import InputError

TIMEOUT = timedelta(hours=2)  # the first process of a machine may decode a large set while the others wait


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one run: this one has `rank` of `world_size`, and on its machine `local_rank`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def gather(self, value) -> list:
        """The `value` of every process, by rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """The sum over all processes of each of `values`."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the block in the first process of each machine, then in the others, which find its cache.

        After an InputError in the first the others run it too, so that each of them raises its own.
        """
        failure = None
        if self.local_rank > 0:
            dist.barrier()
        try:
            yield
        except InputError as error:
            failure = error
        if self.local_rank == 0 and self.world_size > 1:
            dist.barrier()
        if failure:
            raise failure

    def check_same(self, value, what: str) -> None:
        """Raises InputError if `value` is not the same in every process."""
        if any(other != value for other in self.gather(value)):
            raise InputError(f"the processes of this run have not the same {what}")

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` such that backward averages the gradients of all processes; it starts from rank 0's weights.

        Batch-norm's running statistics stay each process's own until `average_buffers`.
        """
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch call broadcast_buffers something else
            return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def average_buffers(self, *models: nn.Module) -> None:
        """Replaces batch-norm's running statistics by their average over all processes, in place."""
        for buffer in (buffer for model in models for buffer in model.buffers() if self.world_size > 1):
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world_size


ALONE = ProcessGroup()


def init(device: torch.device) -> tuple[ProcessGroup, torch.device]:
    """This process's group by torchrun's variables, or ALONE, and its device.

    With CUDA every process of a machine takes its own GPU, and NCCL carries the gradients; otherwise gloo does.
    Raises InputError for fewer GPUs than processes.
    """
    ranks = torchrun_ranks()
    if ranks is None:
        return ALONE, device
    rank, world_size, local_rank, local_world_size = ranks
    if device.type == "mps" or device.index is not None:
        raise InputError(f"--device {device}: processes of torchrun take cuda, each its own GPU, or cpu")
    options = {"timeout": TIMEOUT}
    if device.type == "cuda":
        if local_world_size > torch.cuda.device_count():
            raise InputError(
                f"{local_world_size} processes, but {torch.cuda.device_count()} GPUs: lower --nproc-per-node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group("nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo", **options)
    limit_threads(local_world_size)
    return ProcessGroup(rank, world_size, local_rank), device


def shutdown() -> None:
    """Ends the group. Not for a run that fails: it could wait for the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
