"""Puts the commands together and turns every failure into one line and an exit code.

Exit codes: 0 done, 1 failed (or a bar of ``bench --check`` missed), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from . import chat, convert, measure, paint, plan, tokenize, train
from .checks import BadInput

app = typer.Typer(
    name="synergen",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\n\n".join(
        (
            "[bold]First steps[/bold]",
            "synergen demo   [dim]# paint eight pictures, describe six, say where they are[/dim]",
            'synergen generate "two red apples left of a blue car" -o apples.png',
            'synergen chat apples.png "How many apples are there?"',
            "synergen COMMAND --help   [dim]# one command, with examples[/dim]",
        )
    ),
)
paint.register(app)
chat.register(app)
train.register(app)
plan.register(app)
tokenize.register(app)
convert.register(app)
measure.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        print(f"synergen_ext {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error. Works anywhere on the line."),
    ] = False,
) -> None:
    """Paint pictures from words, and talk about pictures, with one SynerGen-VL model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    ours = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in ours
    args = [a for a in ours if a != "--debug"] + args[len(ours) :]
    try:
        code = typer.main.get_command(app).main(args, prog_name="synergen", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of a pipe went away: `synergen doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BadInput as error:
        return _fail(args, str(error), 2, debug)
    except Exception as error:
        # Errors of typer's own parser (a missing argument, an unknown option) carry their sentence.
        usage = getattr(error, "format_message", None)
        if usage is not None:
            return 2 if not usage() else _fail(args, usage(), 2, debug)
        if isinstance(error, ImportError):
            return _fail(args, str(error), 1, debug)
        hint = "" if debug else "; add --debug to see where"
        return _fail(args, f"{type(error).__name__}: {error}{hint}", 1, debug)


def _fail(args: list[str], message: str, code: int, debug: bool) -> int:
    """One line on stderr, after the traceback if that was asked for."""
    if debug:
        traceback.print_exc()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    where = f"synergen {args[0]}" if args and args[0] in commands else "synergen"
    line = " ".join(f"{where}: {message}".split())
    print(line.encode("utf-8", "replace").decode(), file=sys.stderr)
    return code
