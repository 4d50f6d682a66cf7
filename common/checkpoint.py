"""Checkpoints, of which a run keeps the last two, and the lock of its folder."""

import fcntl
from contextlib import suppress
from pathlib import Path

import torch

from common import InputError, first_line, replacing


def previous(path):
    """Where the checkpoint before the one at `path` is kept."""
    return Path(f"{path}.previous")


def save_checkpoint(state, path):
    """Write a checkpoint. The one that was there is kept as `previous(path)`, in case the new one is damaged later."""
    with replacing(path) as partial:
        torch.save(state, partial)
        if path.exists():
            path.replace(previous(path))


def load_checkpoint(path, announce=print):
    """What `save_checkpoint` wrote, on the CPU; None where there is nothing. The checkpoint before takes the place of one that
    cannot be read, and `announce` is called with a line that says so.

    Raises:
        InputError: there are checkpoints, and none can be read.
    """
    damage = None
    for file in (path, previous(path)):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:  # the unpickler raises whatever the damaged bytes make of it
            damage = damage or f"{file} is damaged ({first_line(error)})"
            continue
        if file != path:
            file.replace(path)
            announce(f"{damage or f'{path} is missing'}; the one before it is used, so an epoch is repeated")
        return state
    if damage:
        raise InputError(f"{damage} and there is none before it; remove it to start over")
    return None


def lock(path, part=None):
    """Keep other processes out of a folder. The lock ends with this process, however that ends, or when the file that is
    returned is closed; this process may take it again. There is none on a file system that has no locks.

    Args:
        path: of a file in the folder, which is made.
        part: byte of the file to lock, for processes that share a folder; by default all of them.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file cannot be opened.
    """
    file = path.open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, *(() if part is None else (1, part)))
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass
    return file


def share(file):
    """Leave all of a lock but the first part to other processes."""
    with suppress(OSError):  # a file system without locks
        fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)
