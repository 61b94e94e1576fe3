"""Values of secrets: where they are read, and that no error, text or trace of ours ever says one."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox.egress.http_policy import HIDDEN, HttpPolicy
from sandbox.errors import ManifestError
from sandbox.manifest import Manifest
from sandbox.planner_http import environment, inspects, policy
from sandbox.prepare_secrets import extra_roots, values
from sandbox.profiles import resolve

VALUE = "v3ry-s3cret-0123456789"
HOST = "api.example.org"


def manifest(**secret: Any) -> Manifest:
    network = {"allow": [f"{HOST}:443"], "http": [f"GET {HOST} inspect"]}
    return resolve({"network": network, "secrets": {"TOKEN": {"host": HOST, **secret}}}).manifest


def read(source: Manifest, given: dict[str, Any] | None = None) -> str:
    data = values(source, given or {})
    assert data is not None
    found: str = json.loads(data)["TOKEN"]
    return found


def everything_about(error: BaseException) -> str:
    """Its text, its trace and all that hangs on it, as a logger might show it."""
    parts: list[str] = []
    seen: list[BaseException | None] = [error]
    while seen and (one := seen.pop()) is not None:
        parts += [str(one), repr(one), repr(one.__dict__), *traceback.format_exception(one)]
        seen += [one.__cause__, one.__context__]
    return "\n".join(parts)


def test_a_value_comes_from_a_variable_a_file_or_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE", VALUE)
    assert read(manifest(env="SOURCE")) == VALUE
    file = tmp_path / "token"
    file.write_text(f"{VALUE}\n")
    assert read(manifest(file=str(file))) == VALUE
    assert read(manifest(), {"TOKEN": VALUE}) == VALUE
    counted = iter((VALUE, VALUE + "2"))
    changing = {"TOKEN": lambda: next(counted)}
    assert [read(manifest(), changing), read(manifest(), changing)] == [VALUE, VALUE + "2"]
    # What the program gives goes before what the profile says.
    assert read(manifest(env="SOURCE"), {"TOKEN": "given-by-hand"}) == "given-by-hand"


def raising() -> str:
    raise RuntimeError(f"could not refresh {VALUE}")


@pytest.mark.parametrize(
    ("secret", "given", "says"),
    [
        ({"env": "NO_SUCH_VARIABLE"}, {}, "NO_SUCH_VARIABLE is not set"),
        ({"file": "/no/such/file"}, {}, "No such file"),
        ({}, {}, "has no source"),
        ({}, {"TOKEN": raising}, "raised RuntimeError"),
        ({}, {"TOKEN": lambda: [VALUE]}, "returned list"),
        ({}, {"TOKEN": f"{VALUE}\r\nX-More: 1"}, "not printable"),
        ({}, {"TOKEN": f"{VALUE}é"}, "not printable"),
        ({}, {"TOKEN": ""}, "empty"),
        ({}, {"TOKEN": VALUE * 1000}, "longer"),
        ({}, {"OTHER": VALUE, "TOKEN": VALUE}, "names no such secret"),
    ],
)
def test_no_error_says_a_value(secret: dict[str, Any], given: dict[str, Any], says: str) -> None:
    with pytest.raises(ManifestError, match=says) as caught:
        values(manifest(**secret), given)
    # The frames of this test itself show its parameters' source lines, which hold no value.
    assert VALUE not in everything_about(caught.value)


@pytest.mark.parametrize(
    "table",
    [
        {"host": HOST, "env": "A", "file": "/x"},
        {"host": f"{HOST}:443"},
        {"host": "*.example.org"},
        {"host": HOST, "header": "Host"},
        {"host": HOST, "header": "Content-Length"},
        {"host": HOST, "header": "X Y"},
        {"host": HOST, "format": "Bearer"},
        {"host": HOST, "format": "{}{}"},
        {"host": HOST, "format": "{}\r\nX: 1"},
        {"host": HOST, "env": "NOT A NAME"},
        {"host": "other.example.org"},
        {},
    ],
)
def test_a_secret_that_makes_no_sense_is_refused(table: dict[str, Any]) -> None:
    network = {"allow": [f"{HOST}:443"], "http": [f"GET {HOST} inspect"]}
    with pytest.raises(ManifestError, match=r"secrets\.TOKEN"):
        resolve({"network": network, "secrets": {"TOKEN": table}})


@pytest.mark.parametrize("wrong", [VALUE, {"host": HOST, "value": VALUE}, {"host": HOST, "env": ["x", VALUE]}])
def test_a_value_in_the_wrong_place_is_not_repeated(wrong: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        resolve({"secrets": {"TOKEN": wrong}})
    assert VALUE not in str(caught.value)


def test_what_would_show_the_value_inside_is_refused(tmp_path: Path) -> None:
    network = {"allow": [f"{HOST}:443"], "http": [f"GET {HOST} inspect"]}
    secret = {"TOKEN": {"host": HOST, "env": "SOURCE"}}
    for variable in ("TOKEN", "SOURCE"):
        with pytest.raises(ManifestError, match=r"environment\.allow"):
            resolve({"network": network, "secrets": secret, "environment": {"allow": [variable]}})
    with pytest.raises(ManifestError, match=r"environment\.set"):
        resolve({"network": network, "secrets": secret, "environment": {"set": {"TOKEN": "x"}}})
    file = tmp_path / "token"
    file.write_text(VALUE)
    shown = {"network": network, "secrets": {"TOKEN": {"host": HOST, "file": str(file)}}}
    with pytest.raises(ManifestError, match="is readable inside"):
        resolve({**shown, "filesystem": {"read": [str(tmp_path)]}})
    assert resolve({**shown, "filesystem": {"read": [str(tmp_path)], "deny": [str(file)]}})


def test_plans_hold_names_and_placeholders_only() -> None:
    source = manifest(env="SOURCE", format="Bearer {}", placeholder="sk-test")
    told = policy(source, ())
    assert told is not None
    assert told["secrets"] == {
        "TOKEN": {"host": HOST, "header": "Authorization", "format": "Bearer {}", "plain": False}
    }
    assert environment(source)["TOKEN"] == "sk-test"
    assert environment(manifest())["TOKEN"] == "placeholder-for-TOKEN"
    assert inspects(source)


def test_without_inspection_the_environment_says_nothing_of_authorities() -> None:
    plain = resolve({"network": {"allow": [f"{HOST}:80"], "http": [f"GET {HOST}"]}}).manifest
    assert not inspects(plain)
    assert environment(plain) == {}
    assert policy(plain, ()) is not None
    assert policy(resolve({"network": {"allow": [f"{HOST}:80"]}}).manifest, ()) is None


def test_the_gateway_hides_values_and_says_none() -> None:
    told = {"http": policy(manifest(format="Bearer {}"), ())}
    made = HttpPolicy(told, {"TOKEN": VALUE})
    assert made.secrets[0].value == f"Bearer {VALUE}".encode()
    assert VALUE not in repr(made) + repr(made.secrets)
    assert made.hide(f"/x/{VALUE}/y") == f"/x/{HIDDEN}/y"
    for bad in ({}, {"TOKEN": ""}, {"TOKEN": f"{VALUE}\n"}):
        with pytest.raises(ValueError, match="TOKEN") as caught:
            HttpPolicy(told, bad)
        assert VALUE not in everything_about(caught.value)


def test_children_of_a_profile_replace_or_remove_secrets_and_a_sealed_one_allows_no_new(tmp_path: Path) -> None:
    base = f"""
