"""What one call may read, write, reach, execute and consume: complete, frozen, with units in the names.

A manifest is the result of resolving a profile (see `profiles`); its defaults grant nothing and every limit that
can be crossed in silence is finite. Here are the shapes, the ranges and what contradicts itself; units, relative
paths and inheritance belong to the profile layer. Nothing here looks at a file.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sandbox.destinations import canonical_denied_host, canonical_host
from sandbox.errors import ManifestError
from sandbox.grants import (
    check_beneath,
    check_grant,
    check_path,
    check_pattern,
    check_text,
    denied_by,
    path_within,
)
from sandbox.http_rules import HttpRules, canonical_http
from sandbox.manifest_secrets import Secrets
from sandbox.manifest_words import explain as explain
from sandbox.units import SIZES

Control = Literal[
    "filesystem",
    "network",
    "processes",
    "memory",
    "cpus",
    "cpu_time",
    "wall_time",
    "pids",
    "disk",
    "inodes",
    "output",
    "open_files",
    "io",
    "gpu",
    "syscalls",
    "landlock",
]
CONTROLS: Final[tuple[str, ...]] = get_args(Control)

MIB: Final = SIZES["MiB"]
# RFC 8785 writes numbers as doubles: above 2^53 two manifests could share one digest.
BYTES_MAX: Final = 1 << 53
MEMORY_MAX: Final = 16 * SIZES["TiB"]
SECONDS_MAX: Final = 30 * 86400.0
PIDS_MAX: Final = 4194304  # PID_MAX_LIMIT of 64-bit kernels
ENTRIES_MAX: Final = 1000
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_DEVICE = re.compile(r"[0-9]{1,3}(:[0-9]{1,3})?|(GPU|MIG)-[A-Za-z0-9/-]{1,80}", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,254}(@sha256:[0-9a-f]{64})?", re.ASCII)
# The jail mounts its own of these; a host tree in their place would undo the walls (or the mount order would).
_JAIL_OWNS: Final = ("/proc", "/sys", "/dev")
_JAIL_OWNS_ITSELF: Final = ("/", "/tmp", "/var/tmp", "/run")  # noqa: S108 - names of paths, nothing is written


def _env_name(name: str) -> str:
    if not _ENV_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a variable name; allowed: letters, digits, '_', no wildcard")
    return name


def _env_value(value: str) -> str:
    # The value itself stays out of the message: it may be a secret, and messages are logged.
    if "\0" in value or any(0xD800 <= ord(c) < 0xE000 for c in value):
        raise ValueError("the value contains NUL or is not valid UTF-8")
    if len(value.encode()) > 128 * 1024 - 512:
        raise ValueError("the value is longer than Linux passes to a program (128 KiB)")
    return value


def _write_grant(path: str) -> str:
    if path == ":minimal":
        raise ValueError("':minimal' is the read-only system view; allowed here: a path, ':workspace', ':tmp'")
    return check_grant(path)


def _device(name: str) -> str:
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"{name!r} is not a GPU; allowed: an index such as '0', 'GPU-<uuid>' or 'MIG-<uuid>'")
    return name


def _name(name: str) -> str:
    if name and not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name; allowed: letters, digits, '.', '_', '-', at most 64")
    return name


def _image(name: str) -> str:
    if name and not _IMAGE.fullmatch(name):
        raise ValueError(f"{name!r} is not an image; allowed: a name such as 'python:3.11-slim' or one with '@sha256:'")
    return name


def _workspace(path: str) -> str:
    return check_path(path) if path else path


def _unique(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(entries))


def _count(low: int, high: int) -> Any:
    return Field(strict=True, ge=low, le=high)


def _real(low: float, high: float) -> Any:
    return Field(strict=True, ge=low, le=high, allow_inf_nan=False)


_List = (Field(max_length=ENTRIES_MAX), AfterValidator(_unique))
Bytes = Annotated[int, _count(1, BYTES_MAX)]
Seconds = Annotated[float, _real(0.001, SECONDS_MAX)]
Connections = Annotated[int, _count(1, 1_000_000)]
ReadGrants = Annotated[tuple[Annotated[str, AfterValidator(check_grant)], ...], *_List]
WriteGrants = Annotated[tuple[Annotated[str, AfterValidator(_write_grant)], ...], *_List]
Patterns = Annotated[tuple[Annotated[str, AfterValidator(check_pattern)], ...], *_List]
Beneath = Annotated[tuple[Annotated[str, AfterValidator(check_beneath)], ...], *_List]
Hosts = Annotated[tuple[Annotated[str, AfterValidator(canonical_host)], ...], *_List]
DeniedHosts = Annotated[tuple[Annotated[str, AfterValidator(canonical_denied_host)], ...], *_List]
HttpTexts = Annotated[tuple[Annotated[str, AfterValidator(canonical_http)], ...], *_List]
Programs = Annotated[tuple[Annotated[str, AfterValidator(check_path)], ...], *_List]
EnvNames = Annotated[tuple[Annotated[str, AfterValidator(_env_name)], ...], *_List]
EnvName = Annotated[str, AfterValidator(_env_name)]
EnvValue = Annotated[str, AfterValidator(_env_value)]
Devices = Annotated[tuple[Annotated[str, AfterValidator(_device)], ...], Field(max_length=64), AfterValidator(_unique)]
Controls = Annotated[tuple[Control, ...], AfterValidator(_unique)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Filesystem(_Section):
    """Trees of the host. Writing implies reading; `deny` wins over both at any depth."""

    read: ReadGrants = ()
    write: WriteGrants = ()
    deny: Patterns = ()
    allow_protected: Beneath = ()
    workspace: Annotated[str, AfterValidator(_workspace)] = ""
    workspace_mode: Literal["private", "rw", "cow", "ro"] = "private"


class Network(_Section):
    """Hosts by name and port. "none": not even a gateway is there.

    The budgets count all flows of the call together; those named `host_…` hold for each host by itself. `on_breach`
    says what else happens when one is crossed, beside the end of the flow: "kill" ends the call. `http` restricts
    what hosts may be sent; `extra_roots` are files of authorities that the servers of inspected TLS may have beside
    the system's.
    """

    mode: Literal["none", "allowlist"] = "none"
    allow: Hosts = ()
    deny: DeniedHosts = ()
    http: HttpTexts = ()
    extra_roots: Programs = ()
    upload_max_bytes: Bytes | None = 16 * MIB
    download_max_bytes: Bytes | None = 256 * MIB
    rate_bytes_per_s: Annotated[int, _count(1024, BYTES_MAX)] | None = None
    connections_max: Connections | None = 4096
    connections_at_once: Connections = 256
    flow_time_s: Seconds | None = None
    idle_time_s: Seconds | None = 300.0
    host_upload_max_bytes: Bytes | None = None
    host_download_max_bytes: Bytes | None = None
    host_rate_bytes_per_s: Annotated[int, _count(1024, BYTES_MAX)] | None = None
    host_connections_max: Connections | None = None
    host_connections_at_once: Connections | None = None
    on_breach: Literal["cut", "kill"] = "cut"


class Resources(_Section):
    """Ceilings of one call. None is without a ceiling of its own: wall time and cpus still bound it."""

    cpus: Annotated[float, _real(0.01, 1024.0)] = 1.0
    memory_bytes: Annotated[int, _count(MIB, MEMORY_MAX)] = 512 * MIB
    pids: Annotated[int, _count(1, PIDS_MAX)] = 64
    cpu_time_s: Seconds | None = None
    wall_time_s: Seconds = 30.0
    disk_bytes: Annotated[int, _count(4096, MEMORY_MAX)] = 256 * MIB
    inodes: Annotated[int, _count(16, 1 << 31)] = 65536
    output_bytes: Bytes = 8 * MIB
    open_files: Annotated[int, _count(16, 1 << 20)] = 1024
    io_bytes_per_s: Annotated[int, _count(4096, BYTES_MAX)] | None = None


class Gpu(_Section):
    """Any `count` GPUs, or the named `devices`; the limits hold for the call as a whole.

    `duty_percent` for `duty_time_s` without a break is reported as a finding; it ends nothing.
    """

    count: Annotated[int, _count(0, 64)] = 0
    devices: Devices = ()
    memory_bytes: Annotated[int, _count(MIB, MEMORY_MAX)] | None = None
    sm_percent: Annotated[int, _count(1, 100)] | None = None
    seconds: Seconds | None = None
    energy_j: Annotated[float, _real(0.001, 1e12)] | None = None
    power_watts: Annotated[int, _count(1, 10000)] | None = None
    processes_max: Annotated[int, _count(1, PIDS_MAX)] | None = None
    allow_mps: Annotated[bool, Field(strict=True)] = False
    duty_percent: Annotated[int, _count(50, 100)] = 95
    duty_time_s: Seconds = 300.0


class Environment(_Section):
    """`allow` passes the caller's variable of that name; `set` gives a value. Nothing else is inherited."""

    allow: EnvNames = ()
    set: dict[EnvName, EnvValue] = Field(default_factory=dict, max_length=ENTRIES_MAX)


