"""The command line: arguments only. Commands import what they use, so that --help is quick."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress

import click

from ncbatch.cli import measurement, stores
from ncbatch.errors import NcbatchError
from ncbatch.version import __version__


class _Commands(click.Group):
    """Keeps commands in the order of use instead of the alphabet's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ncbatch")
def cli() -> None:
    """Measure neural collapse on stored features: out of core, exact, from one read.

    Dump a language model into a store, or import features and the classifier, then measurement.
    """


for _command in (
    stores.import_,
    stores.classifier,
    stores.dump,
    stores.finalize,
    stores.delete,
    stores.describe,
    stores.info,
    stores.validate,
    measurement.plan,
    measurement.measure,
    measurement.grid,
    measurement.metrics,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; errors of users become one or two lines and exit code 1 or 2."""
    # A terminal may lack a letter; what stands in for one has no such method.
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    # As Ctrl-C does, so that a cancelled job leaves no files behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(cli(prog_name="ncbatch", standalone_mode=False) or 0)
    except NcbatchError as error:
        _fail(str(error), 1)
    except click.UsageError as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()
            sys.exit(error.exit_code)
        command = error.ctx.command_path if error.ctx else "ncbatch"
        _fail(f"{error.format_message()}\nsee '{command} --help'", error.exit_code)
    except click.Abort:
        _fail("interrupted", 130)
    except OSError as error:  # a full disk, a folder without permission
        _fail(f"{error.strerror or error}" + (f": '{f}'" if (f := error.filename) else ""), 1)


def _fail(message: str, code: int) -> None:
    click.echo(f"ncbatch: {message}", err=True)
    sys.exit(code)
