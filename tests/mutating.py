"""Inputs changed at random, and a warm server that runs a command on them in a process of its own."""

import atexit
import contextlib
import copy
import importlib
import json
import os
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "make_shards": "scripts.make_shards",
    "verify_shards": "scripts.verify_shards",
    "predict": "scripts.predict",
    "trainer": "trainer.__main__",
    "eval": "eval.__main__",
    "eval.score": "eval.score",
}
# What else a command imports on its way.
_WARM = (
    "trainer.launch",
    "eval.launch",
    "eval.heatmaps.gradients",
    "eval.predict.inference",
    "trainer.model_file",
    "loaders.dali",
    "loaders.torch_loader",
    "loaders.resident",
    "trainer.logging.curves",
    "eval.report.page",
)
_ADDRESSES = 6 * 2**30  # bytes that a process may ask for beyond those of the server: the machine's protection
_WRONG: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.5,
    1e300,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\x1b[2J",
    "../x",
    "1",
    "x" * 100_000,
    [],
    [[]],
    {},
    {"value": {}},
    "@deep list@",
    "@deep object@",
)
_CELLS = (
    "",
    "x",
    "-1",
    "2",
    "0.5",
    "nan",
    "inf",
    "1e999",
    "9" * 20,
    "9" * 400,
    " 1",
    "True",
    '"',
    '"a\nb"',
    "a,b",
    "\0",
    "\x1b[2J",
    "train",
    "../../x",
    "=1+1",
    "²",
    "x" * 100_000,
)

_WRONG_HEADERS = (None, -1, 2**63, 10**30, float("inf"), "", "x", "x" * 10_000, [], [-1], {}, "F64", "@deep list@")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Negative: the signal that killed it."""
    seconds: float
    """By the clock, which other work on the machine changes."""
    processor_seconds: float
    kibibytes: int
    """Peak memory of its largest process."""
    late: bool
    """Whether it was killed, as it took too long by the clock."""


class Server:
    """A process that has imported everything, and forks for each command."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutating"],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def run(self, program: str, arguments: list[str], folder: Path, seconds: float) -> tuple[Ended, str]:
        """Run a program; return how it ended, and its stderr."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"program": program, "arguments": arguments, "folder": str(folder), "seconds": seconds}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        ended = Ended(**json.loads(self._process.stdout.readline()))
        return ended, (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        self._process.communicate()


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert, repeat, move or delete, one to four times."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(changed) + 1)
        end = min(start + draw.choice([1, 2, 4, 16, 256]), len(changed))
        chunk = changed[start:end]
        match draw.randrange(7):
            case 0 if chunk:
                changed[start] ^= 1 << draw.randrange(8)
            case 1:
                del changed[start:]
            case 2:
                changed[start:start] = draw.randbytes(draw.choice([1, 4, 64]))
            case 3:
                changed[start:start] = bytes(chunk) * draw.choice([1, 2, 200])
            case 4:
                elsewhere = draw.randrange(len(changed) + 1)
                changed[elsewhere : elsewhere + len(chunk)] = chunk
            case 5:
                changed[start:end] = draw.choice([b"\0", b"\xff", b"\x7f"]) * len(chunk)
            case _:
                del changed[start:end]
    return bytes(changed)


def mutate_json(draw: random.Random, data: bytes) -> bytes:
    """Give a value another type or size, delete or repeat a key; now and then change bytes instead."""
    if draw.random() < 0.15:
        return mutate_bytes(draw, data)
    return to_json(mutate_tree(draw, json.loads(data), _WRONG))


def to_json(value: Any) -> bytes:
    """Return JSON with what json cannot write: 1e999, and nesting of 200,000 levels."""
    text = json.dumps(value, indent=1).replace("Infinity", "1e999") + "\n"
    text = text.replace('"@deep list@"', "[" * 200_000 + "]" * 200_000)
    return text.replace('"@deep object@"', '{"a":' * 200_000 + "0" + "}" * 200_000).encode()


def mutate_csv(draw: random.Random, data: bytes) -> bytes:
    """Change cells, rows or columns; now and then change bytes instead."""
    if draw.random() < 0.15:
        return mutate_bytes(draw, data)
    rows = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(draw.randint(1, 2)):
        row = draw.randrange(len(rows))
        column = draw.randrange(len(rows[0]))
        match draw.randrange(9):
            case 0:
                rows.insert(row, list(rows[row]))
            case 1 if len(rows) > 1:
                del rows[row]
            case 2:
                other = draw.randrange(len(rows))
                rows[row], rows[other] = rows[other], rows[row]
            case 3 if len(rows[0]) > 1:
                rows = [[cell for place, cell in enumerate(cells) if place != column] for cells in rows]
            case 4:
                rows = [[*cells, *cells[column : column + 1]] for cells in rows]
            case _:
                rows[row][min(column, len(rows[row]) - 1)] = draw.choice(_CELLS)
    return "".join(",".join(cells) + "\n" for cells in rows).encode()


def mutate_tree(draw: random.Random, tree: Any, wrong: tuple[Any, ...]) -> Any:
    """Return a copy of nested dicts and lists in which one or two things are changed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 2)):
        places = list(_places(tree))
        if not places:
            return draw.choice(wrong)
        holder, key = draw.choice(places)
        match draw.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder["other"] = holder.pop(key)
            case 2 if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[key]))
            case _:
                holder[key] = draw.choice(wrong)
    return tree


