"""Changesets of real overlays, mounted by root and by an ordinary user in a user namespace.

A helper program mounts, runs a script on the merged directory and captures from outside. As an ordinary user it runs
with the distribution's Python on a copy of the package, since ours may lie where only root can go.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox.workspace import Changeset
from tests.helpers import overlay_call
from tests.helpers.workspaces import held, plant

USER = 64998
TREE = {
    "same": "s",
    "mod": "m",
    "gone": "g",
    "chm": "c",
    "d/x": "x",
    "d/y": "y",
    "op/old": "o",
    "rf": "r",
    "ren/a": "a",
    "keep/k": "k",
    "hl": "h",
    "l": ("link", "mod"),
}
BOTH = [
    pytest.param("root", marks=pytest.mark.needs("root")),
    pytest.param("user", marks=pytest.mark.needs("overlay", "attributes")),
]


@dataclass(frozen=True)
class Made:
    """What a script on an overlay left: its exit status, its own words and the stored changeset."""

    exit: int
    said: str
    changes: set[tuple[str, str, str]]
    skipped: set[tuple[str, str]]
    changeset: Changeset | None


class Overlays:
    """Runs scripts on overlays over `lower` as root or as an ordinary user."""

    def __init__(self, base: Path, who: str) -> None:
        self.lower = plant(base / "lower", TREE)
        self.who = who
        self._base = base
        self._count = 0

    def run(self, script: str) -> Made:
        self._count += 1
        path = self._base / f"script{self._count}.py"
        path.write_text("import os, stat\n" + script)
        (self._base / "store").mkdir(exist_ok=True)
        command = [str(self.lower), str(self._base / "store"), f"call-{self._count}", str(path)]
        if self.who == "root":
            command = [sys.executable, overlay_call.__file__, *command]
            return self._made(command, {"PYTHONPATH": str(Path(sandbox.__file__).parents[1])})
        return self._made(self._as_user(command), {"PYTHONPATH": str(self._package())})

    def _as_user(self, command: list[str]) -> list[str]:
        program = str(self._package() / "overlay_call.py")
        if os.geteuid() != 0:
            return [sys.executable, program, *command, "--user-namespace"]
        subprocess.run(["chown", "-hR", f"{USER}:{USER}", str(self._base)], check=True)
        dropped = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        return [*dropped, "/usr/bin/python3", program, *command, "--user-namespace"]

    def _package(self) -> Path:
        place = self._base / "package"
        if not place.exists():
            here = Path(sandbox.__file__).parent
            for part in ("_linux", "workspace"):
                shutil.copytree(here / part, place / "sandbox" / part, ignore=shutil.ignore_patterns("__pycache__"))
            for name in ("__init__.py", "errors.py"):
                shutil.copy(here / name, place / "sandbox" / name)
            shutil.copy(overlay_call.__file__, place / "overlay_call.py")
        return place

    def _made(self, command: list[str], env: dict[str, str]) -> Made:
        env = {**env, "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        changeset = Changeset.load(Path(answer["directory"])) if answer.get("directory") else None
        changes = changeset.changes if changeset else ()
        return Made(
            answer["exit"],
            done.stderr,
            {(change.path, change.kind, change.type) for change in changes},
            set(changeset.skipped) if changeset else set(),
            changeset,
        )


@pytest.fixture(params=BOTH)
def overlays(request: pytest.FixtureRequest) -> Iterator[Overlays]:
    if request.param == "user" and os.geteuid() == 0 and not _system_python_works():
        pytest.skip("needs /usr/bin/python3 at 3.11 or newer to run as an ordinary user")
    # Not pytest's own directory: only its user may enter that.
    with tempfile.TemporaryDirectory(prefix="toolcall-sandbox-test-") as base:
        os.chmod(base, 0o755)
        yield Overlays(Path(base), request.param)


@functools.cache
def _system_python_works() -> bool:
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run(["/usr/bin/python3", "-c", check], check=False, capture_output=True).returncode == 0


def test_ordinary_work_comes_out_as_what_it_was_and_commits(overlays: Overlays) -> None:
    before = held(overlays.lower)
    made = overlays.run(
        """
os.unlink("gone")
open("mod", "w").write("changed")
os.utime("same")
os.chmod("chm", 0o600)
os.unlink("d/x"); os.unlink("d/y"); os.rmdir("d")
os.rename("rf", "rf2")
os.link("hl", "hl2")
os.makedirs("new/deep"); open("new/deep/f", "w").write("n")
os.symlink("keep/k", "s")
"""
    )
    assert made.exit == 0, made.said
    assert made.changes == {
        ("gone", "deleted", "file"),
        ("mod", "modified", "file"),
        ("chm", "mode", "file"),
        ("d", "deleted", "dir"),
        ("d/x", "deleted", "file"),
        ("d/y", "deleted", "file"),
        ("rf", "deleted", "file"),
        ("rf2", "added", "file"),
        ("hl2", "added", "file"),
        ("new", "added", "dir"),
        ("new/deep", "added", "dir"),
        ("new/deep/f", "added", "file"),
        ("s", "added", "symlink"),
    }
    assert held(overlays.lower) == before
    assert made.changeset is not None
    assert made.changeset.commit().complete
    expected = {name: text for name, text in before.items() if name not in ("gone", "d", "d/x", "d/y", "rf")}
    expected |= {"mod": "changed", "rf2": "r", "hl2": "h", "new": "/", "new/deep": "/", "new/deep/f": "n"}
    assert held(overlays.lower) == expected | {"s": "-> keep/k"}


def test_a_directory_made_anew_hides_what_was_in_the_old_one(overlays: Overlays) -> None:
    made = overlays.run(
        """
