"""The webdataset loader: the webdataset library reads, shuffles and batches shards in processes.

Training shuffles chunks and a buffer; the order is not a full permutation as that of the other loaders.
A chunk is CHUNK samples side by side in a shard. Each epoch permutes the chunks anew, ranks and their
processes take equal stretches of that sequence, and each process shuffles its samples through a buffer.
So a sample may come anywhere in an epoch (from one to the next it moves by a third of it in the mean, as
in a permutation), but those of a chunk stay nearer: at NIH's 86,524 and 8 processes two of them are 8 % of
the epoch apart in the mean, not 33 %. They have no more in common than any two, as entries are shuffled
before packing. Of W processes each makes every W-th batch.

Evaluation is in row order; of n ranks each has every n-th sample of it, as with any loader.
"""

import functools
import io
import random
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
import webdataset
from isal import isal_zlib
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from loaders.loader import Batch, Loader
from loaders.spec import LoaderSpec
from loaders.worker_pool import Decoded, WorkerPool, decode_batch, no_shared_memory
from shards.errors import BadData, CannotResume, ResourceMissing
from shards.folder import check_labels
from shards.index import read_index

NAME = "webdataset"
CHUNK = 32
"""Samples read at once. Longer chunks mix less."""
BUFFER_BYTES = 16 * 2**20
"""Of encoded samples in a process's shuffle buffer: about 1,000 at 224 px, those of 30 chunks."""
_TAR_BLOCK = 512
_CHUNKS = 3  # after the random streams 0 to 2 of loaders.sampler
_ORDER = 2
"""The version of the order in training: a state of another version continues another epoch."""


class WebLoader(Loader):
    """Keeps the contract of `Loader`; see there, and above for the order in training.

    The processes start at the first epoch (2 s) and stay until close(). Their number decides the order,
    so it is part of the state. Raises ResourceMissing when one of them is killed.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self._dataset = ShardIterableDataset(spec)
        super().__init__(spec, self._dataset.samples)
        self._pool = WorkerPool(NAME, self._dataset, spec, self._sampler, files=1, batch_size=None)

    def _epoch(self) -> Iterator[Batch]:
        self._dataset.start_at(self._sampler.epoch, self._sampler.batch)
        return self._pool.batches()

    def state_dict(self) -> dict[str, Any]:
        """See Loader."""
        return {**super().state_dict(), "workers": self._pool.workers, "order": _ORDER}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Loader; also raises CannotResume for another number of processes or version of the order."""
        if self._spec.training and state.get("order") != _ORDER:
            raise CannotResume(
                "the loader's state does not fit: this version of the webdataset loader orders samples "
                "differently; train under a new --name"
            )
        workers, now = state.get("workers"), self._pool.workers
        if workers != now:
            way_out = f"; --threads {workers} continues it" if workers else ""
            raise CannotResume(f"the loader's state does not fit: workers was {workers}, is now {now}{way_out}")
        super().load_state_dict(state)

    def close(self) -> None:
        """See Loader; waits until the processes have ended."""
        self._pool.close()


