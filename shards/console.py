"""Terminal output and exit codes of commands: one line and a code, never a traceback."""

import contextlib
import errno
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from shards.errors import BadData, ResourceMissing

# Controls but for tab and newline, line separators, marks that turn the direction of text, and halves of surrogate
# pairs, which stand for bytes that are no UTF-8.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BROKEN_PIPE = 128 + 13  # SIGPIPE


def printable(text: str) -> str:
    """Return text with control characters escaped as Python writes them: names come from files."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def echo(text: object = "", *, err: bool = False) -> None:
    """Print a line to stdout or stderr, control characters escaped, and flush it."""
    print(printable(str(text)), file=sys.stderr if err else sys.stdout, flush=True)


PATH = click.Path(path_type=Path, readable=False)
"""Of an option: a file or folder; whoever opens it says whether it may be read."""
SEED = click.IntRange(0, 2**63 - 1)
"""Of an option: torch's and NumPy's generators take it, and JSON keeps it."""
JOBS = click.IntRange(1, 1024)
"""Of an option that says how many processes."""


class RenamedOption(click.Option):
    """An option whose old name still works, on the command line and in the environment; help hides it."""

    def __init__(self, *args: Any, formerly: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._formerly = formerly

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Have the parser know both names."""
        names, self.opts = self.opts, [*self.opts, self._formerly]
        super().add_to_parser(parser, ctx)
        self.opts = names

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the new variable's value, else the old one's."""
        value = super().resolve_envvar_value(ctx)
        if value is None and ctx.auto_envvar_prefix is not None:
            name = self._formerly.lstrip("-").replace("-", "_").upper()
            value = os.environ.get(f"{ctx.auto_envvar_prefix}_{name}") or None
        return value


class FiniteRange(click.FloatRange):
    """A click.FloatRange without NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; BadParameter with the range where it is none, or not in it."""
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number in the range {self._describe_range()}.", param, ctx)
        return super().convert(value, param, ctx)


class Command(click.Command):
    """A click command that ends in one line on stderr and an exit code, whatever goes wrong outside of it.

    Beside the codes of `shards.errors`: 2 for a path that this locale has no characters for; 3 for a file that is
    missing; 4 for one that may not be read or written, for output that cannot be written and for memory; 130 for
    Ctrl-C; 141 where nobody reads stdout or stderr any more, unless the command `outlives_reader`: then it
    continues without output.
    """

    def __init__(self, *args: Any, outlives_reader: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outlives_reader = outlives_reader

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command, and leave Python with its exit code unless `standalone_mode` is False."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        with _guarded_output(self._outlives_reader):
            code = _BROKEN_PIPE
            with contextlib.suppress(_ReaderGone):
                code = self._run(args, prog_name, complete_var, extra)
        sys.exit(code)

    def _run(self, args: Sequence[str] | None, prog_name: str | None, complete_var: str | None, extra: Any) -> int:
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            return code if isinstance(code, int) else 0  # an int: of click's own --help
        except click.exceptions.Exit as error:
            return error.exit_code
        except click.Abort:
            return _end("stopped by SIGINT", 130)
        except click.ClickException as error:
            return _complain(error)
        except UnicodeEncodeError as error:
            text = f"{error.object[error.start : error.end]!a} of a name cannot be written as {error.encoding}"
            return _complain(click.UsageError(f"{text}; use a UTF-8 locale, such as LC_ALL=C.UTF-8"))
        except MemoryError:
            return _complain(ResourceMissing("out of memory"))
        except OSError as error:
            if error.filename is None and error.errno not in _RESOURCES:
                raise
            return _complain(_from_os(error))


def _complain(error: click.ClickException) -> int:
    lines = []
    if isinstance(error, click.UsageError) and error.ctx is not None:
        lines = [error.ctx.get_usage(), f"Try '{error.ctx.command_path} --help' for help.", ""]
    message = " ".join(error.format_message().splitlines())  # a name in it may have line breaks
    return _end("\n".join([*lines, f"Error: {message}"]), error.exit_code)


def _end(text: str, code: int) -> int:
    with contextlib.suppress(ResourceMissing, _ReaderGone):  # nobody reads it, but the code says it
        echo(text, err=True)
    return code


_HINTS = {
    errno.EMFILE: "; allow more open files with `ulimit -n 4096`",
    errno.ENFILE: "; this machine has too many files open",
    errno.ENOSPC: "; make room and run the same command again",
    errno.EDQUOT: "; make room and run the same command again",
}
_RESOURCES = {*_HINTS, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOMEM, errno.EIO, errno.ESTALE}


def _from_os(error: OSError) -> click.ClickException:
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    text = f"{where}{error.strerror or error}{_HINTS.get(error.errno or 0, '')}"
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return BadData(text) if missing else ResourceMissing(text)


class _ReaderGone(BaseException):
    """Nobody reads what is printed: the command unwinds. Not an Exception, so that no library handles it."""


class _Output:
    """A stream whose failures end the command, or for one that outlives its reader the output alone."""

    def __init__(self, stream: Any, name: str, outlives_reader: bool) -> None:
        self._stream = stream
        self._name = name
        self._outlives_reader = outlives_reader
        self._failure: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text or not isinstance(text, str):  # click asks whether bytes are refused
            self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        # Once failed, it always fails: click hides the first failure where it looks at a stream.
        if self._failure is not None:
            raise self._failure
        try:
            act()
        except OSError as error:
            # What is still in Python's buffer would fail once more when Python ends.
            _send_to_nowhere(self._stream)
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            if not isinstance(error, BrokenPipeError):
                self._failure = ResourceMissing(f"cannot write to {self._name}: {error.strerror}")
            elif not self._outlives_reader:
                self._failure = _ReaderGone()
            if self._failure is not None:
                raise self._failure from None


@contextlib.contextmanager
def _guarded_output(outlives_reader: bool) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (None: closed when Python started)
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = _Output(before[0] or nowhere, "standard output", outlives_reader)
    sys.stderr = _Output(before[1] or nowhere, "standard error", outlives_reader)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        nowhere.close()


def _send_to_nowhere(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # of a stream without a number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def progress_bar(total: int, description: str, unit: str, **options: Any) -> "tqdm[Any]":
    """Return a tqdm bar on stderr with rate and ETA; in a log file, one line every 15 seconds."""
    if sys.stderr.isatty():
        options["dynamic_ncols"] = True
    else:
        line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
        options.update(mininterval=15, maxinterval=60, bar_format=line)
    return tqdm(total=total, desc=description, unit=unit, **options)