sealed = SEALED
[network]
allow = ["{HOST}:443"]
[[network.http]]
host = "{HOST}"
inspect = true
[secrets.TOKEN]
host = "{HOST}"
env = "A"
"""
    (tmp_path / "open.toml").write_text(base.replace("SEALED", "false"))
    (tmp_path / "sealed.toml").write_text(base.replace("SEALED", "true"))
    child = tmp_path / "child.toml"
    child.write_text(f'extends = "./open.toml"\n[secrets.TOKEN]\nhost = "{HOST}"\nenv = "B"\n')
    resolved = resolve(child)
    assert resolved.manifest.secrets.entries["TOKEN"].env == "B"
    assert str(resolved.origins["secrets.TOKEN"]) == f"{child}:2 secrets.TOKEN"
    child.write_text('extends = "./sealed.toml"\n[remove]\nsecrets = ["TOKEN"]\n')
    assert resolve(child).manifest.secrets.entries == {}
    for more in (f'[secrets.TOKEN]\nhost = "{HOST}"\nenv = "B"\n', f'[secrets.NEW]\nhost = "{HOST}"\nenv = "B"\n'):
        child.write_text(f'extends = "./sealed.toml"\n{more}')
        with pytest.raises(ManifestError, match="sealed"):
            resolve(child)


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("no certificate"), lambda path: path.write_bytes(b"\xff")]
)
def test_a_file_of_authorities_holds_certificates(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    path = tmp_path / "roots.pem"
    make(path)
    source = resolve({"network": {"allow": [f"{HOST}:443"], "extra_roots": [str(path)]}}).manifest
    with pytest.raises(ManifestError, match="no certificates in PEM"):
        extra_roots(source)
