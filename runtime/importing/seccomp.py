"""A seccomp filter through ctypes: which system calls a process may make.

Owns the call numbers and the filter program for x86_64 and aarch64. A deny-list on top of
Landlock: it closes what file rules cannot reach (sockets, signals, mounts, tracing, kernel
features with a history of holes). Does not own the profiles: see `sandbox.py`.
"""

import ctypes
import errno
import os
import platform
import struct
from typing import Literal

Profile = Literal["build", "serve"]

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_X32_BIT = 0x40000000

# name: (x86_64, aarch64); None where the architecture lacks the call.
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # mounts and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    # kernel surface that no model needs
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "lookup_dcookie": (212, 18),
    "fanotify_init": (300, 262),
    "personality": (135, 92),
    "vhangup": (153, 58),
    # what Landlock does not cover on files of the same user
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "truncate": (76, 45),
    # memory, semaphores and queues shared by number, which no file rule sees
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # no way to reach another service's socket; both ends of a socketpair stay usable
    "connect": (42, 203),
    # handled by a rule of their own
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "clone3": (435, 435),
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "ioctl": (16, 29),
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "setpriority": (141, 140),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
_OWN_RULE = list(_NUMBERS)[list(_NUMBERS).index("io_uring_setup") :]
_DENIED = [name for name in _NUMBERS if name not in _OWN_RULE]
# Callers fall back on an older call when these are missing; clone3 hides its flags from a filter.
_MISSING = ["io_uring_setup", "io_uring_enter", "io_uring_register", "clone3"]
# A linker marks its output executable by path. A filter cannot see the path, so the call does
# nothing and reports success; libraries load without the mark.
_PRETENDED_IN_BUILD = ["chmod", "fchmodat", "fchmodat2"]
_DENIED_IN_SERVE = [
    *("execve", "execveat", "fork", "vfork", "chmod", "fchmod", "fchmodat", "fchmodat2"),
]
_OTHER_SIGNALS = ["tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal"]

_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF
_PRIO_PROCESS = 0
_CLONE_THREAD = 0x00010000
# NEWTIME NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET
_CLONE_NAMESPACES = 0x7E020080
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # put words into the mouth of a terminal

# Classic BPF, and struct seccomp_data: nr at 0, arch at 4, arguments from 16 on, 8 bytes each.
_LOAD, _AND = 0x20, 0x54
_JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT = 0x15, 0x35, 0x45
_RETURN = 0x06
_AT_NUMBER, _AT_ARCHITECTURE = 0, 4
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def is_supported() -> bool:
    """Whether this architecture's call numbers are known and the kernel filters system calls."""
    return platform.machine() in _ARCHITECTURES and os.path.exists(
        "/proc/sys/kernel/seccomp/actions_avail"
    )


def _deny(code: int = errno.EPERM) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | code)


def _argument(index: int) -> Instruction:
    """Load the low half of an argument: all that the kernel itself reads of an int."""
    return (_LOAD, 0, 0, 16 + 8 * index)


def _rules(profile: Profile, signals_to: int | None) -> list[tuple[str, list[Instruction]]]:
    """Per call, the instructions that decide on it. Each list ends in a return."""
    allow: Instruction = (_RETURN, 0, 0, _ALLOW)
    streams_only: list[Instruction] = [
        _argument(0),
        (_JUMP_EQUAL, 1, 0, _AF_UNIX),
        _deny(),
        _argument(1),
        (_AND, 0, 0, _SOCK_TYPE_MASK),
        # A datagram socket, which SOCK_RAW makes as well, can be sent from to any address.
        (_JUMP_EQUAL, 1, 0, _SOCK_STREAM),
        _deny(),
        allow,
    ]
    rules: list[tuple[str, list[Instruction]]] = [
        *((name, [_deny()]) for name in _DENIED),
        *((name, [_deny(errno.ENOSYS)]) for name in _MISSING),
        ("socket", streams_only),
        ("socketpair", streams_only),
        (
            "ioctl",
            [
                _argument(1),
                (_JUMP_EQUAL, 1, 0, _TIOCSTI),
                (_JUMP_EQUAL, 0, 1, _TIOCLINUX),
                _deny(),
                allow,
            ],
        ),
        ("prlimit64", [_argument(0), (_JUMP_EQUAL, 1, 0, 0), _deny(), allow]),
        ("sched_setaffinity", [_argument(0), (_JUMP_EQUAL, 1, 0, 0), _deny(), allow]),
        (
            "setpriority",
            [
                _argument(0),  # 0 of a group or of a user is everyone in it
                (_JUMP_EQUAL, 1, 0, _PRIO_PROCESS),
                _deny(),
                _argument(1),
                (_JUMP_EQUAL, 1, 0, 0),
                _deny(),
                allow,
            ],
        ),
    ]
    if signals_to is not None:
        only: list[Instruction] = [_argument(0), (_JUMP_EQUAL, 1, 0, signals_to), _deny(), allow]
        rules += [("kill", only), ("tgkill", only)]
        rules += [(name, [_deny()]) for name in _OTHER_SIGNALS]
    if profile == "build":
        rules += [(name, [_deny(0)]) for name in _PRETENDED_IN_BUILD]
        clone: list[Instruction] = [
            _argument(0),
            (_JUMP_ANY_BIT, 0, 1, _CLONE_NAMESPACES),
            _deny(),
            allow,
        ]
        return [*rules, ("clone", clone)]
    # Threads only: a child process would be a second program.
    threads: list[Instruction] = [
        _argument(0),
        (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD),
        _deny(),
        (_JUMP_ANY_BIT, 0, 1, _CLONE_NAMESPACES),
        _deny(),
        allow,
    ]
    return [*rules, *((name, [_deny()]) for name in _DENIED_IN_SERVE), ("clone", threads)]


def program(profile: Profile, signals_to: int | None, machine: str) -> bytes:
    """The filter as `struct sock_filter[]`. Signals may go to the process `signals_to` alone; None
    leaves them to Landlock."""
    audit_arch, column = _ARCHITECTURES[machine]
    code: list[Instruction] = [
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, audit_arch),
        (_RETURN, 0, 0, _KILL_PROCESS),  # a 32-bit call would carry other numbers
        (_LOAD, 0, 0, _AT_NUMBER),
    ]
    if machine == "x86_64":
        code += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), _deny(errno.ENOSYS)]
    for name, body in _rules(profile, signals_to):
        number = _NUMBERS[name][column]
        if number is not None:
            code += [(_JUMP_EQUAL, 0, len(body), number), *body]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(profile: Profile, *, signals_to: int | None) -> None:
    """Filter this thread's calls and those of all its children from here on, for good.

    Needs no_new_privs. Raises `OSError`.
    """
    code = program(profile, signals_to, platform.machine())
    libc = ctypes.CDLL(None, use_errno=True)
    attr = _Program(length=len(code) // 8, filter=code)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(attr), 0, 0) != 0:
        failure = ctypes.get_errno()
        raise OSError(failure, os.strerror(failure))
