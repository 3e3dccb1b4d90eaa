"""Checkpoints: everything with a state in one file, verified by a hash beside it, and checked before it is restored.

A checkpoint holds (TrainState.state_dict) model, EMA, optimizer, scaler, early stopping and progress, and for each
rank its counters, its loader's position and its random states. A run resumes from last.pt, else from previous.pt, if
1. the file fits its SHA-256 (here),
2. every option has the same value (RunDirectory.begin), one that is newer than the run its default. Free to change are
   --shards, --runs, --name, --device, --threads, --log-every, --log-to, --checkpoint-every and --checkpoint-steps
   (`identity` in trainer.options); of these only --threads could change the weights: for webdataset it decides the
   order, so that 4 refuses another number,
3. device type, precision, number of ranks and the SHA-256 of the shards' manifest are the same (RunDirectory.begin),
4. the loader's order is the same (loaders.sampler, loaders.web); on a GPU dali takes the decoder it had, and
5. all shapes, dtypes and counters fit (require_like; TrainState.load_state_dict).
Else it is CannotResume, exit code 5, naming what differs; a damaged config.json or environment.json is BadData, 3.
"""

import hashlib
import io
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import torch
from torch import Tensor

from shards.errors import CannotResume
from shards.files import HashingFile, hash_file, write_with_hash
from trainer.run_directory import RunDirectory

log = logging.getLogger("cxrapid.trainer")
_SHARE_OF_TIME = 0.1  # what checkpoints may take if epochs are shorter than saving
_LARGEST = 2**53  # of any count: no run has so many steps


class CheckpointSaver:
    """Writes the checkpoints of a run, and its curves, in a thread while training goes on; for use in a `with`.

    One job after the other, in the order they are given. What a job raises is raised by the next `join`, at the latest
    when the `with` ends.
    """

    def __init__(self, run: RunDirectory, device: torch.device) -> None:
        self.took = 0.0
        """Seconds that the last finished save took, copying and writing."""
        self._run = run
        self._device = device
        self._thread = ThreadPoolExecutor(1, "saving")
        self._jobs: list[Future[None]] = []
        self._copy: Any = None
        self._digests: dict[Path, str] = {}

    def save(self, state: dict[str, Any], best: dict[str, Any] | None, failure: Exception) -> None:
        """Take a copy of `state` to write it to last.pt, keeping the one before as previous.pt; first wait for the
        jobs before, and raise what went wrong with them.

        Before it `best`, which must not change any more, is written to best.pt. Nothing is written where a weight of
        `state` is NaN or infinite: `failure` is raised then. From a GPU the copy goes to pinned memory and is waited
        for in the thread alone. Its memory is used again for the next copy.
        """
        self.join()
        begun = time.monotonic()
        self._copy = copy_to_host(state, self._copy)
        copied = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(self._device))
        copy = self._copy

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            if not all_finite([copy["model"], copy["average"], *copy["optimizer"]["state"].values()]):
                raise failure
            if best is not None:
                # First, since the state refers to it. After a kill in between, its epoch is trained again to the same.
                save_checkpoint(self._run.best, best, digests=self._digests)
            save_checkpoint(self._run.last, copy, self._run.previous, digests=self._digests)
            self.took = time.monotonic() - begun

        self.submit(write)

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done after those before it."""
        self._jobs.append(self._thread.submit(job))

    def join(self) -> None:
        """Wait for all jobs; raise what the first that failed raised."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if kind is None:
            self.join()


