"""What vLLM's engine does with adapters between its steps: a request waits until its own is read.

Only where the engine has its worker in its own process; the ranks of a sharded model read together,
in their loop.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from flora.hosts.vllm.manager import AdapterManager


def patch_engine_core() -> None:
    """Have the scheduler leave out requests whose adapter is on its way."""
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    create, add_lora = EngineCore.__init__, EngineCoreProc.add_lora

    @wraps(create)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        if manager := _manager(self):
            scheduler = self.scheduler
            scheduler._handle_blocked_waiting_request = _if_read(
                manager, scheduler._handle_blocked_waiting_request
            )

    @wraps(add_lora)
    def add(self: Any, lora_request: "LoRARequest") -> bool | Future[bool]:
        """A future, which vLLM answers with once it is done."""
        if manager := _manager(self):
            return manager.check_adapter(lora_request)
        added: bool = add_lora(self, lora_request)
        return added

    EngineCore.__init__, EngineCoreProc.add_lora = init, add


def _manager(core: Any) -> "AdapterManager | None":
    """That of an engine's only worker, where it can read beside the steps."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    if core.vllm_config.lora_config is None or not isinstance(core.model_executor, UniProcExecutor):
        return None
    manager: AdapterManager = core.model_executor.driver_worker.worker.model_runner.lora_manager
    return manager if manager.reads_aside else None


def _if_read(manager: "AdapterManager", handle: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @wraps(handle)
    def ready(request: Any) -> bool:
        lora: LoRARequest | None = request.lora_request
        return (lora is None or manager.is_ready(lora)) and handle(request)

    return ready
