"""How an ordinary user's supervisor gets cgroups of its own: a delegated scope of the user's systemd.

Source: systemd.resource-control(5) Delegate=, systemd-run(1), "Control Group APIs and Delegation" of systemd.
"""

from __future__ import annotations

import os
from pathlib import Path

from sandbox._linux import cgroup
from sandbox.host.facts import Feature

WANTED = ("memory", "pids", "cpu")


def delegation_prefix() -> list[str]:
    """The words to put before the supervisor's command line so that it starts in a delegated scope.

    Empty when it needs none (root, or a group that is delegated already) or when there is no systemd for the user. The
    scope keeps the process, its parent, descriptors and environment. Forks nothing, so any caller may ask.
    """
    layout = cgroup.detect()
    if os.geteuid() == 0 or all(layout.where(control) for control in WANTED):
        return []
    if not systemd_user(layout).ok:
        return []
    words = [] if os.environ.get("XDG_RUNTIME_DIR") else ["env", f"XDG_RUNTIME_DIR={_runtime_directory()}"]
    scope = ["--user", "--scope", "--quiet", "--collect", "--description=toolcall-sandbox supervisor"]
    return [*words, "systemd-run", *scope, "-p", "Delegate=yes", "--"]


def systemd_user(layout: cgroup.Layout) -> Feature:
    """Whether the user's systemd can give us a scope with at least memory and pids."""
    if not Path("/run/systemd/system").is_dir():
        return Feature(False, "systemd does not run this host")
    if not layout.v2:
        return Feature(False, "no cgroup v2 tree", _UNIFIED)
    if not any((Path(entry) / "systemd-run").exists() for entry in os.environ.get("PATH", os.defpath).split(":")):
        return Feature(False, "systemd-run is not in PATH")
    if not Path(_runtime_directory(), "systemd/private").is_socket():
        return Feature(False, "no systemd user manager runs for this uid", "sudo loginctl enable-linger $(id -un)")
    uid = os.geteuid()
    manager = Path(layout.v2.mount_point, f"user.slice/user-{uid}.slice/user@{uid}.service")
    try:
        offered = (manager / "cgroup.controllers").read_text(encoding="ascii").split()
    except OSError:
        return Feature(False, f"the user manager's group {manager} is not visible here")
    missing = [name for name in ("memory", "pids") if name not in offered]
    if missing and layout.v1:
        return Feature(False, f"{' and '.join(missing)} are controlled by cgroup v1 here", _UNIFIED)
    if missing:
        return Feature(
            False, f"the system's systemd does not pass {' and '.join(missing)} on to users", MORE_CONTROLLERS
        )
    return Feature(True)


_UNIFIED = "boot with systemd.unified_cgroup_hierarchy=1, or run as root"
MORE_CONTROLLERS = (
    "sudo mkdir -p /etc/systemd/system/user@.service.d"
    " && printf '[Service]\\nDelegate=cpu cpuset io memory pids\\n'"
    " | sudo tee /etc/systemd/system/user@.service.d/delegate.conf"
    " && sudo systemctl daemon-reload && sudo systemctl restart user@$(id -u).service"
)


def _runtime_directory() -> str:
    return os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
