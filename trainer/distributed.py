"""Several processes that train as one: who this one is, what they agree on, and which of them writes."""

import datetime
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards.errors import ResourceMissing
from trainer.devices import choose_device
from trainer.torchrun import only_the_writer_complains, rank_from_env

T = TypeVar("T")
# A process that dies is noticed at once, by its closed connection; this is for a machine that vanishes.
_TIMEOUT = datetime.timedelta(minutes=10)
# What the others wait for while the writer works alone, on a sweep of heads for example.
_PATIENCE = datetime.timedelta(days=1)


class Team:
    """The ranks of one training. Alone, nothing is sent and every answer is this process's own.

    All ranks must call each method that sends, in the same order. What is agreed on goes through gloo,
    between the hosts, so that no GPU is waited for.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, control: "dist.ProcessGroup | None" = None
    ) -> None:
        self.rank = rank
        """0..size - 1."""
        self.size = size
        self.local_rank = local_rank
        """Among the ranks of this machine."""
        self._control = control

    @property
    def writes(self) -> bool:
        """Whether this is the one that writes the run folder and talks to the user."""
        return self.rank == 0

    def agree(self, *numbers: int) -> list[int]:
        """Return the largest of every number over all ranks."""
        if self.size == 1:
            return list(numbers)
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._control)
        return [int(number) for number in largest]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order of rank; tensors in it should be on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def share(self, part: Tensor, rank: int) -> None:
        """Give all ranks what this tensor, of the same shape and type on all, holds on one of them."""
        if self.size > 1:
            group = None if part.is_cuda else self._control
            # As bytes, since gloo does not send every type of number.
            dist.broadcast(part.view(torch.uint8), src=rank, group=group)

    def from_writer(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the writer; the others do not call it.

        An exception it raises is raised on all ranks. For those of click, which say something to the user,
        the others leave quietly with the same exit code.
        """
        if self.size == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.writes:
            try:
                answer[0] = make()
            except BaseException as error:
                dist.broadcast_object_list([None, error], src=0, group=self._control)
                raise
        dist.broadcast_object_list(answer, src=0, group=self._control)
        value, problem = answer
        if isinstance(problem, click.ClickException):
            raise SystemExit(problem.exit_code)
        if problem is not None:
            raise problem
        made: T = value
        return made

    @contextmanager
    def first_of_host(self) -> Iterator[None]:
        """Let one rank of each machine go first: what it downloads, the others find there."""
        if self.local_rank:
            self.agree(0)
        yield
        if not self.local_rank:
            self.agree(0)

    def train_together(self, part: nn.Module, device: torch.device) -> nn.Module:
        """Return what gives every rank the mean of all ranks' gradients: the part itself when alone.

        The ranks' running statistics go apart; `share_statistics` brings them together.
        """
        if self.size == 1:
            return part
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            part, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def hold_back(self, together: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
        """Return the context in which what `train_together` returned exchanges no gradients."""
        return together.no_sync if isinstance(together, nn.parallel.DistributedDataParallel) else nullcontext

    def share_statistics(self, model: nn.Module) -> None:
        """Give all ranks the writer's buffers: the running statistics of batch norm."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def batch_size_of_rank(self, batch_size: int, *, mirrored: bool) -> int:
        """Return a rank's part of a batch; UsageError where it cannot be cut evenly."""
        unit = self.size * (2 if mirrored else 1)
        if batch_size % unit:
            less = batch_size // unit * unit
            raise click.UsageError(
                f"--batch-size {batch_size} is for all {self.size} ranks together and cannot be cut into "
                f"equal{' even' if mirrored else ''} parts; take {less or unit} or {less + unit}"
            )
        return batch_size // self.size


ALONE = Team()


def told_team() -> Team:
    """Return which rank of how many torchrun made this process, alone without it; nothing can be sent yet."""
    rank = rank_from_env()
    return ALONE if rank.size == 1 else Team(*rank)


@contextmanager
def join(device: str) -> Iterator[tuple[Team, torch.device]]:
    """Join the ranks that torchrun started, if it did, and yield the team and this rank's device.

    Raises:
        UsageError: several ranks are told to use one GPU.
        ResourceMissing: there is no GPU for this rank.
    """
    told = told_team()
    if told.size == 1:
        yield ALONE, choose_device(device)
        return
    with only_the_writer_complains(rank_from_env()):
        if device.startswith("cuda:"):
            raise click.UsageError(f"torchrun gives each rank its own GPU; take --device cuda, not {device}")
    place = choose_device(device)
    if place.type == "cuda":
        if told.local_rank >= (found := torch.cuda.device_count()):
            raise ResourceMissing(
                f"rank {told.rank} has no GPU: this machine has {found}; take --nproc-per-node {found}"
            )
        place = torch.device("cuda", told.local_rank)
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", timeout=_TIMEOUT, device_id=place)
    else:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(control, dist.ProcessGroup)  # every rank is in it
    yield Team(told.rank, told.size, told.local_rank, control), place
    # After an error the others are not there to take part in this.
    dist.destroy_process_group()


def share_batch_norms(model: nn.Module, team: Team, device: torch.device, say: Callable[[str], None]) -> None:
    """Make the batch norms within a model go by the batches of all ranks, where the device can do that."""
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if team.size == 1 or not norms:
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    else:
        say(
            "batch norm: on a CPU each rank normalises its own part of a batch in training, where it is not "
            "frozen; the running statistics kept are those of rank 0"
        )


def raise_where_lost(team: Team, error: RuntimeError) -> None:
    """Raise ResourceMissing where the error says that another rank has gone."""
    text = str(error)
    if team.size > 1 and (
        isinstance(error, dist.DistError) or any(word in text for word in ("onnection", "gloo", "NCCL"))
    ):
        line = next(iter(text.splitlines()), "")
        raise ResourceMissing(
            f"rank {team.rank} has lost the others ({line}); the same command goes on from the last "
            "checkpoint"
        ) from error


def host_copy(state: dict[str, Any]) -> dict[str, Any]:
    """Return a flat state with its tensors on the CPU."""
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
