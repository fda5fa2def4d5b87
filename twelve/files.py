"""Files that are whole or absent: atomic writes, one writer a folder, checksums."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twelve.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, put what was written there in place of `path`.

    The content and the folder entry are synced, so that after a crash or a power cut `path` holds the old bytes or the
    new ones. When the block fails the temporary file is removed and `path` stays as it was.

    Raises InputError, with the path and the free bytes, when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _is_disk_full(error):
            free = f"{free_bytes(path):,} bytes free"
            raise InputError(f"no space left to write {path} ({free}): free some space, run again") from error
        raise


@contextlib.contextmanager
def new_folders(folder: Path) -> Iterator[None]:
    """Make `folder`, for this process alone; when the block fails, what was made and nobody filled goes again."""
    made = _absent(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        _remove_empty(made)
        raise


def _absent(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty: the usual case
        for folder in folders:
            folder.rmdir()


def check_name(path: str | Path) -> None:
    """InputError for a name that is not UTF-8, as old archives leave them: no report or card could tell it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        name = os.fsencode(path)
        raise InputError(f"{name!r}: a file's name must be UTF-8: rename it (convmv does whole folders)") from error


def command(*words: object) -> str:
    """What to type in a shell: names with blanks in quotation marks."""
    return shlex.join(map(str, words))


def valid(text: str) -> str:
    """The text as UTF-8 can hold it: with U+FFFD for half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as readable UTF-8 JSON, atomically."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. InputError when it is missing, is not UTF-8 or is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path} is not JSON: {error}") from error


class FolderLock:
    """Context manager: this process is the only writer of `folder`, which is made when it does not exist yet.

    The lock is the kernel's (flock), so it ends with its process, however that ends. InputError when another process
    holds it. On leaving, the lock file goes, and so do the folders that it made and that nobody filled.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / ".lock"
        self._descriptor = -1
        self._made: list[Path] = []

    def __enter__(self) -> FolderLock:
        self._made = _absent(self.folder)
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # the last holder has just removed the empty folder
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise InputError(
                    f"{self.folder} is in use by process {holder}: wait for it, stop it, or name another folder"
                ) from None
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # the last holder removed the file between our open and our flock
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
        return self

    def __exit__(self, *exception: object) -> None:
        self.path.unlink(missing_ok=True)
        _remove_empty(self._made)
        os.close(self._descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


def sha256(path: str | Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: str | Path) -> int:
    """Bytes that this user may still write on the disk of `path`, which need not exist yet."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove what killed processes left beside `path`: a checkpoint's temporary file can be large."""
    prefix = f".{path.name}."
    for stale in path.parent.iterdir():
        pid = stale.name.removeprefix(prefix).removesuffix(".tmp")
        if stale.name == f"{prefix}{pid}.tmp" and pid.isdigit() and not _is_alive(int(pid)):
            stale.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and numpy tell it in words only; numpy's tofile may also stop half-way
    words = ("No space left on device", "Not enough free space", "requested and")
    return any(word in str(error) for word in words)
