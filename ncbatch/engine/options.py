"""Options, declared once: from a typed signature or dataclass follow checks, help and documents."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ForwardRef, Literal, TypeVar, Union, get_args, get_origin

from ncbatch.errors import UsageError, unknown_name

AnyDeclared = TypeVar("AnyDeclared", bound="Declared")
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@dataclass(frozen=True)
class Limits:
    """What a number may be: integers from `low` to `high`, other numbers above `low`."""

    low: int
    high: int | None = None

    def allow(self, value: float, *, whole: bool) -> bool:
        """Whether a value is within; written so that NaN is not."""
        above = value >= self.low and value % 1 == 0 if whole else value > self.low
        return above and (self.high is None or value <= self.high)

    def describe(self, *, whole: bool) -> str:
        """Say in words what is allowed."""
        if not whole:
            most = "" if self.high is None else f", at most {self.high}"
            return f"a number above {self.low}{most}"
        if self.high is None:
            return f"an integer, at least {self.low}"
        return " or ".join(str(value) for value in range(self.low, self.high + 1))


@dataclass(frozen=True)
class Option:
    """An option as it was declared.

    Attributes
    ----------
    name : str
        As Python calls it.
    annotation : type or str
        What it may be; text where it names what is not imported.
    default : object
        ``inspect.Parameter.empty`` where it must be given.
    help : str
        What it does; names of other options stand in single backticks, values in double ones.
    marks : tuple
        What else was declared of it, such as `Limits`.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    marks: tuple[Any, ...]

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that it may have beside None."""
        # Of a Literal and None `typing` makes a union of its own kind.
        is_union = get_origin(self.annotation) in (UnionType, Union)
        parts = get_args(self.annotation) if is_union else (self.annotation,)
        return tuple(kind for kind in parts if kind is not NoneType)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal`."""
        return next((get_args(kind) for kind in self.kinds if get_origin(kind) is Literal), ())

    @property
    def limits(self) -> Limits | None:
        """What a number may be."""
        return next((mark for mark in self.marks if isinstance(mark, Limits)), None)

    @property
    def type_text(self) -> str:
        """What it may be, in words of Python."""
        if isinstance(self.annotation, str):
            return self.annotation
        names = [inspect.formatannotation(k).replace("collections.abc.", "") for k in self.kinds]
        if NoneType in get_args(self.annotation):
            names.append("None")
        return " | ".join(names)

    def check(self, value: Any) -> None:
        """Refuse a value that the declaration rules out.

        Raises
        ------
        UsageError
            Says what would do.
        """
        if value is None:
            return
        if self.choices and value not in self.choices:
            *others, last = self.choices
            raise UsageError(f"{self.name} '{value}'", f"{', '.join(others)} or {last}")
        whole = int in self.kinds
        if self.limits is not None and not self.limits.allow(value, whole=whole):
            raise UsageError(f"{self.name} {value}", self.limits.describe(whole=whole))

    def document(self) -> str:
        """Write its entry of a docstring, as numpydoc has it."""
        kind = self.type_text.removesuffix(" | None")
        if self.choices:
            kind = "{" + ", ".join(repr(choice) for choice in self.choices) + "}"
        if self.default is None:
            kind += ", optional"
        elif self.default is not inspect.Parameter.empty:
            kind += f", default {self.default!r}"
        text = textwrap.fill(self.help, 96, initial_indent="    ", subsequent_indent="    ")
        return f"{self.name} : {kind}\n{text}"


def options_of(declaration: Callable[..., Any]) -> list[Option]:
    """Read what a dataclass or function declares: names, types, defaults, and what they mean.

    What an option does stands in the docstring, of a dataclass under Attributes, or in its type:
    ``Annotated[type, "what it does", *marks]``.
    """
    texts: dict[str, str] = {}
    for part in reversed(getattr(declaration, "__mro__", (declaration,))):
        texts |= _texts(part.__doc__ or "")
    options = []
    for parameter in inspect.signature(declaration, eval_str=True).parameters.values():
        annotation = parameter.annotation
        marks: list[Any] = []
        if get_origin(annotation) is Annotated:
            annotation, *marks = get_args(annotation)
        if isinstance(annotation, ForwardRef):
            annotation = annotation.__forward_arg__
        written = texts.get(parameter.name, "")
        text = next((mark for mark in marks if isinstance(mark, str)), written)
        options.append(Option(parameter.name, annotation, parameter.default, text, tuple(marks)))
    return options


def _texts(docstring: str) -> dict[str, str]:
    """Read what a numpydoc docstring says of each parameter or attribute."""
    docstring = inspect.cleandoc(docstring)
    section = re.search(r"\n(?:Parameters|Attributes)\n-+\n(.*?)(?:\n\n|\Z)", docstring, re.DOTALL)
    lines = section[1] if section else ""
    entries = re.findall(r"^(\w.*?)(?: :.*)?\n((?:    .*(?:\n|\Z))+)", lines, re.MULTILINE)
    return {
        name: " ".join(text.split()) for names, text in entries for name in re.split(", *", names)
    }


class Declared:
    """Base of frozen dataclasses whose fields are options: checked whenever one is made."""

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            value = getattr(self, option.name)
            option.check(value)
            if isinstance(value, str) and Iterable[str] in option.kinds:
                value = [value]  # one name, not its letters
            if isinstance(value, Iterator | Collection) and not isinstance(value, str | Mapping):
                # An iterator can be read once only, and what is frozen shall not change.
                object.__setattr__(self, option.name, tuple(value))

    @classmethod
    def of(cls: type[AnyDeclared], options: Mapping[str, Any]) -> AnyDeclared:
        """Make one of the keyword arguments of a function that `takes` them.

        Raises
        ------
        UnknownNameError
            For an option that does not exist; names the nearest.
        UsageError
            For a value that makes no sense.
        """
        known = [option.name for option in options_of(cls)]
        for name in options:
            if name not in known:
                raise unknown_name("option", name, known)
        return cls(**options)


def takes(declaration: type[Declared]) -> Callable[[AnyFunction], AnyFunction]:
    """Let signature and docstring of a function list the options that its ``**options`` take."""

    def describe(function: AnyFunction) -> AnyFunction:
        options = options_of(declaration)
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        # Those that may be given by position come first.
        own[sum(p.kind is not p.KEYWORD_ONLY for p in own) : 0] = [
            inspect.Parameter(
                o.name, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=o.annotation
            )
            for o in options
        ]
        function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        head, returns, rest = inspect.cleandoc(function.__doc__ or "").partition("\n\nReturns\n")
        function.__doc__ = "\n".join([head, *(o.document() for o in options)]) + returns + rest
        return function

    return describe
