"""Makes a process one of another host, as far as its name says: `host.py NAME COMMAND...`.

In a namespace of its own for host names, which takes root.
"""

import ctypes
import os
import socket
import sys

_CLONE_NEWUTS = 0x04000000


def become(name: str) -> None:
    """Gives this process, and those that it starts, a host name of their own.

    Raises:
        OSError: it may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUTS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"unshare: {os.strerror(number)}")
    socket.sethostname(name)


if __name__ == "__main__":
    become(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
