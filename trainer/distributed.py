"""Data-parallel training over several processes: rank, world size, collectives, DDP, and the batches of each rank."""

import datetime
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import click
import torch
import torch.distributed as c10d
from torch import Tensor, nn

from loaders import Batch, Loader
from shards.errors import ResourceMissing
from trainer.devices import choose_device, only_rank_zero_complains, rank_from_env, use_device

T = TypeVar("T")
log = logging.getLogger("cxrapid.trainer")
# A process that dies is noticed at once, by its closed connection; this is for a machine that vanishes.
_TIMEOUT = datetime.timedelta(minutes=10)
# What the others wait for while the writer works alone, on a sweep of heads for example.
_PATIENCE = datetime.timedelta(days=1)
# Images of a rank whose own statistics do as well as those of all ranks (Wu and He, arXiv:1803.08494).
_ENOUGH_TO_NORMALISE = 16


@dataclass(frozen=True)
class Distributed:
    """The ranks of one training. In a single process nothing is sent and each method is the identity.

    All ranks must call each collective, in the same order. Control goes through gloo, so that it waits for no GPU.
    """

    rank: int = 0
    """0..size - 1."""
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    control: "c10d.ProcessGroup | None" = None

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes the run folder and prints."""
        return self.rank == 0

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        largest = torch.tensor(numbers)
        c10d.all_reduce(largest, c10d.ReduceOp.MAX, group=self.control)
        return [int(number) for number in largest]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order of rank; tensors in it should be on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        c10d.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, tensor: Tensor, rank: int) -> None:
        """Copy this tensor, of the same shape and dtype on all ranks, from one rank to the others."""
        if self.size > 1:
            group = None if tensor.is_cuda else self.control
            # As bytes, since gloo does not send every dtype.
            c10d.broadcast(tensor.view(torch.uint8), src=rank, group=group)

    def on_rank_zero(self, make: Callable[[], T]) -> T:
        """Return on all ranks what `make` returns on rank 0, the only one to call it.

        An exception it raises is raised on all ranks; for click's, which print a message, the others exit
        quietly with the same code.
        """
        if self.size == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.is_rank_zero:
            try:
                answer[0] = make()
            except BaseException as error:
                c10d.broadcast_object_list([None, error], src=0, group=self.control)
                raise
        c10d.broadcast_object_list(answer, src=0, group=self.control)
        value: T
        value, failure = answer
        if isinstance(failure, click.ClickException):
            raise SystemExit(failure.exit_code)
        if failure is not None:
            raise failure
        return value

    @contextmanager
    def first_of_host(self) -> Iterator[None]:
        """Let one rank of each machine go first, so that the others find what it downloads."""
        if self.local_rank:
            self.all_reduce_max(0)
        yield
        if not self.local_rank:
            self.all_reduce_max(0)

    def wrap_ddp(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Return the module in DistributedDataParallel, or as it is in a single process.

        Running statistics differ between ranks until `broadcast_statistics`.
        """
        if self.size == 1:
            return module
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def no_sync(self, module: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
        """Return the context in which what `wrap_ddp` returned exchanges no gradients."""
        return module.no_sync if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext

    def broadcast_statistics(self, model: nn.Module) -> None:
        """Copy rank 0's buffers, the running statistics of batch norm, to all ranks."""
        if self.size > 1:
            for buffer in model.buffers():
                c10d.broadcast(buffer, src=0)

    def verify_batch_size(self, batch_size: int, *, mirrored: bool) -> None:
        """Raise UsageError if the batch does not divide evenly among the ranks."""
        unit = self.size * (2 if mirrored else 1)
        if batch_size % unit:
            less = batch_size // unit * unit
            raise click.UsageError(
                f"--batch-size {batch_size} is for all {self.size} ranks together and cannot be cut into "
                f"equal{' even' if mirrored else ''} parts; take {less or unit} or {less + unit}"
            )


SINGLE_PROCESS = Distributed()


@contextmanager
def join(device: str) -> Iterator[tuple[Distributed, torch.device]]:
    """Join the process group that torchrun started, if any; yield it and this rank's device.

    Raises UsageError if several ranks are told to use one GPU, ResourceMissing if there is no GPU for this rank.
    """
    rank, size, local_rank = rank_from_env()
    if size == 1:
        yield SINGLE_PROCESS, use_device(device)
        return
    with only_rank_zero_complains(rank):
        if device.startswith("cuda:"):
            raise click.UsageError(f"torchrun gives each rank its own GPU; take --device cuda, not {device}")
    own = choose_device(device)
    if own.type == "cuda":
        if local_rank >= (found := torch.cuda.device_count()):
            raise ResourceMissing(f"rank {rank} has no GPU: this machine has {found}; take --nproc-per-node {found}")
        own = use_device(f"cuda:{local_rank}")
        c10d.init_process_group("nccl", timeout=_TIMEOUT, device_id=own)
    else:
        use_device("cpu")
        c10d.init_process_group("gloo", timeout=_TIMEOUT)
    control = c10d.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(control, c10d.ProcessGroup)  # every rank is in it
    yield Distributed(rank, size, local_rank, control), own
    # After an error the others are not there to take part in this.
    c10d.destroy_process_group()


def should_sync_bn(choice: str, batch_size: int, device: torch.device, dist: Distributed) -> bool:
    """Resolve `auto` of --sync-bn: on GPUs with fewer than 16 images a rank.

    Synchronised, each of ResNet-50's 53 layers waits for the other ranks and for the host (pytorch/pytorch issue
    161302).
    """
    few = device.type == "cuda" and batch_size // dist.size < _ENOUGH_TO_NORMALISE
    return dist.size > 1 and (choice == "on" or (choice == "auto" and few))


def sync_batch_norms(model: nn.Module, dist: Distributed, *, synced: bool) -> None:
    """Convert the batch norms to SyncBatchNorm or leave them, and log which with several ranks."""
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if dist.size == 1 or not norms:
        return
    if synced:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        log.info("batch norm: over the images of all ranks")
    else:
        log.info(
            "batch norm: each rank normalises its own part of a batch in training, where it is not frozen; the running "
            "statistics kept are those of rank 0"
        )


@contextmanager
def noticing_lost_ranks(dist: Distributed) -> Iterator[None]:
    """Turn an error that says that a connection to another rank is lost into ResourceMissing."""
    try:
        yield
    except RuntimeError as error:
        # DistError covers NCCL and the store. gloo raises a plain RuntimeError, which names its own source file.
        if dist.size == 1 or not (isinstance(error, c10d.DistError) or "/gloo/" in str(error)):
            raise
        line = next(iter(str(error).splitlines()), "")
        raise ResourceMissing(
            f"rank {dist.rank} has lost the others ({line}); the same command resumes from the last checkpoint"
        ) from error


@dataclass(frozen=True)
class ShardedLoader:
    """The loader of one rank, which gives it as many batches as every other rank has: all take every step together.

    The loaders of n ranks give rank r every n-th sample of one order, so batch k of all ranks together
    holds exactly the images of batch k of a single process with the whole batch size.
    """

    loader: Loader
    samples: int
    """Images an epoch on all ranks, mirrors counted."""
    batch_size: int
    """Images a batch on all ranks together."""
    filler: Batch
    """For a rank whose images are used up, and not to be counted: with it the rank takes part in a step with tensors of
    the dtypes and shapes that the others have."""

    def iter_from(self, images: int) -> Iterator[tuple[int, int, Batch]]:
        """Yield (images on all ranks, those of this rank, its batch) for the batches after so many images.

        Where this rank has no image its batch is the filler. The loader advances to the next epoch when this is
        exhausted, and not before.
        """
        own = iter(self.loader)
        for number in range(-(-images // self.batch_size), -(-self.samples // self.batch_size)):
            everywhere = min(self.batch_size, self.samples - number * self.batch_size)
            if number < self.loader.batches:
                batch = next(own)
                yield everywhere, len(batch.images), batch
            else:
                yield everywhere, 0, self.filler
        for _ in own:
            raise RuntimeError("a loader has more batches than it says")
