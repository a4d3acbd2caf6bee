"""Runs Python that a model wrote, and its tests, in processes from which it has taken what they could do harm with.

A script of its own, started as `python -I jail.py`; imports the standard library alone. On stdin it gets JSON,
{"prelude", "codes", "tests", "entry_point", "memory_mib", "time_s", "most_s", "unsafe", "parent"}, the last the number
of the process that waits for it; on stdout it gives a list of [passed, what was written] for the codes, each of which
ran in a process of its own: no exit status and no output stands for success. That process has to send a secret back,
which it reads only when the tests have come to their end, and behind it what is wrong with the tests; `passed` is then
null.

A code that is null tries the tests: `Anything` stands for it, and no tests should pass. Where they do, or something is
wrong with them, the list ends there.

What holds the code, on Linux on x86-64 and ARM64, without any privilege: resource limits; no capabilities; Landlock,
which leaves it Python's own files to read and nothing to write; and a seccomp filter, without new processes, programs,
sockets, shared memory or signals to others. Threads and what they need remain.
"""

import builtins
import contextlib
import ctypes
import functools
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import threading
import types

_ARCHITECTURES = {  # AUDIT_ARCH_*, and system calls by number
    "x86_64": (
        0xC000003E,
        {"clone": 56, "clone3": 435},
        "socket 41  fork 57 vfork 58 execve 59 execveat 322  kill 62 tkill 200 tgkill 234 rt_sigqueueinfo 129 "
        "rt_tgsigqueueinfo 297 pidfd_open 434 pidfd_getfd 438 pidfd_send_signal 424 ptrace 101 process_vm_readv 310 "
        "process_vm_writev 311  shmget 29 msgget 68 mq_open 240  io_uring_setup 425 prctl 157 setrlimit 160 "
        "prlimit64 302 unshare 272 setns 308  truncate 76 chmod 90 fchmod 91 chown 92 fchown 93 lchown 94 "
        "fchownat 260 fchmodat 268 fchmodat2 452 utime 132 utimes 235 futimesat 261 utimensat 280 setxattr 188 "
        "lsetxattr 189 fsetxattr 190",
    ),
    "aarch64": (
        0xC00000B7,
        {"clone": 220, "clone3": 435},
        "socket 198  execve 221 execveat 281  kill 129 tkill 130 tgkill 131 rt_sigqueueinfo 138 rt_tgsigqueueinfo 240 "
        "pidfd_open 434 pidfd_getfd 438 pidfd_send_signal 424 ptrace 117 process_vm_readv 270 process_vm_writev 271  "
        "shmget 194 msgget 186 mq_open 180  io_uring_setup 425 prctl 167 setrlimit 164 prlimit64 261 unshare 97 "
        "setns 268  truncate 45 fchmod 52 fchmodat 53 fchmodat2 452 fchownat 54 fchown 55 utimensat 88 setxattr 5 "
        "lsetxattr 6 fsetxattr 7",
    ),
}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR, _WRITE_FILE = 4, 8, 2
_EPERM, _ENOSYS, _CLONE_THREAD = 1, 38, 0x10000
_LARGEST_FILE, _OPEN_FILES = 2**20, 64


def main() -> None:
    job, found = json.load(sys.stdin), []
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: it goes with the process that waits for it
    for blocks in job["codes"]:
        if os.name == "posix" and os.getppid() != job["parent"]:  # nobody waits for it any more
            break
        ended, text = run_apart(job, blocks)
        found.append([None if ended and text else ended, text])
        if blocks is None and ended:
            break
    print(json.dumps(found))


def run_apart(job: dict, blocks) -> tuple:
    """Run one code in a new process: whether the tests came to their end, and what else it says."""
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=run_code, args=(theirs, job, blocks, tempfile.mkdtemp(dir=".")))
    child.start()
    theirs.close()
    secret, written = os.urandom(16), b""  # made now, so that it is not in the memory of that process
    with contextlib.suppress(OSError):
        ours.send_bytes(secret)
        ours.poll(job["most_s"])
    child.kill()
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)  # and what it started, where nothing keeps it from that
    child.join()
    with contextlib.suppress(OSError, EOFError):
        if ours.poll():
            written = ours.recv_bytes(2**16)
    ours.close()
    return written.startswith(secret), written.removeprefix(secret).decode(errors="replace")


