"""What a person at a shell sees when something is wrong: one line on standard error, and an exit code.

0    done
1    the run diverged, or the machine ran out of memory
2    bad input: nothing was written
130  stopped by Ctrl-C or SIGTERM, with the sentence on how to resume
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from pyrolvm.errors import ConvergenceWarning, DivergenceError, PyrolvmError
from pyrolvm.signals import termination_as_interrupt

BAD_INPUT, FAILED, STOPPED = 2, 1, 130

# typer brings click along under a name of its own; the class is the same ancestor in all versions
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Door(TyperGroup):
    """The group of all commands, which turns errors and warnings into lines."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with one_line_each():
            return super().invoke(ctx)


@contextmanager
def one_line_each() -> Iterator[None]:
    """Errors of this package, of files and of usage end the process with one line; warnings are one line each."""
    with warnings.catch_warnings(), termination_as_interrupt():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)  # `fit` prints the verdict at its end
        warnings.showwarning = _show_warning
        try:
            yield
        except _UsageError as error:
            command = error.ctx.command_path if getattr(error, "ctx", None) else "pyrolvm"
            _end(f"{error.format_message()} (see {command} --help)", error.exit_code)
        except PyrolvmError as error:
            _end(one_line(str(error)), FAILED if isinstance(error, DivergenceError) else BAD_INPUT)
        except KeyboardInterrupt as stop:
            _end(str(stop) or "stopped", STOPPED, prefix="")
        except BrokenPipeError:
            raise
        except OSError as error:
            _end(f"{error.filename or 'file'}: {error.strerror or error}", BAD_INPUT)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, typer.Exit) or not _out_of_memory(error):
                raise
            _end("out of memory: take fewer rows or draws at a time", FAILED)


def one_line(message: str) -> str:
    """A message without the table of sites that may follow it, its lines joined."""
    return " ".join(message.partition("\n  site ")[0].split())


def _end(text: str, code: int, prefix: str = "error: ") -> NoReturn:
    sys.stdout.flush()
    rank = os.environ.get("RANK", "0")  # one of several processes, of which all may have the same to say
    print(f"{prefix}{text}" if rank == "0" else f"process {rank}: {text}", file=sys.stderr)
    raise typer.Exit(code) from None


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {one_line(str(message))}", file=sys.stderr)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
