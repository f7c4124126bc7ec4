"""The `mskip` command: its parts, and the one place where user errors end."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mskip
from mskip.cli import console, doctor, job, look, recipe, reproduce, serving, steps
from mskip.cli.options import JSON_KEY
from mskip.compressor.errors import MskipError


class _Group(TyperGroup):
    """Ends a user error with its message, its remedy and its exit status.

    Usage errors are typer's (exit 2); anything else is a bug and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MskipError as error:
            if ctx.meta.get(JSON_KEY):
                print(json.dumps({"error": error.message, "remedy": error.remedy}))
            else:
                console.complain(error.message, error.remedy)
            raise typer.Exit(error.status) from None
        except KeyboardInterrupt:
            console.complain("stopped.", "Nothing is half-written; finished steps are kept.")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: mskip tune && mskip calibrate --capacity 0.5 && mskip export",
)
for part in (*(steps.app, serving.app, job.app, look.app, reproduce.app, recipe.app, doctor.app),):
    app.add_typer(part)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mskip {mskip.__version__}")
        raise typer.Exit


@app.callback()
def _mskip(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            help="Print the version.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Router-tuned language models that skip the attention they do not need.

    Every command takes the last run where no RUN is named, and prints JSON with --json.
    """
    console.prepare()


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="mskip")
    finally:
        _leave_processes()


def _leave_processes() -> None:
    """End what `accelerate launch` began, if it did; torch is not imported for it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":  # accelerate launch -m mskip.cli.main tune
    main()
