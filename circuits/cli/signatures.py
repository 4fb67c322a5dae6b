"""Commands whose parameters may be groups of options: frozen dataclasses, which typer does not know.

A group's fields are annotated as typer has it; its class variable `heading`, if it has one, is what they stand under in
the help. `command` gives typer one flat list of options, and the command its groups, built:

    @command(app)
    def sites(model: ModelOptions, output: Output) -> None:
        "List a model's sites."
        loaded = model.load()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from math import inf
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from circuits.checks import outside
from circuits.cli.output import results_alone
from circuits.database import check_name

LARGEST = 2**31 - 1
"""The largest number of anything that the command line takes: more overflows in the libraries below."""


@dataclass(frozen=True)
class Within:
    """A check of a number, or of each of several: from `low` to `high` or, without that, to `LARGEST`."""

    low: float
    high: float | None = None

    def __call__(self, value: Any) -> Any:
        for one in value if isinstance(value, list) else [value]:
            high = self.high
            if high is None:
                high = LARGEST if one is not None and one > LARGEST else inf
            if one is not None and (said := outside(one, self.low, high)):
                raise typer.BadParameter(said)
        return value


def not_empty(value: str | None) -> str | None:
    """A check of a text: an empty one, such as that of a variable that is not set, is not the same as none."""
    if value is not None and not value.strip():
        raise typer.BadParameter("expected a text that is not empty")
    return value


def circuit_name(value: str | None) -> str | None:
    """A check of the name under which a circuit is to be saved, before the work is done."""
    if not_empty(value) is not None:
        try:
            check_name("circuit", str(value))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return value


def argument(help: str, metavar: str | None = None, check: Within | None = None) -> Any:
    """An argument, for `Annotated`."""
    return typer.Argument(help=help, metavar=metavar, callback=check)


def option(help: str, *names: str, check: Callable[[Any], Any] | None = None) -> Any:
    """An option, for `Annotated`, named as its parameter if no name is given; `check` returns the value or raises."""
    return typer.Option(*names, help=help, callback=check)


Function = TypeVar("Function", bound=Callable[..., None])


def command(
    app: typer.Typer, name: str | None = None, **settings: Any
) -> Callable[[Function], Function]:
    """Register a function as a command, under its own name if no other is given; `settings` are `app.command`'s."""

    def register(function: Function) -> Function:
        app.command(name, **settings)(flattened(function))
        return function

    return register


def flattened(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the fields of its groups as parameters of its own, all of them by name."""
    hints = get_type_hints(function, include_extras=True)
    given = signature(function).parameters.values()
    groups = {p.name: hints[p.name] for p in given if is_dataclass(hints[p.name])}
    parameters: list[Parameter] = []
    for one in given:
        alone = one.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[one.name])
        parameters += _parameters(groups[one.name]) if one.name in groups else [alone]

    def call(**values: Any) -> None:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        with results_alone():
            function(**built, **values)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _parameters(group: Any) -> Iterator[Parameter]:
    """A parameter for each field, under the group's heading in the help."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = Parameter.empty if field.default is MISSING else field.default
        kind, info = get_args(hints[field.name])
        info = copy(info)  # two groups may share an option
        if isinstance(info, OptionInfo):
            info.rich_help_panel = getattr(group, "heading", None)
        hint = Annotated[kind, info]
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)