class Process(_Section):
    """`allow_exec` None: whatever the jail can see. `warm` False: a fresh interpreter for each call."""

    allow_exec: Programs | None = None
    warm: Annotated[bool, Field(strict=True)] = True


class Audit(_Section):
    """Content is stored only where `capture` asks for it; digests always."""

    capture: Annotated[tuple[Literal["args", "output", "result"], ...], AfterValidator(_unique)] = ()
    durability: Literal["fsync", "flush"] = "flush"


class Isolation(_Section):
    """`launcher` "auto": the cheapest that gives `minimum`, by itself the native jail. `image`: whose root a container
    gets, for launchers that take one. `runtime`: the OCI runtime that a launcher is to use, empty for its default.

    `best_effort`: controls that may be less than full here, said so in the record. `required`: must be full."""

    launcher: Annotated[str, AfterValidator(_name), Field(min_length=1)] = "auto"
    image: Annotated[str, AfterValidator(_image)] = ""
    runtime: Literal["", "runc", "crun", "runsc", "kata"] = ""
    minimum: Literal["namespaces", "userspace-kernel", "microvm"] = "namespaces"
    required: Controls = ()
    best_effort: Controls = ()


SECTIONS: Final[dict[str, type[BaseModel]]] = {
    "filesystem": Filesystem,
    "network": Network,
    "resources": Resources,
    "gpu": Gpu,
    "environment": Environment,
    "secrets": Secrets,
    "process": Process,
    "audit": Audit,
    "isolation": Isolation,
}