def copy_to_host(value: Any, into: Any = None) -> Any:
    """Return dicts, lists and tensors copied to the host, in the tensors of `into` where they fit.

    Copies from a GPU are queued on its current stream, and not waited for.
    """
    if isinstance(value, dict):
        into = into if isinstance(into, dict) else {}
        return {key: copy_to_host(one, into.get(key)) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        spare = into if isinstance(into, (list, tuple)) and len(into) == len(value) else [None] * len(value)
        return type(value)(copy_to_host(one, other) for one, other in zip(value, spare, strict=True))
    if not isinstance(value, Tensor):
        return value
    fits = isinstance(into, Tensor) and (into.shape, into.dtype, into.stride()) == (
        value.shape,
        value.dtype,
        value.stride(),
    )
    host = into if fits else torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return host.copy_(value, non_blocking=True)


def save_checkpoint(
    path: Path, state: dict[str, Any], keep_as: Path | None = None, *, digests: dict[Path, str] | None = None
) -> None:
    """Write `state` (tensors and plain values) to `path`, with the guarantees and arguments of `write_with_hash`."""

    def write(file: HashingFile) -> None:
        try:
            torch.save(state, file)  # type: ignore[arg-type]  # of a file it needs write() and flush()
        except RuntimeError:
            if file.error is not None:  # a full disk, behind an error of torch's own
                raise file.error from None
            raise

    write_with_hash(path, write, keep_as, digests=digests)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises CannotResume where it is missing, its SHA-256 differs from the recorded one, or it holds anything but
    tensors and plain values.
    """
    recorded = hash_file(path)
    if not path.is_file() or not recorded.is_file():
        raise CannotResume(f"no checkpoint {path} with its {recorded.name}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() not in recorded.read_text(encoding="ascii", errors="replace").split():
        raise CannotResume(f"{path} is damaged: its SHA-256 is not in {recorded.name}")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of which torch promises no kind for a file that is none
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CannotResume(f"{path} cannot be read: {reason}") from error
    if not isinstance(state, dict):
        raise CannotResume(f"{path} holds a {type(state).__name__}, not the state of a run")
    return state


def load_newest(paths: list[Path]) -> dict[str, Any]:
    """Load the first of these checkpoints that is intact, and log which were not.

    Raises CannotResume naming what is wrong with each where none is: a run never starts anew silently.
    """
    problems: list[str] = []
    for path in paths:
        try:
            state = load_checkpoint(path)
        except CannotResume as error:
            problems.append(error.message)
            continue
        if problems:
            log.info(f"{'; '.join(problems)}: resuming from the one before, {path.name}")
        return state
    raise CannotResume(
        f"{'; '.join(problems)}. Give another --name, or remove {paths[0].parent} to start this run anew"
    )


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Turn what goes wrong in restoring an intact checkpoint into CannotResume."""
    try:
        yield
    except (click.ClickException, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what is in a file may break anything that restoring relies on
        reason = (str(error).splitlines() or [""])[0][:300]
        raise CannotResume(
            f"the checkpoints in {folder} are damaged, or of another version of CXRapid "
            f"({type(error).__name__}: {reason}); give another --name"
        ) from error


class CheckpointTimer:
    """When the next checkpoint within an epoch is due: after so many minutes, or so many steps."""

    def __init__(self, minutes: float, steps: int) -> None:
        self._seconds = 60 * minutes
        self._steps = steps
        self.restart()

    def restart(self) -> None:
        """Count the time from now on."""
        self._begun = time.monotonic()

    def is_worthwhile(self, took: float) -> bool:
        """Return whether saving at this interval, for so many seconds, takes at most a tenth of the run's time."""
        return _SHARE_OF_TIME * (time.monotonic() - self._begun) >= took

    def is_due(self, step: int) -> bool:
        """Return whether to save after this step; 0 minutes and 0 steps are never."""
        late = bool(self._seconds) and time.monotonic() - self._begun >= self._seconds
        return late or (bool(self._steps) and step % self._steps == 0)


def require_like(found: Any, own: Any, name: str) -> None:
    """Raise ValueError naming the first thing in `found` that is not of the form of `own`.

    A dict has the same keys, a list the same length, a tensor the same shape and type and, but for bytes,
    finite numbers; a count lies in 0..2^53, and no number is NaN. None matches only None.
    """
    if isinstance(own, Tensor):
        require_tensor(found, own.shape, own.dtype, name)
    elif isinstance(own, dict):
        if not isinstance(found, dict):
            raise ValueError(f"{name} is a {type(found).__name__}, not a dict")
        if found.keys() != own.keys():
            differing = sorted(map(str, found.keys() ^ own.keys()))[0]
            raise ValueError(f"{name} has not the same keys: {differing[:64]}")
        for key, value in own.items():
            require_like(found[key], value, f"{name}.{key}")
    elif type(found) is not type(own):
        raise ValueError(f"{name} is a {type(found).__name__}, not a {type(own).__name__}")
    elif isinstance(own, list):
        if len(found) != len(own):
            raise ValueError(f"{name} has {len(found)} items, not {len(own)}")
        for number, value in enumerate(own):
            require_like(found[number], value, f"{name}[{number}]")
    elif isinstance(own, int) and not 0 <= found <= _LARGEST:
        raise ValueError(f"{name} is no count")
    elif isinstance(own, float) and math.isnan(found):
        raise ValueError(f"{name} is NaN")


def require_tensor(found: Any, shape: torch.Size, dtype: torch.dtype, name: str) -> None:
    """Raise ValueError unless `found` is a dense tensor of this shape and type whose numbers are finite."""
    if not isinstance(found, Tensor) or found.layout != torch.strided:
        raise ValueError(f"{name} is a {type(found).__name__}, not a tensor")
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}")
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise ValueError(f"{name} holds a number that is not finite")


def require_optimizer_state(found: Any, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Raise ValueError unless `found` is what this optimizer keeps of its parameters, if it took a step."""
    if not isinstance(found, dict):
        raise ValueError(f"{name} is a {type(found).__name__}, not a dict")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = _state_names(optimizer)
    for number, values in found.items():
        where = f"{name}.{number}"
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            raise ValueError(f"{where}: there is no such parameter")
        if not isinstance(values, dict) or values.keys() != kept.keys():
            raise ValueError(f"{where} does not hold {', '.join(kept)}")
        for key, is_scalar in kept.items():
            shape = torch.Size() if is_scalar else parameters[number].shape
            require_tensor(values[key], shape, torch.float32, f"{where}.{key}")


def _state_names(optimizer: torch.optim.Optimizer) -> dict[str, bool]:
    # What it keeps of a parameter after a step -> whether that is a scalar; found out on one.
    trial = torch.nn.Parameter(torch.zeros(2, device=optimizer.param_groups[0]["params"][0].device))
    trial.grad = torch.zeros_like(trial)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    twin: torch.optim.Optimizer = type(optimizer)([{**group, "params": [trial]}])  # type: ignore[call-arg]
    twin.step()
    return {key: value.dim() == 0 for key, value in twin.state[trial].items()}


def all_finite(states: Iterable[dict[str, Any]]) -> bool:
    """Return whether every number in the tensors of these is finite; waits for the device once."""
    # In float64 finite numbers of float32 have a finite sum, and it is one pass over each.
    sums = [
        value.sum(dtype=torch.float64)
        for state in states
        for value in state.values()
        if torch.is_tensor(value) and value.is_floating_point()
    ]
    # Adam keeps its step counters on the CPU in some versions of torch.
    return bool(torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all())
