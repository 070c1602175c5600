"""Requests that name an adapter, made to name its content.

vLLM knows an adapter by a number, a name and a path that whoever asks has chosen, and keys its
caches by them: the same name with new weights meets old state. Here each folder is read and checked
once, written to a place that nobody else writes to, and known by the hash of what it holds: number
and path say the same thing in each process, and never anything else.
"""

import atexit
import fcntl
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from threading import Lock

from vllm.lora.request import LoRARequest

from flora.adapters.checkpoint import CONFIG_FILE, TENSORS_FILE, read_checkpoint, write_checkpoint
from flora.store import fetch

NUMBER_DIGITS = 15
"""Hexadecimal digits of an identity that are its number: 60 bits, as vLLM's are 64 with a sign."""

Stamp = tuple[int, int, int] | None
"""What changes where a file is written again; None where there is none."""


class Snapshots:
    """Copies of adapters' folders by their identity, as long as this process lives."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="flora-adapters-"))
        self._identities: dict[tuple[Path, Stamp, Stamp], str] = {}
        self._lock = Lock()
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        if sys.platform == "linux":
            # systemd deletes old files from its temporary folders, but nothing that is locked.
            fcntl.flock(os.open(self.folder, os.O_RDONLY), fcntl.LOCK_SH)

    def take(self, request: LoRARequest) -> LoRARequest:
        """The request for what its folder holds now; one that was taken is the same again.

        Raises UsageError where there is no such folder, InvalidAdapterError where it does not hold.
        """
        if self.is_taken(request):
            return request
        folder = fetch(request.lora_path)
        key = folder.resolve(), _stamp(folder / CONFIG_FILE), _stamp(folder / TENSORS_FILE)
        identity = self._identities.get(key)
        if identity is None or not (self.folder / identity).exists():
            # What was checked is written, so that it is what will be read.
            checkpoint = read_checkpoint(folder)
            identity = checkpoint.identity
            with self._lock:
                if not (self.folder / identity).exists():
                    write_checkpoint(self.folder / identity, checkpoint)
            self._identities[key] = identity
        return LoRARequest(
            lora_name=request.lora_name,
            lora_int_id=int(identity[:NUMBER_DIGITS], 16) + 1,
            lora_path=str(self.folder / identity),
            base_model_name=request.base_model_name,
        )

    def is_taken(self, request: LoRARequest) -> bool:
        """Whether a request is one that `take` made."""
        return Path(request.lora_path).parent == self.folder

    def drop(self, request: LoRARequest) -> None:
        """Delete the copy of a request that was taken."""
        shutil.rmtree(request.lora_path, ignore_errors=True)


@cache
def snapshots() -> Snapshots:
    """Those of this process."""
    return Snapshots()


def _stamp(file: Path) -> Stamp:
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
