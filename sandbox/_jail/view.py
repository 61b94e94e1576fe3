"""Steps that build the jail's root view, each a function of the launch and the step's arguments.

Everything a jail can see is put here by name on an empty tmpfs: what no step mounts does not exist inside.
Host sources are opened once, without following links, checked against what the planner saw, and mounted from
that very descriptor. Source: mount_namespaces(7), pivot_root(2), overlayfs(5).
"""

from __future__ import annotations

import errno
import os
import stat

from sandbox._jail import cover, inside, places, trust
from sandbox._linux import etc, mounts, syscalls
from sandbox._linux.bare import signal, suppress
from sandbox._linux.batch import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

READ_ONLY = mounts.ATTR_RDONLY | mounts.ATTR_NOSUID | mounts.ATTR_NODEV
WRITABLE = mounts.ATTR_NOSUID | mounts.ATTR_NODEV
COPIED_MAX_BYTES = 4096


def private_propagation(_launch: Launch, _args: dict[str, Any]) -> None:
    """Nothing mounted here reaches the host, nor the other way."""
    mounts.make_private()


def new_root(launch: Launch, args: dict[str, Any]) -> None:
    """The empty root, with the places on which private directories are mounted, and what covers denied paths."""
    flags = mounts.MS_NOSUID | mounts.MS_NODEV
    mounts.mount("tmpfs", launch.mnt, "tmpfs", flags, "size=64k,nr_inodes=16,mode=700")
    for name in ("root", "scratch", "lower"):
        os.mkdir(f"{launch.mnt}/{name}", mode=0o700)
    mounts.mount("tmpfs", launch.root, "tmpfs", flags, "size=4m,nr_inodes=16384,mode=755")
    for jail_path in args["places"]:
        os.makedirs(launch.root + jail_path)
    os.makedirs(launch.root + places.INSIDE)
    cover.make_covers(launch)


def scratch(launch: Launch, args: dict[str, Any]) -> None:
    """The private writable places, here where host paths are to be mounted below them."""
    batch = Batch()
    places.scratch(launch, batch, args, at=f"{launch.mnt}/scratch", root=launch.root, owner=launch.owner)
    batch.run()


def system_view(launch: Launch, args: dict[str, Any]) -> None:
    """The system's programs and libraries, read-only: directories bound, links copied as links, small files copied."""
    for path in args["directories"]:
        _replicate(launch, path)
    for path in args["copied_files"]:
        _copy(launch, path)
    for source, target in (*args["python_paths"], *args["runtime_files"]):
        if not os.path.lexists(launch.root + target):
            _bind_grant(launch, source, target, READ_ONLY)


def etc_files(launch: Launch, args: dict[str, Any]) -> None:
    """The few files of /etc that programs need: some written for the jail, some of the host's own."""
    directory = f"{launch.root}/etc"
    os.makedirs(directory, exist_ok=True)
    for name, text in etc.files(args["hostname"], args["home"], args["nameserver"]).items():
        with open(f"{directory}/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    for path in args["host_paths"]:
        _replicate(launch, path)


def devices(launch: Launch, args: dict[str, Any]) -> None:
    """A minimal /dev: five harmless nodes of the host bound in, and places for what is mounted later."""
    dev = f"{launch.root}/dev"
    os.makedirs(f"{dev}/pts")
    os.mkdir(f"{dev}/mqueue")
    for name in args["nodes"]:
        target = f"{dev}/{name}"
        if "/" in name:
            os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        mounts.bind(f"/dev/{name}", target, mounts.ATTR_NOSUID | mounts.ATTR_NOEXEC)
    for name, (major, minor) in args.get("numbers", {}).items():
        if os.stat(f"{dev}/{name}").st_rdev != os.makedev(major, minor):
            raise OSError(errno.ESTALE, f"/dev/{name} is not the device that was granted")
    links = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}
    for name, where in links.items():
        os.symlink(where, f"{dev}/{name}")


