"""Goes through two epochs of several loaders side by side and writes down every batch, so that a test
can kill it anywhere and compare what a second start adds: `stepwise.py SHARDS OUT LOADER...`.

Run by torchrun it is one of several ranks, which keep step with each other through gloo.
"""

import json
import os
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed

from loaders import LoaderSpec, make_loader
from shards.files import atomic_write_text
from shards.folder import open_shards

EPOCHS = 2


def main(shards: Path, out: Path, names: list[str]) -> None:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    spec = LoaderSpec(
        open_shards(shards),
        "train",
        8,
        torch.device("cpu"),
        training=True,
        flip="random",
        augment="light",
        seed=3,
        rank=rank,
        world_size=world_size,
        threads=1,
    )
    (out / f"rank{rank}.pid").write_text(str(os.getpid()))
    loaders = {name: make_loader(name, spec) for name in names}
    progress = out / f"rank{rank}.json"
    seen: dict[str, list[list[object]]] = {name: [] for name in names}
    if progress.is_file():
        saved = json.loads(progress.read_text())
        seen = saved["seen"]
        for name, state in saved["states"].items():
            loaders[name].load_state_dict(state)
    if world_size > 1:
        # A kill can leave one rank a batch ahead: it lets the others catch up, so that all meet equally often.
        fewest = torch.tensor(len(seen[names[0]]))
        torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN)
        for _ in range(len(seen[names[0]]) - int(fewest)):
            torch.distributed.barrier()
    batches = loaders[names[0]].batches
    while (done := len(seen[names[0]])) < EPOCHS * batches:
        for together in zip(*loaders.values(), strict=True):
            for name, batch in zip(names, together, strict=True):
                seen[name].append([batch.rows.tolist(), zlib.crc32(batch.images.numpy().tobytes())])
            states = {name: loader.state_dict() for name, loader in loaders.items()}
            atomic_write_text(progress, json.dumps({"seen": seen, "states": states}))
            done += 1
            # In one write: print() of a process with -u writes its line break separately, and ranks share a pipe.
            sys.stdout.write(f"rank {rank} batch {done}\n")
            sys.stdout.flush()
            if world_size > 1:
                torch.distributed.barrier()
    for loader in loaders.values():
        loader.close()
    if world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