class Contradiction(ValueError):
    """Two values that are each fine: `key` and `entry` name the one to change, `other` the one it clashes with."""

    def __init__(self, message: str, key: str, entry: str = "", other: tuple[str, str] = ("", ""), hint: str = ""):
        super().__init__(message)
        self.key, self.entry, self.other, self.hint = key, entry, other, hint


class Manifest(BaseModel):
    """The whole of what one call may do.

    Args: the sections, each a model or a mapping of its fields; `name` and `description` are for people.
    Raises: ManifestError: the first thing that is wrong, with its key, the value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, AfterValidator(_name)] = ""
    description: Annotated[str, Field(max_length=1000), AfterValidator(check_text)] = ""
    filesystem: Filesystem = Filesystem()
    network: Network = Network()
    resources: Resources = Resources()
    gpu: Gpu = Gpu()
    environment: Environment = Field(default_factory=Environment)
    secrets: Secrets = Field(default_factory=Secrets)
    process: Process = Process()
    audit: Audit = Audit()
    isolation: Isolation = Isolation()

    def __init__(self, /, **sections: Any) -> None:
        try:
            super().__init__(**sections)
        except ValidationError as err:
            raise _manifest_error(err) from err

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        try:
            return super().model_validate(obj, **options)
        except ValidationError as err:
            raise _manifest_error(err) from err

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as err:
            raise _manifest_error(err) from err

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        _check_filesystem(self.filesystem)
        if self.network.mode == "none" and self.network.allow:
            raise Contradiction("names hosts while network.mode is 'none'", "network.allow", self.network.allow[0])
        if self.gpu.count and self.gpu.devices:
            message = f"asks for any {self.gpu.count} and gpu.devices for {list(self.gpu.devices)}: say one"
            raise Contradiction(message, "gpu.count", other=("gpu.devices", self.gpu.devices[0]))
        _check_secrets(self)
        _check_isolation(self.isolation)
        for control in self.isolation.best_effort:
            if control in self.isolation.required:
                message = f"{control!r} cannot be required and best_effort at once"
                raise Contradiction(message, "isolation.best_effort", control, ("isolation.required", control))
        return self

    def __hash__(self) -> int:
        # `environment.set` and `secrets` are dicts, so the hash that pydantic generates would fail.
        return hash(self.digest)

    @property
    def workspace_writable(self) -> bool:
        """Whether the call may write in its workspace (the host's directory only in mode "rw")."""
        return self.filesystem.workspace_mode != "ro" and ":workspace" in self.filesystem.write

    @property
    def digest(self) -> str:
        """ "sha256:…" over `canonical_bytes`: equal manifests have equal digests, on every machine."""
        return f"sha256:{hashlib.sha256(self.canonical_bytes()).hexdigest()}"

    def canonical_bytes(self) -> bytes:
        """RFC 8785 bytes of the JSON form."""
        import rfc8785

        return rfc8785.dumps(self.model_dump(mode="json"))


def _check_filesystem(fs: Filesystem) -> None:
    for key, grants in (("filesystem.read", fs.read), ("filesystem.write", fs.write)):
        for path in grants:
            _check_not_owned(key, path)
    for path in fs.write:
        if not path.startswith(":") and (pattern := denied_by(path, fs.deny)):
            message = f"grants writing to {path!r} inside the denied tree {pattern!r}; deny always wins"
            hint = "take one of the two away"
            raise Contradiction(message, "filesystem.write", path, ("filesystem.deny", pattern), hint)
    key = "filesystem.workspace"
    if bool(fs.workspace) == (fs.workspace_mode == "private"):
        message = f"is {fs.workspace!r} while workspace_mode is {fs.workspace_mode!r}: a private workspace has no path"
        raise Contradiction(message, key, other=("filesystem.workspace_mode", ""))
    if fs.workspace:
        _check_not_owned(key, fs.workspace)
        if pattern := denied_by(fs.workspace, fs.deny):
            message = f"{fs.workspace!r} lies inside the denied tree {pattern!r}; deny always wins"
            raise Contradiction(message, key, other=("filesystem.deny", pattern))
    if fs.workspace_mode in ("rw", "cow") and ":workspace" not in fs.write:
        message = f"is {fs.workspace_mode!r} but filesystem.write does not name ':workspace'"
        raise Contradiction(message, "filesystem.workspace_mode")


def _check_isolation(isolation: Isolation) -> None:
    other = ("isolation.launcher", "")
    if isolation.launcher == "jail" and isolation.image:
        raise Contradiction("the native launcher takes no image", "isolation.image", isolation.image, other)
    if isolation.launcher in ("jail", "nsjail") and isolation.runtime:
        message = f"the launcher {isolation.launcher!r} drives no OCI runtime"
        raise Contradiction(message, "isolation.runtime", isolation.runtime, other)
    if isolation.launcher == "docker" and not isolation.image:
        hint = "name one that is there: isolation.image = 'python:3.11-slim'"
        raise Contradiction("docker needs an image", "isolation.image", other=other, hint=hint)


def _check_secrets(manifest: Manifest) -> None:
    rules = HttpRules(manifest.network.http)
    for name, secret in manifest.secrets.entries.items():
        key = f"secrets.{name}"
        if rules.group(secret.host) is None:
            hint = "add [[network.http]] with that host, and inspect = true for HTTPS"
            raise Contradiction(f"no HTTP rule names {secret.host}: only there requests are seen", key, hint=hint)
        if name in manifest.environment.set:
            other = (f"environment.set.{name}", "")
            raise Contradiction("is also a variable that environment.set sets: say one", key, other=other)
        for variable in {name, secret.env}.intersection(manifest.environment.allow):
            message = f"environment.allow passes the variable {variable} on, and with it the value"
            raise Contradiction(message, key, other=("environment.allow", variable))
        if tree := _showing(manifest.filesystem, secret.file):
            hint = f"deny it: filesystem.deny = [{secret.file!r}]"
            raise Contradiction(f"the file {secret.file!r} is readable inside, in {tree!r}", key, hint=hint)


def _showing(fs: Filesystem, path: str) -> str:
    """The granted tree in which `path` can be read; empty when there is none."""
    if not path or denied_by(path, fs.deny):
        return ""
    trees = (*fs.read, *fs.write, *filter(None, (fs.workspace,)))
    return next((tree for tree in trees if tree.startswith("/") and path_within(path, tree)), "")


def _check_not_owned(key: str, path: str) -> None:
    if path in _JAIL_OWNS_ITSELF or any(path_within(path, owned) for owned in _JAIL_OWNS if path.startswith("/")):
        hint = "name a directory below it, or ':tmp'" if path.endswith("tmp") else "name the directories it needs"
        raise Contradiction(f"{path!r} is the jail's own and cannot be granted from the host", key, path, hint=hint)


def _manifest_error(err: ValidationError) -> ManifestError:
    details = err.errors(include_url=False)[0]
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ManifestError):
        return cause
    if isinstance(cause, Contradiction):
        return ManifestError(str(cause), where=cause.key, hint=cause.hint)
    where = ".".join(str(part) for part in details["loc"])
    return ManifestError(explain(details), where=where)
