"""Which paths someone else would later run or trust: pure rules over relative paths.

A writable workspace is a letter to the future: a hook, a start file or an agent's settings written by a tool run
outside the jail, later, with nobody's consent. A rule covers files that act *without anyone asking to run the
project*: on `cd`, on opening an editor, on `git status`, on a push, or on the next agent session. Ordinary sources,
Makefiles and package.json are not in it: running those is the user's own act, and reviewing them is too.

Matching ignores case and code points that case-insensitive file systems ignore, and a rule holds at any depth.
A pattern `dir/**` covers everything in the directory, and the directory itself when it is not a directory (a link
named `.vscode` would bring in settings from elsewhere). Bare repositories are found by `is_git_dir`, from their parts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal

EntryType = Literal["file", "dir", "symlink", "special"]

LINK_OUTSIDE = "link-outside"
GIT_BARE = "git-bare"
GIT_REDIRECT = "git-redirect"

# "*" stays within one part; "**" spans any number of parts, none included. A leading "**/" is implied.
RULES: dict[str, tuple[str, ...]] = {
    # git takes its configuration and hooks from wherever these point to.
    GIT_REDIRECT: (".git", ".git/commondir", ".git/worktrees/*/commondir", ".git/modules/**/commondir"),
    "git-hooks": (".git/hooks/**", ".git/modules/**/hooks/**", ".githooks/**"),
    "git-config": (
        ".git/config",
        ".git/config.worktree",
        ".git/modules/**/config",
        ".git/worktrees/*/config.worktree",
        ".gitconfig",
        ".config/git/**",
    ),
    "hook-managers": (
        ".husky/**",
        ".pre-commit-config.yaml",
        ".pre-commit-config.yml",
        "lefthook.yml",
        "lefthook.yaml",
        "lefthook.toml",
        ".lefthook.yml",
        ".lefthook.yaml",
        ".lefthook.toml",
        "lefthook-local.yml",
        ".overcommit.yml",
    ),
    "env-dir": (".envrc", ".config/direnv/**"),
    "version-managers": (
        ".tool-versions",
        "mise.toml",
        ".mise.toml",
        "mise.local.toml",
        ".mise/**",
        ".config/mise/**",
        ".rtx.toml",
    ),
    "shell-startup": (
        ".bashrc",
        ".bash_profile",
        ".bash_login",
        ".bash_logout",
        ".bash_aliases",
        ".profile",
        ".zshrc",
        ".zshenv",
        ".zprofile",
        ".zlogin",
        ".zlogout",
        ".kshrc",
        ".cshrc",
        ".tcshrc",
        ".login",
        ".logout",
        ".inputrc",
        ".xprofile",
        ".xinitrc",
        ".xsession",
        ".xsessionrc",
        ".pam_environment",
        ".config/fish/**",
        ".config/nushell/**",
        ".config/autostart/**",
        ".config/systemd/**",
        ".config/environment.d/**",
    ),
    "ssh": (".ssh/**",),
    "editor-startup": (
        ".vimrc",
        "_vimrc",
        ".gvimrc",
        ".exrc",
        ".nexrc",
        ".lvimrc",
        ".nvimrc",
        ".nvim.lua",
        ".vim/**",
        ".config/nvim/**",
        ".emacs",
        ".emacs.d/**",
        ".config/emacs/**",
        ".dir-locals.el",
        ".dir-locals-2.el",
        ".helix/**",
        ".zed/**",
        "*.sublime-project",
    ),
    "vscode": (".vscode/**", "*.code-workspace"),
    "devcontainer": (".devcontainer/**", ".devcontainer.json"),
    "jetbrains": (".idea/**", ".fleet/**"),
    "agent-settings": (
        ".mcp.json",
        ".claude/**",
        ".claude.json",
        ".codex/**",
        ".cursor/**",
        ".gemini/**",
        ".windsurf/**",
        ".continue/**",
        ".roo/**",
        ".cline/**",
        ".kiro/**",
        ".amazonq/**",
        ".agents/**",
        ".opencode/**",
        "opencode.json",
        "opencode.jsonc",
        ".aider.conf.yml",
    ),
    "agent-instructions": (
        "CLAUDE.md",
        "CLAUDE.local.md",
        "AGENTS.md",
        "AGENTS.override.md",
        "GEMINI.md",
        ".cursorrules",
        ".windsurfrules",
        ".clinerules",
        ".clinerules/**",
        ".roorules",
        ".github/copilot-instructions.md",
        ".github/instructions/**",
        ".github/prompts/**",
        ".github/agents/**",
    ),
    "sandbox-profiles": (".sandbox/**", ".config/sandbox/**"),
    "ci": (
        ".github/workflows/**",
        ".github/actions/**",
        ".gitea/workflows/**",
        ".forgejo/workflows/**",
        ".gitlab-ci.yml",
        ".gitlab-ci.yaml",
        ".gitlab/ci/**",
        ".circleci/**",
        "Jenkinsfile",
        ".travis.yml",
        "azure-pipelines.yml",
        ".azure-pipelines/**",
        "bitbucket-pipelines.yml",
        ".drone.yml",
        ".woodpecker.yml",
        ".woodpecker/**",
        ".buildkite/**",
        ".tekton/**",
        ".teamcity/**",
        "appveyor.yml",
        ".appveyor.yml",
        ".cirrus.yml",
    ),
    "node-bin": ("node_modules/.bin/**",),
    "package-managers": (
        ".npmrc",
        ".yarnrc",
        ".yarnrc.yml",
        ".yarn/releases/**",
        ".yarn/plugins/**",
        ".pnpmfile.cjs",
        ".pnpmfile.mjs",
        "bunfig.toml",
        ".pypirc",
        ".pip/**",
        ".config/pip/**",
        ".cargo/config",
        ".cargo/config.toml",
        ".gemrc",
        ".bundle/config",
        ".mvn/**",
        ".bazelrc",
    ),
    # Not "*.pth" at large: that is also what model checkpoints are called.
    "python-startup": ("sitecustomize.py", "usercustomize.py", "site-packages/*.pth", "dist-packages/*.pth"),
    "tool-startup": (".gdbinit", ".lldbinit", ".pdbrc", ".irbrc", ".pryrc", ".psqlrc", ".sqliterc", ".Rprofile"),
}

# Rules that need more than the path: the entry's type and target, or its neighbours.
STRUCTURAL_RULES = (LINK_OUTSIDE, GIT_BARE)

# `git init` writes a dozen of these; git runs none of them.
_HARMLESS = re.compile(r"(?:.*/)?\.git/(?:modules/(?:.*/)?)?hooks/[^/]+\.sample", re.DOTALL)
_HONEST_DEPTH = 100
# What HFS+ and ext4 with casefold ignore in names: ".g\u200cit" is ".git" there.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0]"
)


def is_protected(path: str, allow: Iterable[str] = (), *, type_: EntryType = "file") -> str | None:
    """The name of the rule that protects `path`, or None: no rule does, or `allow` grants it.

    `allow` holds rule names ("git-hooks"), or paths, which cover what lies below them. A real directory is never
    protected itself: what is in it is (`is_protected_dir` says whether all of it).
    """
    if type_ == "dir":
        return None
    folded = fold(path)
    rule = _rule_for(folded, is_link=type_ != "file")
    if rule is None or _is_allowed(rule, folded, allow):
        return None
    return rule


def is_protected_dir(path: str, allow: Iterable[str] = ()) -> str | None:
    """The rule that protects everything in the directory `path`, or None.

    None too when `allow` grants a path in it: then each entry has to be looked at by itself.
    """
    folded = fold(path)
    rule = _rule_for_dir(folded)
    if rule is None or _is_allowed(rule, folded, allow) or _grants_below(folded, allow):
        return None
    return rule


def check_allow(allow: Iterable[str]) -> None:
    """Raise ValueError for an entry that is neither a rule's name nor a path; a plain word needs "./" to be one."""
    for item in allow:
        is_path = "/" in item or "." in item or _rule_for(fold(item), is_link=True) is not None
        if item not in RULES and item not in STRUCTURAL_RULES and not is_path:
            names = ", ".join([*RULES, *STRUCTURAL_RULES])
            raise ValueError(f"{item!r} is no rule and no path; rules are {names}")


