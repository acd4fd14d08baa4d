"""Options of commands follow from declarations: flags, types, checks, defaults and help."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner

from ncbatch.cli import cli
from ncbatch.cli.options import DeclaredCommand
from ncbatch.engine.options import Declared, Limits

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True, kw_only=True)
class Wanted(Declared):
    """What the command made here may be asked."""

    kind: Annotated[Literal["a", "b"], "Which; ``a`` is quick."]
    n_words: Annotated[int, "How many; see `max_share`.", Limits(1)] = 3
    max_share: Annotated[float | None, "How much of `all`.", Limits(0, 1)] = None
    layers: Annotated[str | Sequence[str] | None, "Of what."] = None
    names: Annotated[Iterable[str] | None, "Called what."] = None
    ids: Annotated[Iterable[int], "Which of them."] = ()
    memory: Annotated[str | int | None, "Room for it."] = None
    folder: Annotated[str | os.PathLike[str] | None, "Where it is."] = None
    where: Annotated["str | Client | None", "Where it runs."] = "here"
    fast: Annotated[bool, "Hurry."] = False
    sure: Annotated[bool, "Check."] = True
    mine: Annotated[int, "Replaced by what the command writes."] = 1


def do(path: str, count: Annotated[int | None, Limits(0)] = None, progress: Any = None) -> None:
    """Do something.

    Parameters
    ----------
    path : str
        Where to do it; see
        `count`.
    count : int, optional
        How often.
    progress : Progress, optional
        Told how far it is.
    """


@pytest.fixture
def run() -> Any:
    """Run a command made of the declaration; answers with what it was given, or what it said."""
    taken: dict[str, Any] = {}

    @click.command(cls=DeclaredCommand, declares=f"{__name__}:Wanted")
    @click.argument("place")
    @click.option("--mine", type=float, default=2.5, help="Written out.")
    def command(**options: Any) -> None:
        taken.update(options)

    def answer(*arguments: str) -> Any:
        done = CliRunner().invoke(command, arguments)
        if done.exit_code == 0 and "--help" not in arguments:
            return taken
        return done.output if done.exit_code in (0, 2) else done.exception

    return answer


DEFAULTS = {
    "place": "x",
    "kind": "a",
    "n_words": 3,
    "max_share": None,
    "layers": None,
    "names": None,
    "ids": [],
    "memory": None,
    "folder": None,
    "where": "here",
    "fast": False,
    "sure": True,
    "mine": 2.5,
}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("", {}),
        ("--words 5 --max-share 0.5", {"n_words": 5, "max_share": 0.5}),
        ("--layer h.0", {"layers": "h.0"}),
        ("--layer h.0 --layer h.1", {"layers": ("h.0", "h.1")}),
        ("--names b,a", {"names": ["b", "a"]}),
        ("--ids 3,1", {"ids": [3, 1]}),
        ("--names b,a --names c --ids 3 --ids 1,2", {"names": ["b", "a", "c"], "ids": [3, 1, 2]}),
        ("--memory 8GiB --folder f --where there", {"memory": "8GiB", "folder": "f", "where": "there"}),
        ("--fast --no-sure", {"fast": True, "sure": False}),
        ("--mine 1.5", {"mine": 1.5}),
    ],
)  # fmt: skip
def test_what_is_given_reaches_the_command(run, arguments, options):
    assert run("x", "--kind", "a", *arguments.split()) == DEFAULTS | options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x", "Missing option '--kind'"),
        ("x --kind c", "'c' is not one of 'a', 'b'"),
        ("x --kind a --words 0", "0 is not in the range x>=1"),
        ("x --kind a --max-share much", "'much' is not a valid float"),
        ("x --kind a --words", "requires an argument"),
        ("x --kind a --fats", "No such option"),
        ("x --kind a --names ,", "--names ','; expected names, separated by commas"),
        ("x --kind a --ids 1,x", "--ids '1,x'; expected token ids, separated by commas"),
    ],
)
def test_what_makes_no_sense_is_refused(run, arguments, message):
    assert message in str(run(*arguments.split()))


def test_help_says_what_was_declared(run):
    said = " ".join(run("--help").split())
    for text in (
        "--kind [a|b] Which; a is quick. [required]",
        "--words INTEGER RANGE How many; see --max-share. [default: 3; x>=1]",
        "--max-share FLOAT How much of all.",
        "--layer TEXT Of what. [repeatable]",
        "--names TEXT Called what. [separated by commas; repeatable]",
        "--sure / --no-sure Check. [default: sure]",
        "--mine FLOAT Written out.",
    ):
        assert text in said
    assert "Replaced" not in said


def test_a_function_declares_by_signature_and_docstring():
    command = DeclaredCommand("do", declares=f"{__name__}:do")
    path, count, _ = command.get_params(click.Context(command))
    assert (path.opts, path.required, path.help) == (
        ["--path"],
        True,
        "Where to do it; see --count.",
    )
    assert (count.opts, count.required, count.help) == (["--count"], False, "How often.")
    assert (count.type.min, count.type.max) == (0, None)


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_of_every_command_is_explained(name):
    command = cli.commands[name]
    for parameter in command.get_params(click.Context(command)):
        assert isinstance(parameter, click.Argument) or parameter.help