class ShardIterableDataset(IterableDataset[Decoded | click.ClickException]):
    """What each process runs: its batches of an epoch, or at last the error that ended it."""

    def __init__(self, spec: LoaderSpec) -> None:
        # Not the spec itself: it is pickled to each process, with a manifest that grows with the set.
        self._training, self._seed = spec.training, spec.seed
        self._rank, self._world_size = spec.rank, spec.world_size
        self._per_batch = spec.batch_size // spec.copies
        folder, manifest = spec.shards.path, spec.shards.manifest
        self._size, self._findings = manifest.size, manifest.findings
        self._members = (manifest.extension, "labels", "row")
        shards = manifest.shards_of(spec.split)
        self._tars = [str(folder.absolute() / shard.name) for shard in shards]
        self._counts = [shard.samples for shard in shards]
        rows, labels = spec.shards.rows(spec.split), spec.shards.labels(spec.split)
        self.samples = len(rows)
        if sum(self._counts) != self.samples:
            raise BadData(f"{folder}: {self.samples} entries of {spec.split}, {sum(self._counts)} samples")
        indexes = [read_index((folder / shard.name).with_suffix(".idx"), self._members) for shard in shards]
        offsets = np.concatenate([*indexes, np.empty((0, 3, 2), dtype=np.int64)])
        # A sample reaches from the header of its image to the end of the one block of its row.
        extents = np.stack([offsets[:, 0, 0] - _TAR_BLOCK, offsets[:, 2, 0] + _TAR_BLOCK], 1)
        # Shared: a process gets a name instead of the values, so that the next can start at once.
        self._rows, self._labels, self._extents = _shared(rows), _shared(labels), _shared(extents)
        crc32s = spec.shards.crc32s(spec.split)
        self._crc32s = None if crc32s is None else _shared(crc32s)
        self._start = _shared(np.zeros(2, dtype=np.int64))
        self._buffer = max(CHUNK, BUFFER_BYTES * self.samples // max(1, sum(shard.bytes for shard in shards)))

    def start_at(self, epoch: int, batch: int) -> None:
        """Make the next iteration begin at this batch, also in processes that run already."""
        self._start.copy_(torch.tensor([epoch, batch]))

    def __iter__(self) -> Iterator[Decoded | click.ClickException]:
        worker = get_worker_info()
        assert worker is not None
        epoch, first = self._start.tolist()
        # Batch n comes from share n % W; torch takes the first batch from the first process.
        number = (worker.id + first) % worker.num_workers
        skipped = len(range(number, first, worker.num_workers))
        stages: list[Any] = [functools.partial(self._read, self._chunks(epoch, number, worker.num_workers))]
        if self._training:
            rng = random.Random(f"{self._seed} {epoch} {self._rank} {number}")
            stages.append(webdataset.shuffle(self._buffer, initial=self._buffer // 4, rng=rng))
        try:
            yield from webdataset.DataPipeline(
                *stages,
                webdataset.slice(skipped * self._per_batch, None),  # read again, but not decoded
                webdataset.batched(self._per_batch, collation_fn=None),
                webdataset.map(self._decode),
            )
        except click.ClickException as error:
            yield error

    def _chunks(self, epoch: int, number: int, workers: int) -> list[npt.NDArray[np.int64]]:
        """Return the positions of the split that a process reads in an epoch, those of a chunk together."""
        step = CHUNK if self._training else CHUNK * self._world_size
        starts = np.concatenate([np.arange(count) % step == 0 for count in self._counts])
        chunk_of = np.cumsum(starts) - 1
        if self._training:
            sequence = np.random.default_rng([self._seed, epoch, _CHUNKS]).permutation(int(starts.sum()))
            order = np.argsort(sequence[chunk_of], kind="stable")
            mine = np.array_split(order, self._world_size)[self._rank]
        else:
            mine = np.arange(self._rank, self.samples, self._world_size)
        share_of = np.arange(len(mine)) // self._per_batch % workers
        if self._training:
            share_of.sort()  # stretches as long as the batches of each process
        mine = mine[share_of == number]
        return np.split(mine, np.flatnonzero(np.diff(chunk_of[mine])) + 1) if len(mine) else []

    def _read(self, chunks: Iterable[npt.NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        ends = np.cumsum(self._counts)
        for positions in chunks:
            tar = self._tars[int(np.searchsorted(ends, positions[0], side="right"))]
            start, end = int(self._extents[positions[0], 0]), int(self._extents[positions[-1], 1])
            try:
                with open(tar, "rb") as file:
                    file.seek(start)
                    chunk = io.BytesIO(file.read(end - start))
                samples = group_by_keys(tar_file_expander([{"url": tar, "stream": chunk}]))
                found = {sample["__key__"]: sample for sample in samples}
            except FileNotFoundError as error:
                raise BadData(f"{tar} is missing; pack again") from error
            except OSError as error:
                raise ResourceMissing(f"{tar} cannot be read: {error.strerror}; check the disk") from error
            except (tarfile.TarError, ValueError) as error:
                # Webdataset adds to the arguments of an error.
                raise BadData(f"{tar} cannot be read: {error.args[0]}; pack again") from error
            rows, labels = self._rows[positions].tolist(), self._labels[positions].numpy()
            crc32s = [None] * len(rows) if self._crc32s is None else self._crc32s[positions].tolist()
            for row, of_row, crc32 in zip(rows, labels, crc32s, strict=True):
                yield self._verified(found.get(f"{row:08d}", {}), f"{tar}, sample {row:08d}", row, of_row, crc32)

    def _verified(
        self, sample: dict[str, Any], name: str, row: int, labels: npt.NDArray[np.uint8], crc32: int | None
    ) -> dict[str, Any]:
        missing = [member for member in self._members if member not in sample]
        if missing or len(sample["labels"]) != len(labels):
            raise BadData(f"{name} has no intact {', '.join(missing or ['labels'])}; pack again")
        found = int.from_bytes(sample["row"], "little", signed=True)
        if found != row:
            raise BadData(f"{name}: the shard holds row {found} there")
        check_labels(name, self._findings, np.frombuffer(sample["labels"], np.uint8), labels)
        image = sample[self._members[0]]
        if crc32 is not None and isal_zlib.crc32(image) != crc32:
            raise BadData(f"{name} does not hold the image that was packed; pack again")
        return {"name": name, "row": row, "labels": labels, "image": image}

    def _decode(self, samples: list[dict[str, Any]]) -> Decoded:
        encoded = [np.frombuffer(sample["image"], np.uint8) for sample in samples]
        images = decode_batch(encoded, self._size, lambda n: samples[n]["name"], NAME)
        rows = np.array([sample["row"] for sample in samples], dtype=np.int32)
        return Decoded(images, np.stack([sample["labels"] for sample in samples]), rows)


def _shared(values: npt.NDArray[Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(values).share_memory_()  # type: ignore[no-untyped-call,no-any-return]
    except RuntimeError as error:
        raise no_shared_memory(NAME) from error
