"""The words of a grant and what they mean: paths and deny patterns. Pure; no file is looked at.

A path grant is a whole tree. A deny pattern names a tree too, with `*`, `?`, `[…]` inside one component and `**`
for any number of components; a pattern that starts with `**/` matches at any depth.
Meaning, never text, decides whether one word lies within another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

TOKENS: Final = (":workspace", ":tmp", ":minimal")
_GLOB = re.compile(r"[*?\[]")
_PATH_BYTES_MAX: Final = 4095  # PATH_MAX without its NUL


def check_text(text: str) -> str:
    """Refuse what would change meaning further down: NUL cuts a C string, control characters forge log lines."""
    for char in text:
        if ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0:
            raise ValueError(f"{text!r} contains the control character {char!r}")
        if 0xD800 <= ord(char) < 0xE000:
            raise ValueError(f"{text!r} is not valid UTF-8")
    return text


def check_path(path: str) -> str:
    """An absolute, normal path: what the profile layer makes of `~`, `$VAR` and relative paths."""
    check_text(path)
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is not an absolute path (only profiles may use relative ones, ~ and $VAR)")
    if len(path.encode()) > _PATH_BYTES_MAX:
        raise ValueError(f"the path is longer than {_PATH_BYTES_MAX} bytes: {path[:60]!r}…")
    if path != "/" and any(part in ("", ".", "..") for part in path[1:].split("/")):
        raise ValueError(f"{path!r} is not normal: it has an empty, '.' or '..' component")
    return path


def check_grant(path: str) -> str:
    """A tree that is granted, or a token. Globs are for `deny`: a grant says exactly what it opens."""
    if path.startswith(":"):
        if path not in TOKENS:
            raise ValueError(f"{path!r} is not a token; allowed: {', '.join(TOKENS)}")
        return path
    check_path(path)
    if has_glob(path):
        raise ValueError(f"{path!r} has a wildcard; a grant names a tree, wildcards are for deny")
    return path


def check_pattern(pattern: str) -> str:
    """A tree that is denied: an absolute path, or a pattern that is absolute or begins with `**/`."""
    rest = "/" + pattern if pattern.startswith("**/") else pattern
    check_path(rest)
    if any("**" in part and part != "**" for part in rest.split("/")):
        raise ValueError(f"{pattern!r}: '**' must be a whole component, as in '**/.env'")
    _pattern_regex(pattern)
    return pattern


def check_beneath(name: str) -> str:
    """A name below the workspace, such as `.git/hooks`."""
    check_text(name)
    if not name or name.startswith(("/", "~", ":")) or any(p in ("", ".", "..") for p in name.split("/")):
        raise ValueError(f"{name!r} is not a path below the workspace, such as '.git/hooks'")
    return name


def has_glob(path: str) -> bool:
    return _GLOB.search(path) is not None


def path_within(inner: str, outer: str) -> bool:
    """Whether the tree `inner` lies in the tree `outer` (both absolute and normal)."""
    return outer == "/" or inner == outer or inner.startswith(outer + "/")


def meet_paths(one: str, other: str) -> str | None:
    """The smaller of two trees when one lies in the other."""
    if path_within(one, other):
        return one
    return other if path_within(other, one) else None


def denied_by(path: str, patterns: Iterable[str]) -> str | None:
    """The first pattern whose tree holds `path`, or None."""
    for pattern in patterns:
        if not has_glob(pattern):
            if path_within(path, pattern):
                return pattern
        elif _pattern_regex(pattern).fullmatch(path):
            return pattern
    return None


def _pattern_regex(pattern: str) -> re.Pattern[str]:
    """A regular expression for everything in the pattern's tree. Raises ValueError for a broken `[…]`."""
    parts = ("/" + pattern if pattern.startswith("**/") else pattern)[1:].split("/")
    out = []
    for i, part in enumerate(parts):
        if part == "**":
            out.append("(?:/[^/]+)*" if i < len(parts) - 1 else "(?:/[^/]+)+")
        else:
            out.append("/" + _component_regex(part))
    try:
        return re.compile("".join(out) + "(?:/.*)?", re.DOTALL)
    except re.error as err:
        raise ValueError(f"{pattern!r} is not a pattern: {err}") from err


def _component_regex(part: str) -> str:
    def one(match: re.Match[str]) -> str:
        text = match.group()
        if text[0] == "[" and len(text) > 1:
            inner = re.sub(r"([\\\[\]&~|])", r"\\\1", text[1:-1])
            return f"(?!/)[{'^' + inner[1:] if inner[0] == '!' else inner}]"
        return {"*": "[^/]*", "?": "[^/]"}.get(text, re.escape(text))

    return re.sub(r"\[!?[^\[\]]+\]|.", one, part, flags=re.DOTALL)
