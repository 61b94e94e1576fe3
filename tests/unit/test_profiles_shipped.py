"""The shipped profiles: there, sensible, explained, valid by the published schema."""

from __future__ import annotations

import re
import time
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sandbox import profiles
from sandbox.errors import ManifestError
from sandbox.manifest_secrets import Secret
from sandbox.profile_fields import FIELDS
from sandbox.profile_files import shipped_dir
from sandbox.profile_schema import json_schema, to_file_form
from sandbox.profiles import available, resolve

NAMES = ["build", "data-science", "mcp-server", "minimal", "node", "python", "shell", "web-reader"]
EVERYDAY = [name for name in NAMES if name != "minimal"]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ceiling and no profiles but the shipped ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiles, "SYSTEM_CEILING", tmp_path / "none.toml")
    monkeypatch.delenv("SANDBOX_CEILING", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_the_shipped_profiles_are_all_there_and_described() -> None:
    infos = [info for info in available() if info.kind == "shipped"]
    assert [info.name for info in infos] == NAMES
    assert all(info.description and not info.error for info in infos)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_profile_grants_no_host_path_no_gpu_and_no_network_unasked(name: str) -> None:
    manifest = resolve(name).manifest
    assert manifest.filesystem.read == ()
    assert set(manifest.filesystem.write) <= {":workspace"}
    assert manifest.network.allow == ()
    assert manifest.network.mode == ("allowlist" if name == "web-reader" else "none")
    assert (manifest.gpu.count, manifest.gpu.devices) == (0, ())
    assert manifest.audit.capture == ()


@pytest.mark.parametrize("name", NAMES)
def test_private_files_fit_into_the_memory_that_holds_them(name: str) -> None:
    limits = resolve(name).manifest.resources
    assert limits.disk_bytes < limits.memory_bytes


@pytest.mark.parametrize("name", EVERYDAY)
def test_everyday_profiles_run_without_delegated_cgroups_and_bound_io_where_they_can(name: str) -> None:
    manifest = resolve(name).manifest
    needed = {"cpus", "io", "memory"} | ({"cpu_time"} if manifest.resources.cpu_time_s is not None else set())
    assert set(manifest.isolation.best_effort) == needed
    assert manifest.resources.io_bytes_per_s


def test_minimal_insists_on_every_limit() -> None:
    assert resolve("minimal").manifest.isolation.best_effort == ()


@pytest.mark.parametrize("name", NAMES)
def test_every_grant_and_every_best_effort_has_a_comment(name: str) -> None:
    lines = (shipped_dir() / f"{name}.toml").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"(read|write|allow|set|mode|best_effort|io|extends) *=", line):
            assert lines[number - 1].startswith("#") or "#" in line, f"{name}.toml:{number + 1}: {line}"


def test_a_ceiling_can_forbid_best_effort(tmp_path: Path) -> None:
    ceiling = tmp_path / "ceiling.toml"
    ceiling.write_text("[isolation]\nbest_effort = []\n")
    assert resolve("python", ceiling=ceiling).manifest.isolation.best_effort == ()


def test_resolving_is_quick_enough_for_a_decorator() -> None:
    resolve("data-science")
    spent = []
    for _ in range(5):
        start = time.process_time()
        resolve("data-science", overrides={"memory": "2GiB"})
        spent.append(time.process_time() - start)
    assert min(spent) < 0.020, f"{min(spent) * 1000:.1f} ms of CPU"


# --- the schema


@pytest.mark.parametrize("name", NAMES)
def test_shipped_profiles_are_valid_by_the_schema(name: str) -> None:
    text = (shipped_dir() / f"{name}.toml").read_text()
    jsonschema.validate(tomllib.loads(text), json_schema())
    jsonschema.validate(to_file_form(resolve(name).manifest, defaults=True), json_schema())


def test_the_schema_is_a_schema_and_knows_every_key() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for field in FIELDS:
        section = schema["properties"][field.section]
        assert (section if field.section == "secrets" else section["properties"][field.name])["description"]
    assert set(schema["properties"]["secrets"]["additionalProperties"]["properties"]) == set(Secret.model_fields)
    assert schema["properties"]["resources"]["properties"]["pids"]["maximum"] == 4194304
    assert schema["properties"]["gpu"]["properties"]["sm_percent"]["anyOf"][0]["maximum"] == 100


@pytest.mark.parametrize(
    "table",
    [
        {"memory": "1GiB"},
        {"resources": {"memory": 512}},
        {"resources": {"memory": "512M"}},
        {"resources": {"memory_bytes": 512}},
        {"resources": {"pids": 0}},
        {"resources": {"cpus": 2000}},
        {"resources": {"wall_time": "unlimited"}},
        {"filesystem": {"read": "/x"}},
        {"network": {"mode": "open"}},
        {"isolation": {"best_effort": ["mem"]}},
        {"gpu": {"sm_percent": 101}},
        {"environment": {"set": {"N": 1}}},
        {"remove": {"filesystem": {"deny": True}}},
        {"sealed": 1},
        {"network": {"http": [{"method": "GET"}]}},
        {"network": {"http": [{"host": "x.org", "path": "x"}]}},
        {"network": {"http": [{"host": "x.org", "access": "maybe"}]}},
        {"network": {"http": [{"host": "x.org", "port": 1}]}},
        {"secrets": {"A": {"env": "A"}}},
        {"secrets": {"A": {"host": "x.org", "value": "v"}}},
        {"secrets": {"A-B": {"host": "x.org"}}},
        {"extends": ""},
    ],
)
def test_what_the_schema_refuses_we_refuse_too(table: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(table, json_schema())
    with pytest.raises(ManifestError):
        resolve(table)


@pytest.mark.parametrize(
    "table",
    [
        {"extends": "python", "sealed": True, "remove": {"environment": {"allow": True, "set": []}}},
        {"extends": ["python", "shell"], "resources": {"memory": "1.5 GiB", "cpu_time": "unlimited", "cpus": 2}},
        {"gpu": {"memory": "4GiB", "sm_percent": 50, "time": "1h"}, "network": {"upload_max": "unlimited"}},
        {"network": {"allow": ["x.org"], "http": [{"host": "x.org", "method": ["GET"], "inspect": True}]}},
        {
            "network": {"allow": ["x.org"], "http": ["GET x.org /a/** inspect", {"host": "x.org", "access": "deny"}]},
            "secrets": {"A": {"host": "x.org", "format": "Bearer {}", "env": "A"}},
        },
    ],
)
def test_what_the_schema_takes_we_take_too(table: dict[str, Any]) -> None:
    jsonschema.validate(table, json_schema())
    assert resolve(table)


def test_the_examples_of_the_page_on_profiles_work(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/profiles.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        jsonschema.validate(tomllib.loads(block), json_schema())
    for number, block in enumerate(blocks[:3]):
        file = tmp_path / f"example{number}.toml"
        file.write_text(block)
        assert resolve(file)
    (tmp_path / "ceiling.toml").write_text(blocks[3])
    assert resolve("python", ceiling=tmp_path / "ceiling.toml").manifest.isolation.best_effort == ()
    for name in (*(field.name for field in FIELDS if field.section != "secrets"), *Secret.model_fields):
        assert f"`{name}`" in page, name
