"""What a writable host directory holds before a call, and what is swept out of it after."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from sandbox.errors import WorkspaceError
from sandbox.workspace import Scan, SweepResult, scan, sweep
from sandbox.workspace.walk import remove
from tests.helpers.workspaces import held, opened, plant

TREE = {
    "src/main.py": "print()",
    ".git/HEAD": "ref: refs/heads/main",
    ".git/config": "[core]",
    ".git/hooks/pre-commit": "mine",
    ".git/hooks/pre-push.sample": "sample",
    "node_modules/.bin/tsc": ("link", "../typescript/bin/tsc"),
    ".envrc": "export A=1",
    "docs": None,
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return plant(tmp_path / "work", TREE)


def scanned(work: Path, *, max_entries: int = 1000, allow: tuple[str, ...] = ()) -> Scan:
    with opened(work) as fd:
        return scan(fd, max_entries=max_entries, allow=allow)


def swept(work: Path, before: Scan, *allow: str) -> SweepResult:
    quarantine = work.parent / "quarantine"
    quarantine.mkdir(mode=0o700, exist_ok=True)
    with opened(work) as fd, opened(quarantine) as quarantine_fd:
        return sweep(fd, before, allow, quarantine_fd)


def taken(result: SweepResult) -> set[tuple[str, str, str]]:
    return {(entry.path, entry.rule, entry.action) for entry in result.quarantined}


def test_the_scan_knows_every_entry_and_what_is_protected(work: Path) -> None:
    before = scanned(work)
    assert set(before.paths()) == set(held(work))
    assert len(before) == len(held(work))
    entry = before.entry("src/main.py")
    assert entry is not None
    assert (entry.size, stat.S_ISREG(entry.mode)) == (7, True)
    assert before.entry("src/none.py") is None
    # Whole directories stand once; a link cannot be bound over and stands apart.
    assert sorted(before.protected) == [".envrc", ".git/config", ".git/hooks", "node_modules/.bin"]
    assert before.protected_links == ["node_modules/.bin/tsc"]
    assert sorted(scanned(work, allow=("git-hooks", ".envrc")).protected) == [".git/config", "node_modules/.bin"]


def test_a_directory_too_large_to_watch_is_refused_with_a_hint(work: Path) -> None:
    count = len(held(work))
    with pytest.raises(WorkspaceError, match=r"too many to watch.*\n.*cow"):
        scanned(work, max_entries=count - 1)
    assert len(scanned(work, max_entries=count)) == count


def test_a_directory_too_deep_to_watch_is_refused(work: Path) -> None:
    _dig(work, 300)
    with pytest.raises(WorkspaceError, match="too deep"):
        scanned(work)
    with opened(work) as fd:
        remove(fd, "d")
    assert scanned(work)


def test_nothing_happens_to_what_nobody_touched(work: Path) -> None:
    before = scanned(work)
    tree = held(work)
    result = swept(work, before)
    assert result.is_clean
    assert (result.changes.added.count, result.changes.modified.count, result.changes.deleted.count) == (0, 0, 0)
    assert held(work) == tree
    assert os.listdir(work.parent / "quarantine") == []


def test_changes_are_listed(work: Path) -> None:
    before = scanned(work)
    plant(work, {"new/deep/f": "x", "src/main.py": "print(1)"})
    (work / "docs").rmdir()
    (work / ".git/hooks/pre-push.sample").unlink()
    result = swept(work, before)
    assert sorted(result.changes.added.paths) == ["new", "new/deep", "new/deep/f"]
    assert result.changes.modified.paths == ["src/main.py"]
    assert sorted(result.changes.deleted.paths) == [".git/hooks/pre-push.sample", "docs"]
    assert result.is_clean


def test_a_change_that_hides_its_time_shows_all_the_same(work: Path) -> None:
    before = scanned(work)
    status = (work / "src/main.py").stat()
    (work / "src/main.py").write_text("evil()!")
    os.utime(work / "src/main.py", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert swept(work, before).changes.modified.paths == ["src/main.py"]


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        (".git/hooks/post-checkout", "git-hooks"),
        (".vscode/tasks.json", "vscode"),
        ("sub/.envrc", "env-dir"),
        (".BASHRC", "shell-startup"),
        ("node_modules/.bin/evil", "node-bin"),
        (".github/workflows/x.yml", "ci"),
        (".mcp.json", "agent-settings"),
    ],
)
def test_a_planted_protected_file_is_set_aside_unless_granted(work: Path, path: str, rule: str) -> None:
    before = scanned(work)
    plant(work, {path: "evil"})
    result = swept(work, before)
    assert taken(result) == {(path, rule, "moved")}
    assert not (work / path).exists()
    stored = work.parent / "quarantine" / result.quarantined[0].stored
    assert stored.read_text() == "evil"
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    plant(work, {path: "granted"})
    assert swept(work, before, rule).is_clean
    assert (work / path).read_text() == "granted"


def test_setting_a_hard_link_aside_leaves_the_other_name_as_it_was(work: Path) -> None:
    (work / "src/main.py").chmod(0o755)
    before = scanned(work)
    os.link(work / "src/main.py", work / ".profile")
    result = swept(work, before)
    assert taken(result) == {(".profile", "shell-startup", "copied")}
    assert not (work / ".profile").exists()
    assert stat.S_IMODE((work / "src/main.py").stat().st_mode) == 0o755
    assert (work.parent / "quarantine" / result.quarantined[0].stored).read_text() == "print()"


def test_the_quarantine_says_what_it_holds(work: Path) -> None:
    before = scanned(work)
    plant(work, {".vscode/\x1b[2J\n": "evil"})
    swept(work, before)
    lines = (work.parent / "quarantine/index.jsonl").read_bytes().splitlines()
    assert len(lines) == 1
    line = json.loads(lines[0])
    assert (line["path"], line["rule"], line["stored"], line["size"]) == (".vscode/\x1b[2J\n", "vscode", "000001", 4)


def test_an_overwritten_protected_file_is_set_aside_and_the_old_one_put_back(work: Path) -> None:
    (work / ".git/config").chmod(0o640)
    before = scanned(work)
    (work / ".git/config").unlink()
    plant(work, {".git/config": "[core]\nfsmonitor = evil"})
    result = swept(work, before)
    assert taken(result) == {(".git/config", "git-config", "moved")}
    assert result.quarantined[0].restored
    assert (work / ".git/config").read_text() == "[core]"
    assert stat.S_IMODE((work / ".git/config").stat().st_mode) == 0o640


def test_a_replaced_protected_link_is_put_back(work: Path) -> None:
    before = scanned(work)
    (work / "node_modules/.bin/tsc").unlink()
    (work / "node_modules/.bin/tsc").symlink_to("/tmp/evil")
    result = swept(work, before)
    assert result.quarantined[0].restored
    assert os.readlink(work / "node_modules/.bin/tsc") == "../typescript/bin/tsc"


def test_a_directory_moved_into_a_protected_place_is_emptied(work: Path) -> None:
    before = scanned(work)
    plant(work, {"x/settings.json": "evil", "x/sub/tasks.json": "evil"})
    (work / "x").rename(work / ".vscode")
    assert taken(swept(work, before)) == {
        (".vscode/settings.json", "vscode", "moved"),
        (".vscode/sub/tasks.json", "vscode", "moved"),
    }


@pytest.mark.parametrize("name", [".vscode", "node_modules2/.git", ".github"])
def test_a_link_in_place_of_a_protected_directory_is_set_aside(work: Path, name: str) -> None:
    plant(work, {"node_modules2": None})
    before = scanned(work)
    plant(work, {"elsewhere/settings.json": "evil"})
    (work / name).symlink_to(work / "elsewhere")
    assert [entry.path for entry in swept(work, before).quarantined] == [name]
    assert not (work / name).is_symlink()


def test_privilege_bits_are_stripped_from_what_is_new_or_changed(work: Path) -> None:
    plant(work, {"old": "o"})
    (work / "old").chmod(0o4755)
    before = scanned(work)
    plant(work, {"new": "n"})
    (work / "new").chmod(0o6755)
    (work / "newdir").mkdir()
    (work / "newdir").chmod(0o2755)
    (work / "src/main.py").chmod(0o4755)
    result = swept(work, before)
    assert sorted(result.stripped) == [
        ("new", "set-gid"),
        ("new", "set-uid"),
        ("newdir", "set-gid"),
        ("src/main.py", "set-uid"),
    ]
    assert stat.S_IMODE((work / "new").stat().st_mode) == 0o755
    assert stat.S_IMODE((work / "old").stat().st_mode) == 0o4755  # the host's own, unchanged


def test_a_directory_that_inherits_its_group_keeps_doing_so(work: Path) -> None:
    (work / "docs").chmod(0o2755)
    before = scanned(work)
    (work / "docs/new").mkdir()
    assert swept(work, before).is_clean
    assert (work / "docs/new").stat().st_mode & stat.S_ISGID


@pytest.mark.needs("root")
@pytest.mark.parametrize("as_root", [True, False])
def test_a_file_capability_is_stripped_by_root_and_by_the_owner(work: Path, as_root: bool) -> None:
    before = scanned(work)
    plant(work, {"tool": "x"})
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(work / "tool", "security.capability", capability)
    assert os.listxattr(work / "tool") == ["security.capability"]
    if as_root:
        assert swept(work, before).stripped == [("tool", "file-capability")]
    else:
        _sweep_as_user(work, before)
    assert os.listxattr(work / "tool") == []
    assert (work / "tool").read_text() == "x"


def test_special_files_are_removed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scanned(work)
    os.mkfifo(work / "fifo")
    monkeypatch.chdir(work)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("sock")
        result = swept(work, before)
    assert taken(result) == {("fifo", "special-file", "removed"), ("sock", "special-file", "removed")}
    assert not {"fifo", "sock"} & set(os.listdir(work))


def test_a_bottomless_tree_is_set_aside_whole(work: Path) -> None:
    before = scanned(work)
    _dig(work, 1200)
    result = swept(work, before)
    assert [(entry.rule, entry.action) for entry in result.quarantined] == [("too-deep", "moved")]
    with opened(work.parent) as fd:
        remove(fd, "quarantine")
    assert not (work.parent / "quarantine").exists()


def test_a_locked_directory_hides_nothing(work: Path) -> None:
    before = scanned(work)
    plant(work, {"locked/.envrc": "evil"})
    (work / "locked").chmod(0)
    assert taken(swept(work, before)) == {("locked/.envrc", "env-dir", "moved")}


def test_a_bare_repository_loses_what_makes_it_act(work: Path) -> None:
    before = scanned(work)
    plant(work, {"x/HEAD": "ref: refs/heads/m", "x/config": "evil", "x/objects": None, "x/refs": None})
    plant(work, {"x/hooks/post-checkout": "evil", "x/hooks/a.sample": "s", "x/description": "d"})
    assert taken(swept(work, before)) == {
        (name, "git-bare", "moved") for name in ("x/HEAD", "x/config", "x/hooks/post-checkout")
    }
    assert set(held(work / "x")) == {"objects", "refs", "hooks", "hooks/a.sample", "description"}


def test_a_bare_repository_cannot_be_put_together_over_two_calls(work: Path) -> None:
    plant(work, {"x/HEAD": "ref: refs/heads/m", "x/config": "evil"})
    before = scanned(work)
    plant(work, {"x/objects": None, "x/refs": None})
    assert ("x/HEAD", "git-bare", "moved") in taken(swept(work, before))


def test_a_bare_repository_of_the_hosts_own_is_protected_and_may_be_worked_in(work: Path) -> None:
    plant(work, {"r.git/HEAD": "ref: refs/heads/m", "r.git/config": "mine", "r.git/objects": None, "r.git/refs": None})
    plant(work, {"r.git/hooks/update": "mine"})
    before = scanned(work)
    assert {"r.git/config", "r.git/hooks"} <= set(before.protected)
    plant(work, {"r.git/objects/aa": "o", "r.git/HEAD": "ref: refs/heads/other"})
    assert swept(work, before).is_clean
    plant(work, {"r.git/config": "evil", "r.git/hooks/new": "evil"})
    assert {path for path, _, _ in taken(swept(work, before))} == {"r.git/config", "r.git/hooks/new"}
    assert (work / "r.git/config").read_text() == "mine"


def test_links_that_lead_outside_are_named(work: Path) -> None:
    before = scanned(work)
    plant(work, {"out": ("link", "/etc/passwd"), "in": ("link", "src/main.py")})
    result = swept(work, before)
    assert result.links_outside.paths == ["out"]
    assert (work / "out").is_symlink()


def test_a_quarantine_inside_the_workspace_is_not_swept_into_itself(work: Path) -> None:
    (work / "state").mkdir()
    before = scanned(work)
    plant(work, {".envrc2/.envrc": "evil"})
    with opened(work) as fd, opened(work / "state") as quarantine_fd:
        result = sweep(fd, before, (), quarantine_fd)
    assert taken(result) == {(".envrc2/.envrc", "env-dir", "moved")}


@pytest.mark.needs("root")
def test_a_directory_that_the_call_cannot_reach_is_not_looked_into(work: Path) -> None:
    # Such as the state directory: other calls' records and changesets are written there meanwhile.
    plant(work / "state", {"chains/a.jsonl": "1", "changes/1/upper/.git/hooks/post-commit": "theirs"})
    info = (work / "state").stat()
    with opened(work) as fd:
        before = scan(fd, max_entries=1000, apart=frozenset({(info.st_dev, info.st_ino)}))
    assert [path for path in before.paths() if path.startswith("state")] == ["state"]
    assert not [path for path in before.protected if path.startswith("state")]
    plant(work, {"state/chains/b.jsonl": "2", "state/changes/2/upper/.envrc": "theirs", "other/.envrc": "planted"})
    result = swept(work, before)
    assert taken(result) == {("other/.envrc", "env-dir", "moved")}
    assert sorted(result.changes.added.paths) == ["other", "other/.envrc"]
    assert (work / "state/changes/2/upper/.envrc").read_text() == "theirs"
    # Its twin, looked into: what is found there is taken for the call's.
    before = scanned(work)
    plant(work / "state", {"changes/3/upper/.envrc": "theirs"})
    assert taken(swept(work, before)) == {("state/changes/3/upper/.envrc", "env-dir", "moved")}


def test_a_quarantine_on_another_file_system_gets_copies(work: Path) -> None:
    before = scanned(work)
    plant(work, {".vscode/tasks.json": "evil", ".idea": ("link", "/tmp")})
    os.mkfifo(work / "fifo")
    other = Path("/dev/shm") / f"toolcall-sandbox-test-{os.getpid()}"
    if os.stat("/dev/shm").st_dev == work.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    other.mkdir(mode=0o700)
    try:
        with opened(work) as fd, opened(other) as quarantine_fd:
            result = sweep(fd, before, (), quarantine_fd)
        assert taken(result) == {
            (".vscode/tasks.json", "vscode", "copied"),
            (".idea", "jetbrains", "removed"),
            ("fifo", "special-file", "removed"),
        }
        copied = next(entry for entry in result.quarantined if entry.action == "copied")
        assert (other / copied.stored).read_text() == "evil"
    finally:
        for path in other.iterdir():
            path.unlink()
        other.rmdir()


def _dig(work: Path, depth: int) -> None:
    fd = os.open(work, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def _sweep_as_user(work: Path, before: Scan) -> None:
    """Sweep in a child that is the owner but has no capability."""
    quarantine = work.parent / "quarantine"
    quarantine.mkdir(mode=0o700)
    for path in (work, quarantine, *work.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    # chown took the capability away, and only root may set one.
    os.setxattr(work / "tool", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    with opened(work) as fd, opened(quarantine) as quarantine_fd:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                code = 0 if ("tool", "file-capability") in sweep(fd, before, (), quarantine_fd).stripped else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
