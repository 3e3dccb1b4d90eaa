"""The webdataset loader: shards read as streams and decoded by Pillow in processes, on any system.

For machines without DALI. The webdataset library parses the tars, groups members into samples and
shuffles them; torch's DataLoader runs that in processes and hands the pixels over in shared memory.

The order in training is not a permutation of the whole split as that of the other loaders. The split
is cut into pieces, of at most PIECE samples that lie side by side in a shard. The pieces are permuted
anew each epoch, ranks take equal stretches of their sequence, the processes of a rank its pieces in
turn, and each process shuffles its samples through a buffer. So a sample may come anywhere in an
epoch (from one to the next it moves by a third of it in the mean, as in a permutation), but those of
a piece stay together: at NIH's 86,524 and 8 processes two of them are 8 % of the epoch apart in the
mean, not 33 %. They have no more in common than any two, as entries are shuffled before packing.

Evaluation is in row order; of n ranks each has every n-th sample of it, as with any loader.
"""

import functools
import io
import random
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from loaders.batch import Batch
from loaders.finishing import finish
from loaders.own_stream import beside_the_step
from loaders.processes import Workers, ignore_interrupts, share
from loaders.scheduled import ScheduledLoader
from loaders.spec import LoaderSpec
from shards.cores import available_cores
from shards.errors import BadData, CannotResume, ResourceMissing
from shards.findings import FINDINGS
from shards.folder import check_labels
from shards.index import read_index
from shards.pixels import decode_sample

NAME = "webdataset"
# Samples read, decoded and sent at once. Larger pieces mix less and take more shared memory: two for
# each process are 3 MB at 224 px, and a container has 64 MB unless told otherwise.
PIECE = 32
# Of encoded samples, which a process shuffles among: about 1,000 at 224 px, those of 30 pieces.
BUFFER_BYTES = 16 * 2**20
_TAR_BLOCK = 512
# After the streams 0 to 2 of loaders.schedule.
_PIECES = 3


class Chunk(NamedTuple):
    """Some decoded samples on their way from a process to a batch."""

    images: torch.Tensor
    """uint8 [n, S, S], in shared memory. A tensor there holds a file open, so the rest are arrays."""
    labels: npt.NDArray[np.uint8]
    """[n, 14]."""
    rows: npt.NDArray[np.int32]
    """[n]."""

    def part(self, places: slice) -> "Chunk":
        """Return the samples at these places."""
        return Chunk(self.images[places], self.labels[places], self.rows[places])