def grants(launch: Launch, args: dict[str, Any]) -> None:
    """What the manifest names, at the same path inside, shallow before deep so that the longest path wins."""
    for grant in sorted(args["paths"], key=lambda g: g["jail_path"].count("/")):
        attributes = WRITABLE if grant["access"] == "write" else READ_ONLY
        _bind_grant(launch, grant["host_path"], grant["jail_path"], attributes, grant)
    for asked, real in args.get("links", ()):
        target = launch.root + asked
        # Through a link of the view we would leave the new root: then the grant is at its real path only.
        if not os.path.lexists(target) and os.path.realpath(os.path.dirname(target)) == os.path.dirname(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(real, target)


def inner_grants(launch: Launch, args: dict[str, Any]) -> None:
    """Those that lie below the workspace, which would cover them if they came first."""
    grants(launch, args)


def workspace(launch: Launch, args: dict[str, Any]) -> None:
    """The workspace: private, the host's directory (rw, ro), or a writable layer over it (cow)."""
    mode, jail_path = args["mode"], args["jail_path"]
    if mode == "private":
        return  # one of the private places
    if mode == "cow":
        _overlay(launch, args)
    else:
        _bind_grant(launch, args["host_path"], jail_path, WRITABLE if mode == "rw" else READ_ONLY, args)
    fd = inside.make_place(launch, jail_path, directory=True)
    try:
        protect(launch, fd, args)
    finally:
        os.close(fd)
    if jail_path != "/workspace":
        with suppress(FileExistsError):
            os.symlink(jail_path, f"{launch.root}/workspace")


def proc_seed(launch: Launch, _args: dict[str, Any]) -> None:
    """The host's /proc, to be covered by the jail's own: the kernel lets a user namespace mount a new one only where
    an uncovered one is in sight already (mount_too_revealing() in fs/namespace.c)."""
    os.makedirs(f"{launch.root}/proc", exist_ok=True)
    mounts.bind("/proc", f"{launch.root}/proc", 0)


def enter_root(launch: Launch, _args: dict[str, Any]) -> None:
    """Make the view the root, let go of the host's tree, and make the root itself read-only."""
    os.chdir(launch.root)
    syscalls.pivot_root_here()
    mounts.unmount_detached(".")
    os.chdir("/")
    mounts.remount_read_only("/")


STEPS = {
    step.__name__: step
    for step in (
        private_propagation,
        new_root,
        scratch,
        system_view,
        etc_files,
        devices,
        grants,
        workspace,
        inner_grants,
        cover.deny,
        trust.trust,
        proc_seed,
        enter_root,
    )
}


def _owned_directory(launch: Launch, path: str, mode: int) -> None:
    os.mkdir(path)
    os.chown(path, launch.owner, launch.owner)
    os.chmod(path, mode)


def _replicate(launch: Launch, path: str) -> None:
    """Show one host path inside as what it is: a link as the same link, anything else as a read-only bind."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return
    target = launch.root + path
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if stat.S_ISLNK(info.st_mode):
        os.symlink(os.readlink(path), target)
        return
    _bind_grant(launch, path, path, READ_ONLY)


def _copy(launch: Launch, path: str) -> None:
    """A file of the jail's own with the same few bytes: nothing of the host's filesystem is in sight for it."""
    try:
        with open(path, "rb") as file:
            data = file.read(COPIED_MAX_BYTES)
    except OSError:
        return  # a host without it, or one that hides it: the tool sees what we see
    os.makedirs(os.path.dirname(launch.root + path), exist_ok=True)
    with open(launch.root + path, "wb") as file:
        file.write(data)


def _bind_grant(
    launch: Launch, host_path: str, jail_path: str, attributes: int, expected: dict[str, Any] | None = None
) -> None:
    """Bind one host path. `expected` holds the device and inode that the caller saw when it resolved the path."""
    tree, is_directory = open_grant(launch, host_path, attributes, expected)
    attach_grant(launch, tree, jail_path, directory=is_directory)


def open_grant(
    launch: Launch, host_path: str, attributes: int, expected: dict[str, Any] | None = None
) -> tuple[int, bool]:
    """(a detached tree of one host path, ready to be attached; whether it is a directory's)."""
    fd = mounts.open_path(host_path)
    try:
        info = os.fstat(fd)
        if expected is not None and (info.st_dev, info.st_ino) != (expected["dev"], expected["ino"]):
            raise OSError(errno.ESTALE, f"{host_path}: replaced since it was resolved")
        tree = mounts.clone_tree(fd)
    finally:
        os.close(fd)
    try:
        if expected is not None and launch.host_uid is not None:
            _map_owner(launch, tree, host_path, must=not attributes & mounts.ATTR_RDONLY)
        mounts.set_attributes(tree, attributes)
    except BaseException:
        os.close(tree)
        raise
    return tree, stat.S_ISDIR(info.st_mode)


def attach_grant(launch: Launch, tree: int, jail_path: str, *, directory: bool) -> None:
    """Show a detached tree at its place inside, and let go of it."""
    try:
        place = inside.make_place(launch, jail_path, directory=directory)
        try:
            mounts.attach_at(tree, place)
        finally:
            os.close(place)
    finally:
        os.close(tree)


def _map_owner(launch: Launch, tree: int, host_path: str, *, must: bool) -> None:
    """Show what the supervisor's own uid owns as owned by the jail's uid, in both directions (idmapped mount)."""
    pairs = [(os.geteuid(), launch.owner)]
    if launch.is_made_by_us:
        # A new file is whoever's made it, until that one gives it to the jail's uid: for that moment the jail's.
        pairs.append((launch.owner, os.geteuid()))
    userns_fd = _idmap_namespace(pairs)
    try:
        mounts.set_attributes(tree, 0, userns_fd=userns_fd)
    except OSError as error:
        # EINVAL: this filesystem has no idmapped mounts; EPERM: it belongs to another user namespace. Reading then
        # goes by the "others" permission bits, which is less than was granted; writing could not work at all.
        if must or error.errno not in (errno.EINVAL, errno.EPERM):
            raise OSError(error.errno, f"idmapped mount of {host_path}: {error.strerror}") from error
        launch.notes.append(f"{host_path}: not idmapped, readable as far as others may read it")
    finally:
        os.close(userns_fd)


def _idmap_namespace(pairs: list[tuple[int, int]]) -> int:
    """A descriptor of a user namespace that maps ids (on the disk, in sight). Its one process ends with this."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid, pidfd = syscalls.clone(syscalls.CLONE_NEWUSER)
    if pid == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    try:
        for name in ("uid_map", "gid_map"):
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"".join(b"%d %d 1\n" % pair for pair in pairs))
            finally:
                os.close(fd)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        syscalls.pidfd_kill(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (pidfd, read_end, write_end):
            os.close(fd)


def _overlay(launch: Launch, args: dict[str, Any]) -> None:
    """A writable layer on the scratch tmpfs over the host's directory, which is never written."""
    attach_overlay(launch, open_lower(launch, args), args["jail_path"])


def attach_overlay(launch: Launch, tree: int, jail_path: str) -> None:
    """Mount the layer over a detached tree of the host's directory, and let go of that."""
    lower = f"{launch.mnt}/lower"
    try:
        mounts.attach(tree, lower)
    finally:
        os.close(tree)
    info = os.stat(lower)
    for name in ("upper", "work"):
        _owned_directory(launch, f"{launch.mnt}/scratch/{name}", stat.S_IMODE(info.st_mode) | 0o700)
    # Relative names: an absolute path could hold the colons and commas that separate overlay's options.
    options = "lowerdir=lower,upperdir=scratch/upper,workdir=scratch/work,metacopy=off,index=off"
    # userxattr refuses redirect_dir=off (EINVAL, Linux 6.18) and means nofollow by itself: directories are copied too.
    options += ",userxattr" if launch.host_uid is None else ",redirect_dir=off"
    place = inside.make_place(launch, jail_path, directory=True)
    here = os.getcwd()
    os.chdir(launch.mnt)
    try:
        flags = mounts.MS_NOSUID | mounts.MS_NODEV
        mounts.mount("overlay", f"/proc/self/fd/{place}", "overlay", flags, options)
    finally:
        os.chdir(here)
        os.close(place)
    upper = f"{launch.mnt}/scratch/upper"
    launch.out_fds["upper"] = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def open_lower(launch: Launch, args: dict[str, Any]) -> int:
    """A detached, read-only tree of the host's directory."""
    fd = mounts.open_path(args["host_path"])
    try:
        info = os.fstat(fd)
        if (info.st_dev, info.st_ino) != (args["dev"], args["ino"]):
            raise OSError(errno.ESTALE, f"{args['host_path']}: replaced since it was resolved")
        tree = mounts.clone_tree(fd)
    finally:
        os.close(fd)
    try:
        if launch.host_uid is not None:
            _map_owner(launch, tree, args["host_path"], must=True)
        mounts.set_attributes(tree, READ_ONLY)
    except BaseException:
        os.close(tree)
        raise
    return tree


def protect(launch: Launch, workspace_fd: int, args: dict[str, Any]) -> None:
    """Make protected entries of a mounted workspace read-only, and have it looked through after the call."""
    for relative in args.get("protected", ()):
        _protect(workspace_fd, relative)
    path = f"/proc/self/fd/{workspace_fd}"
    launch.out_fds["workspace"] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _protect(workspace_fd: int, relative: str) -> None:
    """Make one entry of a writable workspace read-only. Gone since the scan: the sweep after the call sees to it."""
    try:
        fd = mounts.open_path(relative, mounts.RESOLVE_BENEATH | mounts.RESOLVE_NO_SYMLINKS, workspace_fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return
        raise
    try:
        tree = mounts.clone_tree(fd)
        try:
            mounts.set_attributes(tree, READ_ONLY)
            mounts.attach_at(tree, fd)
        finally:
            os.close(tree)
    finally:
        os.close(fd)
