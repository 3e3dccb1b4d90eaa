"""The synthetic loader: one fixed batch of noise, repeated; the ceiling that no loader can pass.

A model trained on it has learnt nothing; it exists for benchmarks.
"""

from collections.abc import Iterator

import torch

from loaders.loader import Batch, Loader
from loaders.spec import LoaderSpec


class SyntheticLoader(Loader):
    """Keeps the shapes, the number of batches and the state of a real loader, not its data.

    Labels and rows are those of the split's first samples, repeated to fill the batch.
    """

    def __init__(self, spec: LoaderSpec) -> None:
        rows, labels = spec.shards.rows(spec.split), spec.shards.labels(spec.split)
        super().__init__(spec, len(rows))
        size = spec.shards.manifest.size
        generator = torch.Generator().manual_seed(spec.seed)
        images = torch.randint(0, 256, (spec.batch_size, size, size, 1), dtype=torch.uint8, generator=generator)
        first = [n % len(rows) for n in range(spec.batch_size)] if len(rows) else []
        self._batch = Batch(
            images.permute(0, 3, 1, 2).to(spec.device),
            torch.from_numpy(labels[first]).to(spec.device),
            torch.from_numpy(rows[first]).to(spec.device),
        )

    def _epoch(self) -> Iterator[Batch]:
        for indices in self._sampler.remaining():
            count = len(indices.positions) * (2 if self._spec.flip == "both" else 1)
            yield Batch(*(tensor[:count] for tensor in self._batch))
