"""A writable workspace as a letter to the future: hooks, settings, links, traps for whoever looks at it next."""

from __future__ import annotations

import os
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from tests.escape.conftest import Secret
from tests.helpers.escape import TIME_FACTOR, Errno, Jail
from tests.helpers.workspaces import held, plant

pytestmark = [pytest.mark.needs("jail")]

EXISTING = {
    ".git/hooks/pre-commit": "theirs",
    ".git/config": "theirs",
    ".git/HEAD": "ref",
    ".envrc": "theirs",
    ".vscode/tasks.json": "theirs",
    ".mcp.json": "theirs",
    "node_modules/.bin/tool": "theirs",
    "sub/.git/hooks/pre-commit": "theirs",
    "src/main.py": "theirs",
}
PROTECTED = [name for name in EXISTING if name not in (".git/HEAD", "src/main.py")]
PLANTED = [".git/hooks/post-checkout", ".envrc", ".vscode/tasks.json", ".mcp.json", ".claude/settings.json"]
PLANTED += [".github/workflows/x.yml", "node_modules/.bin/tool", "deep/er/.envrc", ".bashrc", ".GIT/hooks/pre-push"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return plant(tmp_path / "project", EXISTING)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return plant(tmp_path / "empty", {"kept": "kept"})


def rw(path: Path, **more: Any) -> dict[str, Any]:
    return {"workspace": str(path), "workspace_mode": "rw", **more}


@pytest.mark.parametrize("name", PROTECTED)
def test_what_others_will_run_cannot_be_changed(jail: Jail, project: Path, name: str) -> None:
    actions = [["write", f"{project}/{name}", "evil!!"], ["write", f"{project}/src/main.py", "mine!!"]]
    assert jail.act(*actions, **rw(project)) == [Errno("EROFS"), 6]
    assert (project / name).read_text() == "theirs"
    assert jail.one(*actions[0], **rw(project, allow_protected=[name])) == 6


@pytest.mark.parametrize("name", PLANTED)
def test_what_others_would_run_does_not_stay(jail: Jail, empty: Path, name: str) -> None:
    script = (
        f"import os; os.makedirs(os.path.dirname({name!r}) or '.', exist_ok=True); open({name!r}, 'w').write('evil')"
    )
    outcome = jail.run(["python3", "-S", "-c", script + "; open('honest', 'w').write('x')"], **rw(empty))
    assert outcome.ok, outcome.stderr
    assert not (empty / name).exists()
    assert (empty / "honest").exists()
    decision = outcome.record.decisions[0]
    assert (decision["decision"], decision["subject"]) == ("deny", name)
    assert any(name in denial for denial in outcome.denials)
    outcome = jail.run(["python3", "-S", "-c", script], **rw(empty, allow_protected=[name]))
    assert (outcome.ok, (empty / name).read_text(), outcome.denials) == (True, "evil", ())


def test_one_file_granted_in_a_protected_directory_opens_no_other(jail: Jail, project: Path) -> None:
    hooks = project / ".git/hooks"
    (hooks / "pre-push").write_text("theirs")
    writes = [["write", f"{hooks}/{name}", "evil!!"] for name in ("pre-commit", "pre-push")]
    writes += [["create", f"{hooks}/post-merge"]]
    found = jail.act(*writes, **rw(project, allow_protected=[".git/hooks/pre-commit"]))
    assert found == [6, Errno("EROFS"), 1]
    kept = {path.name: path.read_text() for path in hooks.iterdir()}
    assert kept == {"pre-commit": "evil!!", "pre-push": "theirs"}


def test_a_protected_file_survives_the_removal_of_its_directory(jail: Jail, project: Path) -> None:
    """Moved away and made anew it would be somebody else's."""
    script = (
        "import os, shutil\n"
        "os.rename('.git', 'moved')\nos.makedirs('.git/hooks')\n"
        "open('.git/hooks/pre-commit', 'w').write('evil')\nopen('.git/config', 'w').write('evil')"
    )
    jail.run(["python3", "-S", "-c", script], **rw(project))
    assert "evil" not in {text for name, text in held(project).items() if ".git/" in name}


def test_a_link_in_place_of_a_protected_directory_does_not_stay(jail: Jail, empty: Path) -> None:
    """`.git` as a link, or `.vscode`, brings in settings from a place that looks harmless."""
    script = (
        "import os; os.makedirs('data/hooks'); open('data/hooks/pre-commit', 'w').write('evil')\n"
        "os.symlink('data', '.git')"
    )
    outcome = jail.run(["python3", "-S", "-c", script], **rw(empty))
    assert outcome.ok, outcome.stderr
    assert not (empty / ".git").is_symlink()


def test_a_bare_repository_in_disguise_does_not_stay_armed(jail: Jail, empty: Path) -> None:
    """git takes any directory with HEAD, objects and refs for a repository, and runs what its config says."""
    script = (
        "import os\nfor n in ('lib/objects', 'lib/refs', 'lib/hooks'): os.makedirs(n)\n"
        "open('lib/HEAD', 'w').write('ref: refs/heads/x')\n"
        "open('lib/config', 'w').write('[core]\\n\\tfsmonitor = evil\\n\\tbare = false\\n\\tworktree = ..')"
    )
    outcome = jail.run(["python3", "-S", "-c", script], **rw(empty))
    assert outcome.ok, outcome.stderr
    assert not ((empty / "lib/config").exists() and (empty / "lib/HEAD").exists())
    assert outcome.record.decisions


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_traps_for_whoever_opens_them_do_not_stay(jail: Jail, empty: Path, kind: str) -> None:
    script = {
        "fifo": "import os; os.mkfifo('trap')",
        "socket": "import socket; socket.socket(socket.AF_UNIX).bind('trap')",
    }[kind]
    outcome = jail.run(["python3", "-S", "-c", script], **rw(empty))
    assert outcome.ok, outcome.stderr
    assert not (empty / "trap").exists()
    assert sorted(held(empty)) == ["kept"]


def test_files_belong_to_the_caller_and_to_nobody_else(jail: Jail, empty: Path) -> None:
    assert jail.act(["create", "new"], ["chown", "new", 0, 0], **rw(empty)) == [1, Errno("EINVAL")]
    info = (empty / "new").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (os.geteuid(), os.getegid(), 0o644)


@pytest.mark.needs("root")
def test_files_of_others_keep_their_permissions(jail: Jail, empty: Path) -> None:
    """Only the caller's own files become the jail's: another user's private file in the workspace stays private."""
    (empty / "theirs").write_text("private")
    (empty / "theirs").chmod(0o600)
    os.chown(empty / "theirs", 4242, 4242)
    found = jail.act(
        ["read", "theirs"], ["write", "theirs", "x"], ["chmod", "theirs", 0o666], ["read", "kept"], **rw(empty)
    )
    assert found == [Errno("EACCES"), Errno("EACCES"), Errno("EOVERFLOW"), "kept"]


@pytest.mark.parametrize("mode", ["rw", "cow"])
def test_collecting_follows_no_link_and_waits_for_no_fifo(jail: Jail, empty: Path, secret: Secret, mode: str) -> None:
    script = (
        f"import os\nos.mkdir('out')\nos.symlink({str(secret.path)!r}, 'out/link')\n"
        f"os.symlink({str(secret.directory)!r}, 'out/dir')\nos.mkfifo('out/fifo')\n"
        "open('out/plain', 'w').write('plain')\nos.symlink('/proc/self/environ', 'out/proc')"
    )
    started = time.monotonic()
    outcome = jail.run(
        ["python3", "-S", "-c", script], collect=["out/*", "out/dir/*"], workspace=str(empty), workspace_mode=mode
    )
    assert outcome.ok, outcome.stderr
    assert dict(outcome.files) == {"out/plain": b"plain"}
    assert time.monotonic() - started < 10 * TIME_FACTOR


def test_collecting_from_a_private_workspace_is_the_same(jail: Jail, secret: Secret) -> None:
    script = f"ln -s {secret.path} a; mkfifo b; echo fine > c; ln c d; mkdir e; ln -s / e/root"
    outcome = jail.run(["sh", "-c", script], collect=["*", "e/root/etc/*"])
    assert dict(outcome.files) == {"c": b"fine\n", "d": b"fine\n"}


def test_a_cow_workspace_is_never_written(jail: Jail, project: Path) -> None:
    before = held(project)
    script = "rm -rf src; echo evil > .envrc; mv .git .g; echo new > new; ln -s / root; chmod 777 ."
    outcome = jail.run(["sh", "-c", script], workspace=str(project), workspace_mode="cow")
    assert held(project) == before
    assert outcome.changes is not None
    changed = {str(change.path) for change in (*outcome.changes.added, *outcome.changes.modified)}
    assert "new" in changed
    outcome.changes.discard()


def test_protected_changes_of_a_cow_workspace_are_not_committed(jail: Jail, project: Path) -> None:
    script = "echo evil > .envrc; echo evil >> .git/config; echo new > new"
    outcome = jail.run(["sh", "-c", script], workspace=str(project), workspace_mode="cow")
    assert outcome.ok, outcome.stderr
    result = outcome.changes.commit()
    assert {str(path) for path, _ in result.protected} == {".envrc", ".git/config"}
    assert (project / ".envrc").read_text() == "theirs"
    assert (project / "new").read_text() == "new\n"


def test_set_id_bits_do_not_come_out_of_a_cow_workspace(jail: Jail, empty: Path) -> None:
    outcome = jail.run(
        ["sh", "-c", "cp /bin/true t; chmod 6755 t; echo $?"], workspace=str(empty), workspace_mode="cow"
    )
    assert outcome.text == "1\n"
    outcome.changes.commit()
    assert stat.S_IMODE((empty / "t").stat().st_mode) & 0o6000 == 0


def test_a_workspace_that_cannot_be_swept_does_not_end_well(tmp_path: Path, empty: Path) -> None:
    """What is planted stays then, so nobody may take the call for a good one; and it has its record all the same."""
    from sandbox import Sandbox
    from tests.helpers.escape import BOUNDS

    state = tmp_path / "state"
    with Sandbox("shell", state=state, **BOUNDS, **rw(empty)) as box:
        assert box.run(["true"]).ok
        (state / "quarantine").rmdir()
        (state / "quarantine").write_text("in the way")
        outcome = box.run(["touch", ".envrc"])
        assert (outcome.ending.kind, outcome.ending.fault) == ("launch_error", "host")
        assert "could not be gathered" in outcome.record.ending.message
        (state / "quarantine").unlink()
        assert box.run(["true"]).ok


def test_a_socket_made_by_the_tool_serves_nobody_outside(jail: Jail, short_path: Path) -> None:
    """While the call runs its socket can be met in the workspace; afterwards nothing listens and nothing is left."""
    script = (
        "import socket, time\ns = socket.socket(socket.AF_UNIX)\ns.bind('meet')\ns.listen()\n"
        "print('ready', flush=True)\ntime.sleep(0.5)"
    )
    outcome = jail.run(["python3", "-S", "-c", script], **rw(short_path))
    assert outcome.ok
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(FileNotFoundError):
        client.connect(str(short_path / "meet"))
