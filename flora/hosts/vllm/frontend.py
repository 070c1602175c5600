"""What vLLM's front ends do with adapters: check them before the engine does anything with them.

One function a class of vLLM's; each replaces methods of it, and is called once.
"""

import asyncio
import re
import time
from functools import wraps
from http import HTTPStatus
from typing import Any

from vllm.lora.request import LoRARequest

from flora import errors
from flora.errors import FloraError, OutOfBudgetError, UsageError
from flora.hosts.vllm.requests import snapshots

STATUS = {
    UsageError: HTTPStatus.NOT_FOUND,
    OutOfBudgetError: HTTPStatus.SERVICE_UNAVAILABLE,
    FloraError: HTTPStatus.BAD_REQUEST,
}
"""What a client is told when its adapter is refused; the first that an error is."""

GRACE_SECONDS = 60.0
"""So long an adapter's copy outlives its name, for a request that was on its way."""

POLL_SECONDS = 0.5

READING_SECONDS = 0.01
"""After so long it is asked again whether an adapter was read."""

ARGUMENTS = 4
"""Of `add_request` in front of its adapter: id, prompt, parameters, arrival."""


class Adapters:
    """The adapters that an engine was given through one front end.

    taken:   by number.
    numbers: of ours, by the number that the user gave.
    retired: when the copies of those that were removed may go.
    """

    def __init__(self) -> None:
        self.taken: dict[int, LoRARequest] = {}
        self.numbers: dict[int, int] = {}
        self.retired: dict[int, tuple[float, LoRARequest]] = {}
        self.sweeping: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, engine: Any) -> "Adapters":
        """An engine's own."""
        own: Adapters = vars(engine).setdefault("flora_adapters", cls())
        return own

    def accept(self, request: LoRARequest, taken: LoRARequest) -> None:
        self.numbers[request.lora_int_id] = taken.lora_int_id
        self.taken[taken.lora_int_id] = taken
        self.retired.pop(taken.lora_int_id, None)

    def remove(self, number: int) -> int:
        """Our number of an adapter that leaves."""
        number = self.numbers.pop(number, number)
        if (taken := self.taken.pop(number, None)) is not None:
            self.retired[number] = time.monotonic() + GRACE_SECONDS, taken
        return number

    def drop_retired(self) -> None:
        for number, (due, taken) in list(self.retired.items()):
            if time.monotonic() > due:
                del self.retired[number]
                snapshots().drop(taken)