def run_code(pipe, job: dict, blocks, folder: str) -> None:
    os.chdir(folder)
    if hasattr(os, "setsid"):
        os.setsid()
    if sys.platform != "linux":  # which has PR_SET_PDEATHSIG
        threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    limit(job["memory_mib"] * 2**20, job["time_s"])
    try:
        isolate()
    except OSError as error:
        if not job["unsafe"]:
            pipe.send_bytes(f"{error.strerror}".encode())
            os._exit(1)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, job["time_s"])  # what sets it aside meets the one outside
    trial, wrong = blocks is None, ""
    try:
        names = load_anything(job["prelude"]) if trial else load(job["prelude"], blocks)
        if left := run(job["tests"], names, job["entry_point"]):
            wrong = f"nothing calls {', '.join(left)}"
    except BaseException as error:  # whatever it is, exit included, it is not the end of the tests
        if not (trial and isinstance(error, (SyntaxError, ImportError))):
            os._exit(1)
        wrong = f"they cannot run here ({error})"
    pipe.send_bytes(pipe.recv_bytes() + wrong.encode()[:1000])
    os._exit(0)


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def load(prelude: str, blocks: list) -> dict:
    """Run the code as the module `solution`, without the blocks that are no Python if it is none with them."""

    def is_python(block: str) -> bool:
        try:
            return bool(compile(block, "code", "exec"))
        except SyntaxError:
            return False

    module = sys.modules["solution"] = types.ModuleType("solution")
    try:
        program = compile("\n".join([prelude, *blocks]), "code", "exec")
    except SyntaxError:  # a draft, a session, an output
        program = compile("\n".join([prelude, *filter(is_python, blocks)]), "code", "exec")
    exec(program, vars(module))
    return vars(module)


class Anything:
    """Can be called and has every attribute, and no comparison with it is true or false."""

    def __call__(self, *_, **__):
        return Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __bool__(self):
        raise TypeError("it is anything")

    def __eq__(self, other):
        return Anything()

    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__
    __hash__ = None


