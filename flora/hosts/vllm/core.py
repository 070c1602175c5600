"""What vLLM's engine does between its steps: a request waits until its own adapter is read.

The ranks of a sharded model read together, in their loop, and there nothing is changed.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import wraps
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

Answer = bool | str
"""Whether an adapter was read, or why it cannot be."""

Ask = Callable[[Sequence["LoRARequest"]], "Future[list[list[Answer]]]"]
"""Asks the worker of some adapters whether they were read, and has it read them."""


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

    def ask(loras: Sequence["LoRARequest"]) -> "Future[list[list[Answer]]]":
        future: Future[list[list[Answer]]] = executor.collective_rpc(
            _are_read, args=(loras,), non_block=True
        )
        return future

    def used(step: Any) -> set[int]:
        loras = (scheduler.requests[name].lora_request for name in step.num_scheduled_tokens)
        return {lora.lora_int_id for lora in loras if lora is not None}

    arrivals = Arrivals(
        ask,
        slots=config.lora_config.max_loras,
        capacity=config.lora_config.max_cpu_loras,
        runs_meanwhile=engine.batch_queue is not None,
    )
    scheduler.schedule = arrivals.around(scheduler.schedule, used=used)
    scheduler._handle_blocked_waiting_request = arrivals.before(
        scheduler._handle_blocked_waiting_request,
        # Whatever it is in stands for: the scheduler ends these with an error.
        fail=scheduler.encoder_cache_mismatch_reqs.add,
    )
    executor.remove_lora = arrivals.without(executor.remove_lora)


class Arrivals:
    """The adapters of requests that wait, of which the worker is asked once a step, of all at once:
    it and the engine would wait for each other if there were many questions on their way.

    slots:          adapters that a step may use; it is asked of so many, and reads no more ahead.
    capacity:       adapters that the worker holds.
    runs_meanwhile: whether the worker runs a step while the next one is scheduled.
    late:           the adapters that steps used last, in the order in which the worker has them
                    leave. One that has left all the same, for others that are pinned or for want of
                    bytes, is read within its step.
    """

    def __init__(self, ask: Ask, *, slots: int, capacity: int, runs_meanwhile: bool) -> None:
        self.ask, self.slots, self.capacity = ask, slots, capacity
        self.runs_meanwhile = runs_meanwhile
        self.late: OrderedDict[int, None] = OrderedDict()
        self._waiting: dict[int, LoRARequest] = {}
        self._asked: Future[list[list[Answer]]] | None = None
        self._answers: dict[int, Answer] = {}

    def around(
        self, schedule: Callable[..., Any], *, used: Callable[[Any], Iterable[int]]
    ) -> Callable[..., Any]:
        """The scheduler's making of a step, with the questions around it.

        used: the numbers of a step's adapters.
        """

        @wraps(schedule)
        def scheduled(*args: Any, **kwargs: Any) -> Any:
            waiting, self._waiting = self._waiting, {}
            if waiting and not self.runs_meanwhile:  # it answers at once, and has read since
                self._asked = self.ask([*waiting.values()])
            if self._asked is not None:
                self._answers = dict(zip(waiting, self._asked.result()[0], strict=True))
            step = schedule(*args, **kwargs)
            self._have_used(used(step))
            self._waiting = dict(islice(self._waiting.items(), self.slots))
            self._asked = self.ask([*self._waiting.values()]) if self._waiting else None
            self._answers.clear()
            return step

        return scheduled

    def before(
        self, handle: Callable[[Any], bool], *, fail: Callable[[str], None]
    ) -> Callable[[Any], bool]:
        """The scheduler's question whether a waiting request can begin, with this one in front.

        fail: has a request end with an error, whose adapter is there no longer.
        """

        @wraps(handle)
        def can_begin(request: Any) -> bool:
            lora: LoRARequest | None = request.lora_request
            answer = lora is None or self._has(lora)
            if isinstance(answer, str):
                logger.error("request %s: %s", request.request_id, answer)
                fail(request.request_id)
                return False
            return answer and handle(request)

        return can_begin

    def without(self, remove: Callable[[int], bool]) -> Callable[[int], bool]:
        """The executor's removal of an adapter by its number: the same one may come again, and is
        read again then."""

        @wraps(remove)
        def removed(number: int) -> bool:
            self.late.pop(number, None)
            return remove(number)

        return removed

    def _has(self, lora: "LoRARequest") -> Answer:
        """Whether a step with this adapter would not wait for it; if not, it is asked for."""
        number = lora.lora_int_id
        if number in self.late:
            return True
        answer = self._answers.get(number, False)
        if isinstance(answer, bool):
            self._waiting[number] = lora  # also where it was read: it may not begin now
        return answer

    def _have_used(self, numbers: Iterable[int]) -> None:
        for number in sorted(numbers):
            self._waiting.pop(number, None)
            self.late[number] = None
            self.late.move_to_end(number)
        while len(self.late) > self.capacity:
            self.late.popitem(last=False)


def _are_read(worker: Any, loras: Sequence["LoRARequest"]) -> list[Answer]:
    answers: list[Answer] = []
    for lora in loras:
        try:
            answers.append(worker.model_runner.lora_manager.is_read(lora))
        except Exception as error:
            answers.append(f"{error}")
    return answers
