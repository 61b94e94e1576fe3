"""The words of a grant and what they mean: paths, deny patterns, host rules. Pure; no file is looked at.

A path grant is a whole tree. A deny pattern names a tree too, with `*`, `?`, `[…]` inside one component and `**`
for any number of components; a pattern that starts with `**/` matches at any depth. A host rule always carries a
port. Meaning, never text, decides whether one word lies within another.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

TOKENS: Final = (":workspace", ":tmp", ":minimal")
_GLOB = re.compile(r"[*?\[]")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
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


class HostRule(NamedTuple):
    """One network rule. `one`: exactly one label more than `host`; `many`: one or more. `port` None is any port."""

    kind: Literal["name", "one", "many", "net"]
    host: str
    port: int | None

    def __str__(self) -> str:
        stars = {"one": "*.", "many": "**."}.get(self.kind, "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{stars}{host}:{'*' if self.port is None else self.port}"


def parse_host(text: str, *, deny: bool = False) -> HostRule:
    """Read `host:port`, `*.host:port`, `**.host:port` or `CIDR:port`; names are normalised once, here.

    Without a port an allowed host means 443 only and a denied one means every port. Raises ValueError.
    """
    check_text(text)
    host, port = _split_port(text, 443 if not deny else None)
    if host.startswith("["):
        return HostRule("net", _network(text, host[1:-1]), port)
    stars, _, rest = host.rpartition("*.") if host.startswith("*") else ("", "", host)
    if stars not in ("", "*") or "*" in rest:
        raise ValueError(f"{text!r}: a wildcard is '*.' (one label) or '**.' (any depth) before a name")
    if not host.startswith("*") and re.fullmatch(r"[0-9./]+", rest):
        return HostRule("net", _network(text, rest), port)
    name = _name(text, rest)
    if not host.startswith("*"):
        return HostRule("name", name, port)
    if "." not in name and not deny:
        raise ValueError(f"{text!r} is too wide: the name after the wildcard needs two labels or more")
    return HostRule("many" if stars else "one", name, port)


def canonical_host(text: str) -> str:
    return str(parse_host(text))


def canonical_denied_host(text: str) -> str:
    return str(parse_host(text, deny=True))


def meet_hosts(one: str, other: str) -> str | None:
    """What two rules have in common, or None. Host patterns nest or are apart, so the meeting is again one rule."""
    a, b = parse_host(one), parse_host(other)
    if a.port is not None and b.port is not None and a.port != b.port:
        return None
    port = a.port if a.port is not None else b.port
    if _host_within(a, b):
        return str(a._replace(port=port))
    return str(b._replace(port=port)) if _host_within(b, a) else None


def host_within(inner: str, outer: str) -> bool:
    return meet_hosts(inner, outer) == str(parse_host(inner))


def _host_within(inner: HostRule, outer: HostRule) -> bool:
    """Compared by labels from the right, never by text: `evil-a.example` is not within `*.a.example`."""
    if (inner.kind == "net") != (outer.kind == "net"):
        return False
    if inner.kind == "net":
        a, b = ipaddress.ip_network(inner.host), ipaddress.ip_network(outer.host)
        return a.version == b.version and a.subnet_of(b)  # type: ignore[arg-type]
    if outer.kind == "name" or inner.kind == outer.kind == "one":
        return inner.kind == outer.kind and inner.host == outer.host
    deeper = inner.host.endswith("." + outer.host)
    if outer.kind == "one":
        return inner.kind == "name" and deeper and "." not in inner.host[: -len(outer.host) - 1]
    return deeper or (inner.kind != "name" and inner.host == outer.host)


def _split_port(text: str, default: int | None) -> tuple[str, int | None]:
    host, port = text, ""
    if text.startswith("["):
        end = text.find("]")
        if end < 0 or text[end + 1 : end + 2] not in ("", ":"):
            raise ValueError(f"{text!r}: an IPv6 address is written '[2001:db8::1]:443'")
        host, port = text[: end + 1], text[end + 2 :]
        if not port and end + 1 < len(text):
            raise ValueError(f"{text!r} has an empty port")
    elif text.count(":") > 1:
        raise ValueError(f"{text!r}: an IPv6 address is written '[2001:db8::1]:443'")
    elif ":" in text:
        host, _, port = text.partition(":")
        if not port:
            raise ValueError(f"{text!r} has an empty port")
    if port == "*":
        return host, None
    if not port:
        return host, default
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"{text!r}: the port must be 1 to 65535, or '*' for any")
    return host, int(port)


def _network(text: str, host: str) -> str:
    if "%" in host:
        raise ValueError(f"{text!r} has a zone id, which means something else on every machine")
    # ipaddress takes neither octal nor short forms, which is what we want: libc would read 127.1 as 127.0.0.1.
    try:
        network = ipaddress.ip_network(host)
    except ValueError as err:
        raise ValueError(f"{text!r} is not an address or network: {err}") from err
    return str(network.network_address) if network.num_addresses == 1 else str(network)


def _name(text: str, name: str) -> str:
    try:
        ascii_name = name if name.isascii() else name.encode("idna").decode()
    except UnicodeError as err:
        raise ValueError(f"{text!r} is not a host name: {err}") from err
    ascii_name = ascii_name.lower().removesuffix(".")
    labels = ascii_name.split(".")
    if len(ascii_name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(
            f"{text!r} is not a host name; allowed: 'host:port', '*.host:port', '**.host:port', 'CIDR:port'"
        )
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        raise ValueError(f"{text!r} would be read as an address; write it in full, such as 127.0.0.1")
    return ascii_name
