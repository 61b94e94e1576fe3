"""A process in which the host seems to have two GPUs: a private /dev with stand-in nodes, a private /run with the
stand-in library. Started as `python -m tests.helpers.gpu_world SCENE DIRECTORY LIBRARY`; prints one JSON line.

The nodes are harmless devices of the kernel under NVIDIA's names: nvidia0 is /dev/net/tun's number and nvidia1 is
/dev/fuse's, so that opening one works or is refused for real; the control nodes have numbers without a driver.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sandbox import Sandbox, SandboxError
from sandbox._linux import mounts, syscalls
from tests.helpers import nvml

NODES = {"nvidia0": (10, 200), "nvidia1": (10, 229), "nvidiactl": (195, 255), "nvidia-uvm": (510, 0)}
PLAIN = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
LIBRARIES = Path("/run/opengl-driver/lib")
SCENARIO = Path("/run/standin/scenario")


def enter(directory: Path, library: Path) -> nvml.Scenario:
    """Make the world, in a mount namespace of this process's own."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.make_private()
    dev = directory / "dev"
    dev.mkdir()
    mounts.mount("tmpfs", str(dev), "tmpfs", 0, "size=64k,mode=755")
    os.umask(0)
    for name, (major, minor) in {**PLAIN, **NODES}.items():
        os.mknod(dev / name, 0o020666, os.makedev(major, minor))
    for name in ("pts", "shm"):
        (dev / name).mkdir()
    mounts.bind("/dev/pts", str(dev / "pts"), 0)
    os.symlink("pts/ptmx", dev / "ptmx")
    mounts.bind(str(dev), "/dev", 0)
    mounts.mount("tmpfs", "/run", "tmpfs", 0, "size=16m,mode=755")
    os.umask(0o022)
    LIBRARIES.mkdir(parents=True)
    SCENARIO.parent.mkdir()
    shutil.copy(library, LIBRARIES)
    os.symlink("libnvidia-ml.so.1", LIBRARIES / "libcuda.so.1")
    return nvml.Scenario(SCENARIO).device(0).device(1, used=9000).write()


