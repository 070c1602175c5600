"""What vLLM's engine does between its steps: a request waits until its own adapter is read.

The ranks of a sharded model read together, in their loop, and there nothing is changed.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import wraps
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

Ask = Callable[["LoRARequest"], "Future[list[bool]]"]
"""Asks the workers whether an adapter is read, and has them read it."""


def patch_engine_core() -> None:
    """Have schedulers leave out requests whose adapter is on its way."""
    from vllm.v1.engine.core import EngineCore

    add = EngineCore.add_request
    prepared: WeakSet[EngineCore] = WeakSet()

    # Not as it is made: in a process of its own an engine loads plugins once it has begun that.
    @wraps(add)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        if request.lora_request is not None and self not in prepared:
            prepared.add(self)
            _hold_back(self)
        add(self, request, *args, **kwargs)

    EngineCore.add_request = add_request


def _hold_back(engine: Any) -> None:
    """Have an engine's scheduler leave out requests whose adapter is on its way."""
    config, executor, scheduler = engine.vllm_config, engine.model_executor, engine.scheduler
    if config.parallel_config.world_size > 1:
        return

    def ask(lora: "LoRARequest") -> "Future[list[bool]]":
        future: Future[list[bool]] = executor.collective_rpc(_is_read, args=(lora,), non_block=True)
        return future

    arrivals = Arrivals(ask, config.lora_config.max_cpu_loras)
    scheduler._handle_blocked_waiting_request = arrivals.before(
        scheduler._handle_blocked_waiting_request,
        # Whatever it is in stands for: the scheduler ends these with an error.
        fail=scheduler.encoder_cache_mismatch_reqs.add,
    )


class Arrivals:
    """The adapters of requests that wait, of which the workers are asked once a step.

    late: those that requests began with, the last ones last: workers hold them, as long as they
          leave in this order; one that has left all the same is read within its step.
    """

    def __init__(self, ask: Ask, capacity: int) -> None:
        self.ask, self.capacity = ask, capacity
        self.late: OrderedDict[int, None] = OrderedDict()
        self._asked: dict[int, Future[list[bool]]] = {}

    def has(self, lora: "LoRARequest") -> bool:
        """Whether a step with this adapter would not wait for it. Raises where it is lost."""
        number = lora.lora_int_id
        asked = self._asked.pop(number, None)
        if number not in self.late and (asked is None or not all(asked.result())):
            # The answer is there by the next step, and nothing waits for it.
            self._asked[number] = self.ask(lora)
            return False
        self.late[number] = None
        self.late.move_to_end(number)
        if len(self.late) > self.capacity:
            self.late.popitem(last=False)
        return True

    def before(
        self, handle: Callable[[Any], bool], *, fail: Callable[[str], None]
    ) -> Callable[[Any], bool]:
        """The scheduler's question whether a waiting request can begin, with this one in front.

        fail: has a request end with an error, whose adapter is there no longer.
        """

        @wraps(handle)
        def can_begin(request: Any) -> bool:
            lora: LoRARequest | None = request.lora_request
            try:
                if lora is not None and not self.has(lora):
                    return False
            except Exception as error:  # a worker's comes as whatever its executor makes of it
                logger.error("request %s: %s", request.request_id, error)
                fail(request.request_id)
                return False
            return handle(request)

        return can_begin


def _is_read(worker: Any, lora: "LoRARequest") -> bool:
    read: bool = worker.model_runner.lora_manager.is_read(lora)
    return read
