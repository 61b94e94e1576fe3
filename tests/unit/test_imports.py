"""Imports point downwards, the jail stays on the standard library, and `import sandbox` stays light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "sandbox"

# From the top down. A part may import from its own layer (without a circle) and from those below. Behind a part stand
# the files that it was split into for length: a file `profile_NAME.py` is part of `profiles` and has its place.
LAYERS = (
    ("cli", "tool", "integrations", "fleet", "testing", "bench"),
    ("runtime", "link", "prepare", "why", "kept"),
    ("supervisor",),
    ("profiles", "planner", "launchers", "egress", "workspace", "gpu", "quotas", "monitor", "audit"),
    (
        "manifest",
        "host",
        "plan",
        "outcome",
        "ending",
        "spec",
        "codec",
        "seccomp",
        "rebuild",
        "reply",
        "context",
        "grants",
        "units",
        "destinations",
        "http_rules",
        "http_paths",
        "suffixes",
    ),
    ("_linux",),
    ("errors", "digests"),
)
RANK = {part: len(LAYERS) - index for index, layer in enumerate(LAYERS) for part in layer}
SPLIT = {"profile": "profiles"} | {name: name for name in ("host", "runtime", "planner", "manifest", "prepare", "link")}

HEAVY = ("pydantic", "typer", "rich", "cryptography", "docker", "numpy", "pandas", "asyncio", "ctypes", "cloudpickle")

# The caller's function travels as cloudpickle and is loaded inside; the runner imports it when it needs it.
LOADED_INSIDE = {"cloudpickle"}
SLOW_TO_IMPORT = ("dataclasses", "inspect", "pydantic", "asyncio", "logging", "typing")
# What `_linux.bare` stands for, and what that brings along.
SLOW_FOR_A_ZYGOTE = ("collections", "contextlib", "enum", "functools", "json", "re", "signal", "socket", "termios")


@dataclass(frozen=True)
class Import:
    """One import statement: `target` is absolute, `deferred` when it stands in a function."""

    file: str
    line: int
    part: str
    target: str
    deferred: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"

    @property
    def target_part(self) -> str:
        """The part of our package that is imported, or "" when it is somebody else's."""
        names = self.target.split(".")
        return whole(names[1]) if names[0] == "sandbox" and len(names) > 1 else ""


def whole(name: str) -> str:
    """The part that a file belongs to: `profile_parse` to `profiles`, any other to the part of its own name."""
    first, _, rest = name.partition("_")
    return SPLIT.get(first, name) if first and rest else name


def part_of(path: Path, package: Path) -> str:
    relative = path.relative_to(package)
    return whole(relative.parts[0].removesuffix(".py"))