def is_allowed(rule: str, path: str, allow: Iterable[str]) -> bool:
    """Whether `allow` grants `rule` by name, or `path` by itself or a directory above it."""
    return _is_allowed(rule, fold(path), allow)


def is_git_dir(directory: str, exists: Callable[[str], bool]) -> bool:
    """Whether git would take `directory` for a repository of its own, given which names exist in it.

    git reads configuration and hooks of any directory with HEAD, objects and refs that it meets on the way up, or
    with HEAD and commondir. Source: setup.c is_git_directory(), and git-config(1) on safe.bareRepository.
    """
    if fold(directory).rpartition("/")[2] == ".git":
        return False  # its parts have rules of their own
    return exists("HEAD") and (exists("commondir") or (exists("objects") and exists("refs")))


def acts_in_git_dir(name: str) -> bool:
    """Whether a file of that name in a repository's directory makes git run something."""
    return fold(name) in ("config", "config.worktree", "commondir", "hooks")


def fold(path: str) -> str:
    """What a case-insensitive file system takes `path` for."""
    if path.isascii():
        return path.lower()
    return _IGNORABLE.sub("", unicodedata.normalize("NFKC", path)).casefold()


def _is_allowed(rule: str, folded: str, allow: Iterable[str]) -> bool:
    for item in allow:
        if item in RULES or item in STRUCTURAL_RULES:
            if item == rule:
                return True
            continue
        granted = _granted_path(item)
        if granted and (folded == granted or folded.startswith(granted + "/")):
            return True
    return False


