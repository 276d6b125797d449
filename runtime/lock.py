"""A lock on a directory for one process: a locked file in that directory."""

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from runtime.files import NOT_SUPPORTED, is_running


class Lock:
    """Locks a directory for this process, by a lock on a file in it.

    The system releases it when the process ends, however that happens. Where there are no locks,
    `supported` is False and the file's content decides, host and id of the process that has the
    lock: a process of this machine that still runs is noticed, one of another machine is not.
    """

    def __init__(self, folder: Path, name: str = ".lock"):
        """Take the lock. Raises BlockingIOError naming the process that has it."""
        self.path = folder / name
        self.supported = True
        self.file = None
        while self.file is None:
            file = open(self.path, "a+")  # noqa: SIM115  neither cuts the file nor needs one
            try:
                self.take(file)
                if same_file(file, self.path):  # otherwise its holder has just deleted it
                    self.file = file
            finally:
                if self.file is None:
                    file.close()
        self.file.truncate(0)
        self.file.write(f"{socket.gethostname()} {os.getpid()}")
        self.file.flush()

    def take(self, file):
        """Lock an open file. Raises BlockingIOError when another process has it."""
        file.seek(0)
        host, _, pid = file.read(300).partition(" ")
        taken = False  # by another process
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError as e:
            if e.errno not in NOT_SUPPORTED:
                raise
            self.supported = False
            if host == socket.gethostname() and pid.isdecimal():
                taken = int(pid) != os.getpid() and is_running(int(pid))
        if taken:
            holder = f"process {pid or '?'} on {host or '?'}"
            if not self.supported:  # the id may be that of another process by now
                holder += f"; if that is another program, delete {self.path}"
            raise BlockingIOError(errno.EWOULDBLOCK, holder)

    def close(self):
        """Release the lock; a second call does nothing."""
        if self.file is None:
            return
        with suppress(OSError):  # while it is locked: nobody deletes the file of the next one
            self.path.unlink()
        with suppress(OSError):
            self.file.close()
        self.file = None


def same_file(file, path: Path) -> bool:
    """Return whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
