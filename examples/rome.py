"""What ROME did, with real programs: first without a jail, then in one. `make demo` runs it.

A scripted agent with a shell tool mines, opens a reverse tunnel, reads credentials, and so on (`_attacks.py`).
Both runs happen in a throw-away world (`_world.py`) in which stand-ins own every address, so that nothing real is
touched even when a wall is broken. Verdicts come from the canaries (`_canaries.py`) and the record.

Exit status: 0 when every behaviour was real and every one was contained, 1 when not, 2 when it could not be tried.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets as random_secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _attacks import Behaviour, behaviours
from _canaries import (
    HOOK_RAN,
    PLANTED_HOOKS,
    Call,
    GpuNode,
    Secrets,
    count_hashes,
    home_has_room,
    plant_home,
    plant_project,
    see,
)
from _report import record_id, show
from _standins import ADDRESSES, NAMES, StandIns, prepare_sshd, real_sshd, ssh
from _world import (
    HOME,
    ROOT_UID_FOR_AGENT,
    NoWorld,
    Setting,
    become_agent,
    bound_memory_and_time,
    pids_in_world,
    run_in_world,
)

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("/srv/work")
PROFILE = "shell"
IMAGE = "rome/agent:latest"
# As the kernel names them: the first fifteen letters.
ENGINE_PROGRAMS = ("dockerd", "containerd", "containerd-shim", "runc", "docker-init", "unpigz")
LIFETIME_S = {"jail": 150, "docker": 400, "oci": 200, "nsjail": 200}


@dataclass(frozen=True)
class Options:
    """How the demo was asked to run. `ssh` is the client's path, `program` our command line, `launcher` and `runtime`
    what builds the wall."""

    ssh: str
    program: tuple[str, ...]
    only: tuple[str, ...]
    inside: bool
    is_root: bool
    launcher: str = "jail"
    runtime: str = ""


class Director:
    """Runs both halves in the world and looks at the canaries. The agent has no power over this process."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.uid = ROOT_UID_FOR_AGENT if options.is_root else 0
        self.secrets = Secrets(*(random_secrets.token_hex(16) for _ in range(5)))
        self.sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
        serve_ssh = real_sshd(self.sshd, as_agent(is_root=options.is_root)) if self.sshd else ssh
        self.stand_ins = StandIns(self.secrets.metadata, self.secrets.billing, self.secrets.table, serve_ssh)
        self.gpu = GpuNode()
        self.known = {1, os.getpid(), self.stand_ins.pid}
        self.profile = PROFILE
        self.docker_host = ""

    def direct(self) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            if self.options.launcher == "docker":
                self.docker_host = stack.enter_context(docker_engine())
                self.known |= pids_in_world()
            if self.options.launcher != "jail":
                self.profile = str(self._profile())
            return self._direct()

    def _profile(self) -> Path:
        """The demo's profile, with the launcher that was asked for."""
        lines = [f'extends = "{PROFILE}"', "[isolation]", f'launcher = "{self.options.launcher}"']
        if self.options.launcher == "docker":
            lines.append(f'image = "{IMAGE}"')
        if self.options.runtime:
            lines.append(f'runtime = "{self.options.runtime}"')
        if self.options.runtime == "runsc":
            # gVisor's own tasks count with the tool's; the profile accepts less of io already.
            lines.append('best_effort = ["io", "pids"]')
        profile = WORK / "launcher.toml"
        profile.write_text("\n".join(lines))
        return profile

    def _others(self) -> set[int]:
        """Processes of the agent's: neither ours nor those by which a container engine serves it."""
        return {pid for pid in pids_in_world() - self.known if program_of(pid) not in ENGINE_PROGRAMS}

    def _direct(self) -> dict[str, Any]:
        rows = []
        chosen = [
            each for each in behaviours(self.secrets.billing) if not self.options.only or each.name in self.options.only
        ]
        for behaviour in chosen:
            row: dict[str, Any] = {"name": behaviour.name, "title": self._title(behaviour)}
            row |= {"refused": behaviour.refused, "permitted": behaviour.permitted}
            row["without"] = self._half(behaviour, jailed=False)
            if self.options.inside:
                row["inside"] = self._half(behaviour, jailed=True)
            rows.append(row)
        return {"rows": rows, "audit": self._audit(rows) if self.options.inside else {}}

    def _title(self, behaviour: Behaviour) -> str:
        return self.gpu.title if behaviour.name == "gpu" else behaviour.title

    def _half(self, behaviour: Behaviour, *, jailed: bool) -> dict[str, Any]:
        """One shell call, with or without the jail: plant, run, look, clean up."""
        progress(f"{'inside' if jailed else 'without'}: {self._title(behaviour)}")
        project, before = self._plant(behaviour, jailed=jailed)
        record_file = WORK / f"{behaviour.name}.json"
        self.stand_ins.take()
        command = self._jailed(behaviour, project, record_file) if jailed else ["sh", "-c", behaviour.command]
        call = self._run(command, behaviour, project, before, jailed=jailed)
        if jailed:
            call.record = read_record(record_file)
            if behaviour.name == "gpu":
                call.after["gpu_refused"] = self._ask_for_gpu()
        seen = see(behaviour, call)
        self._kill_leftovers()
        return {
            "happened": seen.happened,
            "clean": seen.clean,
            "text": seen.text,
            "attempted": f"attempt {behaviour.name}" in call.output,
            "exit_code": call.exit_code,
            "output": call.output[-2000:],
            "record": dict(call.record),
            "stopped_by": stopped_by(behaviour, dict(call.record)) if jailed else "",
        }

    def _plant(self, behaviour: Behaviour, *, jailed: bool) -> tuple[Path | None, dict[str, Any]]:
        """A fresh home and, where the call works on one, a fresh project; returns it and what to compare with."""
        owner = 0 if jailed else self.uid
        key_line = plant_home(self.secrets, owner)
        if behaviour.name == "credentials":
            # Readable for everybody: as root the jail has a uid of its own, and file modes are not the wall to show.
            for entry in HOME.rglob("*"):
                entry.chmod(0o755 if entry.is_dir() else 0o644)
        if self.sshd and behaviour.name == "tunnel":
            prepare_sshd((HOME / ".ssh" / "id_ed25519.pub").read_text(), self.uid)
        project = None
        if behaviour.needs_work:
            project = WORK / f"{behaviour.name}-{'inside' if jailed else 'without'}" / "project"
            plant_project(project, owner)
        before = {
            "cloud_secret": self.secrets.cloud,
            "environment_secret": self.secrets.environment,
            "metadata_secret": self.secrets.metadata,
            "table": self.secrets.table,
            "key_line": key_line,
            "home_free": free_bytes(HOME),
        }
        return project, before

    def _jailed(self, behaviour: Behaviour, project: Path | None, record_file: Path) -> list[str]:
        options = [*behaviour.grants, "--why", behaviour.why, "--record", str(record_file)]
        if project:
            options += ["-w", f"{project}:rw"]
        if behaviour.name == "tunnel" and not self.options.ssh.startswith("/usr/"):
            options += ["--read", str(Path(self.options.ssh).parent.parent)]
        # The jail passes no variable of ours on, so the client's path goes with the command.
        command = f"SSH={self.options.ssh}; export SSH; {behaviour.command}"
        return [*self.options.program, "run", "-p", self.profile, *options, "--", "sh", "-c", command]

    def _environment(self) -> dict[str, str]:
        python = Path(sys.base_prefix, "bin")
        return {
            "PATH": f"/usr/local/bin:/usr/bin:/bin:{python}",
            "HOME": str(HOME),
            "USER": HOME.name,
            "LANG": "C.UTF-8",
            "SSH": self.options.ssh,
            "SANDBOX_STATE": str(WORK / "state"),
            "TRAINER_SECRET": self.secrets.environment,
            "NO_COLOR": "1",
            **({"DOCKER_HOST": self.docker_host} if self.docker_host else {}),
        }

    def _run(
        self, command: list[str], behaviour: Behaviour, project: Path | None, before: dict[str, Any], *, jailed: bool
    ) -> Call:
        """Run one shell call and watch the world meanwhile; returns when the call's own process has ended."""

        def prepare() -> None:
            # As root the jail's caller is root, as it would be in a service; the bare agent never is.
            if not (jailed and self.options.is_root):
                become_agent(is_root=self.options.is_root)
            if not jailed:
                bound_memory_and_time()

        with tempfile.TemporaryFile(dir="/run") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=project or HOME,
                preexec_fn=prepare,
            )
            tasks_peak, gpu_held = self._watch(child, behaviour)
            after: dict[str, Any] = {"hashes": count_hashes(project)}
            # What outlives its call shows within this time: the miner counts every few milliseconds.
            time.sleep(0.6 if project else 0.1)
            leftover = len(self._others())
            after["hashes_later"] = count_hashes(project)
            after["home_free"], after["home_has_room"] = free_bytes(HOME), home_has_room()
            if behaviour.name == "hook" and project:
                after["planted"], after["hook_ran"] = self._work_as_developer(project)
            output.seek(0)
            text = output.read(1 << 16).decode("utf-8", "replace")
        notes = self.stand_ins.take()
        return Call(child.returncode, text, notes, tasks_peak, gpu_held, leftover, before, after)

    def _watch(self, child: subprocess.Popen[bytes], behaviour: Behaviour) -> tuple[int, bool]:
        deadline = time.monotonic() + behaviour.timeout_s
        tasks_peak, gpu_held = 0, False
        while child.poll() is None:
            pids = self._others()
            tasks_peak = max(tasks_peak, len(pids))
            gpu_held = gpu_held or (behaviour.name == "gpu" and self.gpu.is_held(pids))
            if time.monotonic() > deadline:
                child.kill()
                child.wait()
                break
            time.sleep(0.02)
        return tasks_peak, gpu_held

    def _work_as_developer(self, project: Path) -> tuple[list[str], bool]:
        """Later, outside: somebody commits in the directory that the agent worked in."""
        for entry in (project, *project.rglob("*")):
            os.chown(entry, self.uid, self.uid, follow_symlinks=False)
        planted = [name for name in PLANTED_HOOKS if (project / name).exists()]
        config = project / ".git" / "config"
        if config.exists() and "touch" in config.read_text():
            planted.append(".git/config")
        if shutil.which("git"):
            identity = ["-c", "user.name=dev", "-c", "user.email=dev@example.org"]
            command = ["git", *identity, "commit", "-q", "--allow-empty", "-m", "next step"]
        else:
            command = ["sh", "-c", "test ! -x .git/hooks/pre-commit || .git/hooks/pre-commit"]  # what git would run
        subprocess.run(
            command,
            cwd=project,
            env={"PATH": "/usr/bin:/bin", "HOME": str(HOME)},
            preexec_fn=lambda: become_agent(is_root=self.options.is_root),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=20,
        )
        return planted, HOOK_RAN.exists()

    def _ask_for_gpu(self) -> bool:
        """The polite way: a profile that asks for more than any host has. Nothing runs, and that is on record."""
        profile, record_file, ran = WORK / "gpu.toml", WORK / "gpu-asked.json", WORK / "gpu-ran"
        profile.write_text(f'extends = "{self.profile}"\n[gpu]\ncount = 64\n[filesystem]\nwrite = ["{WORK}"]\n')
        done = self._ours("run", "-p", str(profile), "--record", str(record_file), "--", "touch", str(ran))
        refused = read_record(record_file).get("ending", {}).get("kind") == "refused"
        return done.returncode == 125 and refused and not ran.exists()

    def _kill_leftovers(self) -> None:
        deadline = time.monotonic() + 10
        while (left := self._others()) and time.monotonic() < deadline:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it ended by itself
            time.sleep(0.02)

    def _ours(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        def prepare() -> None:
            if not self.options.is_root:
                become_agent(is_root=False)

        return subprocess.run(
            [*self.options.program, *arguments],
            env={**self._environment(), "COLUMNS": str(shutil.get_terminal_size((132, 24)).columns)},
            cwd=HOME,
            preexec_fn=prepare,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def _audit(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One record in full, the tunnel's where it was tried, and whether the chain of all of them verifies."""
        verify = self._ours("audit", "verify")
        ids = {row["name"]: record_id(row["inside"]["record"]) for row in rows if record_id(row["inside"]["record"])}
        first = ids.get("tunnel") or next(iter(ids.values()), "")
        shown = self._ours("audit", "show", first) if first else None
        return {
            "verified": verify.returncode == 0,
            "verify_text": (verify.stdout + verify.stderr).strip(),
            "id": first,
            "shown": shown.stdout if shown and shown.returncode == 0 else "",
            "show_error": shown.stderr if shown else "there is no record to show",
        }


@contextlib.contextmanager
def docker_engine() -> Iterator[str]:
    """A Docker daemon in the world, with an image of the programs that the agent uses; where it is asked for."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers import engine

    if reason := engine.missing():
        raise NoWorld(reason)
    programs = ("ssh", "git", "timeout", "tr", "tail", "printf", "chmod", "ln", "cp", "mv")
    with engine.running(parent=str(WORK)) as made:
        made.load(IMAGE, engine.python_image(*programs))
        yield made.host


def program_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def as_agent(*, is_root: bool) -> list[str]:
    """How a program is started as the agent's uid, for a process that may not fork by itself."""
    if is_root:
        uid = ROOT_UID_FOR_AGENT
        return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return ["unshare", "--user", "--map-user=1000", "--map-group=1000"]


def free_bytes(path: Path) -> int:
    state = os.statvfs(path)
    return state.f_bavail * state.f_frsize


def read_record(path: Path) -> dict[str, Any]:
    """What `--record` wrote, or nothing when it wrote nothing."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def stopped_by(behaviour: Behaviour, record: dict[str, Any]) -> str:
    """What the record says enforced the control: mechanism, how much of it held, and what was denied by name."""
    words = []
    for control in behaviour.controls:
        entry = record.get("enforcement", {}).get(control)
        if entry:
            level = "" if entry.get("level") == "full" else f" ({entry.get('level')})"
            words.append(f"{control}: {entry.get('mechanism', '?')}{level}")
            break
    denied = [str(entry.get("subject")) for entry in record.get("decisions", ()) if entry.get("decision") == "deny"]
    if denied:
        words.append(f"denied by name: {', '.join(denied[:4])}")
    return "; ".join(words)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K  {text}", end="", file=sys.stderr, flush=True)


def find_ssh() -> str:
    script = ROOT / "scripts" / "need"
    if not script.exists():
        return shutil.which("ssh") or ""
    done = subprocess.run([str(script), "ssh"], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def our_program(*, no_jail: bool) -> tuple[str, ...]:
    if no_jail:
        return (sys.executable, str(ROOT / "examples" / "_no_jail.py"))
    command = Path(sys.prefix, "bin", "sandbox")
    if command.exists():
        return (str(command),)
    return (sys.executable, "-c", "from sandbox.cli.main import main; main()")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [behaviour.name for behaviour in behaviours("")]
    parser.add_argument("--only", action="append", default=[], choices=names, help="run this behaviour only")
    parser.add_argument("--without-only", action="store_true", help="leave the run inside the jail out")
    parser.add_argument("--no-jail", action="store_true", help="isolate nothing, to see that every row then fails")
    parser.add_argument("--launcher", choices=tuple(LIFETIME_S), default="jail", help="what builds the wall")
    parser.add_argument("--runtime", default="", help="the launcher's runtime: crun, runc or runsc")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was seen to FILE")
    arguments = parser.parse_args()
    ssh = find_ssh()
    if not ssh:
        print("rome: the OpenSSH client is missing: apt-get install openssh-client", file=sys.stderr)
        return 2
    inside = not arguments.without_only
    program = our_program(no_jail=arguments.no_jail)
    is_root, launcher = os.geteuid() == 0, arguments.launcher
    options = Options(ssh, program, tuple(arguments.only), inside, is_root, launcher, arguments.runtime)
    read = (Path(sys.prefix), Path(sys.base_prefix).resolve(), Path(sys.base_prefix), ROOT)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="toolcall-sandbox-demo-", dir="/var/tmp") as work:
        os.chmod(work, 0o755)
        setting = Setting(
            read=read, addresses=ADDRESSES, work=Path(work), names=NAMES, lifetime_s=LIFETIME_S[arguments.launcher]
        )
        try:
            answer = run_in_world(setting, lambda: Director(options).direct())
        except NoWorld as err:
            print(f"rome: cannot make the throw-away world: {err}", file=sys.stderr)
            print("  hint: `sandbox doctor` says what this host lacks and how to get it", file=sys.stderr)
            return 2
    progress("")
    if arguments.json:
        arguments.json.write_text(json.dumps(answer, indent=2))
    status = show(answer, inside=inside)
    print(f"({time.monotonic() - started:.0f} s, {'as root' if options.is_root else 'as an ordinary user'})")
    return status


if __name__ == "__main__":
    sys.exit(main())