class WebLoader(ScheduledLoader):
    """Keeps the contract of `Loader`; see there, and above for the order in training.

    The processes start with the first epoch (2 s) and stay until close(). How many they are decides
    the order, so it is part of the state. Raises ResourceMissing when one of them is killed.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        self._stream = _Stream(spec)
        super().__init__(spec, self._stream.samples)
        self._places = len(range(spec.rank, self._stream.samples, spec.world_size))
        self._workers = max(
            1, min(spec.threads or available_cores(), -(-self._stream.samples // (spec.world_size * PIECE)))
        )
        self._processes = Workers(self._make_loader, NAME, files=1)

    def _epoch(self) -> Iterator[Batch]:
        return beside_the_step(self._batches(), self._spec.device)

    def _batches(self) -> Iterator[Batch]:
        slots = list(self._schedule.remaining())
        pin = self._spec.device.type == "cuda"
        taking = self._resumed(sum(len(slot.positions) for slot in slots))
        for slot in slots:
            chunks = taking.take(len(slot.positions))
            images = torch.cat([chunk.images for chunk in chunks])
            labels = torch.from_numpy(np.concatenate([chunk.labels for chunk in chunks]))
            rows = torch.from_numpy(np.concatenate([chunk.rows for chunk in chunks]))
            yield finish(images.pin_memory() if pin else images, labels, rows, slot, self._spec)

    def state_dict(self) -> dict[str, Any]:
        """See Loader."""
        return {**super().state_dict(), "workers": self._workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Loader; also raises CannotResume for another number of processes."""
        workers = state.get("workers")
        if workers != self._workers:
            way_out = f"; --threads {workers} continues it" if workers else ""
            raise CannotResume(
                f"the loader's state does not fit: workers was {workers}, is now {self._workers}{way_out}"
            )
        super().load_state_dict(state)

    def close(self) -> None:
        """See Loader; waits until the processes have ended. A closed loader starts them again."""
        self._processes.close()

    def _resumed(self, left: int) -> "_Taking":
        if not left:
            return _Taking(iter(()))
        # Rounds in which every process has a whole chunk are skipped there, without decoding.
        done = self._places - left
        shares = self._stream.shares(self._schedule.epoch, self._workers)
        whole = min(sum(map(len, share)) for share in shares) // PIECE
        rounds = min(done // (PIECE * self._workers), whole)
        taking = _Taking(self._chunks(rounds))
        taking.take(done - rounds * PIECE * self._workers)
        return taking

    def _chunks(self, rounds: int) -> Iterator[Chunk]:
        self._stream.turn.copy_(torch.tensor([self._schedule.epoch, rounds]))
        yield from self._processes.epoch()
        raise BadData(f"the shards of {self._spec.split} hold fewer samples than the manifest says")

    def _make_loader(self) -> "DataLoader[Chunk | click.ClickException]":
        return DataLoader(
            self._stream,
            batch_size=None,
            num_workers=self._workers,
            multiprocessing_context="spawn",
            persistent_workers=True,
            worker_init_fn=ignore_interrupts,
            collate_fn=webdataset.utils.identity,
            generator=torch.Generator(),
        )


class _Stream(IterableDataset[Chunk | click.ClickException]):
    """What each process does: chunks of its share of an epoch, or at last the error that ended it.

    In training all chunks of a process but its last have PIECE samples; in evaluation a chunk is a
    piece, so that taking one from each process in turn is row order.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        manifest = spec.shards.manifest
        shards = manifest.shards_of(spec.split)
        self._members = (manifest.extension, "labels", "row")
        self._size = manifest.size
        self._training, self._seed = spec.training, spec.seed
        self._rank, self._world_size = spec.rank, spec.world_size
        self._tars = [str(spec.shards.path.absolute() / shard.name) for shard in shards]
        self._rows = _shared(spec.shards.rows(spec.split))
        self._labels = _shared(spec.shards.labels(spec.split))
        self.samples = len(self._rows)
        counts = [shard.samples for shard in shards]
        if sum(counts) != self.samples:
            raise BadData(
                f"{spec.shards.path}: {self.samples} entries of {spec.split}, {sum(counts)} samples"
            )
        self._shard = _shared(np.repeat(np.arange(len(shards)), counts))
        ends = np.cumsum(counts).tolist()
        self._shards = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
        indexes = [read_index((spec.shards.path / s.name).with_suffix(".idx"), self._members) for s in shards]
        places = np.concatenate(indexes) if indexes else np.empty((0, 3, 2), dtype=np.int64)
        # A sample reaches from the header of its image to the end of the one block of its row.
        self._extents = _shared(np.stack([places[:, 0, 0] - _TAR_BLOCK, places[:, 2, 0] + _TAR_BLOCK], 1))
        self._buffer = max(PIECE, BUFFER_BYTES * self.samples // max(1, sum(s.bytes for s in shards)))
        self.turn = _shared(np.zeros(2, dtype=np.int64))
        """Epoch, and chunks of each process to skip: shared, it tells running processes of a new epoch."""

    def __iter__(self) -> Iterator[Chunk | click.ClickException]:
        worker = get_worker_info()
        assert worker is not None
        epoch, skipped = self.turn.tolist()
        share = self.shares(epoch, worker.num_workers)[worker.id]
        stages = [functools.partial(self._read, share)]
        if self._training:
            draws = random.Random(f"{self._seed} {epoch} {self._rank} {worker.id}")
            stages += [
                webdataset.filters.unlisted(),
                webdataset.shuffle(self._buffer, initial=self._buffer // 4, rng=draws),
                webdataset.slice(skipped * PIECE, None),
                webdataset.batched(PIECE, collation_fn=None),
            ]
        try:
            yield from webdataset.DataPipeline(*stages, webdataset.map(self._decode))
        except click.ClickException as error:
            yield error

    def shares(self, epoch: int, workers: int) -> list[list[range]]:
        """Return for every process the positions of the split that it reads in an epoch."""
        step = PIECE if self._training else PIECE * self._world_size
        pieces = [shard[n : n + step] for shard in self._shards for n in range(0, len(shard), step)]
        if not self._training:
            mine = [part for piece in pieces if (part := self._every_nth(piece))]
        else:
            order = np.random.default_rng([self._seed, epoch, _PIECES]).permutation(len(pieces))
            pieces = [pieces[piece] for piece in order]
            stretches = [len(range(rank, self.samples, self._world_size)) for rank in range(self._rank + 1)]
            mine = list(_cut(pieces, sum(stretches[:-1]), sum(stretches)))
        return [mine[worker::workers] for worker in range(workers)]

    def _every_nth(self, piece: range) -> range:
        first = piece.start + (self._rank - piece.start) % self._world_size
        return range(first, piece.stop, self._world_size)

    def _read(self, pieces: Iterable[range]) -> Iterator[list[dict[str, Any]]]:
        for piece in pieces:
            tar = self._tars[self._shard[piece[0]]]
            start, end = int(self._extents[piece[0], 0]), int(self._extents[piece[-1], 1])
            try:
                # Opened here: webdataset would take a name with `pipe:` or `::` in it for a command.
                with open(tar, "rb") as file:
                    file.seek(start)
                    source = {"url": tar, "stream": io.BytesIO(file.read(end - start))}
                found = {sample["__key__"]: sample for sample in group_by_keys(tar_file_expander([source]))}
            except FileNotFoundError as error:
                raise BadData(f"{tar} is missing; pack again") from error
            except OSError as error:
                raise ResourceMissing(f"{tar} cannot be read: {error.strerror}; check the disk") from error
            except (tarfile.TarError, ValueError) as error:
                # Webdataset adds to the arguments of an error.
                raise BadData(f"{tar} cannot be read: {error.args[0]}; pack again") from error
            these = slice(piece.start, piece.stop, piece.step)
            expected = zip(self._rows[these].tolist(), self._labels[these].numpy(), strict=True)
            yield [self._proved(found, f"{row:08d}", labels, tar) for row, labels in expected]

    def _proved(
        self, found: dict[str, dict[str, Any]], key: str, labels: npt.NDArray[np.uint8], tar: str
    ) -> dict[str, Any]:
        sample = found.get(key, {})
        missing = [member for member in self._members if member not in sample]
        if missing or len(sample["labels"]) != len(FINDINGS):
            raise BadData(f"{tar}, sample {key} has no whole {', '.join(missing or ['labels'])}; pack again")
        row = int.from_bytes(sample["row"], "little", signed=True)
        if row != int(key):
            raise BadData(f"{tar}, sample {key}: the shard holds row {row} there")
        check_labels(f"{tar}, sample {key}", np.frombuffer(sample["labels"], np.uint8), labels)
        return sample

    def _decode(self, samples: list[dict[str, Any]]) -> Chunk:
        images = np.empty((len(samples), self._size, self._size), dtype=np.uint8)
        for image, sample in zip(images, samples, strict=True):
            try:
                image[:] = decode_sample(sample[self._members[0]], self._size)
            except ValueError as error:
                name = f"{sample['__url__']}, sample {sample['__key__']}"
                raise BadData(f"{name} does not decode; pack again") from error
        labels = np.array([list(sample["labels"]) for sample in samples], dtype=np.uint8)
        rows = np.array([int(sample["__key__"]) for sample in samples], dtype=np.int32)
        return Chunk(share(torch.from_numpy(images), NAME), labels, rows)


def _shared(values: npt.NDArray[Any]) -> torch.Tensor:
    # A process is sent a name instead of the values, so that the next can be started at once.
    return share(torch.from_numpy(values), NAME)


class _Taking:
    """Chunks of any size, handed on in the sizes asked for."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self._rest: Chunk | None = None

    def take(self, count: int) -> list[Chunk]:
        """Return the next `count` samples."""
        taken = []
        while count:
            chunk = self._rest or next(self._chunks)
            taken.append(chunk.part(slice(count)))
            self._rest = chunk.part(slice(count, None)) if len(chunk.rows) > count else None
            count -= len(taken[-1].rows)
        return taken


def _cut(pieces: Iterable[range], first: int, last: int) -> Iterator[range]:
    # What of these pieces lies at the places first to last of their sequence.
    start = 0
    for piece in pieces:
        part = piece[max(first - start, 0) : max(last - start, 0)]
        if part:
            yield part
        start += len(piece)
