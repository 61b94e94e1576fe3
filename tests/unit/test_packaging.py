"""The wheel carries what a user needs: the package, its types, the profiles, the command."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as pip builds it, without a network: the build backend is part of the development environment."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(target), str(ROOT)], capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_is_pure_and_named_after_the_distribution(wheel: zipfile.ZipFile) -> None:
    assert Path(wheel.filename or "").name.startswith("toolcall_sandbox-")
    assert Path(wheel.filename or "").name.endswith("-py3-none-any.whl")


def test_every_shipped_profile_travels_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    profiles = sorted(path.relative_to(ROOT / "profiles").as_posix() for path in (ROOT / "profiles").rglob("*.toml"))
    assert profiles, "there are profiles to ship"
    names = set(wheel.namelist())
    assert [name for name in profiles if f"sandbox/shipped_profiles/{name}" not in names] == []


def test_every_module_and_the_type_marker_travel_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "sandbox/py.typed" in names
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "sandbox").rglob("*.py")]
    assert [module for module in modules if module not in names] == []


def test_nothing_else_travels_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    strays = [name for name in wheel.namelist() if not name.startswith(("sandbox/", "toolcall_sandbox-"))]
    assert strays == []
    assert [name for name in wheel.namelist() if "__pycache__" in name] == []


def test_the_command_is_an_entry_point(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "sandbox = sandbox.cli.main:main" in wheel.read(entry_points).decode()


def test_the_base_install_stays_small(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in wheel.read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    names = {requirement.split(">")[0].split("<")[0].split("=")[0].strip() for requirement in required}
    # h11 is pure Python without dependencies: the gateway reads HTTP with it rather than with a parser of its own.
    allowed = {"pydantic", "typer", "rich", "cloudpickle", "pyseccomp", "rfc8785", "cryptography", "tenacity", "h11"}
    assert names <= allowed
