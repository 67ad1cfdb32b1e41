"""Calls by other users, for the programs beside this one: one line of output a call, to be compared with another system's."""

import ctypes
import errno
import os

libc = ctypes.CDLL(None, use_errno=True)
CAP_FSETID = 4


def call(name, *arguments):
    """A call of the C library that Python does not have."""
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def drop_capability(number):
    """Takes one capability out of the effective and permitted sets (capget(2), version 3)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    call("capget", header, data)
    for field in (0, 1):
        data[field + 3 * (number // 32)] &= ~(1 << number % 32)
    call("capset", header, data)


def as_user(user, action):
    """What action returns, or the name of its error, when `user` = (uid, gid, groups, keep CAP_FSETID or not) does it."""
    uid, gid, groups, fsetid = user
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            if uid != 0 and fsetid:
                # Capabilities stay over the change of ids, and are made effective again.
                call("prctl", 8, 1, 0, 0, 0)
            os.setresuid(uid, uid, uid)
            if uid != 0 and fsetid:
                header = (ctypes.c_uint32 * 2)(0x20080522, 0)
                call("capset", header, (ctypes.c_uint32 * 6)(1 << CAP_FSETID, 1 << CAP_FSETID, 0, 0, 0, 0))
            if uid == 0 and not fsetid:
                drop_capability(CAP_FSETID)
            answer = action()
        except OSError as error:
            answer = errno.errorcode[error.errno]
        except BaseException as error:  # the parent prints it, which makes the outputs differ
            answer = repr(error)
        os.write(there, str(answer).encode())
        os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return answer
