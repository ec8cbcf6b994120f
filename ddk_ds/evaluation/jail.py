"""Run one program that nobody vouches for, shut in. `sandbox.py` starts this file as a script of its own.

    python -I -S jail.py '{"directory": ..., "status": FD, ...}' < program.py

It imports the standard library alone, and of that little. Lines that it writes to the file descriptor `status`:
what it is shut in by (JSON), then `passed` if the program came to its end, and `timed out` if it did not in time.
Exit code 125: the walls could not be built, and the program was not started.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from typing import Any

SETUP_FAILED = 125
DRIVER = """
import os, sys
status, process = int(sys.argv.pop()), os.getpid()
source = sys.stdin.buffer.read()
exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
if os.getpid() == process:
    os.write(status, b"passed\\n")
"""

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_HOSTNAME, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = (
    *(0x00020000, 0x04000000, 0x08000000),
    *(0x10000000, 0x20000000, 0x40000000),
)
_NAMESPACES = _NEW_HOSTNAME | _NEW_IPC | _NEW_PIDS | _NEW_NETWORK
_SET_PARENT_DEATH_SIGNAL, _SET_DUMPABLE, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVILEGES = 1, 4, 36, 38
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same on every machine
_NO_SUID, _NO_DEVICES, _NO_EXEC, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_HERE = -100  # AT_FDCWD
_ID_INSIDE = 1000
_PRIVATE_IDS = (2_000_000_000, 1_000_000)
"""First of the user ids that root's programs get, and how many: no other process has one of them."""


