"""Files that are complete or absent: atomic writing, fsync, SHA-256; what helps against errors."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a file system answers when it has no such operation, as against failing at it: many network
# and FUSE mounts sync no directory, Lustre has no locks unless mounted with -o flock.
NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` once its content is on the disk.

    For a file or a directory of files. After a crash `path` is the old one or the new one. When the
    block raises, the temporary one is deleted and `path` stays as it was. Several processes may
    write the same path: the last one to finish wins.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove_leftovers(path)
    try:
        yield temporary
        if temporary.is_dir():
            for file in temporary.iterdir():
                fsync(file)
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    fsync(path.parent)


def remove_leftovers(path: Path):
    """Delete what processes that were killed while writing `path` have left."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = temporary.name.split(".")[-2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not is_running(int(pid))):
            remove(temporary)


def is_running(pid: int) -> bool:
    """Return whether a process with this id exists on this machine."""
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def remove(path: Path):
    """Delete a file or a directory, as far as it can be deleted; nothing when it does not exist.

    Of a link, what it points to stays.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_directory(path: Path):
    """Make a directory and its parents, and wait until their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def fsync(path: Path):
    """Wait until a file or a directory is on the disk.

    Where directories cannot be synced, a new name in one is as safe as that file system makes it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in NOT_SUPPORTED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict):
    """Write a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def regular_file(path: Path) -> Path:
    """Return the path. Raises ValueError for a pipe or a device: reading one may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file")
    return path


def read_text(path: Path, largest: int = 100_000_000) -> str:
    """Return the content of a text file that may come from anywhere.

    Raises OSError, and ValueError for more bytes, for what is not UTF-8, and for what is not a
    regular file.
    """
    size = regular_file(path).stat().st_size
    if size > largest:
        raise ValueError(f"{path.name} has {size:,} bytes, expected at most {largest:,}")
    return path.read_text(encoding="utf-8")


def read_json(path: Path):
    """Return the content of a JSON file that may come from anywhere. Raises as read_text()."""
    try:
        return json.loads(read_text(path))
    except RecursionError as e:
        raise ValueError("nested too deeply") from e


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------
# errors

REMEDIES = {
    errno.ENOSPC: "make room in {path}",
    errno.EDQUOT: "make room in {path}: your quota is used up",
    errno.EFBIG: "make room in {path}, or raise `ulimit -f`",
    errno.EACCES: "change the permissions of {path}",
    errno.EPERM: "change the permissions of {path}",
    errno.EROFS: "mount {path} so that it can be written to",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "raise `ulimit -n`",
    errno.EEXIST: "move away what has that name",
    errno.ENOTEMPTY: "move away what has that name",
    errno.ENOTDIR: "move away the file that stands where a directory should be",
    errno.EISDIR: "move away the directory that stands where a file should be",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ENOENT: "is {path} still mounted?",
    errno.EIO: "look after the disk of {path} (dmesg)",
}


def error_number(e: BaseException) -> int | None:
    """Return the errno of an OSError, also from the text of another library's error."""
    number = getattr(e, "errno", None)
    quoted = re.search(r"\(os error (\d+)\)", str(e))  # safetensors' way
    if number is None and quoted:
        number = int(quoted[1])
    return number


def remedy(e: BaseException, path: str | Path) -> str:
    """Return the hint for an error in reading or writing at a path."""
    default = "look after the disk of {path} (dmesg)"
    return REMEDIES.get(error_number(e), default).format(path=path)
