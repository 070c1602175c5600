"""Adapters are read beside the engine's steps, in a thread of its own.

So no request waits for another's; what is left for the loop is to copy pages into the bank.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

T = TypeVar("T")


class Reader(Generic[T]):
    """Reads adapters by their number, each once until it is taken.

    read:  from a request to what the bank takes.
    aside: whether another thread may call it; else who asks for an adapter waits for it.
    kept:  so many that were read wait for their first step; of more the oldest is read again.
    """

    def __init__(self, read: Callable[["LoRARequest"], T], *, aside: bool, kept: int) -> None:
        self._read, self._kept = read, kept
        self._thread = aside and ThreadPoolExecutor(
            1, "flora-reader", initializer=_leave_the_engines_cores
        )
        self._coming: OrderedDict[int, Future[T]] = OrderedDict()

    def has(self, request: "LoRARequest") -> bool:
        """Whether an adapter was read; if not, it is being read. Raises what reading raised."""
        read = self._start(request).done()
        if read:
            self.get(request)
        return read

    def get(self, request: "LoRARequest") -> T:
        """What was read, waited for, and kept until it is taken. Raises what reading raised."""
        future = self._start(request)
        if future.exception() is not None:
            del self._coming[request.lora_int_id]
        return future.result()

    def take(self, request: "LoRARequest") -> T:
        """What was read, waited for, and not kept any longer. Raises what reading raised."""
        found = self.get(request)
        del self._coming[request.lora_int_id]
        return found

    def _start(self, request: "LoRARequest") -> Future[T]:
        number = request.lora_int_id
        if number not in self._coming:
            self._coming[number] = self._begin(request)
            done = [n for n, future in self._coming.items() if future.done() and n != number]
            for old in done[: max(0, len(done) - self._kept)]:
                del self._coming[old]
        return self._coming[number]

    def _begin(self, request: "LoRARequest") -> Future[T]:
        if self._thread:
            return self._thread.submit(self._read, request)
        found: Future[T] = Future()
        try:
            found.set_result(self._read(request))
        except Exception as error:
            found.set_exception(error)
        return found


def _leave_the_engines_cores() -> None:
    """vLLM binds each thread that computes to a core, and what such a one starts inherits it."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = os.sched_getaffinity(os.getppid())
    free = set(cores)
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended since
            own = os.sched_getaffinity(int(thread))
            if own != cores:
                free -= own
    os.sched_setaffinity(0, free or cores)