def load_anything(prelude: str) -> dict:
    """A module `solution` in which every name that the prelude does not have is Anything."""

    class Names(dict):
        def __missing__(self, name):
            if name.startswith("__") or hasattr(builtins, name):
                raise KeyError(name)
            return Anything()

    def find(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return names[name] if name in names else Anything()

    names = Names(__name__="solution")
    module = sys.modules["solution"] = types.ModuleType("solution")
    module.__getattr__ = find
    with contextlib.suppress(BaseException):  # it may be the beginning of something
        exec(compile(prelude, "code", "exec"), names)
    return names


def run(tests: str, names: dict, entry_point) -> list:
    """Run tests, and then what they define and did not call, as pytest would; returns what could not be called."""
    waiting, classes = {}, []

    class Noted(dict):  # the tests' own names, which are kept in `names` like all others
        def __missing__(self, name):
            return names[name]

        def __setitem__(self, name, value):
            if getattr(value, "__module__", "") == "solution" and names.get(name) is not value:
                if isinstance(value, type):
                    classes.append(value)
                elif isinstance(value, types.FunctionType) and value.__name__ == name:
                    value = note(value) if name == "check" or name.startswith("test") else value
            names[name] = value

        def __delitem__(self, name):
            del names[name]

    def note(function):
        @functools.wraps(function)
        def call(*arguments, **named):
            waiting.pop(call, None)
            return function(*arguments, **named)

        waiting[call] = function
        return call

    def needs(function) -> int:
        code = getattr(function, "__code__", None)
        return code.co_argcount - len(function.__defaults__ or ()) if code else 0

    if "unittest" in tests:
        import unittest

        unittest.main = lambda *_, **__: None  # it would look into this file, and exit
    exec(compile(tests, "tests", "exec"), names, Noted())
    for call, function in list(waiting.items()):
        if call not in waiting:
            continue
        if call.__name__ == "check" and entry_point and needs(function) == 1:
            call(eval(entry_point, names))
        elif not needs(function) and hasattr(coroutine := call(), "__await__"):
            import asyncio

            asyncio.run(coroutine)
    return [call.__name__ for call in waiting] + [name for each in classes for name in _run_class(each, needs)]


def _run_class(tests: type, needs) -> list:
    """Run unittest's tests, or pytest's as if they were; raises where one fails, returns what could not be called."""
    import unittest

    loader = unittest.defaultTestLoader
    if not issubclass(tests, unittest.TestCase):
        if not tests.__name__.startswith("Test") or not loader.getTestCaseNames(tests):
            return []
        case = unittest.IsolatedAsyncioTestCase
        tests = type(tests.__name__, (tests, case), {"setUp": getattr(tests, "setup_method", case.setUp)})
    methods = loader.getTestCaseNames(tests)
    if left := [f"{tests.__name__}.{name}" for name in methods if needs(getattr(tests, name)) > 1]:
        return left
    if not loader.loadTestsFromTestCase(tests).run(unittest.TestResult()).wasSuccessful():
        raise AssertionError
    return []


def limit(memory: int, time_s: float) -> None:
    """Resource limits of this process, in bytes and seconds; none on Windows, which has none of these."""
    try:
        import resource
    except ImportError:
        return
    seconds = math.ceil(time_s)
    for name, most in (
        ("AS", memory),
        ("CPU", seconds),
        ("FSIZE", _LARGEST_FILE),
        ("NOFILE", _OPEN_FILES),
        ("CORE", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def isolate() -> None:
    """Leave this process no way to the network, to files or to other processes. Raises OSError where that fails."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES:
        raise OSError(_ENOSYS, f"there is no isolation for {sys.platform} on {machine}")
    libc = ctypes.CDLL(None, use_errno=True)

    def call(what: str, function, *arguments) -> int:
        answer = function(*(ctypes.c_long(each) if isinstance(each, int) else each for each in arguments))
        if answer < 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
        return answer

    call("PR_SET_PDEATHSIG", libc.prctl, 1, 9, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call("capset", libc.syscall, _CAPSET[machine], ctypes.byref(header), ctypes.byref(none))
    call("PR_SET_NO_NEW_PRIVS", libc.prctl, 38, 1, 0, 0, 0)
    _forbid_files(call, libc)
    _forbid_calls(call, libc, machine)


def _forbid_files(call, libc) -> None:
    """By Landlock: all but reading what Python consists of, and /dev/null."""
    version = call("Landlock", libc.syscall, _LANDLOCK_CREATE, None, 0, 1)
    rights = (1 << (13 + min(version - 1, 2))) - 1
    rules = call("Landlock", libc.syscall, _LANDLOCK_CREATE, ctypes.byref(ctypes.c_uint64(rights)), 8, 0)
    readable = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64"}
    allowed = {path: _READ_FILE | _READ_DIR for path in readable if os.path.isdir(path)}
    for path, right in {**allowed, os.devnull: _READ_FILE | _WRITE_FILE}.items():
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = right.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
        call("Landlock", libc.syscall, _LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(descriptor)
    call("Landlock", libc.syscall, _LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _forbid_calls(call, libc, machine: str) -> None:
    """By seccomp: each system call that is named fails; a new thread may be, a new process may not."""
    architecture, clones, named = _ARCHITECTURES[machine]
    load, if_equal, if_at_least, if_set, give_back = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, fail, kill = 0x7FFF0000, 0x00050000, 0x80000000
    steps = [(load, 0, 0, 4), (if_equal, 1, 0, architecture), (give_back, 0, 0, kill), (load, 0, 0, 0)]
    steps += [(if_at_least, 0, 1, 0x40000000), (give_back, 0, 0, kill)]  # x86-64 has a second set of numbers there
    for number in map(int, named.split()[1::2]):
        steps += [(if_equal, 0, 1, number), (give_back, 0, 0, fail | _EPERM)]
    # Its flags are out of a filter's sight; without it the C library takes clone.
    steps += [(if_equal, 0, 1, clones["clone3"]), (give_back, 0, 0, fail | _ENOSYS)]
    steps += [(if_equal, 0, 3, clones["clone"]), (load, 0, 0, 16), (if_set, 1, 0, _CLONE_THREAD)]
    steps += [(give_back, 0, 0, fail | _EPERM), (give_back, 0, 0, allow)]
    code = b"".join(
        kind.to_bytes(2, sys.byteorder) + bytes([yes, no]) + value.to_bytes(4, sys.byteorder)
        for kind, yes, no, value in steps
    )
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    program = Program(len(steps), ctypes.addressof(buffer))
    call("seccomp", libc.prctl, 22, 2, ctypes.byref(program), 0, 0)


if __name__ == "__main__":
    main()
