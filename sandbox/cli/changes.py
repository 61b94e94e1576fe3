"""`sandbox changes`: what calls changed in copy-on-write workspaces: list, show, commit or discard. Prints only.

Names in a changeset were chosen by a tool: they reach the terminal escaped, and JSON is written in ASCII. `commit`
exits with 1 when something had to be left out; a refusal, with nothing changed, is 125.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from sandbox.workspace import Change, Changeset, CommitResult

INCOMPLETE, OURS = 1, 125
SHOWN = 200
_SIGNS = {"added": "A", "modified": "M", "mode": "m", "deleted": "D"}

app = typer.Typer(name="changes", help="What calls changed in cow workspaces: review, commit, discard.")

StateOption = Annotated[
    str | None, typer.Option("--state", envvar="SANDBOX_STATE", help="The state directory that holds the changes.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="A record's id, the start of one, or `last`.")]
AllowOption = Annotated[
    list[str] | None,
    typer.Option("--allow-protected", metavar="NAME", help="Commit this rule's paths too, or one path; repeatable."),
]


def register(main: typer.Typer) -> None:
    """Add the group to the command line."""
    main.add_typer(app)


@app.callback(invoke_without_command=True)
def changes(ctx: typer.Context) -> None:
    """What calls changed in cow workspaces: review, commit, discard."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command("list")
def list_(state: StateOption = None, as_json: JsonOption = False) -> None:
    """The changes that wait to be committed or discarded, oldest first."""
    from sandbox.workspace import list_changesets, printable

    with _errors():
        found = list(list_changesets(_store(state)))
    if as_json:
        _print_json([_summary(changeset) for changeset in found])
        return
    for changeset in found:
        print(f"{changeset.record_id}  {_counted(changeset)}  {printable(changeset.lower_path)}")
    if not found:
        typer.echo("sandbox changes: none are waiting", err=True)


@app.command()
def show(
    record_id: IdArgument,
    state: StateOption = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show what changed inside small text files.")] = False,
    as_json: JsonOption = False,
) -> None:
    """One call's changes; with --diff also inside files."""
    from sandbox.workspace import printable

    with _errors():
        changeset = _load(state, record_id)
        if as_json:
            _print_json(_summary(changeset) | changeset.to_json())
            return
        print(f"{_counted(changeset)} in {printable(changeset.lower_path)}")
        for change in changeset.pending[:SHOWN]:
            print(_line(change))
        if len(changeset.pending) > SHOWN:
            print(f"… and {len(changeset.pending) - SHOWN} more (--json shows all)")
        for path, reason in changeset.skipped:
            print(f"-  {printable(path)}  (not kept: {reason})")
        if diff:
            for text in changeset.diff():
                print(text)


@app.command()
def commit(
    record_id: IdArgument,
    state: StateOption = None,
    allow_protected: AllowOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what changed on the host meanwhile.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Apply a call's changes to the directory it worked on."""
    with _errors():
        changeset = _load(state, record_id)
        result = changeset.commit(allow_protected=allow_protected or (), force=force)
    if as_json:
        _print_json(result.to_json() | {"record_id": changeset.record_id})
    else:
        _print_result(result)
    if not result.complete:
        raise typer.Exit(INCOMPLETE)


@app.command()
def discard(
    record_id: Annotated[str, typer.Argument(metavar="ID", help="A record's id, the start of one, or `last`.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Forget the changes of every call.")] = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget a call's changes; the directory it worked on stays as it is."""
    from sandbox.workspace import list_changesets

    if everything == bool(record_id):
        _fail("give one ID, or --all")
    with _errors():
        found = list(list_changesets(_store(state))) if everything else [_load(state, record_id)]
        for changeset in found:
            changeset.discard()
    if as_json:
        _print_json([{"record_id": changeset.record_id, "discarded": len(changeset.pending)} for changeset in found])
    else:
        count = sum(len(changeset.pending) for changeset in found)
        typer.echo(f"sandbox changes: {count} changes of {len(found)} calls forgotten", err=True)


def _load(state: str | None, record_id: str) -> Changeset:
    """The changeset of that id, of the only one that starts with it, or the newest one."""
    from sandbox.errors import WorkspaceError
    from sandbox.workspace import Changeset, list_changesets, printable

    store = _store(state)
    ids = [changeset.record_id for changeset in list_changesets(store)]
    matching = [record_id] if record_id in ids else [found for found in ids if found.startswith(record_id)]
    if record_id == "last":
        matching = ids[-1:]
    if len(matching) != 1:
        many = f"{len(matching)} changesets start with" if matching else "there is no changeset"
        raise WorkspaceError(f"{many} {printable(record_id[:64])!r}", hint="`sandbox changes list` shows them")
    return Changeset.load(store / matching[0])


def _store(option: str | None) -> Path:
    from sandbox.audit.store import state_dir

    return state_dir(option) / "changes"


def _summary(changeset: Changeset) -> dict[str, Any]:
    from sandbox.workspace.names import to_json

    counts = {kind: sum(change.kind == kind for change in changeset.pending) for kind in _SIGNS}
    return {
        "record_id": changeset.record_id,
        "workspace": to_json(changeset.lower_path),
        "created_ns": changeset.created_ns,
        "counts": counts | {"protected": sum(bool(change.protected) for change in changeset.pending)},
    }


def _counted(changeset: Changeset) -> str:
    counts = _summary(changeset)["counts"]
    counts["modified"] += counts.pop("mode")
    return ", ".join(f"{number} {word}" for word, number in counts.items() if number) or "nothing"


def _line(change: Change) -> str:
    from sandbox.workspace import printable

    notes = []
    if change.target:
        notes.append(f"-> {printable(change.target)}")
    if change.protected:
        notes.append(f"(protected: {change.protected})")
    if change.stale:
        notes.append("(changed on the host meanwhile)")
    ending = "/" if change.type == "dir" else ""
    return " ".join([f"{_SIGNS[change.kind]} ", printable(change.path) + ending, *notes])


def _print_result(result: CommitResult) -> None:
    from sandbox.workspace import printable

    typer.echo(f"sandbox changes: {len(result.applied)} committed", err=True)
    for path, rule in result.protected[:SHOWN]:
        typer.echo(f"  left out: {printable(path)} (protected: {rule})", err=True)
    for path, reason in [*result.failed, *result.skipped][:SHOWN]:
        typer.echo(f"  not committed: {printable(path)} ({reason})", err=True)
    if result.protected:
        rules = sorted({rule for _, rule in result.protected})
        typer.echo(f"  after a look at them: --allow-protected {' --allow-protected '.join(rules)}", err=True)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=True))


@contextmanager
def _errors() -> Iterator[None]:
    from sandbox.errors import SandboxError

    try:
        yield
    except BrokenPipeError:
        sys.stderr.close()  # the reader has seen enough: nothing to complain about
        raise typer.Exit(0) from None
    except (SandboxError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"sandbox changes: {message}", err=True)
    raise typer.Exit(OURS)
