"""Imported first by every command, so that Ctrl-C ends it in one line while Python still imports.

Importing torch takes seconds, and KeyboardInterrupt raised within leaves a library's traceback.
"""

import os
import signal
import sys
from types import FrameType


def _open_standard_streams() -> None:
    # Of a command started with one of them closed: the next file to be opened would get its number, and
    # with it whatever a library prints.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _leave(number: int, _frame: FrameType | None) -> None:
    os.write(2, b"stopped by SIGINT before anything was begun\n")
    os._exit(128 + number)


_open_standard_streams()
# A process that multiprocessing has spawned imports the command's module again.
_multiprocessing = sys.modules.get("multiprocessing")
_is_worker = _multiprocessing is not None and _multiprocessing.parent_process() is not None
# One that is ignored stays so: a shell starts background jobs of a script that way.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_IGN if _is_worker else _leave)
