"""`sandbox why`: the verdict on one attempt, the rule that decided, and where it was written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.errors import ManifestError
from sandbox.profiles import Resolved, resolve
from sandbox.why import Answer, Kind, why

PROFILE = """
extends = "minimal"
[filesystem]
read = ["{data}"]
write = [":workspace", "{data}/out"]
deny = ["**/.env"]
[network]
allow = ["api.example.org:443", "*.example.net:8000-8100", "10.0.0.0/8:5432", "git.example.org:22"]
deny = ["bad.example.net"]
"""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    (tmp_path / "data" / "out").mkdir(parents=True)
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE.format(data=tmp_path / "data"))
    return path


@pytest.fixture
def resolved(profile: Path) -> Resolved:
    return resolve(profile)


@pytest.mark.parametrize(
    ("subject", "allowed", "rule", "said"),
    [
        ("api.example.org:443", True, "api.example.org:443", "as TLS"),
        ("API.example.org.", True, "api.example.org:443", "as TLS"),
        ("api.example.org:80", False, "api.example.org:443", "at port 443 only"),
        ("x.example.net:8050", True, "*.example.net:8000-8100", "as TCP"),
        ("bad.example.net:8050", False, "bad.example.net:*", "denied"),
        ("git.example.org:22", True, "git.example.org:22", "as TCP"),
        ("evil.example:443", False, "", "no rule names it"),
        ("10.1.2.3:5432", True, "10.0.0.0/8:5432", "as TCP"),
        ("169.254.169.254:80", False, "", "no rule names it"),
        ("[2001:db8::1]:443", False, "", "no rule names it"),
    ],
)
def test_a_connection_is_judged_as_the_gateway_judges_it(
    resolved: Resolved, subject: str, allowed: bool, rule: str, said: str
) -> None:
    answer = why(resolved, "connect", subject)
    assert (answer.allowed, answer.rule) == (allowed, rule)
    assert said in answer.reason
    assert bool(answer.origin) == bool(rule)
    assert "mine.toml" in answer.origin or not rule


@pytest.mark.parametrize("subject", ["", ":443", "a.example:0", "a.example:x", "a.example:99999", "a b", "127.1:80"])
def test_what_is_no_destination_is_refused(resolved: Resolved, subject: str) -> None:
    with pytest.raises(ManifestError):
        why(resolved, "connect", subject)


@pytest.mark.parametrize(
    ("kind", "path", "allowed"),
    [
        ("read", "{data}/x", True),
        ("write", "{data}/x", False),
        ("write", "{data}/out/x", True),
        ("read", "{data}/.env", False),
        ("read", "/usr/bin/env", True),
        ("write", "/usr/bin/env", False),
        ("read", "/etc/shadow", False),
        ("read", "/root/.ssh/id_ed25519", False),
        ("write", "/workspace/x", True),
        ("write", "/tmp/x", True),
        ("read", "{data}/../../../../../../etc/shadow", False),
    ],
)
def test_a_path_is_judged_by_its_longest_grant_and_deny_first(
    resolved: Resolved, profile: Path, kind: Kind, path: str, allowed: bool
) -> None:
    answer = why(resolved, kind, path.format(data=profile.parent / "data"))
    assert answer.allowed is allowed, answer


def test_without_a_network_the_answer_says_so() -> None:
    answer = why(resolve("minimal"), "connect", "api.example.org:443")
    assert answer == Answer(answer.what, False, "there is no network", "network.mode", answer.origin)


def test_the_command_says_the_verdict_and_exits_by_it(profile: Path) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sandbox.cli.main", "why", "-p", str(profile), *argv]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    good = run("--connect", "api.example.org:443", "--read", "/usr/bin/env")
    assert (good.returncode, good.stdout.count("allow  ")) == (0, 2), good
    assert "mine.toml" in good.stdout
    bad = run("--connect", "evil.example:443", "--json")
    assert bad.returncode == 1
    assert json.loads(bad.stdout)[0]["allowed"] is False
    assert run().returncode == 125
