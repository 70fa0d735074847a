"""Turn what a user can mend into one line and an exit code."""

from __future__ import annotations

import sys
from typing import Any

import click

from .ending import orderly_end

# MLX reports damaged files and lack of memory as RuntimeError.
_USER_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)


class Boundary(click.Group):
    """A command group whose errors are one line each, without a traceback.

    Exit codes: 1 when the work failed, 2 when the command line is wrong, 130
    after Ctrl-C, 128 + its number after another signal.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with orderly_end():
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader (head, less) has gone: there is nothing to report.
            sys.stderr.close()
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("Stopped.", err=True)
            sys.exit(130)
        # A click error is a RuntimeError too, and shows itself.
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except _USER_ERRORS as error:
            click.echo(f"Error: {one_line(error)}", err=True)
            sys.exit(1)


def one_line(error: BaseException) -> str:
    """Return what an error says as one line of text."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__
