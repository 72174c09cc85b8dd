"""One process trains in a run folder at a time; a second one is refused before it writes anything."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from flags import UserError
from training.folder import writing

_held: list[tuple[Path, int]] = []


def take(folder: Path, flag: str = "--resume") -> None:
    """Hold FOLDER/.lock inside `releasing`; the system lets go of it with the process, however that ends.

    flag: what named the folder. Raises UserError where another process holds it, RunError where no file can be made.
    On a disk that keeps no locks nothing is held, and one line says so.
    """
    path = folder / ".lock"
    with writing(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(path, file):  # deleted by a run that ended meanwhile: no other process would meet this lock
            os.close(file)
            return take(folder, flag)
        with writing(path):
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        if error.errno in (EACCES, EAGAIN):
            other = os.read(file, 1000).decode(errors="replace") or "another process"
            os.close(file)
            raise UserError(
                f"{flag} {folder}: {other} trains there; wait for its end, or stop it (if it is dead, delete {path})"
            ) from None
        print(f"note: the disk of {folder} keeps no locks: a second run in it would not be refused")
    _held.append((path, file))


def _is_at(path: Path, file: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file))
    return False


def take_for_all(folder: Path) -> None:
    """`take` by the main process, for a run of many; every process raises what it does."""
    error = None
    if PartialState().is_main_process:
        try:
            take(folder)
        except UserError as found:
            error = found
    (error,) = broadcast_object_list([error])
    if error is not None:
        raise error


@contextmanager
def releasing() -> Iterator[None]:
    """Give back at its end what was taken, and leave no file of it."""
    try:
        yield
    finally:
        while _held:
            path, file = _held.pop()
            with suppress(OSError):  # the folder may be gone, or its disk
                if _is_at(path, file):  # and not another run's
                    path.unlink()
            os.close(file)
