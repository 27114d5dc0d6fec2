"""What every ``vans`` command shares: how errors are said, where libraries' output goes, and common arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import VansError
from cluster.storage import disk_error
from cluster.surroundings import settle
from pipeline.support import terminal

if TYPE_CHECKING:
    from rich.console import Console

EXIT_USER_ERROR = 2
EXIT_CTRL_C = 130  # 128 + SIGINT, as shells have it


class _Group(typer.core.TyperGroup):
    """Print our own errors as one message; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        from pipeline.support.interrupt import RunStopped

        settle()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            terminal.console(stderr=True).print("stopped by Ctrl-C", highlight=False)
            raise SystemExit(EXIT_CTRL_C) from None
        except RunStopped as stopped:
            terminal.console(stderr=True).print(str(stopped), highlight=False, markup=False, soft_wrap=True)
            raise SystemExit(stopped.exit_code) from None
        except VansError as error:
            _explain(str(error), error)
            raise SystemExit(EXIT_USER_ERROR) from None
        except OSError as error:
            if (why := disk_error(error)) is None:
                raise
            _explain(why, error)
            raise SystemExit(EXIT_USER_ERROR) from None


def _explain(told: str, error: Exception) -> None:
    """Print what is wrong, and below it where the libraries' output is."""
    from cluster.harmless import in_markup, redacted

    screen = terminal.console(stderr=True)
    screen.print(f"[bold red]error:[/] {in_markup(redacted(told))}", highlight=False, soft_wrap=True)
    for note in getattr(error, "__notes__", ()):
        screen.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)


class _Command(typer.core.TyperCommand):
    """Send what other libraries print to a log file, which an error names; usage and help are printed outside of it."""

    def invoke(self, ctx: Any) -> Any:
        name = f"vans{ctx.command_path.removeprefix(ctx.find_root().command_path)}"
        with terminal.library_log(name) as log:
            try:
                return super().invoke(ctx)
            except typer.Exit:
                raise
            except Exception as error:
                if log is not None:
                    log.explain(error, tail=not isinstance(error, VansError) and disk_error(error) is None)
                raise


class Program(typer.Typer):
    """A program or a group of commands whose errors and library output are handled as above."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=_Group, no_args_is_help=True, rich_markup_mode="markdown", **options)

    def command(self, *args: Any, **options: Any) -> Any:
        return super().command(*args, cls=_Command, **options)


def print_plain(text: str) -> None:
    """Print ``text`` as it is: nothing is wrapped or coloured."""
    terminal.console().print(text, highlight=False, markup=False, soft_wrap=True)


def wide_console(width: int) -> Console:
    """Return the console of standard output, ``width`` columns wide where that is no terminal."""
    console = terminal.console()
    return console if console.is_terminal else terminal.console(width=width)


def local(text: str) -> Path:
    """Return the path that an argument names; LocationError for a URI."""
    from pipeline.support.location import local_path

    return local_path(text)


Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides such as `stage1.rollout.group_size=4`.", metavar="[KEY=VALUE]…")
]
Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled run such as `toy`.")]
Out = Annotated[Path, typer.Option("--out", parser=local, metavar="PATH", help="Folder to write to.")]
DataOut = Annotated[
    str,
    typer.Option(
        "--out", metavar="PATH|URI", help="Folder to write to, or a URI such as `s3://bucket/folder` (docs/data.md)."
    ),
]