def mutate_state(draw: random.Random, state: dict[str, Any]) -> Any:
    """Return a checkpoint's state with one or two things changed, in tensors, too."""
    some = torch.zeros(3)
    wrong = (*_WRONG, 10**400, some, some.double(), torch.zeros(0), torch.full((), float("nan")), b"x", (1,))
    if draw.random() < 0.5:
        return mutate_tree(draw, state, wrong)
    state = copy.deepcopy(state)
    holder, key = draw.choice([place for place in _places(state) if torch.is_tensor(place[0][place[1]])])
    changes: list[Callable[[torch.Tensor], Any]] = [
        lambda one: one.to(torch.float64) if one.dtype != torch.float64 else one.float(),
        lambda one: one.flatten()[:-1],
        lambda one: one.unsqueeze(0),
        lambda one: one.to_sparse(),
        lambda one: one.tolist() if one.numel() < 10_000 else None,
        lambda one: torch.full_like(one, draw.choice([-1, 100, 2**30])) if one.dtype != torch.uint8 else ~one,
        lambda one: one / 0 if one.is_floating_point() else -one,
        lambda one: torch.zeros(()).expand(10**9),
        lambda one: np.zeros(3),
    ]
    holder[key] = draw.choice(changes)(holder[key])
    return state


def mutate_index(draw: random.Random, data: bytes) -> bytes:
    if draw.random() < 0.3:
        return mutate_bytes(draw, data)
    words = data.split(b" ")
    words[draw.randrange(len(words))] = draw.choice(
        [b"0", b"-1", b"9" * 18, b"9" * 30, b"1", b"8192", b"10240", b"x", b"\n", b"", b"jpg", b"1e9"]
    )
    return b" ".join(words)


def mutate_header(draw: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = draw.randrange(4)
    if kind == 0:
        return mutate_bytes(draw, data[: 8 + length]) + rest
    record = json.loads(header)
    if kind == 1:
        record = mutate_tree(draw, record, _WRONG_HEADERS)
    else:  # what is written in the metadata as JSON
        (key,) = record["__metadata__"]
        record["__metadata__"][key] = mutate_json(draw, record["__metadata__"][key].encode()).decode(
            "utf-8", errors="replace"
        )
    changed = to_json(record)
    return struct.pack("<Q", len(changed)) + changed + rest


def mutate_png(draw: random.Random, data: bytes) -> bytes:
    # The header's fields, with a checksum that fits.
    fields = list(struct.unpack(">IIBBBBB", data[16:29]))
    fields[draw.randrange(7)] = draw.choice([0, 1, 3, 16, 60_000, 255]) % 256
    if draw.random() < 0.7:
        fields[draw.randrange(2)] = draw.choice([0, 1, 8192, 65_500, 2**31 - 1, 2**32 - 1])
    header = b"IHDR" + struct.pack(">IIBBBBB", *fields)
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def mutate_jpeg(draw: random.Random, data: bytes) -> bytes:
    # Height and width in the frame's header.
    frame = data.find(b"\xff\xc0")
    sides = struct.pack(">HH", *(draw.choice([0, 1, 31, 33, 8192, 65_500, 65_535]) for _ in range(2)))
    return data[: frame + 5] + sides + data[frame + 9 :]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def _serve() -> None:
    for module in (*PROGRAMS.values(), *_WARM):
        importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        begun = time.monotonic()
        pid = os.fork()
        if not pid:
            _run(**order)
        waiting = os.pidfd_open(pid)
        late = not select.select([waiting], [], [], order["seconds"])[0]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # whatever processes it left, too
        _, status, used = os.wait4(pid, 0)
        os.close(waiting)
        code = os.waitstatus_to_exitcode(status)
        busy = used.ru_utime + used.ru_stime
        ended = Ended(code, time.monotonic() - begun, busy, used.ru_maxrss, late)
        answers.write(json.dumps(asdict(ended)) + "\n")
        answers.flush()


def _run(program: str, arguments: list[str], folder: str, seconds: float) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code: Any = 0
    try:
        importlib.import_module(PROGRAMS[program]).main(args=arguments, prog_name=program)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve()