def _grants_below(folded: str, allow: Iterable[str]) -> bool:
    return any(_granted_path(item).startswith(folded + "/") for item in allow)


def _granted_path(item: str) -> str:
    return fold(item).removeprefix("./").removesuffix("/**").rstrip("/")


@dataclass(frozen=True, slots=True)
class _Pattern:
    """`head` [any parts] `tail`; with `covers`, everything below too. Without "**" the head is the whole of it."""

    rule: str
    head: tuple[str, ...]
    tail: tuple[str, ...]
    covers: bool

    def matches(self, parts: Sequence[str], start: int) -> bool:
        at = start + len(self.head)
        if not _same(self.head, parts, start):
            return False
        if not self.tail:
            return self.covers or at == len(parts)
        if not self.covers:
            last = len(parts) - len(self.tail)
            return last >= at and _same(self.tail, parts, last)
        return any(_same(self.tail, parts, n) for n in range(at, len(parts)))

    def leads_to(self, parts: Sequence[str], start: int) -> bool:
        """Whether the path is one of the directories on the way: a link there brings in the rest from elsewhere."""
        length = len(parts) - start
        if self.tail and length > len(self.head):
            return _same(self.head, parts, start)
        return length <= len(self.head) and _same(self.head[:length], parts, start)


def _same(patterns: Sequence[str], parts: Sequence[str], start: int) -> bool:
    if start + len(patterns) > len(parts):
        return False
    return all(
        fnmatchcase(parts[start + n], part) if "*" in part else parts[start + n] == part
        for n, part in enumerate(patterns)
    )


def _rule_for(folded: str, *, is_link: bool) -> str | None:
    parts = folded.split("/")
    first_parts, endings = _compiled()
    for ending, rule in endings:
        if parts[-1].endswith(ending):
            return rule
    if first_parts.keys().isdisjoint(parts) or (not is_link and _HARMLESS.fullmatch(folded)):
        return None
    if len(parts) > _HONEST_DEPTH:  # matching costs depth times occurrences, and nothing honest is that deep
        return next(pattern.rule for pattern, _ in _candidates(parts, first_parts))
    candidates = list(_candidates(parts, first_parts))
    found = next((pattern for pattern, start in candidates if pattern.matches(parts, start)), None)
    if found is None and is_link:
        found = next((pattern for pattern, start in candidates if pattern.leads_to(parts, start)), None)
    return found.rule if found else None


def _rule_for_dir(folded: str) -> str | None:
    parts = folded.split("/")
    first_parts = _compiled()[0]
    found = (p.rule for p, start in _candidates(parts, first_parts) if p.covers and p.matches(parts, start))
    return next(found, None)


def _candidates(parts: Sequence[str], first_parts: dict[str, list[_Pattern]]) -> Iterator[tuple[_Pattern, int]]:
    """Patterns whose first part occurs in the path, with where.

    One with "**" is tried where its head first occurs only: what a later occurrence matches, the first one does.
    """
    spent: set[_Pattern] = set()
    for start, part in enumerate(parts):
        for pattern in first_parts.get(part, ()):
            if pattern in spent:
                continue
            if pattern.tail and _same(pattern.head, parts, start):
                spent.add(pattern)
            yield pattern, start


@lru_cache(maxsize=1)
def _compiled() -> tuple[dict[str, list[_Pattern]], list[tuple[str, str]]]:
    """Patterns by their first part, and the endings of names that need no more ("*.code-workspace")."""
    first_parts: dict[str, list[_Pattern]] = {}
    endings: list[tuple[str, str]] = []
    for rule, patterns in RULES.items():
        for text in patterns:
            covers = text.endswith("/**")
            parts = text.lower().removesuffix("/**").split("/")
            if parts[0].startswith("*"):
                endings.append((parts[0][1:], rule))
                continue
            cut = parts.index("**") if "**" in parts else len(parts)
            pattern = _Pattern(rule, tuple(parts[:cut]), tuple(parts[cut + 1 :]), covers)
            first_parts.setdefault(parts[0], []).append(pattern)
    return first_parts, endings
