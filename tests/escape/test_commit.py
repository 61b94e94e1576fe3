"""A host directory that is rearranged while, or after, a changeset is committed into it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox._linux import files
from sandbox.errors import WorkspaceError
from sandbox.workspace import Changeset
from tests.helpers.workspaces import captured, held, plant, whiteout


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return plant(tmp_path / "outside", {"precious": "P", "sub/f": "F"})


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    return plant(tmp_path / "lower", {"d/precious": "p", "d/sub/f": "f", "top": "t"})


@pytest.fixture
def changeset(tmp_path: Path, lower: Path) -> Changeset:
    """Adds, overwrites and deletes below `d`."""
    upper = plant(tmp_path / "upper", {"d/new": "n", "d/precious": "overwritten", "d/newdir/x": "x", "top": "T"})
    whiteout(upper, "d/sub/f")
    return captured(tmp_path, lower, upper)


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_became_a_link_is_not_written_through(
    lower: Path, outside: Path, changeset: Changeset, force: bool
) -> None:
    (lower / "d").rename(lower / "moved")
    (lower / "d").symlink_to(outside)
    with pytest.raises(WorkspaceError, match="is a link") as caught:
        changeset.commit(force=force)
    assert {path for path, _ in caught.value.conflicts} >= {"d/new", "d/precious"}
    assert held(outside) == {"precious": "P", "sub": "/", "sub/f": "F"}
    assert (lower / "top").read_text() == "t"
    (lower / "d").unlink()
    (lower / "moved").rename(lower / "d")
    assert changeset.commit().complete
    assert (lower / "d/precious").read_text() == "overwritten"


def test_a_file_that_became_a_link_is_replaced_not_written_through(
    lower: Path, outside: Path, changeset: Changeset
) -> None:
    (lower / "d/precious").unlink()
    (lower / "d/precious").symlink_to(outside / "precious")
    (lower / "d/new").symlink_to(outside / "created")
    with pytest.raises(WorkspaceError, match="changed since the call"):
        changeset.commit()
    assert changeset.commit(force=True).complete
    assert held(outside) == {"precious": "P", "sub": "/", "sub/f": "F"}
    assert not (lower / "d/precious").is_symlink()
    assert (lower / "d/precious").read_text() == "overwritten"
    assert (lower / "d/new").read_text() == "n"


def test_a_directory_in_a_files_place_is_never_deleted(lower: Path, changeset: Changeset) -> None:
    (lower / "d/precious").unlink()
    plant(lower, {"d/precious/inner": "i"})
    result = changeset.commit(force=True)
    assert [path for path, _ in result.failed] == ["d/precious"]
    assert (lower / "d/precious/inner").read_text() == "i"
    assert [name for name in held(lower) if ".sandbox-commit" in name] == []


def test_a_link_in_the_upper_and_files_below_its_name_cannot_meet(tmp_path: Path, lower: Path, outside: Path) -> None:
    """An index that lists a link and files "in" it, as no overlay would, stays below the root all the same."""
    upper = plant(tmp_path / "upper2", {"esc": ("link", str(outside)), "dir/file": "x"})
    made = captured(tmp_path, lower, upper, record_id="call-2")
    index = (made.directory or tmp_path) / "index.json"
    index.write_text(index.read_text().replace('"dir/file"', '"esc/file"'))
    with pytest.raises(WorkspaceError, match="esc/file"):
        Changeset.load(index.parent).commit(allow_protected=("link-outside",), force=True)
    (lower / "esc").symlink_to(outside)  # as if the link had been committed earlier
    with pytest.raises(WorkspaceError, match="esc/file: a directory on the way is a link"):
        Changeset.load(index.parent).commit(allow_protected=("link-outside",), force=True)
    assert held(outside) == {"precious": "P", "sub": "/", "sub/f": "F"}


@contextmanager
def meddling(step: Callable[[], None]) -> Iterator[None]:
    """Another process that repeats `step`."""
    pid = os.fork()
    if pid == 0:
        try:
            ends = time.monotonic() + 60
            while time.monotonic() < ends:
                try:
                    step()
                except OSError:
                    continue
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_swapped_for_a_link_while_committing_never_leads_out(
    tmp_path: Path, outside: Path, force: bool
) -> None:
    untouched = held(outside)
    lower = plant(tmp_path / "racy", {"d/precious": "p", "d/sub/f": "f", "link": ("link", str(outside))})
    made = []
    for number in range(600):
        upper = plant(tmp_path / f"upper{number}", {f"d/new{number}": "n"})
        made.append(captured(tmp_path, lower, upper, record_id=f"call-{number}"))
    done = refused = 0

    def swap() -> None:
        files.rename_exchange(-100, str(lower / "d"), -100, str(lower / "link"))
        time.sleep(random.random() * 0.001)  # about what one commit takes, so that swaps fall before, into and after it

    with meddling(swap):
        for changeset in made:
            try:
                result = changeset.commit(force=force)
                done += bool(result.applied)
                refused += bool(result.failed)
            except WorkspaceError:
                refused += 1
    assert min(done, refused) >= 5, (done, refused)
    assert held(outside) == untouched


def test_a_file_the_host_keeps_rewriting_is_never_lost(tmp_path: Path) -> None:
    """Each version that the host wrote and the commit displaced is put back, or the commit came first."""
    lower = plant(tmp_path / "busy", {"f": "0"})

    def rewrite() -> None:
        text = str(time.monotonic_ns())
        temporary = lower / "host-temporary"
        temporary.write_text(text)
        temporary.rename(lower / "f")

    with meddling(rewrite):
        for number in range(150):
            upper = plant(tmp_path / f"u{number}", {"f": "ours"})
            try:
                captured(tmp_path, lower, upper, record_id=f"call-{number}").commit()
            except WorkspaceError:
                pass  # the host was faster, and kept its version
    left = [name for name in os.listdir(lower) if name.startswith(".sandbox-commit")]
    assert left == []
    assert (lower / "f").exists()


def test_a_killed_commit_leaves_whole_files_and_can_be_finished(tmp_path: Path) -> None:
    content = {f"f{n}": f"new {n} " * 200 for n in range(60)}
    for attempt in range(12):
        lower = plant(tmp_path / f"l{attempt}", dict.fromkeys(content, "old") | {"gone": "g"})
        upper = plant(tmp_path / f"u{attempt}", content)
        whiteout(upper, "gone")
        made = captured(tmp_path, lower, upper, record_id=f"call-{attempt}")
        pid = os.fork()
        if pid == 0:
            try:
                made.commit()
            finally:
                os._exit(0)
        time.sleep(0.0008 * attempt)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for name, text in content.items():
            assert not (lower / name).exists() or (lower / name).read_text() in ("old", text)
        if made.directory is not None and (made.directory / "index.json").exists():
            result = Changeset.load(made.directory).commit()
            assert result.failed == []
        assert held(lower) == content