class Call:
    """A running call, whose tool can be given a process on a stand-in GPU."""

    def __init__(self, box: Sandbox, argv: list[str], **gpu: Any) -> None:
        self.stream = box.stream(argv, **{f"gpu.{name}": value for name, value in gpu.items()})
        lines = iter(self.stream)
        assert next(lines)[1].startswith(b"up")
        self.pid = self._find(argv[-1])

    @staticmethod
    def _find(marker: str) -> int:
        """The host's pid of the tool, by its last argument."""
        for _ in range(200):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                if pid != str(os.getpid()) and _words(pid)[-1:] == [marker] and "toolcall-sandbox" in _groups(pid):
                    return int(pid)
            time.sleep(0.01)
        raise AssertionError(f"no process with {marker!r}")

    def end(self) -> Any:
        with self.stream:
            return self.stream.outcome


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _words(pid: str, file: str = "cmdline") -> list[str]:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _groups(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""


def tool(marker: str, seconds: float = 20) -> list[str]:
    return ["python3", "-c", f"import time; print('up', flush=True); time.sleep({seconds})", marker]


def told(outcome: Any) -> dict[str, Any]:
    """What tests look at."""
    record = outcome.record.to_json()
    return {
        "ending": record["ending"],
        "gpu": record["usage"]["gpu"],
        "findings": record["findings"],
        "enforcement": {name: row for name, row in record["enforcement"].items() if name.startswith("gpu")},
        "env_names": record["command"]["env_names"],
        "stdout": outcome.text,
        "stderr": outcome.stderr.decode(errors="replace"),
        "isolation": record["isolation"],
        "duration_s": record["time"]["duration_s"],
    }


LOOK = """
import errno, json, os, sys
def opened(path):
    try:
        os.close(os.open(path, os.O_RDWR)); return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
nodes = sorted(n for n in os.listdir("/dev") if n.startswith("nvidia"))
try:
    os.mknod("/tmp/nvidia1", 0o020666, os.makedev(10, 229)); made = "ok"
except OSError as error:
    made = errno.errorcode[error.errno]
print(json.dumps({
    "nodes": {n: opened("/dev/" + n) for n in nodes}, "other": opened("/dev/nvidia1"), "made": made,
    "plain": {n: opened("/dev/" + n) for n in ("null", "zero", "full", "random", "urandom")},
    "env": {n: os.environ.get(n) for n in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")},
    "libraries": sorted(os.listdir("/run/opengl-driver/lib")) if os.path.isdir("/run/opengl-driver/lib") else None,
}))
"""


def scene_nodes(box: Sandbox, world: nvml.Scenario) -> Any:
    """A look around inside, with one GPU and without."""
    argv = ["python3", "-c", LOOK]
    return {"with": told(box.run(argv, **{"gpu.count": 1})), "without": told(box.run(argv))}


def scene_plan(box: Sandbox, world: nvml.Scenario) -> Any:
    limits = {"gpu.count": 1, "gpu.memory": "1GiB", "gpu.time": "5s", "gpu.power_watts": 150, "gpu.processes_max": 2}
    plan = box.plan(["true"], **limits)
    found = {limit.control: [limit.level, limit.strength] for limit in plan.limits if limit.control.startswith("gpu")}
    try:
        box.run(["true"], **{"gpu.count": 1, "gpu.sm_percent": 50})
    except SandboxError as error:
        found["refused"] = str(error)
    done = told(box.run(["true"], **{"gpu.count": 1, "gpu.sm_percent": 50, "best_effort": ["gpu", "io"]}))
    return {**found, "accepted": done}


def scene_memory(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, tool("grows"), count=1, memory="1GiB")
    world.process(0, call.pid, 700).write()
    time.sleep(0.4)
    world.processes.clear()
    world.process(0, call.pid, 1700, sm=80).write()
    wrote = time.monotonic()
    outcome = call.end()
    return {**told(outcome), "waited_s": time.monotonic() - wrote}


def scene_within(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, tool("within", 2.6), count=1, memory="1GiB", time="10s", energy_j=500.0, processes_max=2)
    world.devices.clear()
    world.device(0, rate=100000, sm=50, pcie=100).device(1, used=9000)
    world.process(0, call.pid, 700, sm=50).write()
    return told(call.end())


def scene_seconds(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, tool("hash"), count=1, time="1.5s")
    world.process(0, call.pid, 100, sm=100).write()
    return told(call.end())


def scene_energy(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, tool("hot"), count=1, energy_j=200.0)
    world.devices.clear()
    world.device(0, rate=400000).device(1, used=9000).process(0, call.pid, 100).write()
    return told(call.end())


def scene_processes(box: Sandbox, world: nvml.Scenario) -> Any:
    source = "import os, time\nfor _ in range(2):\n    if os.fork() == 0:\n        time.sleep(20); os._exit(0)\n"
    source += "print('up', flush=True); time.sleep(20)"
    call = Call(box, ["python3", "-c", source, "many"], count=1, processes_max=2)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if _words(pid)[-1:] == ["many"] and "toolcall-sandbox" in _groups(pid):
            world.process(0, int(pid), 10)
    world.write()
    return told(call.end())


def scene_no_grant(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, tool("sneaks"))
    world.process(1, call.pid, 100).write()
    return told(call.end())


def scene_no_grant_slow(box: Sandbox, world: nvml.Scenario) -> Any:
    """The same process on a GPU that it was granted is fine."""
    call = Call(box, tool("fine", 2.5), count=1)
    world.process(0, call.pid, 100).write()
    return told(call.end())


def scene_other_device(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, tool("strays"), count=1)
    world.process(1, call.pid, 100).write()
    return told(call.end())


def scene_lost(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, tool("lost"), count=1, memory="1GiB")
    world.fail("nvmlDeviceGetMemoryInfo", 15).write()
    return told(call.end())


def scene_mismatch(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, tool("upgraded"), count=1, memory="1GiB")
    world.fail("nvmlDeviceGetMemoryInfo", 18).fail("nvmlInitWithFlags", 18).write()
    return told(call.end())


def scene_hang(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, tool("stuck"), count=1, memory="1GiB")
    world.hang("nvmlDeviceGetMemoryInfo", 6000).write()
    return told(call.end())


def scene_busy(box: Sandbox, world: nvml.Scenario) -> Any:
    """Two calls get two GPUs, a third none; after one has ended there is one again."""
    first, second = Call(box, tool("one"), count=1), Call(box, tool("two"), count=1)
    third = told(box.run(["true"], **{"gpu.count": 1}))
    first.stream.signal(9)
    one = told(first.end())
    fourth = told(box.run(["true"], **{"gpu.count": 1}))
    second.stream.signal(9)
    return {"one": one, "two": told(second.end()), "third": third, "fourth": fourth}


def scene_power(box: Sandbox, world: nvml.Scenario) -> Any:
    return {**told(box.run(["true"], **{"gpu.count": 1, "gpu.power_watts": 150})), "log": world.log}


def scene_power_left(box: Sandbox, world: nvml.Scenario) -> Any:
    """A holder that died before it could put the power limit back."""
    leases = Path("/run/toolcall-sandbox/gpu")
    leases.mkdir(parents=True, mode=0o700)
    (leases / "GPU-standin-0.lease").write_text('{"pid": 1, "call_id": "dead", "power_before_mw": 250000}')
    return {**told(box.run(["true"], **{"gpu.count": 1})), "log": world.log}


def scene_driver_limit(box: Sandbox, world: nvml.Scenario) -> Any:
    """r615, with a version 2 tree at its usual place; on a hybrid host its own is put there."""
    if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        mounts.bind("/sys/fs/cgroup/unified", "/sys/fs/cgroup", 0)
    world.driver = "615.10"
    world.write()
    less = ["memory", "cpus", "cpu_time", "pids", "io"]
    state = Path(box.state).with_name("state-615")
    with Sandbox("shell", state=state, wall_time="30s", best_effort=less) as newer:
        done = told(newer.run(["true"], **{"gpu.count": 1, "gpu.memory": "5GiB"}))
        world.fail("nvmlDeviceSetMemoryLimits_v1", 4).write()
        failed = told(newer.run(["true"], **{"gpu.count": 1, "gpu.memory": "5GiB"}))
    return {**done, "log": world.log, "failed": failed}


def scene_supervisor_dies(box: Sandbox, world: nvml.Scenario) -> Any:
    """The lease goes with the supervisor that held it."""
    call = Call(box, tool("orphan"), count=2)
    assert box._link is not None
    held = _cli("gpu", "--json")
    os.kill(box._link.supervisor_pid, signal.SIGKILL)
    try:
        call.end()
        lost = ""
    except SandboxError as error:
        lost = type(error).__name__
    units = [json.loads(text)["units"] for text in (held, _cli("gpu", "--json"))]
    leases = [[unit["lease"] is not None for unit in row] for row in units]
    return {"lost": lost, "leases": leases, "next": told(box.run(["true"], **{"gpu.count": 2}))}


def before_cli(world: nvml.Scenario) -> None:
    """A GPU in slices, and a reading that it does not have: devices are found when the supervisor starts."""
    world.devices.clear()
    world.device(0, sm=30).device(1, mig=1).slice(1, 0).fail("nvmlDeviceGetPowerUsage", 3).write()


def scene_cli(box: Sandbox, world: nvml.Scenario) -> Any:
    """`sandbox gpu` and `sandbox doctor` beside a call that holds a GPU."""
    call = Call(box, tool("shown"), count=1)
    world.process(0, call.pid, 100).write()
    shown = [_cli("gpu", "--json"), _cli("gpu"), _cli("doctor")]
    watching = subprocess.Popen([*CLI, "gpu", "--json", "--watch"], stdout=subprocess.PIPE, text=True)
    with watching:
        assert watching.stdout is not None
        lines = [json.loads(watching.stdout.readline()) for _ in range(2)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 0, "interrupting it is how it ends"
    call.stream.signal(9)
    text = {"text": shown[1], "doctor": shown[2], "watched": [line["units"][0]["processes"] for line in lines]}
    return {"call": told(call.end()), "json": json.loads(shown[0]), **text}


def scene_bench(box: Sandbox, world: nvml.Scenario) -> Any:
    """`bench/gpu.py` from end to end, with a stand-in for CUDA: each of its programs gets a process on the GPU."""
    source = Path(__file__).with_name("cuda_standin.c")
    (LIBRARIES / "libcuda.so.1").unlink()
    target = str(LIBRARIES / "libcuda.so.1")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", target, str(source)], check=True, timeout=60)
    bench = Path(__file__).parents[2] / "bench" / "gpu.py"
    with subprocess.Popen([sys.executable, str(bench), "--quick"], stdout=subprocess.PIPE, text=True) as running:
        while running.poll() is None:
            world.processes.clear()
            world.devices.clear()
            world.device(0, rate=100000).device(1, rate=100000, used=9000)
            for pid in filter(str.isdigit, os.listdir("/proc")):
                words = _words(pid)
                if words[3:4] in (["fill"], ["hash"]) and _name(pid) == "has-gpu-memory":
                    unit = 1 if "CUDA_VISIBLE_DEVICES=GPU-standin-1" in _words(pid, "environ") else 0
                    world.process(unit, int(pid), int(words[4]) if words[3] == "fill" else 10, sm=100)
            world.write()
            time.sleep(0.05)
        assert running.stdout is not None
        return json.loads(running.stdout.read())


CLI = [sys.executable, "-c", "from sandbox.cli.main import main; main()"]


def _cli(*argv: str) -> str:
    done = subprocess.run([*CLI, *argv], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def scene_miner(box: Sandbox, world: nvml.Scenario) -> Any:
    call = Call(box, [*tool("x")[:3], "--algo=kawpow", "stratum+tcp://pool.example:3333"], count=1, duty_time="1s")
    world.devices.clear()
    world.device(0, sm=99, pcie=1).device(1, used=9000).process(0, call.pid, 100, sm=99).write()
    time.sleep(1.0)
    call.stream.signal(9)
    return told(call.end())


def scene_docker(box: Sandbox, world: nvml.Scenario) -> Any:
    """A GPU under docker, with whatever daemon DOCKER_HOST names."""
    engine = {"isolation.launcher": "docker", "isolation.image": os.environ["SANDBOX_TEST_IMAGE"]}
    plan = box.plan(["true"], **{"gpu.count": 1, **engine})
    steps = {step.name: step.args for step in plan.steps}
    files = steps["system_view"]["runtime_files"]
    done = told(box.run(["true"], **{"gpu.count": 1, **engine}))
    return {**done, "env": sorted(plan.env), "libraries": [path for pair in files for path in pair if "opengl" in path]}


def scenes() -> Iterator[tuple[str, Callable[[Sandbox, nvml.Scenario], Any]]]:
    return ((name[6:], value) for name, value in globals().items() if name.startswith("scene_"))


def main(scene: str, directory: str, library: str) -> None:
    world = enter(Path(directory), Path(library))
    if f"before_{scene}" in globals():
        globals()[f"before_{scene}"](world)
    with Sandbox("shell", state=Path(directory) / "state", wall_time="30s") as box:
        print(json.dumps(dict(scenes())[scene](box, world)))


if __name__ == "__main__":
    main(*sys.argv[1:])
