"""What vLLM calls in each of its processes, once flora is installed beside it.

Each change to vLLM is one function here, and each place in vLLM that it stands on a line of
`flora.hosts.vllm.seams`.
"""

from functools import partial, wraps
from typing import Any

from flora.errors import UsageError
from flora.hosts.vllm.seams import check_installed


def register() -> None:
    """Put flora in the place of vLLM's own LoRA; called again it changes nothing.

    Raises BackendError where this vLLM is not one that the plugin knows.
    """
    check_installed()
    from vllm.v1.worker import lora_model_runner_mixin

    from flora.hosts.vllm.core import patch_engine_core
    from flora.hosts.vllm.frontend import (
        patch_async_llm,
        patch_llm_engine,
        patch_serving_models,
    )
    from flora.hosts.vllm.manager import AdapterManager

    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is AdapterManager:
        return
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = AdapterManager
    _configure()
    _keep_weights()
    patch_engine_core()
    patch_llm_engine()
    patch_async_llm()
    patch_serving_models()


def _configure() -> None:
    """Leave compilation on where vLLM turns it off for LoRA, and give each request a slot.

    vLLM's own LoRA operators would be traced with "no adapter" in them; flora's are opaque.
    """
    from vllm.platforms import current_platform

    from flora.hosts.vllm.graphs import capture_pieces
    from flora.hosts.vllm.settings import Settings

    platform: Any = type(current_platform)
    check = platform.check_and_update_config.__func__

    @wraps(check)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        lora = vllm_config.lora_config
        if lora is not None:
            _refuse(vllm_config)
            Settings.of(vllm_config)
            if lora.max_loras == 1:  # vLLM's default, which has different adapters wait in turns
                lora.max_loras = vllm_config.scheduler_config.max_num_seqs
                lora.max_cpu_loras = max(lora.max_cpu_loras, lora.max_loras)
            vllm_config.lora_config = None
        try:
            check(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora
        if lora is not None:
            capture_pieces(vllm_config.compilation_config)

    platform.check_and_update_config = classmethod(check_and_update_config)


def _refuse(vllm_config: Any) -> None:
    """Raise UsageError for what the plugin cannot serve adapters with."""
    parallel, lora, model = (
        vllm_config.parallel_config,
        vllm_config.lora_config,
        vllm_config.model_config,
    )
    wrong = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--fully-sharded-loras": lora.fully_sharded_loras,
        "--enable-tower-connector-lora": lora.enable_tower_connector_lora,
    }
    if found := [name for name, is_set in wrong.items() if is_set]:
        raise UsageError(
            f"flora does not serve adapters with {', '.join(found)}; leave it out, or turn flora "
            f"off with VLLM_PLUGINS=''"
        )
    # It runs the encoder over the items in another order than that in which it says their adapters.
    if model is not None and model.is_encoder_decoder and vllm_config.use_v2_model_runner:
        raise UsageError(
            "flora does not serve adapters of an encoder with vLLM's model runner V2; set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )


def _keep_weights() -> None:
    """Keep of the layers that vLLM packs on a CPU what adapters need."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.layers import utils

    from flora.hosts.vllm.layers import keep
    from flora.hosts.vllm.settings import Settings

    dispatch = utils.dispatch_cpu_unquantized_gemm

    @wraps(dispatch)
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        pack = partial(dispatch, remove_weight=remove_weight)
        config = get_current_vllm_config_or_none()
        if config is None or config.lora_config is None:
            pack(layer)
        else:
            keep(layer, pack, weight=Settings.of(config).keep_weights)

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