def patch_llm_engine() -> None:
    """`LLM`'s engine: an adapter is loaded, or refused, before a request of it is queued."""
    from vllm.v1.engine.llm_engine import LLMEngine

    add_request, add_lora = LLMEngine.add_request, LLMEngine.add_lora
    remove_lora, pin_lora, list_loras = (
        LLMEngine.remove_lora,
        LLMEngine.pin_lora,
        LLMEngine.list_loras,
    )

    @wraps(add_request)
    def add(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, request = _split(args, kwargs)
        if request is not None and self.vllm_config.lora_config is not None:
            taken = snapshots().take(request)
            if taken.lora_int_id not in Adapters.of(self).taken:
                load(self, request)
            request = taken
        return add_request(self, *args, lora_request=request, **kwargs)

    @wraps(add_lora)
    def load(self: Any, lora_request: LoRARequest) -> bool:
        taken = snapshots().take(lora_request)
        try:
            while not add_lora(self, taken):
                time.sleep(READING_SECONDS)
        except Exception as error:
            raise _told(error) from None
        Adapters.of(self).accept(lora_request, taken)
        return True

    @wraps(remove_lora)
    def remove(self: Any, lora_id: int) -> bool:
        own = Adapters.of(self)
        own.drop_retired()
        removed: bool = remove_lora(self, own.remove(lora_id))
        return removed

    @wraps(pin_lora)
    def pin(self: Any, lora_id: int) -> bool:
        pinned: bool = pin_lora(self, Adapters.of(self).numbers.get(lora_id, lora_id))
        return pinned

    @wraps(list_loras)
    def list_all(self: Any) -> set[int]:
        own = {ours: theirs for theirs, ours in Adapters.of(self).numbers.items()}
        return {own.get(number, number) for number in list_loras(self)}

    LLMEngine.add_request, LLMEngine.add_lora = add, load
    LLMEngine.remove_lora, LLMEngine.pin_lora, LLMEngine.list_loras = remove, pin, list_all


def patch_async_llm() -> None:
    """The servers' engine, likewise."""
    from vllm.v1.engine.async_llm import AsyncLLM

    add_request, add_lora = AsyncLLM.add_request, AsyncLLM.add_lora
    remove_lora, pin_lora = AsyncLLM.remove_lora, AsyncLLM.pin_lora

    @wraps(add_request)
    async def add(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, request = _split(args, kwargs)
        if request is not None and self.vllm_config.lora_config is not None:
            taken = await _take(request)
            if taken.lora_int_id not in Adapters.of(self).taken:
                await load(self, request)
            request = taken
        return await add_request(self, *args, lora_request=request, **kwargs)

    @wraps(add_lora)
    async def load(self: Any, lora_request: LoRARequest) -> bool:
        taken = await _take(lora_request)
        try:
            while not await add_lora(self, taken):
                await asyncio.sleep(READING_SECONDS)
        except Exception as error:
            raise _told(error) from None
        Adapters.of(self).accept(lora_request, taken)
        return True

    @wraps(remove_lora)
    async def remove(self: Any, lora_id: int) -> bool:
        removed: bool = await remove_lora(self, Adapters.of(self).remove(lora_id))
        return removed

    @wraps(pin_lora)
    async def pin(self: Any, lora_id: int) -> bool:
        pinned: bool = await pin_lora(self, Adapters.of(self).numbers.get(lora_id, lora_id))
        return pinned

    AsyncLLM.add_request, AsyncLLM.add_lora = add, load
    AsyncLLM.remove_lora, AsyncLLM.pin_lora = remove, pin


def patch_serving_models() -> None:
    """The server's names: each stands for the content that it was loaded with.

    Loading answers 4xx for a bad adapter, and unloading reaches the engine.
    """
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve import create_error_response

    unload_lora_adapter = OpenAIServingModels.unload_lora_adapter
    resolve_lora = OpenAIServingModels.resolve_lora

    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        name = request.lora_name
        async with self.lora_resolver_lock[name]:
            refused = await self._check_load_lora_adapter_request(request)
            if refused is not None:
                return refused
            lora = LoRARequest(name, 1, request.lora_path)
            if base_model_name is not None and self.is_base_model(base_model_name):
                lora.base_model_name = base_model_name
            try:
                taken = await _take(lora)
                await self.engine_client.add_lora(taken)
            except FloraError as error:
                status = next(s for cls, s in STATUS.items() if isinstance(error, cls))
                return create_error_response(
                    message=str(error), err_type=type(error).__name__, status_code=status
                )
            self.lora_requests[name] = taken
        _sweep(self)
        return f"Success: LoRA adapter '{name}' added successfully."

    @wraps(unload_lora_adapter)
    async def unload(self: Any, request: Any) -> Any:
        answer = await unload_lora_adapter(self, request)
        _sweep(self)
        return answer

    @wraps(resolve_lora)
    async def resolve(self: Any, lora_name: str) -> Any:
        answer = await resolve_lora(self, lora_name)
        if isinstance(answer, LoRARequest) and not snapshots().is_taken(answer):
            answer = self.lora_requests[lora_name] = await _take(answer)
        return answer

    OpenAIServingModels.load_lora_adapter = load
    OpenAIServingModels.unload_lora_adapter = unload
    OpenAIServingModels.resolve_lora = resolve


def _sweep(models: Any) -> None:
    """Have the engine forget adapters without a name as soon as no request runs on them."""
    own = Adapters.of(models.engine_client)
    if own.sweeping is None or own.sweeping.done():
        own.sweeping = asyncio.create_task(_sweep_all(models, own))


async def _sweep_all(models: Any, own: Adapters) -> None:
    engine = models.engine_client
    while True:
        own.drop_retired()
        named = {request.lora_int_id for request in models.lora_requests.values()}
        nameless = own.taken.keys() - named
        states = engine.output_processor.request_states.values()
        running = {state.lora_request.lora_int_id for state in states if state.lora_request}
        for number in nameless - running:
            await engine.remove_lora(number)
        if not nameless & running:
            return
        await asyncio.sleep(POLL_SECONDS)


async def _take(request: LoRARequest) -> LoRARequest:
    """`Snapshots.take`, whose reading other requests do not wait for."""
    if snapshots().is_taken(request):
        return request
    return await asyncio.to_thread(snapshots().take, request)


def _split(args: Any, kwargs: Any) -> tuple[Any, Any, LoRARequest | None]:
    """The arguments of an `add_request`, and apart from them its adapter.

    Raises TypeError where it is not given by name, as vLLM's own callers give it.
    """
    if len(args) > ARGUMENTS:
        raise TypeError("add_request takes lora_request and what follows it by name")
    return args, kwargs, kwargs.pop("lora_request", None)


def _told(error: Exception) -> Exception:
    """What a worker refused an adapter with, as it comes back from another process."""
    found = re.search(r"(\w+Error): (.*)", str(error), re.DOTALL)
    cls = getattr(errors, found[1], None) if found else None
    if found is None or cls is None:
        return error
    told: Exception = cls(found[2])
    return told
