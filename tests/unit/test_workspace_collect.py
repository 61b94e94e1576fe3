"""Which files come out of a workspace, by which pattern, within which bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox.errors import ManifestError
from sandbox.workspace import CollectLimits, collect, collect_into
from sandbox.workspace.deliver import write_collected
from tests.helpers.workspaces import held, opened, plant

TREE = {
    "out/a.json": "a",
    "out/b.json": "b",
    "out/c.txt": "c",
    "out/deep/d.json": "d",
    "top.json": "t",
    ".hidden.json": "h",
    ".cache/x.json": "x",
    "out/.e.json": "e",
    "data/[x].csv": "csv",
}


def taken(root: Path, *patterns: str) -> set[str]:
    with opened(root) as fd:
        result = collect(fd, patterns)
    assert result.skipped == []
    return set(result.files)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["out/*.json"], {"out/a.json", "out/b.json"}),
        (["./out/*.json"], {"out/a.json", "out/b.json"}),
        (["**/*.json"], {"out/a.json", "out/b.json", "out/deep/d.json", "top.json"}),
        (["*.json"], {"top.json"}),
        (["out/**"], {"out/a.json", "out/b.json", "out/c.txt", "out/deep/d.json"}),
        (["out/**/d.json"], {"out/deep/d.json"}),
        (["**/**/d.json"], {"out/deep/d.json"}),
        (["out/?.json", "top.json"], {"out/a.json", "out/b.json", "top.json"}),
        (["out/[ab].json"], {"out/a.json", "out/b.json"}),
        (["data/[[]x].csv"], {"data/[x].csv"}),
        ([".hidden.json", ".cache/*"], {".hidden.json", ".cache/x.json"}),
        (["out/.*"], {"out/.e.json"}),
        (["nothing/*"], set()),
        (["OUT/*.JSON"], set()),
        ([], set()),
    ],
)
def test_patterns_select_as_a_shell_would(tmp_path: Path, patterns: list[str], expected: set[str]) -> None:
    assert taken(plant(tmp_path / "w", TREE), *patterns) == expected


@pytest.mark.parametrize("pattern", ["/etc/passwd", "../x", "a/../b", "", "a//b", "a/\0", "./", "out/"])
def test_a_pattern_that_leaves_the_workspace_is_an_error(tmp_path: Path, pattern: str) -> None:
    with opened(tmp_path) as fd, pytest.raises(ManifestError, match="collect"):
        collect(fd, [pattern])


def test_files_come_out_byte_for_byte(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192 + b"end"
    plant(tmp_path, {"big.bin": data, "empty": ""})
    with opened(tmp_path) as fd:
        result = collect(fd, ["*"])
    assert result.files == {"big.bin": data, "empty": b""}
    assert result.total_bytes == len(data)


def test_the_number_of_files_is_bounded(tmp_path: Path) -> None:
    plant(tmp_path, {f"f{n}": "x" for n in range(5)})
    with opened(tmp_path) as fd:
        result = collect(fd, ["*"], max_files=3)
    assert len(result.files) == 3
    assert [reason for _, reason in result.skipped] == ["too-many-files"] * 2


def test_the_bytes_are_bounded_and_what_fits_still_comes(tmp_path: Path) -> None:
    plant(tmp_path, {"big": "x" * 101, "small": "y" * 100})
    with opened(tmp_path) as fd:
        result = collect(fd, ["*"], max_bytes=100)
    assert result.files == {"small": b"y" * 100}
    assert result.skipped == [("big", "too-large")]


def test_copies_go_to_the_same_relative_paths(tmp_path: Path) -> None:
    source, into = plant(tmp_path / "w", TREE), plant(tmp_path / "into", {"out/a.json": "older", "kept": "k"})
    with opened(source) as fd, opened(into) as into_fd:
        result = collect_into(fd, ["out/**"], into_fd)
    assert result.skipped == []
    assert sorted(result.written) == ["out/a.json", "out/b.json", "out/c.txt", "out/deep/d.json"]
    assert held(into) == {
        "kept": "k",
        "out": "/",
        "out/a.json": "a",
        "out/b.json": "b",
        "out/c.txt": "c",
        "out/deep": "/",
        "out/deep/d.json": "d",
    }


def test_copies_are_never_executable_and_never_privileged(tmp_path: Path) -> None:
    source, into = plant(tmp_path / "w", {"x": "#!"}), plant(tmp_path / "into", {})
    (source / "x").chmod(0o6777)
    with opened(source) as fd, opened(into) as into_fd:
        collect_into(fd, ["x"], into_fd)
    assert (into / "x").stat().st_mode & 0o7111 == 0
    assert (into / "x").read_text() == "#!"


def test_protected_paths_stay_behind_unless_allowed(tmp_path: Path) -> None:
    source, into = plant(tmp_path / "w", {"Jenkinsfile": "j", "ok": "o"}), plant(tmp_path / "into", {})
    with opened(source) as fd, opened(into) as into_fd:
        result = collect_into(fd, ["*"], into_fd)
        assert (result.written, result.skipped) == (["ok"], [("Jenkinsfile", "protected:ci")])
        allowed = collect_into(fd, ["*"], into_fd, allow_protected=["ci"])
    assert sorted(allowed.written) == ["Jenkinsfile", "ok"]


def test_copies_are_bounded_too(tmp_path: Path) -> None:
    source, into = plant(tmp_path / "w", {"big": "x" * 101, "small": "y"}), plant(tmp_path / "into", {})
    with opened(source) as fd, opened(into) as into_fd:
        result = collect_into(fd, ["*"], into_fd, limits=CollectLimits(total_bytes=100))
    assert result.skipped == [("big", "too-large")]
    assert held(into) == {"small": "y"}


def test_a_search_that_never_ends_is_ended(tmp_path: Path) -> None:
    source = plant(tmp_path / "w", {f"d{n}/f": "x" for n in range(20)})
    into = plant(tmp_path / "into", {})
    with opened(source) as fd, opened(into) as into_fd:
        result = collect_into(fd, ["**/nothing"], into_fd, limits=CollectLimits(visits=10))
    assert [reason for _, reason in result.skipped] == ["too-many-entries"]


def test_files_held_in_memory_are_written_as_carefully(tmp_path: Path) -> None:
    into = plant(tmp_path / "into", {"real": "r", "link": ("link", "real")})
    files = {"a/b": b"1", "link": b"2", "../up": b"3", "/abs": b"4", ".envrc": b"5", "dir/../../x": b"6"}
    written, skipped = write_collected(into, files)
    assert written == ["a/b"]
    assert {path for path, _ in skipped} == {"link", "../up", "/abs", ".envrc", "dir/../../x"}
    assert not {"up", "x"} & set(os.listdir(tmp_path))
    assert (into / "real").read_text() == "r"
    assert write_collected(into, {".envrc": b"5"}, ["env-dir"])[0] == [".envrc"]
