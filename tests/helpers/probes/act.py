"""Does, inside a jail, what its argument says, one thing after the other, and prints one JSON line of results.

`python3 act.py '[["read", "/etc/passwd"], ["listdir", "/"]]'` prints `[{"errno": "EACCES"}, {"ok": [...]}]`. What the
kernel refuses is an errno, anything else that goes wrong ends the probe. Standard library only.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import pty
import resource
import socket
import stat
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


def read(path, size=65536):
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    data = b""
    try:
        # Files of /proc come page by page.
        while len(data) < size and (chunk := os.read(fd, size - len(data))):
            data += chunk
        return data.decode("utf-8", "replace")
    finally:
        os.close(fd)


def write(path, text, flags=os.O_WRONLY):
    fd = os.open(path, flags | os.O_NONBLOCK)
    try:
        return os.write(fd, text.encode())
    finally:
        os.close(fd)


def create(path, text="x", mode=0o644):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        return os.write(fd, text.encode())
    finally:
        os.close(fd)


def open_at_descriptor(fd, path):
    """Open relative to a descriptor that the probe was started with."""
    new = os.open(path, os.O_RDONLY, dir_fd=fd)
    os.close(new)


def descriptors():
    """Number to what it is, without the one that lists."""
    listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        numbers = [int(name) for name in os.listdir(listing)]
    finally:
        os.close(listing)
    found = {}
    for number in numbers:
        if number != listing:
            try:
                found[str(number)] = os.readlink(f"/proc/self/fd/{number}")
            except FileNotFoundError:
                continue
    return found


def connect(family, address, kind="stream"):
    """`family`: unix, inet, inet6. An abstract name begins with "@"."""
    families = {"unix": socket.AF_UNIX, "inet": socket.AF_INET, "inet6": socket.AF_INET6}
    if family == "unix":
        address = "\0" + address[1:] if address.startswith("@") else address
    else:
        address = tuple(address)
    with socket.socket(families[family], socket.SOCK_DGRAM if kind == "dgram" else socket.SOCK_STREAM) as sock:
        sock.settimeout(3)
        sock.connect(address)
        if kind == "dgram":
            # A refusal of the first datagram is reported by the second.
            sock.send(b"x")
            time.sleep(0.05)
            sock.send(b"x")
    return True


def talk(family, address):
    """Listen and connect within one process."""
    families = {"unix": socket.AF_UNIX, "inet": socket.AF_INET, "inet6": socket.AF_INET6}
    address = ("\0" + address[1:] if address.startswith("@") else address) if family == "unix" else tuple(address)
    with socket.socket(families[family]) as server, socket.socket(families[family]) as client:
        server.bind(address)
        server.listen()
        client.connect(server.getsockname())
        peer, _ = server.accept()
        with peer:
            peer.sendall(b"hello")
            return client.recv(5).decode()


def make_socket(family, kind, protocol=0):
    """socket(2) by numbers, 64 bits of each argument as they are."""
    fd = syscall(41 if os.uname().machine == "x86_64" else 198, family, kind, protocol)
    os.close(fd)
    return True


def syscall(number, *args):
    """A system call by number. Strings are passed as C strings, `["buffer", N]` as N zeroed bytes."""
    keep = []
    words = []
    for arg in args:
        if isinstance(arg, (str, list)):
            buffer = ctypes.create_string_buffer(arg.encode() if isinstance(arg, str) else arg[1])
            keep.append(buffer)
            arg = ctypes.addressof(buffer)
        words.append(ctypes.c_ulong(arg & (1 << 64) - 1))
    ctypes.set_errno(0)
    result = LIBC.syscall(ctypes.c_long(number), *words)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def terminal_ioctl(request, argument):
    """An ioctl on a terminal of our own; all 64 bits of the request go to the kernel."""
    master, slave = pty.openpty()
    LIBC.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p]
    ctypes.set_errno(0)
    result = LIBC.ioctl(slave, request, ctypes.create_string_buffer(argument.encode(), 16))
    code = ctypes.get_errno()
    os.close(master)
    os.close(slave)
    if result == -1:
        raise OSError(code, os.strerror(code))
    return result


def send_signal(pid, number):
    os.kill(pid, number)
    return True


def set_limit(pid, name, soft, hard):
    resource.prlimit(pid, getattr(resource, f"RLIMIT_{name}"), (soft, hard))
    return True


def identity():
    return {"uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(), "pid": os.getpid()}


def status():
    """The process's own security state, from /proc."""
    with open("/proc/self/status", encoding="ascii") as file:
        pairs = (line.split(":", 1) for line in file)
        return {name: value.strip() for name, value in pairs}


