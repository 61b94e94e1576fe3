"""The options of `run`, `shell` and `plan` as typer wants them, made of the table in `words`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from sandbox.cli import words

_TYPES: dict[str, Any] = {"text": str | None, "int": int | None, "float": float | None, "words": list[str] | None}


def complete_profiles(incomplete: str) -> list[str]:
    """For shell completion; a file's path completes as the shell itself does it."""
    from sandbox.profiles import load_names

    return [name for name in load_names() if name.startswith(incomplete)]


def _option(name: str, **more: Any) -> Any:
    option = words.BY_NAME[name]
    flags = ("/".join(option.flags),) if option.kind == "switch" else option.flags
    return typer.Option(
        *flags,
        help=option.help,
        metavar=option.metavar,
        rich_help_panel=option.panel,
        envvar=option.environment,
        **more,
    )


Profile = Annotated[str, _option("profile", autocompletion=complete_profiles)]
Why = Annotated[str, _option("why")]
State = Annotated[str | None, _option("state")]
Record = Annotated[str | None, _option("record")]
Commit = Annotated[bool, _option("commit")]
Collect = Annotated[list[str] | None, _option("collect")]
Into = Annotated[str | None, _option("into")]
Terminal = Annotated[bool | None, _option("terminal")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", metavar="")]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` each of `words.SETTINGS`; it gets them as one argument `settings`, a manifest's overrides."""
    return _with_options(command, "settings", words.SETTINGS, words.overrides)


def with_context(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` every option of `words.CONTEXT`; it gets them as one argument `context`."""
    from sandbox.cli.context import gather

    return _with_options(command, "context", words.CONTEXT, gather)


def _with_options(
    command: Callable[..., None], argument: str, table: Sequence[words.Option], gather: Callable[..., Any]
) -> Callable[..., None]:
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        given = {option.name: values.pop(option.name) for option in table}
        command(**{argument: gather(**given)}, **values)

    kind = inspect.Parameter.KEYWORD_ONLY
    types = ((option.name, Annotated[_TYPES[option.kind], _option(option.name)]) for option in table)
    added = [inspect.Parameter(name, kind, default=None, annotation=option) for name, option in types]
    mine = [parameter.replace(kind=kind) for name, parameter in own.items() if name != argument]
    wrapper.__signature__ = inspect.Signature([*mine, *added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {}
    # What it wraps has other parameters: nobody is to look through to that.
    del wrapper.__wrapped__
    return wrapper
