"""`sandbox why`: the verdict, the rule, and the line where it stands, without a packet."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.errors import ManifestError
from sandbox.profiles import resolve
from sandbox.why import Judge

PROFILE = """\
extends = "minimal"

[filesystem]
read = ["./data"]
write = ["./out"]
deny = ["**/.env"]

[network]
allow = ["api.example.org:443", "*.example.com:443", "10.0.0.0/8:80", "plain.example.org:80"]
deny = ["bad.example.com"]

[[network.http]]
host = "api.example.org"
method = ["GET"]
path = "/repos/**"
inspect = true

[[network.http]]
host = "plain.example.org"
path = "/admin/**"
access = "deny"

[secrets.TOKEN]
env = "TOKEN"
host = "api.example.org"
"""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    for name in ("data", "out"):
        (tmp_path / name).mkdir()
    path = tmp_path / "p.toml"
    path.write_text(PROFILE)
    return path


@pytest.fixture
def judge(profile: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    def no_lookup(*_: object, **__: object) -> None:
        raise AssertionError("a name was looked up, or a socket made")

    made = Judge(resolve(profile))
    monkeypatch.setattr(socket, "getaddrinfo", no_lookup)
    monkeypatch.setattr(socket, "socket", no_lookup)
    return made


@pytest.mark.parametrize(
    ("destination", "allowed", "rule", "line"),
    [
        ("api.example.org:443", True, "api.example.org:443", 9),
        ("API.Example.Org.", True, "api.example.org:443", 9),
        ("api.example.org:80", False, "api.example.org:443", 9),
        ("x.example.com:443", True, "*.example.com:443", 9),
        ("x.y.example.com:443", False, "", 0),
        ("bad.example.com:443", False, "bad.example.com:*", 10),
        ("evil.org:443", False, "", 0),
        ("10.1.2.3:80", True, "10.0.0.0/8:80", 9),
        ("[::ffff:10.1.2.3]:80", True, "10.0.0.0/8:80", 9),
        ("169.254.169.254:80", False, "", 0),
    ],
)
def test_connections(judge: Judge, profile: Path, destination: str, allowed: bool, rule: str, line: int) -> None:
    answer = judge.connect(destination)
    assert (answer.allowed, answer.rule) == (allowed, rule)
    assert answer.origin.startswith(f"{profile}:{line} network.") if line else answer.origin == ""


@pytest.mark.parametrize(
    ("method", "url", "allowed", "line", "says"),
    [
        ("GET", "https://api.example.org/repos/x?q=1", True, 12, "permitted"),
        ("POST", "https://api.example.org/repos/x", False, 12, "permit GET"),
        ("GET", "https://api.example.org/other", False, 12, "/repos/**"),
        ("GET", "https://api.example.org/repos/../other", False, 12, "several ways"),
        ("GET", "http://api.example.org/repos/x", False, 9, "only at port 443"),
        ("CONNECT", "http://plain.example.org/", False, 18, "anything but CONNECT"),
        ("PUT", "http://plain.example.org/x", True, 18, "permitted"),
        ("PUT", "http://plain.example.org/Admin/x", False, 18, "denies"),
        ("GET", "https://x.example.com/anything", True, 9, "permitted"),
        ("GET", "http://x.example.com:443/anything", False, 9, "only TLS"),
        ("GET", "https://evil.org/", False, 0, "does not name"),
    ],
)
def test_requests(judge: Judge, profile: Path, method: str, url: str, allowed: bool, line: int, says: str) -> None:
    answer = judge.request(method, url)
    assert answer.allowed is allowed, answer
    assert says in answer.reason
    assert answer.origin.startswith(f"{profile}:{line} ") if line else answer.origin == ""


def test_a_secret_is_noted_by_its_name(judge: Judge) -> None:
    answer = judge.request("GET", "https://api.example.org/repos/x")
    assert "the gateway sets Authorization from the secret TOKEN" in answer.notes


def test_files(judge: Judge, profile: Path) -> None:
    here = profile.parent
    assert judge.read(f"{here}/data/x").origin == f"{profile}:4 filesystem.read"
    assert judge.read(f"{here}/out/x").rule == f"{here}/out"
    assert judge.write(f"{here}/out/x").origin == f"{profile}:5 filesystem.write"
    assert not judge.write(f"{here}/data/x").allowed
    assert "reading only" in judge.write(f"{here}/data/x").reason
    denied = judge.read(f"{here}/data/.env")
    assert (denied.allowed, denied.rule, denied.origin) == (False, "**/.env", f"{profile}:6 filesystem.deny")
    assert judge.read(f"{here}/elsewhere").rule == ":tmp"  # the test's files are in /tmp, which is the call's own
    (here / "elsewhere").write_text("the host's")
    assert not judge.read(f"{here}/elsewhere").allowed
    assert not judge.read("/var/lib/dpkg/status").allowed
    assert judge.read("/usr/bin/env").allowed
    assert not judge.write("/usr/bin/env").allowed
    assert judge.write("/tmp/x").allowed
    assert not judge.read("/etc/shadow").allowed
    assert "jail's own" in judge.read("/etc/passwd").reason


def test_links_are_followed_to_what_is_meant(judge: Judge, profile: Path) -> None:
    os.symlink("/etc/shadow", profile.parent / "data" / "link")
    assert not judge.read(f"{profile.parent}/data/link").allowed


def test_programs(judge: Judge, profile: Path) -> None:
    assert judge.execute("env").allowed
    assert not judge.execute("no-such-program").allowed
    assert not judge.execute(f"{profile.parent}/elsewhere/program").allowed


def test_without_a_network_that_is_the_reason() -> None:
    answer = Judge(resolve("minimal")).connect("example.org")
    assert (answer.allowed, answer.rule) == (False, "network.mode = none")


@pytest.mark.parametrize("text", ["a b", "x.org:0", "x.org:99999", "127.1:80", ":443", "http://x.org"])
def test_what_is_no_destination_is_an_error(judge: Judge, text: str) -> None:
    with pytest.raises(ManifestError, match="is not a destination"):
        judge.connect(text)


@pytest.mark.parametrize("url", ["ftp://x.org/", "x.org", "https://", "https://u@x.org/"])
def test_what_is_no_url_is_an_error(judge: Judge, url: str) -> None:
    with pytest.raises(ManifestError):
        judge.request("GET", url)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sandbox.cli.main", "why", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_command_prints_facts_and_exits_by_the_verdict(profile: Path) -> None:
    done = run("-p", str(profile), "--connect", "api.example.org:443", "--json")
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    assert (answer["allowed"], answer["rule"]) == (True, "api.example.org:443")
    done = run("-p", str(profile), "--connect", "api.example.org:443", "--http", "GET", "https://evil.org/")
    assert done.returncode == 1
    assert "allowed  connect api.example.org:443" in done.stdout
    assert "denied  GET https://evil.org/" in done.stdout
    assert f"{profile}:9 network.allow" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [(), ("--connect", "a b"), ("-p", "no-such-profile", "--read", "/x")])
def test_what_cannot_be_answered_is_125(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 125
    assert done.stdout == ""
    assert done.stderr.startswith("sandbox: ")
