"""Landlock through ctypes: which files a process may touch, enforced by the kernel.

Owns the numbers of the kernel interface (`linux/landlock.h`) and the ruleset calls. Does not
own what the profiles allow: see `sandbox.py`.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

# The three calls have the same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SYM = 1 << 12
REFER = 1 << 13  # rename and link across directories, since ABI 2
TRUNCATE = 1 << 14  # since ABI 3
IOCTL_DEV = 1 << 15  # since ABI 5

READ = READ_FILE | READ_DIR
WRITE = WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER
_ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
_BITS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # and 16 from ABI 5 on

ABI_WITH_TRUNCATE, ABI_WITH_TCP, ABI_WITH_SIGNAL_SCOPE = 3, 4, 6

_NET_BIND_TCP, _NET_CONNECT_TCP = 1 << 0, 1 << 1
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1 << 0, 1 << 1

_libc = ctypes.CDLL(None, use_errno=True)


class _RulesetAttr(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),  # since ABI 4
        ("scoped", ctypes.c_uint64),  # since ABI 6
    )


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _call(number: int, *arguments: object) -> int:
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def abi_version() -> int:
    """The kernel's Landlock ABI, or 0 where Landlock is absent or switched off."""
    try:
        return _call(
            _CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION)
        )
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def restrict(rules: Iterable[tuple[Path, int]], abi: int) -> list[int]:
    """Deny this thread and its children every file access that no rule of (path, rights) grants,
    TCP from ABI 4 and signals to outsiders from ABI 6. Paths that do not exist are skipped.

    Needs no_new_privs. Returns descriptors to keep open: a rule on `/proc/self` lasts as long as
    its directory entry, which only an open descriptor pins. Raises `OSError`.
    """
    assert abi >= 1
    handled_fs = (1 << _BITS_BY_ABI.get(abi, 16)) - 1
    attr = _RulesetAttr(
        handled_access_fs=handled_fs,
        handled_access_net=_NET_BIND_TCP | _NET_CONNECT_TCP if abi >= ABI_WITH_TCP else 0,
        scoped=_SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if abi >= ABI_WITH_SIGNAL_SCOPE else 0,
    )
    has_scope, has_tcp = abi >= ABI_WITH_SIGNAL_SCOPE, abi >= ABI_WITH_TCP
    size = ctypes.sizeof(attr) if has_scope else 16 if has_tcp else 8
    ruleset_fd = _call(
        _CREATE_RULESET, ctypes.byref(attr), ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    try:
        kept = [fd for path, access in rules if (fd := _add(ruleset_fd, path, access & handled_fs))]
        _call(_RESTRICT_SELF, ctypes.c_int(ruleset_fd), ctypes.c_uint32(0))
    finally:
        os.close(ruleset_fd)
    return kept


def _add(ruleset_fd: int, path: Path, access: int) -> int | None:
    """Grant `access` beneath `path`. Returns the descriptor where it must stay open."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None  # nothing to reach there: the rule would grant nothing
    is_pinned = path.is_relative_to("/proc")
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= _ON_FILES
        rule = _PathBeneathAttr(allowed_access=access, parent_fd=fd)
        _call(
            _ADD_RULE,
            ctypes.c_int(ruleset_fd),
            ctypes.c_int(_RULE_PATH_BENEATH),
            ctypes.byref(rule),
            ctypes.c_uint32(0),
        )
    except OSError:
        is_pinned = False
        raise
    finally:
        if not is_pinned:
            os.close(fd)
    return fd if is_pinned else None
