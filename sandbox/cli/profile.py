"""`sandbox profile`: list, show, validate, compare and start profiles. Parses and prints only.

Facts go to standard output, what is wrong to standard error. `validate` exits with 125 when a file is not usable.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from sandbox.profiles import Origin, Resolved

FAILED = 125

app = typer.Typer(name="profile", help="Profiles: list, show, validate, compare, start one.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

TEMPLATE = """\
description = ""
extends = "{parent}"

# Every grant says why it is there. What is not named here or in "{parent}" does not exist for the call.

[filesystem]
# read = ["./data"]            # relative to this file; a leading "?" marks a path that may be missing
# write = [":workspace"]
# deny = ["**/.env"]           # wins over every grant

# [network]
# allow = ["api.example.org:443"]

[resources]
# memory = "512MiB"
# pids = 64
# wall_time = "30s"
# disk = "256MiB"

[environment]
# allow = ["TZ"]
"""


def complete_names() -> list[str]:
    """For shell completion."""
    from sandbox.profiles import load_names

    return load_names()


NameArgument = Annotated[str, typer.Argument(help="A profile's name, or a file's path.", autocompletion=complete_names)]


@app.command("list")
def list_profiles(as_json: JsonOption = False) -> None:
    """Every profile that has a name: shipped, the user's, the project's."""
    from dataclasses import asdict

    from rich.text import Text

    from sandbox.profiles import available

    infos = available()
    if as_json:
        _print_json([asdict(info) for info in infos])
        return
    table = _table("name", "from", "description")
    for info in infos:
        name = f"{info.name} (sealed)" if info.sealed else info.name
        what = Text(info.error, style="red") if info.error else Text(info.description)
        table.add_row(Text(name, style="bold"), Text(info.kind), what)
    _print(table)


@app.command()
def show(
    name: NameArgument,
    resolved: Annotated[bool, typer.Option("--resolved", help="Also what is left at its default.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What a profile comes to, with the file and line of each value."""
    from sandbox.profiles import resolve

    result = resolve(name)
    if as_json:
        _print_json(_facts(result))
        return
    _print_resolved(result, defaults=resolved)


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(help="Files, or names of profiles.")], as_json: JsonOption = False
) -> None:
    """Check profiles. Exit status 125 when one of them cannot be used."""
    from sandbox.errors import ManifestError
    from sandbox.profiles import resolve

    results: list[dict[str, Any]] = []
    for file in files:
        try:
            found = resolve(file)
        except ManifestError as err:
            results.append({"file": file, "ok": False, "error": err.message, "where": err.where, "hint": err.hint})
            if not as_json:
                print(f"sandbox: {err}", file=sys.stderr)
        else:
            results.append({"file": file, "ok": True, "profile": found.profile, "digest": found.digest})
            if not as_json:
                print(f"{file}: ok ({found.profile}, {found.digest})")
    if as_json:
        _print_json(results)
    if not all(result["ok"] for result in results):
        raise typer.Exit(FAILED)


@app.command()
def diff(
    one: NameArgument,
    other: Annotated[str, typer.Argument(help="The one to compare with.", autocompletion=complete_names)],
    as_json: JsonOption = False,
) -> None:
    """What differs between two profiles, and whether the second one only narrows the first."""
    from rich.text import Text

    from sandbox.profiles import resolve

    first, second = resolve(one), resolve(other)
    changes = _changes(first, second)
    wider = second.widenings(first)
    if as_json:
        _print_json({"one": first.profile, "other": second.profile, "changes": changes, "wider": wider})
        return
    if not changes:
        print(f"{one} and {other} permit the same")
        return
    table = _table("key", one, other)
    for change in changes:
        table.add_row(Text(change["key"], style="bold"), Text(_words(change["one"])), Text(_words(change["other"])))
    _print(table)
    print(f"{other} permits more than {one} in: {', '.join(wider)}" if wider else f"{other} only narrows {one}")


