"""What an upper directory means, how it is kept, and what a commit does to the host's directory."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.errors import WorkspaceError
from sandbox.workspace import Changeset, StoreLimits, list_changesets
from sandbox.workspace.commit import ordered
from tests.helpers.workspaces import captured, held, opaque, opened, plant, whiteout


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    return plant(tmp_path / "lower", {"a": "1", "b": "2", "d/x": "x", "d/y": "y", "l": ("link", "a"), "e": None})


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    return plant(tmp_path / "upper", {})


def described(changeset: Changeset) -> set[tuple[str, str, str]]:
    return {(change.path, change.kind, change.type) for change in changeset.changes}


def test_what_the_call_wrote_is_told_apart(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"new": "n", "a": "changed", "d/z": "z", "s": ("link", "b"), "l": ("link", "b")})
    whiteout(upper, "b")
    whiteout(upper, "d/x")
    changeset = captured(tmp_path, lower, upper)
    assert described(changeset) == {
        ("new", "added", "file"),
        ("a", "modified", "file"),
        ("d/z", "added", "file"),
        ("s", "added", "symlink"),
        ("l", "modified", "symlink"),
        ("b", "deleted", "file"),
        ("d/x", "deleted", "file"),
    }
    assert [change.path for change in changeset.added] == ["d/z", "new", "s"]
    assert changeset.skipped == ()


def test_a_file_that_was_copied_up_but_not_changed_is_no_change(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"a": "1"})
    os.utime(upper / "a", (1, 1))
    changeset = captured(tmp_path, lower, upper)
    assert changeset.changes == ()
    assert changeset.directory is None
    assert list((tmp_path / "changes").iterdir()) == []


def test_a_mode_alone_is_a_change_of_mode(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"a": "1"})
    (upper / "a").chmod(0o700)
    changeset = captured(tmp_path, lower, upper)
    assert described(changeset) == {("a", "mode", "file")}
    changeset.commit()
    assert stat.S_IMODE((lower / "a").stat().st_mode) == 0o700


def test_a_replaced_directory_deletes_what_it_no_longer_has(tmp_path: Path, lower: Path, upper: Path) -> None:
    opaque(upper, "d")
    plant(upper, {"d/x": "new x", "d/n": "n"})
    changeset = captured(tmp_path, lower, upper)
    assert described(changeset) == {
        ("d/x", "modified", "file"),
        ("d/n", "added", "file"),
        ("d/y", "deleted", "file"),
    }


def test_types_may_change_both_ways(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"d": "now a file", "l": "was a link", "b": ("link", "a")})
    opaque(upper, "a")
    plant(upper, {"a/in": "i"})
    changeset = captured(tmp_path, lower, upper)
    result = changeset.commit()
    assert result.complete
    assert held(lower) == {"a": "/", "a/in": "i", "b": "-> a", "d": "now a file", "l": "was a link", "e": "/"}


def test_a_commit_applies_everything_and_forgets_the_changeset(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"new/deep/f": "n", "a": "changed"})
    (upper / "new/deep/f").chmod(0o755)
    whiteout(upper, "d")
    changeset = Changeset.load(captured(tmp_path, lower, upper).directory or tmp_path)
    result = changeset.commit()
    assert result.complete
    assert held(lower) == {"a": "changed", "b": "2", "l": "-> a", "e": "/", "new": "/", "new/deep": "/"} | {
        "new/deep/f": "n"
    }
    assert stat.S_IMODE((lower / "new/deep/f").stat().st_mode) == 0o755 & ~_umask()
    assert list((tmp_path / "changes").iterdir()) == []
    with pytest.raises(WorkspaceError, match="gone"):
        changeset.commit()


def test_discarding_leaves_the_directory_as_it_is(tmp_path: Path, lower: Path, upper: Path) -> None:
    before = held(lower)
    plant(upper, {"new": "n"})
    captured(tmp_path, lower, upper).discard()
    assert held(lower) == before
    assert list((tmp_path / "changes").iterdir()) == []


def test_set_uid_and_set_gid_never_reach_the_host(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"su": "x", "a": "2"})
    (upper / "su").chmod(0o6755)
    (upper / "a").chmod(0o4755)
    captured(tmp_path, lower, upper).commit(force=True)
    for name in ("su", "a"):
        assert not (lower / name).stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
        assert (lower / name).exists()


def test_special_files_are_left_out_and_listed(tmp_path: Path, lower: Path, upper: Path) -> None:
    os.mkfifo(upper / "pipe")
    plant(upper, {"new": "n"})
    changeset = captured(tmp_path, lower, upper)
    assert changeset.skipped == (("pipe", "special-file"),)
    result = changeset.commit()
    assert result.applied == ["new"]
    assert not result.complete
    assert not (lower / "pipe").exists()


@pytest.mark.parametrize("rule", ["git-hooks", ".git/hooks/pre-commit", ".git/hooks"])
def test_protected_paths_wait_for_their_grant(tmp_path: Path, lower: Path, upper: Path, rule: str) -> None:
    plant(upper, {".git/hooks/pre-commit": "evil", ".envrc": "evil", "ok": "fine"})
    changeset = captured(tmp_path, lower, upper)
    assert {(change.path, change.protected) for change in changeset.protected} == {
        (".git/hooks/pre-commit", "git-hooks"),
        (".envrc", "env-dir"),
    }
    result = changeset.commit()
    assert sorted(result.protected) == [(".envrc", "env-dir"), (".git/hooks/pre-commit", "git-hooks")]
    assert (lower / "ok").read_text() == "fine"
    assert not (lower / ".git").exists()  # nor the directories that only it would go into
    assert not (lower / ".envrc").exists()
    later = Changeset.load(changeset.directory or tmp_path)
    assert {change.path for change in later.pending} == {".git", ".git/hooks", ".git/hooks/pre-commit", ".envrc"}
    result = later.commit(allow_protected=(rule,))
    assert result.applied == [".git", ".git/hooks", ".git/hooks/pre-commit"]
    assert (lower / ".git/hooks/pre-commit").read_text() == "evil"
    assert not (lower / ".envrc").exists()


def test_a_misspelt_grant_commits_nothing(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"new": "n"})
    with pytest.raises(WorkspaceError, match="git-hoks"):
        captured(tmp_path, lower, upper).commit(allow_protected=("git-hoks",))
    assert not (lower / "new").exists()


@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "d/../../x"])
def test_links_that_lead_outside_wait_for_their_grant(tmp_path: Path, lower: Path, upper: Path, target: str) -> None:
    plant(upper, {"out": ("link", target), "in": ("link", "d/x")})
    changeset = captured(tmp_path, lower, upper)
    assert changeset.commit().protected == [("out", "link-outside")]
    assert os.readlink(lower / "in") == "d/x"
    assert not (lower / "out").is_symlink()
    Changeset.load(changeset.directory or tmp_path).commit(allow_protected=("link-outside",))
    assert os.readlink(lower / "out") == target


def test_a_bare_repository_is_protected_by_its_parts(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"x/HEAD": "ref: refs/heads/m", "x/config": "[core]", "x/objects": None, "x/refs": None})
    plant(upper, {"x/hooks/post-checkout": "evil", "y/config": "mine", "y/HEAD": "not git"})
    changeset = captured(tmp_path, lower, upper)
    assert {(c.path, c.protected) for c in changeset.protected} == {
        ("x/HEAD", "git-bare"),
        ("x/config", "git-bare"),
        ("x/hooks/post-checkout", "git-bare"),
    }


def test_a_bare_repository_cannot_be_put_together_over_two_commits(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(lower, {"x/HEAD": "ref: refs/heads/m", "x/config": "[core]"})
    plant(upper, {"x/objects/a": "o", "x/refs/heads/m": "r"})
    changeset = captured(tmp_path, lower, upper)
    assert {change.path for change in changeset.protected} == {"x/objects/a", "x/refs/heads/m"}
    plant(lower, {"z/objects/a": "o", "z/refs/h": "r", "z/config": "evil"})
    second = plant(tmp_path / "upper2", {"z/HEAD": "ref: x"})
    assert {c.path for c in captured(tmp_path, lower, second, record_id="call-2").protected} == {"z/HEAD"}


def test_what_the_host_changed_since_is_refused_and_nothing_applied(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"a": "theirs", "new": "n"})
    whiteout(upper, "b")
    changeset = captured(tmp_path, lower, upper)
    (lower / "a").write_text("ours")
    (lower / "new").write_text("ours too")
    (lower / "b").write_text("kept")
    with pytest.raises(WorkspaceError, match="nothing was committed") as caught:
        changeset.commit()
    assert {path for path, _ in caught.value.conflicts} == {"a", "new", "b"}
    assert (lower / "a").read_text() == "ours"
    assert changeset.commit(force=True).complete
    assert held(lower) == {"a": "theirs", "new": "n", "d": "/", "d/x": "x", "d/y": "y", "l": "-> a", "e": "/"}


def test_what_the_host_changed_during_the_call_is_refused(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"a": "theirs"})
    fresh = captured(tmp_path, lower, upper, started_ns=time.time_ns())
    assert not fresh.changes[0].stale
    assert fresh.commit().complete
    started_ns = time.time_ns()
    time.sleep(0.05)
    (lower / "b").write_text("ours")
    plant(upper, {"b": "theirs"})
    stale = captured(tmp_path, lower, upper, started_ns=started_ns, record_id="call-2")
    with pytest.raises(WorkspaceError, match="while the call ran"):
        stale.commit()
    assert (lower / "b").read_text() == "ours"


def test_a_file_the_host_adds_to_a_deleted_directory_is_kept(tmp_path: Path, lower: Path, upper: Path) -> None:
    whiteout(upper, "d")
    changeset = captured(tmp_path, lower, upper)
    (lower / "d/precious").write_text("p")
    with pytest.raises(WorkspaceError, match="holds files that were not there"):
        changeset.commit()
    result = changeset.commit(force=True)
    assert [path for path, _ in result.failed] == ["d"]
    assert held(lower / "d") == {"precious": "p"}


def test_the_host_having_made_the_same_change_is_no_conflict(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"a": "same", "new": "n", "dir": None})
    whiteout(upper, "b")
    changeset = captured(tmp_path, lower, upper)
    plant(lower, {"a": "same", "new": "n", "dir": None})
    (lower / "b").unlink()
    assert changeset.commit().complete


def test_an_interrupted_commit_is_finished_by_the_next(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"n1": "1", "n2": "2", "a": "changed"})
    whiteout(upper, "d")
    changeset = captured(tmp_path, lower, upper)
    assert changeset.directory is not None
    # As a commit leaves it that died between moving the old `a` aside and removing it: torn journal, leftover, and
    # one change done that is not in the journal.
    numbers = {change.path: number for number, change in enumerate(changeset.changes)}
    (changeset.directory / "journal").write_text(
        f"\nrun 0123456789abcdef\nbegin {numbers['n1']}\ndone {numbers['n1']}\nbegin {numbers['a']}\nbeg"
    )
    (lower / "n1").write_text("1")
    (lower / "a").rename(lower / f".sandbox-commit-0123456789abcdef-{numbers['a']}")
    (lower / "d/y").unlink()
    result = Changeset.load(changeset.directory).commit()
    assert result.complete
    assert "n1" not in result.applied
    assert held(lower) == {"a": "changed", "b": "2", "n1": "1", "n2": "2", "l": "-> a", "e": "/"}


def test_two_commits_at_once_are_one(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"new": "n"})
    changeset = captured(tmp_path, lower, upper)
    assert changeset.directory is not None
    with open(changeset.directory / "journal", "w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(WorkspaceError, match="being committed already"):
            changeset.commit()
    assert not (lower / "new").exists()
    assert changeset.commit().complete


def test_a_directory_put_in_the_workspaces_place_is_refused(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"new": "n"})
    changeset = captured(tmp_path, lower, upper)
    lower.rename(tmp_path / "moved")
    with pytest.raises(WorkspaceError, match="cannot be opened"):
        changeset.commit()
    lower.mkdir()
    with pytest.raises(WorkspaceError, match="another directory"):
        changeset.commit()
    assert held(lower) == {}
    assert changeset.commit(force=True).complete


def test_damaged_contents_are_not_committed(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"new": "n", "other": "o"})
    changeset = captured(tmp_path, lower, upper)
    change = next(change for change in changeset.changes if change.path == "new")
    changeset.content_path(change).write_text("tampered")
    result = changeset.commit()
    assert result.failed == [("new", "the stored contents are damaged")]
    assert result.applied == ["other"]
    assert sorted(held(lower)) == ["a", "b", "d", "d/x", "d/y", "e", "l", "other"]


def test_names_of_any_bytes_survive_the_store(tmp_path: Path, lower: Path, upper: Path) -> None:
    names = [b"new\nline", b"\xff\xfe", b"\x1b[31mred", "ü\u202e".encode(), b"-rf", b" ", b"a\\b"]
    for name in names:
        Path(os.fsdecode(os.fsencode(upper) + b"/" + name)).write_bytes(name)
    changeset = captured(tmp_path, lower, upper)
    assert changeset.directory is not None
    (changeset.directory / "index.json").read_bytes().decode("ascii")
    assert Changeset.load(changeset.directory).commit().complete
    assert set(names) <= set(os.listdir(os.fsencode(lower)))


def test_a_sparse_giant_is_listed_not_copied(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"small": "s"})
    with open(upper / "giant", "wb") as file:
        file.truncate(1 << 40)
    changeset = captured(tmp_path, lower, upper, limits=StoreLimits(total_bytes=1 << 20))
    assert changeset.skipped == (("giant", "too-large"),)
    assert [change.path for change in changeset.changes] == ["small"]


def test_too_many_changes_are_refused_and_leave_nothing(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {f"f{n}": "" for n in range(11)})
    with pytest.raises(WorkspaceError, match="more than 10 paths"):
        captured(tmp_path, lower, upper, limits=StoreLimits(entries=10))
    assert list((tmp_path / "changes").iterdir()) == []
    assert captured(tmp_path, lower, upper, limits=StoreLimits(entries=11)).directory


def test_what_a_killed_capture_left_is_removed_by_the_next(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(tmp_path / "changes/old.partial", {"content/000001": "x"})
    plant(tmp_path / "changes/young.partial", {"content/000001": "x"})
    plant(tmp_path / "changes/busy.partial", {"content/000001": "x"})
    for name in ("old", "busy"):
        os.utime(tmp_path / f"changes/{name}.partial", (1, 1))
    plant(upper, {"new": "n"})
    with opened(tmp_path / "changes/busy.partial") as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        captured(tmp_path, lower, upper)
    assert sorted(os.listdir(tmp_path / "changes")) == ["busy.partial", "call-1", "young.partial"]


def test_unreadable_files_of_ours_are_read_all_the_same(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"locked/in": "i", "secret": "s"})
    (upper / "secret").chmod(0)
    (upper / "locked").chmod(0)
    changeset = captured(tmp_path, lower, upper)
    assert described(changeset) >= {("locked/in", "added", "file"), ("secret", "added", "file")}
    assert changeset.skipped == ()


@pytest.mark.parametrize("record_id", ["../x", "", ".hidden", "a/b", "x.partial", "a" * 200, "a\nb"])
def test_a_record_id_cannot_leave_the_store(tmp_path: Path, lower: Path, upper: Path, record_id: str) -> None:
    plant(upper, {"new": "n"})
    with pytest.raises(WorkspaceError, match="no record id"):
        captured(tmp_path, lower, upper, record_id=record_id)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", ""])
def test_a_stored_path_that_climbs_is_refused(tmp_path: Path, lower: Path, upper: Path, path: str) -> None:
    plant(upper, {"new": "n"})
    directory = captured(tmp_path, lower, upper).directory
    assert directory is not None
    data = json.loads((directory / "index.json").read_text())
    data["changes"][0]["path"] = path
    (directory / "index.json").write_text(json.dumps(data))
    with pytest.raises(WorkspaceError, match="no readable changeset"):
        Changeset.load(directory)


def test_the_list_is_oldest_first_and_passes_over_what_it_cannot_read(tmp_path: Path, lower: Path, upper: Path) -> None:
    assert list(list_changesets(tmp_path / "changes")) == []
    plant(upper, {"new": "n"})
    for record_id in ("z", "a", "m"):
        captured(tmp_path, lower, upper, record_id=record_id)
    (tmp_path / "changes/m/index.json").write_text("{")
    (tmp_path / "changes/x.partial").mkdir()
    assert [changeset.record_id for changeset in list_changesets(tmp_path / "changes")] == ["z", "a"]


def test_the_diff_shows_small_text_and_names_the_rest(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"a": "1\nnew\x1b[31m\n", "bin": b"\0\1", "s": ("link", "a")})
    whiteout(upper, "b")
    text = list(captured(tmp_path, lower, upper).diff())
    assert "--- a/a" in text
    assert "+new\\x1b[31m" in text
    assert {"added file bin", "deleted file b", "added symlink s"} <= set(text)
    assert all("\x1b" not in line for line in text)


def test_deletions_come_last_and_directories_first(tmp_path: Path, lower: Path, upper: Path) -> None:
    plant(upper, {"d": "a file now", "n/deep/f": "x"})
    whiteout(upper, "a")
    opaque(upper, "b")
    changeset = captured(tmp_path, lower, upper)
    order = [change.path for _, change in ordered(enumerate(changeset.changes))]
    assert order.index("d/x") < order.index("d")
    assert order.index("n") < order.index("n/deep") < order.index("n/deep/f")
    assert order[-1] == "a"
    assert {replace(change, content="") for change in changeset.deleted}


def test_an_overwritten_file_keeps_its_mode(tmp_path: Path, lower: Path, upper: Path) -> None:
    (lower / "a").chmod(0o664)
    plant(upper, {"a": "changed"})
    (upper / "a").chmod(0o664)
    captured(tmp_path, lower, upper).commit()
    assert stat.S_IMODE((lower / "a").stat().st_mode) == 0o664


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
