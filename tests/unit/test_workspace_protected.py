"""Which paths are protected, by which rule, and what grants them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.workspace.links import leads_outside
from sandbox.workspace.names import from_json, is_relative, printable, to_json
from sandbox.workspace.protected import RULES, check_allow, is_git_dir, is_protected, is_protected_dir

PROTECTED = {
    ".git/hooks/pre-commit": "git-hooks",
    ".git/modules/lib/sub/hooks/post-checkout": "git-hooks",
    ".git/config": "git-config",
    ".git/config.worktree": "git-config",
    ".git/modules/lib/config": "git-config",
    ".git": "git-redirect",
    ".git/commondir": "git-redirect",
    ".envrc": "env-dir",
    ".bashrc": "shell-startup",
    ".zshenv": "shell-startup",
    ".profile": "shell-startup",
    ".vimrc": "editor-startup",
    ".exrc": "editor-startup",
    ".dir-locals.el": "editor-startup",
    ".vscode/settings.json": "vscode",
    "x.code-workspace": "vscode",
    ".idea/workspace.xml": "jetbrains",
    ".mcp.json": "agent-settings",
    ".claude/settings.local.json": "agent-settings",
    ".cursor/mcp.json": "agent-settings",
    ".codex/config.toml": "agent-settings",
    "CLAUDE.md": "agent-instructions",
    "AGENTS.md": "agent-instructions",
    ".sandbox/profiles/mine.toml": "sandbox-profiles",
    ".github/workflows/ci.yml": "ci",
    ".gitlab-ci.yml": "ci",
    ".circleci/config.yml": "ci",
    "Jenkinsfile": "ci",
    "node_modules/.bin/tsc": "node-bin",
    ".husky/pre-commit": "hook-managers",
    ".pre-commit-config.yaml": "hook-managers",
    ".npmrc": "package-managers",
    ".yarnrc.yml": "package-managers",
    ".tool-versions": "version-managers",
    "mise.toml": "version-managers",
    "sitecustomize.py": "python-startup",
    ".venv/lib/python3.11/site-packages/evil.pth": "python-startup",
    ".gdbinit": "tool-startup",
    ".ssh/authorized_keys": "ssh",
}

ORDINARY = [
    "src/main.py",
    "Makefile",
    "package.json",
    "pyproject.toml",
    ".env",
    ".gitignore",
    ".gitattributes",
    ".gitmodules",
    ".git/HEAD",
    ".git/index",
    ".git/objects/aa/bb",
    ".git/refs/heads/config",
    ".git/logs/refs/heads/hooks/x",
    ".git/hooks/pre-commit.sample",
    ".git/modules/lib/hooks/pre-push.sample",
    ".github/ISSUE_TEMPLATE.md",
    "hooks/pre-commit",
    "config",
    "checkpoint.pth",
    "models/best.pth",
    "node_modules/left-pad/index.js",
    "vscode/settings.json",
    "my.git/hooks/x",
    "docs/.gitkeep",
]


@pytest.mark.parametrize(("path", "rule"), PROTECTED.items())
def test_what_others_run_or_trust_is_protected_at_any_depth_in_any_case(path: str, rule: str) -> None:
    for variant in (path, f"a/b c/{path}", path.upper(), path.swapcase()):
        assert is_protected(variant) == rule


@pytest.mark.parametrize("path", ORDINARY)
def test_ordinary_work_is_not_protected(path: str) -> None:
    assert is_protected(path) is None
    assert is_protected(f"sub/{path}") is None


@pytest.mark.parametrize(("path", "rule"), PROTECTED.items())
def test_a_rule_is_granted_by_its_name_or_by_the_path_and_by_nothing_else(path: str, rule: str) -> None:
    assert is_protected(path, (rule,)) is None
    assert is_protected(path, (path,)) is None
    others = tuple(name for name in RULES if name != rule)
    assert is_protected(path, others) == rule
    assert is_protected(path, ("README.md", "src/x.py")) == rule


def test_granting_a_directory_grants_what_is_below_it_only() -> None:
    assert is_protected(".git/hooks/pre-commit", (".git/hooks",)) is None
    assert is_protected(".git/hooks/pre-commit", (".git/hooks/**",)) is None
    assert is_protected("sub/.git/hooks/pre-commit", (".git/hooks",)) == "git-hooks"
    assert is_protected(".git/config", (".git/hooks",)) == "git-config"


@pytest.mark.parametrize(
    "path", [".git", ".git/hooks", ".vscode", "node_modules", "node_modules/.bin", ".github", ".config"]
)
def test_a_link_in_place_of_a_directory_on_the_way_is_protected(path: str) -> None:
    assert is_protected(path, type_="symlink") is not None
    assert is_protected(path, type_="dir") is None


@pytest.mark.parametrize("path", ["src", "data", ".cache", "node_module"])
def test_a_link_elsewhere_is_not_protected(path: str) -> None:
    assert is_protected(path, type_="symlink") is None


def test_names_that_other_file_systems_fold_together_are_one_name() -> None:
    assert is_protected(".g\u200cit/config") == "git-config"  # HFS+ and casefolding ext4 drop the joiner
    assert is_protected(".ＧＩＴ/config") == "git-config"  # full width letters, NFKC
    assert is_protected(".ba\u017fhrc") == "shell-startup"  # the long s folds to s
    assert is_protected(".bash rc") is None


def test_whole_directories_are_told_from_those_with_some_protected_files() -> None:
    assert is_protected_dir(".git/hooks") == "git-hooks"
    assert is_protected_dir("a/.vscode/sub") == "vscode"
    assert is_protected_dir(".git") is None
    assert is_protected_dir("node_modules") is None
    assert is_protected_dir(".vscode", ("vscode",)) is None


def test_a_misspelt_grant_is_an_error_that_lists_the_rules() -> None:
    check_allow(["git-hooks", "git-bare", "link-outside", ".envrc", "sub/Jenkinsfile"])
    with pytest.raises(ValueError, match=r"git-hook.*rules are.*git-hooks"):
        check_allow(["git-hook"])


def test_git_takes_a_directory_for_a_repository_by_its_parts() -> None:
    assert is_git_dir("x", {"HEAD", "objects", "refs"}.__contains__)
    assert is_git_dir("x", {"HEAD", "commondir"}.__contains__)
    assert not is_git_dir("x", {"objects", "refs", "config"}.__contains__)
    assert not is_git_dir("a/.git", {"HEAD", "objects", "refs"}.__contains__)  # has rules of its own


_PART = st.text(st.characters(exclude_characters="/\0", exclude_categories=()), min_size=1, max_size=8)
_PATH = st.lists(_PART, min_size=1, max_size=6).map("/".join)


@given(_PATH, st.sampled_from(sorted(PROTECTED)))
def test_whatever_lies_above_does_not_lift_protection(prefix: str, path: str) -> None:
    assert is_protected(f"{prefix}/{path}") is not None


@given(_PATH, st.lists(st.sampled_from(sorted(RULES))))
def test_allowing_never_protects_more(path: str, allow: list[str]) -> None:
    if is_protected(path) is None:
        assert is_protected(path, tuple(allow)) is None


@pytest.mark.parametrize("part", [".git/", ".git/modules/", "node_modules/", ".git/modules/hooks/", "a/"])
def test_a_hostile_path_cannot_make_matching_slow(part: str) -> None:
    path = (part * (4000 // len(part)))[:-1]
    started = time.process_time()
    for _ in range(20):
        is_protected(path)
        is_protected(path, type_="symlink")
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    ("path", "target", "outside"),
    [
        ("link", "/etc/passwd", True),
        ("link", "..", True),
        ("link", "../x", True),
        ("a/link", "../x", False),
        ("a/link", "../../x", True),
        ("a/link", "x/../../../y", True),
        ("a/link", "x/../y", True),  # x may be a link itself, and ".." climbs from where that leads
        ("link", "a/b/c", False),
        ("link", "./a", False),
        ("a/b/link", "./../c", False),
        ("link", "", True),
    ],
)
def test_where_a_links_text_leads(path: str, target: str, outside: bool) -> None:
    assert leads_outside(path, target) is outside


@given(st.binary(min_size=1, max_size=40).filter(lambda raw: b"\0" not in raw))
def test_any_name_is_printed_without_anything_a_terminal_acts_on_and_kept_exactly(raw: bytes) -> None:
    name = raw.decode("utf-8", "surrogateescape")
    shown = printable(name)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert from_json(to_json(name)) == name


def test_names_that_differ_are_printed_differently() -> None:
    names = ["a\nb", "a\\nb", "a\\x0ab", "a\x1b[31mb", "a\u202eb", "a\udcffb", "a\\xffb", "ab"]
    assert len({printable(name) for name in names}) == len(names)


@pytest.mark.parametrize("path", ["", "/a", "a//b", "a/../b", ".", "..", "a/.", "a\0b", "a/"])
def test_only_plain_relative_paths_pass(path: str) -> None:
    assert not is_relative(path)
    assert is_relative("a/b.c/..d")