@app.command()
def schema() -> None:
    """The JSON Schema of a profile file, for editors."""
    from sandbox.profile_schema import json_schema

    _print_json(json_schema())


@app.command()
def init(
    file: Annotated[Path | None, typer.Argument(help="Where to write it; left out: standard output.")] = None,
    extends: Annotated[str, typer.Option("--extends", help="Start from.", autocompletion=complete_names)] = "minimal",
) -> None:
    """Start a profile of one's own. An existing file is never overwritten."""
    from sandbox.errors import ProfileError
    from sandbox.profiles import resolve

    resolve(extends)
    text = TEMPLATE.format(parent=extends)
    if file is None:
        print(text, end="")
        return
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except OSError as err:
        raise ProfileError(f"cannot be written: {err.strerror}", where=str(file)) from err
    print(f"wrote {file}", file=sys.stderr)


def _facts(result: Resolved) -> dict[str, Any]:
    from sandbox.profile_schema import to_file_form

    return {
        "profile": result.profile,
        "digest": result.digest,
        "description": result.manifest.description,
        "manifest": result.manifest.model_dump(mode="json"),
        "file_form": to_file_form(result.manifest),
        "origins": {key: str(origin) for key, origin in result.origins.items()},
        "notes": list(result.notes),
        "sources": dict(result.sources),
    }


def _print_resolved(result: Resolved, *, defaults: bool) -> None:
    from rich.text import Text

    from sandbox.profile_schema import to_file_form

    table = _table("key", "value", "written in")
    for section, body in to_file_form(result.manifest, defaults=True).items():
        for name, value in body.items() if isinstance(body, dict) else ():
            for entry, text in _rows(f"{section}.{name}", value):
                origin = result.origins.get(entry) or result.origins[f"{section}.{name}"]
                if defaults or origin.file != "default":
                    place = Text(_place(origin), style="dim")
                    table.add_row(Text(f"{section}.{name}", style="bold"), Text(text), place)
    print(f"{result.profile or 'manifest'}: {result.manifest.description}")
    print(result.digest)
    _print(table)
    for note in result.notes:
        print(f"note: {note}")


def _place(origin: Origin) -> str:
    """Where a value was written, as short as it stays clear."""
    from sandbox.profile_files import shipped_dir

    file = Path(origin.file)
    if file.is_relative_to(shipped_dir()):
        name = f"{file.name} (shipped)"
    else:
        name = str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else origin.file
    return f"{name}:{origin.line}" if origin.line else name


def _rows(key: str, value: Any) -> list[tuple[str, str]]:
    """One row for a scalar, one for each entry of a list or table: (key of its origin, text)."""
    if isinstance(value, dict):
        return [(f"{key}.{name}", f"{name}={text}") for name, text in value.items()]
    if isinstance(value, list):
        return [(f"{key}[{entry}]", str(entry)) for entry in value] or [(key, "nothing")]
    return [(key, _words(value))]


def _changes(first: Resolved, second: Resolved) -> list[dict[str, Any]]:
    from sandbox.profile_schema import to_file_form

    a, b = (to_file_form(result.manifest, defaults=True) for result in (first, second))
    changes = []
    for section in dict.fromkeys((*a, *b)):
        one, other = a.get(section, {}), b.get(section, {})
        if not isinstance(one, dict) or not isinstance(other, dict):
            continue
        for name in {**one, **other}:
            before, after = one.get(name), other.get(name)
            if before != after:
                changes.append({"key": f"{section}.{name}", "one": before, "other": after})
    return changes


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={text}" for name, text in value.items()) or "nothing"
    if isinstance(value, list):
        return " ".join(str(entry) for entry in value) or "nothing"
    if value is None:
        return "any"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    # In a pipe rich would fold lines at 80 columns, which `grep` and `cut` cannot undo.
    console = Console() if sys.stdout.isatty() else Console(width=1000)
    console.print(table)


def _print_json(facts: Any) -> None:
    print(json.dumps(facts, indent=2))
