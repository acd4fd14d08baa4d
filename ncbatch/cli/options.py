"""Options of commands, made of what the functions behind them declare."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pkgutil import resolve_name
from typing import Any

import click

from ncbatch.engine.options import Option, options_of
from ncbatch.errors import UsageError

# What Python is given, and a command makes itself.
_NO_OPTIONS = {"progress"}


class DeclaredCommand(click.Command):
    """A command that has the options of a declaration, which is loaded when they are asked for.

    Parameters written at the command come first, and replace declared ones of their name.

    Parameters
    ----------
    declares : str
        A dataclass or function, as ``package.module:name``.
    """

    def __init__(self, *arguments: Any, declares: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self._declares = declares

    @cached_property
    def _declared(self) -> list[click.Option]:
        written = {parameter.name for parameter in self.params} | _NO_OPTIONS
        options = options_of(resolve_name(self._declares))
        names = {option.name for option in options}
        return [click_option(option, names) for option in options if option.name not in written]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """List arguments and options, the one for help at last."""
        written = super().get_params(ctx)
        n = len(self.params)
        return [*written[:n], *self._declared, *written[n:]]


def click_option(option: Option, names: Iterable[str] = ()) -> click.Option:
    """Make an option of the command line.

    Parameters
    ----------
    option : Option
        What it is, as declared.
    names : iterable of str, optional
        Options that its help may name.
    """
    flag = _flag(option.name)
    attributes: dict[str, Any] = {"help": _help(option, names), "type": _type(option)}
    if option.default is inspect.Parameter.empty:
        attributes["required"] = True
    elif option.default is not None and option.default is not False and option.default != ():
        attributes |= {"default": option.default, "show_default": True}
    if bool in option.kinds:
        attributes |= {"is_flag": True, "default": option.default, "type": None}
        flag += f"/--no-{flag[2:]}" if option.default else ""
    elif Sequence[str] in option.kinds:
        flag = flag.removesuffix("s")
        attributes |= {"multiple": True, "callback": _one_or_several}
        attributes["help"] += "  [repeatable]"
    elif Iterable[str] in option.kinds or Iterable[int] in option.kinds:
        callback = _names if Iterable[str] in option.kinds else _token_ids
        attributes |= {"multiple": True, "callback": callback}
        attributes["help"] += "  [separated by commas; repeatable]"
    return click.Option([flag, option.name], **attributes)


def _flag(name: str) -> str:
    """Write a flag; a number of things is called by the things."""
    return "--" + name.removeprefix("n_").replace("_", "-")


def _help(option: Option, names: Iterable[str]) -> str:
    text = re.sub(
        "(?<!`)`([a-z_]+)`(?!`)",
        lambda name: _flag(name[1]) if name[1] in names else name[1],
        option.help,
    )
    return text.replace("`", "")


def _type(option: Option) -> Any:
    if option.choices:
        return click.Choice(option.choices)
    if os.PathLike[str] in option.kinds:
        return click.Path()
    if int in option.kinds and str not in option.kinds:
        limits = option.limits
        return int if limits is None else click.IntRange(limits.low, limits.high)
    return float if float in option.kinds else str


def _one_or_several(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> Any:
    return values if len(values) > 1 else next(iter(values), None)


def _names(
    _: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> list[str] | None:
    if not texts:
        return None
    names = _parts(texts)
    if not names:
        raise UsageError(
            f"{parameter.opts[0]} '{','.join(texts)}'",
            "names, separated by commas",
            "see 'ncbatch metrics'",
        )
    return names


def _token_ids(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[int]:
    parts = _parts(texts)
    if any(not part.isdecimal() for part in parts):
        raise UsageError(
            f"{parameter.opts[0]} '{','.join(texts)}'", "token ids, separated by commas"
        )
    return [int(part) for part in parts]


def _parts(texts: Iterable[str]) -> list[str]:
    """Split what is separated by commas; an option that is repeated adds to the one before."""
    return [part for text in texts for part in map(str.strip, text.split(",")) if part]