def _call(name: str, *arguments: Any) -> int:
    result: int = getattr(_LIBC, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _unshare(flags: int) -> bool:
    try:
        _call("unshare", flags)
    except OSError:
        return False
    return True


def separate(owner: int) -> bool:
    """Leave the machine's network and, for children, its processes; False where that is not permitted.

    Root keeps its rights until the mounts are made; a user gets a namespace in which it has them.
    """
    if os.geteuid() == 0:
        if _unshare(_NAMESPACES):
            return True
        become(owner)
    user, group = os.getuid(), os.getgid()
    if not _unshare(_NAMESPACES | _NEW_USER):
        return False
    for name, text in (
        ("setgroups", "deny"),
        ("gid_map", f"{_ID_INSIDE} {group} 1"),
        ("uid_map", f"{_ID_INSIDE} {user} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as stream:
            stream.write(text)
    return True


def private_id() -> int:
    """A user id that no other process has; where a container maps only few ids, the one of nobody."""
    chosen = _PRIVATE_IDS[0] + os.getpid() % _PRIVATE_IDS[1]
    with open("/proc/self/uid_map") as stream:
        ranges = [line.split() for line in stream]
    return chosen if any(int(first) <= chosen < int(first) + int(number) for first, _, number in ranges) else 65534


def become(owner: int) -> None:
    """Root becomes a user that owns nothing; of its processes RLIMIT_NPROC counts, which root's escape."""
    os.setgroups([])
    os.setresgid(owner, owner, owner)
    os.setresuid(owner, owner, owner)
    _call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self stays root's


def mount_read_only(options: dict[str, Any]) -> bool:
    """Everything read-only, but for an empty directory in memory in the place of the working directory."""
    try:
        _call("unshare", _NEW_MOUNTS)
        _mount("none", "/", None, _RECURSIVE | _PRIVATE, None)
        if os.geteuid() == 0:
            _show_python(os.path.realpath(sys.base_prefix))
        try:
            _mount("proc", "/proc", "proc", _NO_SUID | _NO_DEVICES | _NO_EXEC, None)
        except OSError:  # a container hides parts of its own
            _mount("tmpfs", "/proc", "tmpfs", _NO_SUID | _NO_DEVICES | _NO_EXEC, "size=4k")
        attributes = struct.pack("QQQQ", 1 | 2 | 4, 0, 0, 0)  # set: read-only, nosuid, nodev
        _call("syscall", _MOUNT_SETATTR, _HERE, b"/", 0x8000, attributes, len(attributes))
        owner = options["owner"] if os.geteuid() == 0 else _ID_INSIDE
        data = f"size={options['disk_bytes']},nr_inodes=4096,mode=700,uid={owner},gid={owner}"
        _mount("tmpfs", options["directory"], "tmpfs", _NO_SUID | _NO_DEVICES, data)
    except OSError:
        return False
    return True


def _show_python(prefix: str) -> None:
    """Where other users may not enter a directory above Python's, hide all of it but Python: root's home, mostly."""
    parts = prefix.split("/")
    above = ["/".join(parts[:number]) for number in range(2, len(parts))]
    closed = [path for path in above if not os.stat(path).st_mode & 0o001]
    if closed:
        python = os.open(prefix, os.O_PATH)
        _mount("tmpfs", closed[0], "tmpfs", _NO_SUID | _NO_DEVICES, "size=64k,mode=755")
        os.makedirs(prefix, 0o755)
        _mount(f"/proc/self/fd/{python}", prefix, None, _BIND | _RECURSIVE, None)
        os.close(python)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def restrict_writes(directory: str) -> None:
    """By Landlock: nothing is written, made or removed but below `directory`.

    Newer kernels forbid TCP too, and signals to processes that are not shut in.
    """
    version = _LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        raise OSError("neither namespaces nor Landlock are permitted here")
    writes = 1 << 1 | 0b111111111 << 4  # write a file; remove and make every kind of entry
    writes |= 1 << 14 if version >= 3 else 0  # truncate
    parts = [writes, *([0b11] if version >= 4 else []), *([0b11] if version >= 6 else [])]
    ruleset = struct.pack(f"{len(parts)}Q", *parts)
    rules = _call("syscall", _LANDLOCK_CREATE, ruleset, len(ruleset), 0)
    rule = struct.pack("=Qi", writes, os.open(directory, os.O_PATH))
    _call("syscall", _LANDLOCK_ADD, rules, 1, rule, 0)
    _call("syscall", _LANDLOCK_RESTRICT, rules, 0)


def limit(options: dict[str, Any]) -> None:
    """What one process may take; of the processes their number."""
    for kind, value in (
        (resource.RLIMIT_CPU, options["cpu_s"]),
        (resource.RLIMIT_AS, options["memory_bytes"]),
        (resource.RLIMIT_FSIZE, options["file_bytes"]),
        (resource.RLIMIT_NPROC, options["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def shut_in_and_run(options: dict[str, Any], separated: bool) -> None:
    """In the child: build the walls and become the program. Does not return."""
    mounted = separated and mount_read_only(options)
    os.chdir(options["directory"])
    if os.geteuid() == 0:
        become(options["owner"])
    _call("prctl", _SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if not mounted:
        restrict_writes(options["directory"])
    status = options["status"]
    walls = {"network": separated, "files": "mounts" if mounted else "landlock"}
    os.write(status, json.dumps(walls).encode() + b"\n")
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    limit(options)
    # Not by a virtual environment's link: other users may not see it. A user's rights in its namespace end here,
    # since its id inside is not 0.
    python = os.path.realpath(sys.executable)
    os.execve(python, [python, "-I", "-S", "-B", "-c", DRIVER, str(status)], {})


def supervise(child: int, wall_s: float, status: int) -> int:
    """Wait for the child, `wall_s` at most, then end whatever it has started. Returns an exit code."""
    deadline, code = time.monotonic() + wall_s, None
    while code is None and (left := deadline - time.monotonic()) > 0:
        pid, ended = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(ended)
        else:
            signal.sigtimedwait([signal.SIGCHLD], left)
    if code is None or code in (-signal.SIGXCPU, -signal.SIGKILL):  # how the limit on processor time ends it
        os.write(status, b"timed out\n")
    _end_all(child if code is None else None)
    return SETUP_FAILED if code == SETUP_FAILED else 0


def _end_all(child: int | None) -> None:
    # With processes of its own, all end with their first. Without, orphans become this process's children.
    if child is not None:
        os.kill(child, signal.SIGKILL)
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as stream:
            for pid in map(int, stream.read().split()):
                os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
        except ChildProcessError:
            return


def main() -> int:
    """Returns 0 once the program has ended, in whatever way, or SETUP_FAILED."""
    options = json.loads(sys.argv[1])
    options["owner"] = private_id()
    if os.geteuid() == 0:
        os.chown(options["directory"], options["owner"], options["owner"])
    _call("prctl", _SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    _call("prctl", _SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    separated = options["namespaces"] and separate(options["owner"])
    child = os.fork()
    if child == 0:
        try:
            shut_in_and_run(options, separated)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(SETUP_FAILED)
    return supervise(child, options["wall_s"], options["status"])


if __name__ == "__main__":
    sys.exit(main())