os.unlink("op/old"); os.rmdir("op"); os.mkdir("op"); open("op/young", "w").write("y")
os.unlink("mod"); os.mkdir("mod"); open("mod/in", "w").write("i")
os.unlink("d/x"); os.unlink("d/y"); os.rmdir("d"); open("d", "w").write("file now")
os.unlink("l"); open("l", "w").write("file now")
"""
    )
    assert made.exit == 0, made.said
    assert made.changes == {
        ("op/old", "deleted", "file"),
        ("op/young", "added", "file"),
        ("mod", "modified", "dir"),
        ("mod/in", "added", "file"),
        ("d", "modified", "file"),
        ("d/x", "deleted", "file"),
        ("d/y", "deleted", "file"),
        ("l", "modified", "file"),
    }
    assert made.changeset is not None
    assert made.changeset.commit().complete
    after = held(overlays.lower)
    assert {name: after[name] for name in ("op/young", "mod/in", "d", "l")} == {
        "op/young": "y",
        "mod/in": "i",
        "d": "file now",
        "l": "file now",
    }
    assert not {"op/old", "d/x"} & set(after)


def test_nothing_done_is_nothing_to_commit(overlays: Overlays) -> None:
    made = overlays.run('open("mod").read(); os.listdir("keep"); os.chmod("chm", os.stat("chm").st_mode)')
    assert (made.exit, made.changes, made.changeset) == (0, set(), None)


def test_a_renamed_directory_comes_as_copies(overlays: Overlays) -> None:
    """The kernel refuses to rename it (EXDEV, redirect_dir is off), as programs expect between file systems."""
    made = overlays.run(
        """
import errno, shutil
try:
    os.rename("ren", "ren2"); raise SystemExit("renamed")
except OSError as error:
    assert error.errno == errno.EXDEV, error
shutil.move("ren", "ren2")
"""
    )
    assert made.exit == 0, made.said
    assert made.changes == {
        ("ren", "deleted", "dir"),
        ("ren/a", "deleted", "file"),
        ("ren2", "added", "dir"),
        ("ren2/a", "added", "file"),
    }


def test_a_program_cannot_forge_a_whiteout(overlays: Overlays) -> None:
    made = overlays.run(
        """
import errno
try:
    os.mknod("keep/k2", stat.S_IFCHR, os.makedev(0, 0)); raise SystemExit("made")
except OSError as error:
    assert error.errno == errno.EPERM, error
os.unlink("keep/k")
"""
    )
    assert made.exit == 0, made.said
    assert made.changes == {("keep/k", "deleted", "file")}  # the kernel's own, for a real deletion


def test_a_program_cannot_forge_an_opaque_directory(overlays: Overlays) -> None:
    made = overlays.run(
        """
for name in ("user.overlay.opaque", "user.overlay.redirect", "user.overlay.metacopy", "user.overlay.whiteout"):
    for path in ("keep", "d", "mod"):
        try:
            os.setxattr(path, name, b"y")
        except OSError:
            pass
open("keep/new", "w").write("n")
"""
    )
    assert made.exit == 0, made.said
    assert made.changes == {("keep/new", "added", "file")}
    assert made.skipped == set()


def test_special_files_and_privilege_bits_do_not_come_out(overlays: Overlays) -> None:
    made = overlays.run(
        """
os.mkfifo("pipe")
open("su", "w").write("x"); os.chmod("su", 0o6755)
"""
    )
    assert made.exit == 0, made.said
    assert made.skipped == {("pipe", "special-file")}
    assert made.changeset is not None
    result = made.changeset.commit()
    assert result.applied == ["su"]
    assert (overlays.lower / "su").stat().st_mode & 0o7777 == 0o755
    assert not (overlays.lower / "pipe").exists()


def test_hooks_and_links_to_the_outside_wait(overlays: Overlays) -> None:
    made = overlays.run(
        """
os.makedirs(".git/hooks"); open(".git/hooks/pre-commit", "w").write("evil")
os.symlink("/etc/passwd", "p"); os.symlink("keep", "q")
"""
    )
    assert made.changeset is not None
    assert {(c.path, c.protected) for c in made.changeset.protected} == {
        (".git/hooks/pre-commit", "git-hooks"),
        ("p", "link-outside"),
    }
    made.changeset.commit()
    assert not (overlays.lower / ".git/hooks/pre-commit").exists()
    assert not (overlays.lower / "p").is_symlink()
    assert (overlays.lower / "q").is_symlink()


def test_locked_directories_and_files_come_out(overlays: Overlays) -> None:
    made = overlays.run(
        """
os.mkdir("locked"); open("locked/f", "w").write("f"); open("secret", "w").write("s")
os.chmod("secret", 0); os.chmod("locked", 0)
"""
    )
    assert made.exit == 0, made.said
    assert made.changes == {("locked", "added", "dir"), ("locked/f", "added", "file"), ("secret", "added", "file")}
    assert made.skipped == set()


def test_two_calls_in_a_row_build_on_each_other_once_committed(overlays: Overlays) -> None:
    first = overlays.run('open("note", "w").write("one")')
    second = overlays.run('assert not os.path.exists("note"); open("note", "w").write("two")')
    assert second.exit == 0, second.said
    assert first.changeset is not None
    assert first.changeset.commit().complete
    third = overlays.run('assert open("note").read() == "one"; open("note", "a").write("+three")')
    assert third.exit == 0, third.said
    assert third.changeset is not None
    assert third.changeset.commit().complete
    assert (overlays.lower / "note").read_text() == "one+three"