def absolute(node: ast.ImportFrom, path: Path, package: Path) -> list[str]:
    """What `from X import a, b` may load: `X.a` and `X.b` when X is our top level, else X."""
    base = node.module or ""
    if node.level:
        above = ["sandbox", *path.relative_to(package).parts[:-1]]
        above = above[: len(above) - (node.level - 1)]
        base = ".".join([*above, *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names] if base == "sandbox" else [base]


def imports_of(path: Path, package: Path = PACKAGE) -> Iterator[Import]:
    tree = ast.parse(path.read_text(), str(path))
    deferred: set[int] = set()
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            deferred.update(id(node) for node in ast.walk(function))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = absolute(node, path, package)
        else:
            continue
        for target in targets:
            file = str(path.relative_to(package.parent))
            yield Import(file, node.lineno, part_of(path, package), target, id(node) in deferred)


def all_imports(package: Path = PACKAGE) -> list[Import]:
    return [entry for path in sorted(package.rglob("*.py")) for entry in imports_of(path, package)]


def wrong_directions(imports: list[Import]) -> list[str]:
    """Imports that point up, that reach `_jail`, or whose part has no place in the layering."""
    wrong = []
    for entry in imports:
        target = entry.target_part
        if not target or target == "__version__" or target == entry.part or entry.part == "__init__":
            continue
        if target == "_jail":
            wrong.append(f"{entry}: _jail is started, never imported")
        elif entry.part == "_jail":
            if target not in ("_linux", "errors"):
                wrong.append(f"{entry}: _jail may use _linux and errors only")
        elif target not in RANK or entry.part not in RANK:
            wrong.append(f"{entry}: no layer is stated for it")
        elif RANK[target] > RANK[entry.part]:
            wrong.append(f"{entry}: points upwards")
    return wrong


def circle(imports: list[Import]) -> list[str]:
    """Parts that import each other in a circle, in order, or nothing."""
    edges: dict[str, set[str]] = {}
    for entry in imports:
        if entry.target_part in RANK and entry.part in RANK and entry.target_part != entry.part:
            edges.setdefault(entry.part, set()).add(entry.target_part)
    done: set[str] = set()

    def walk(part: str, path: list[str]) -> list[str]:
        if part in path:
            return [*path[path.index(part) :], part]
        if part in done:
            return []
        for target in sorted(edges.get(part, ())):
            found = walk(target, [*path, part])
            if found:
                return found
        done.add(part)
        return []

    return next((found for part in sorted(edges) if (found := walk(part, []))), [])


def test_imports_point_downwards() -> None:
    assert wrong_directions(all_imports()) == []


def test_no_parts_import_each_other_in_a_circle() -> None:
    assert circle(all_imports()) == []


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    package = tmp_path / "sandbox"
    (package / "_jail").mkdir(parents=True)
    (package / "audit").mkdir()
    (package / "plan.py").write_text("from sandbox.manifest import Manifest\nimport sandbox.runtime\n")
    (package / "manifest.py").write_text("def f():\n    from . import plan\n")
    (package / "audit" / "store.py").write_text("from ..supervisor import server\nfrom ..errors import AuditError\n")
    (package / "_jail" / "steps.py").write_text("from sandbox import plan\nfrom sandbox._linux import mount\n")
    (package / "host.py").write_text("from sandbox._jail import steps\nimport sandbox.novelty\n")
    found = "\n".join(wrong_directions(all_imports(package)))
    for expected in (
        "plan.py:2 imports sandbox.runtime: points upwards",
        "store.py:1 imports sandbox.supervisor: points upwards",
        "steps.py:1 imports sandbox.plan: _jail may use _linux and errors only",
        "host.py:1 imports sandbox._jail: _jail is started, never imported",
        "host.py:2 imports sandbox.novelty: no layer is stated for it",
    ):
        assert expected in found
    assert found.count("\n") == 4
    assert circle(all_imports(package)) == ["manifest", "plan", "manifest"]


def test_ctypes_lives_in_linux_only() -> None:
    strays = [str(entry) for entry in all_imports() if entry.target.split(".")[0] == "ctypes"]
    assert [stray for stray in strays if not stray.startswith("sandbox/_linux/")] == []


def test_the_jail_runs_on_the_standard_library() -> None:
    strays = []
    for entry in all_imports():
        top = entry.target.split(".")[0]
        if entry.part not in ("_jail", "_linux") or top == "sandbox" or top in sys.stdlib_module_names:
            continue
        if entry.part == "_jail" and (PACKAGE / "_jail" / f"{top}.py").exists():
            continue  # the runner is started as a file, beside its siblings
        if not (entry.deferred and top in LOADED_INSIDE):
            strays.append(str(entry))
    assert strays == []


@pytest.mark.parametrize("module", ["sandbox._jail.zygote", "sandbox._jail.pid1"])
def test_the_jail_starts_without_modules_that_are_slow_to_import(module: str) -> None:
    """`dataclasses` alone brings in `inspect`: a third more start time for every fresh interpreter."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert module in loaded
    slow = {*SLOW_TO_IMPORT, *SLOW_FOR_A_ZYGOTE}
    assert loaded.isdisjoint(slow), sorted(loaded.intersection(slow))


MEASURE = """
import json, sys, time
before = set(sys.modules)
start = time.process_time()
import sandbox
spent = time.process_time() - start
print(json.dumps({"cpu_s": spent, "loaded": sorted(set(sys.modules) - before)}))
"""


def test_import_sandbox_is_light(record_property: pytest.RecordProperty) -> None:
    """The fastest of three, since other work on the machine can only add to it."""
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=60)
        runs.append(json.loads(done.stdout))
    loaded = {name.split(".")[0] for name in runs[0]["loaded"]}
    assert "sandbox" in loaded, "the measurement saw the import happen"
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))
    cpu_s = min(run["cpu_s"] for run in runs)
    record_property("import_sandbox_cpu_ms", round(cpu_s * 1000, 2))
    print(f"import sandbox: {cpu_s * 1000:.1f} ms of CPU")
    assert cpu_s < 0.150
