"""Put pip's wheel into a directory and print its path: for an interpreter without ensurepip.

Looks where pip itself would: PIP_INDEX_URL and PIP_FIND_LINKS, pip's configuration files, then the public
index. Standard library only. Where no index answers, Debian's package of pip's wheel is unpacked, which
needs no privileges.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from html import unescape
from pathlib import Path

PUBLIC_INDEX = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.2"
WHEEL = re.compile(r"pip-(\d+(?:\.\d+)*)-py3-none-any\.whl")
DEBIAN_WHEELS = Path("/usr/share/python-wheels")


def option(name: str) -> str:
    """A setting as pip would find it: the environment first, then its files."""
    from_env = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if from_env:
        return from_env
    home = Path.home()
    files = ["/etc/pip.conf", home / ".pip/pip.conf", home / ".config/pip/pip.conf"]
    parser = configparser.RawConfigParser()
    parser.read([*map(str, files), os.environ.get("PIP_CONFIG_FILE", "")])
    for section in ("install", "global"):
        if parser.has_option(section, name):
            return parser.get(section, name)
    return ""


def version_of(filename: str) -> tuple[int, ...]:
    match = WHEEL.fullmatch(filename)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def newest(directories: list[Path]) -> Path | None:
    wheels = [wheel for directory in directories if directory.is_dir() for wheel in directory.glob("pip-*.whl")]
    return max(wheels, key=lambda wheel: version_of(wheel.name), default=None)


def open_url(url: str, accept: str = "*/*") -> tuple[bytes, str]:
    cafile = option("cert") or None
    context = ssl.create_default_context(cafile=cafile)
    # The address is the operator's own index setting; pip itself would open it, `file:` included.
    headers = {"Accept": accept, "User-Agent": "toolcall-sandbox bootstrap"}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:  # noqa: S310
        return answer.read(), answer.headers.get_content_type()


def candidates(page: str, body: bytes, content_type: str) -> list[tuple[str, str, str]]:
    """(file name, address, sha256 or "") of every wheel that was not withdrawn."""
    if content_type.endswith("json"):
        files = json.loads(body)["files"]
        return [
            (file["filename"], urllib.parse.urljoin(page, file["url"]), file.get("hashes", {}).get("sha256", ""))
            for file in files
            if not file.get("yanked")
        ]
    found = []
    for attributes, text in re.findall(r"<a\s([^>]*)>([^<]*)</a>", body.decode()):
        href = re.search(r'href="([^"]+)"', attributes)
        if href and "data-yanked" not in attributes:
            address, _, fragment = urllib.parse.urljoin(page, unescape(href[1])).partition("#")
            found.append((text.strip(), address, fragment.removeprefix("sha256=")))
    return found


def from_index(index: str, into: Path) -> Path:
    page = index.rstrip("/") + "/pip/"
    body, content_type = open_url(page, ACCEPT)
    wheels = [entry for entry in candidates(page, body, content_type) if version_of(entry[0])]
    name, address, sha256 = max(wheels, key=lambda entry: version_of(entry[0]))
    content, _ = open_url(address)
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{name} does not have the digest its index states")
    target = into / name
    target.write_bytes(content)
    return target


def from_debian(into: Path) -> Path | None:
    subprocess.run(["apt-get", "download", "-qq", "python3-pip-whl"], cwd=into, check=True)
    for package in into.glob("python3-pip-whl_*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(into)], check=True)
    return newest([into / DEBIAN_WHEELS.relative_to("/")])


def main() -> int:
    into = Path(sys.argv[1])
    into.mkdir(parents=True, exist_ok=True)
    links = [Path(link) for link in option("find-links").split() if "://" not in link]
    wheel = newest([into, DEBIAN_WHEELS, *links])
    reasons = []
    for attempt in (lambda: from_index(option("index-url") or PUBLIC_INDEX, into), lambda: from_debian(into)):
        if wheel:
            break
        try:
            wheel = attempt()
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as err:
            reasons.append(str(err))
    if wheel is None:
        print(f"bootstrap: no pip to be had: {'; '.join(reasons)}; apt-get install python3-venv", file=sys.stderr)
        return 1
    print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