def become(kind, number):
    getattr(os, kind)(number)
    return True


def environment():
    return dict(os.environ)


def reopen(fd, mode):
    """Open what a descriptor holds anew, through /proc, with other rights."""
    new = os.open(f"/proc/self/fd/{fd}", {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}[mode])
    try:
        return os.write(new, b"tampered") if "w" in mode else os.read(new, 64).decode()
    finally:
        os.close(new)


def lock_region(path):
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    return True


def map_writable(path):
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 0) as mapped:
        mapped[0:1] = b"!"
    os.close(fd)
    return True


def run(argv):
    """The exit status of a program, and what it printed."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write_end, 1)
        try:
            os.execv(argv[0], argv)
        except OSError as error:
            os.write(1, errno.errorcode[error.errno].encode())
        os._exit(127)
    os.close(write_end)
    with open(read_end, "rb") as file:
        text = file.read(65536).decode("utf-8", "replace")
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text]


def pids():
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def exists(path):
    return os.path.lexists(path)


def kind_of(path):
    info = os.stat(path, follow_symlinks=False)
    return {"type": stat.S_IFMT(info.st_mode), "mode": stat.S_IMODE(info.st_mode), "uid": info.st_uid}


def make_node(path, kind, major, minor):
    os.mknod(
        path,
        0o600 | {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}[kind],
        os.makedev(major, minor),
    )
    return True


def done(function):
    """Of a function whose result is nothing: that it was done."""

    def act(*args):
        function(*args)
        return True

    return act


ACTIONS = {
    "become": become,
    "chmod": done(os.chmod),
    "chown": done(os.chown),
    "connect": connect,
    "create": create,
    "descriptors": descriptors,
    "environment": environment,
    "exists": exists,
    "identity": identity,
    "kind_of": kind_of,
    "link": done(os.link),
    "listdir": lambda path: sorted(os.listdir(path)),
    "lock": lock_region,
    "make_node": make_node,
    "make_socket": make_socket,
    "map_writable": map_writable,
    "mkdir": done(os.mkdir),
    "open_at_descriptor": done(open_at_descriptor),
    "pids": pids,
    "read": read,
    "readlink": os.readlink,
    "rename": done(os.rename),
    "reopen": reopen,
    "rmdir": done(os.rmdir),
    "run": run,
    "send_signal": send_signal,
    "set_limit": set_limit,
    "setxattr": lambda path, name, value: done(os.setxattr)(path, name, value.encode()),
    "sleep": done(time.sleep),
    "status": status,
    "symlink": done(os.symlink),
    "syscall": syscall,
    "talk": talk,
    "terminal_ioctl": terminal_ioctl,
    "truncate": done(os.truncate),
    "unlink": done(os.unlink),
    "utime": lambda path: done(os.utime)(path, (1, 1)),
    "write": write,
}


def main():
    results = []
    for name, *args in json.loads(sys.argv[1]):
        try:
            results.append({"ok": ACTIONS[name](*args)})
        except OSError as error:
            # socket timeouts carry no errno
            results.append({"errno": errno.errorcode.get(error.errno, str(error))})
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
