"""What the plugin stands on in vLLM: each place with what is expected there and why.

It is read from vLLM's source, and vLLM is not imported: so it is known before anything is changed,
and for a version that is not installed. `make compat` checks all versions that flora supports.
"""

import ast
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flora.errors import BackendError


@dataclass(frozen=True)
class Seam:
    """One place that the plugin stands on.

    file:  in vLLM's folder.
    place: the class or function there, with dots; "" is the whole file.
    code:  what stands in it. `_` is anything, `*_` and `**_` are further arguments. Of a
           definition it is the head: its parameters by name, further ones having defaults.
    why:   what the plugin needs it for.
    among: where given, code need not be there; where it is, the name that stands for its `_`, or
           that it defines, is one of these.
    """

    file: str
    place: str
    code: str
    why: str
    among: tuple[str, ...] | None = None

    def __str__(self) -> str:
        code = self.code.replace("\n", " ")
        if self.among is not None:
            code = f"{code} only of {', '.join(self.among)}" if self.among else f"no {code}"
        return f"{self.file}: {f'{self.place}: ' * bool(self.place)}{code} ({self.why})"


MANAGER = (
    "add_adapter",
    "add_dummy_lora",
    "create_lora_manager",
    "dummy_lora_cache",
    "get_dummy_lora_warmup_rank",
    "is_enabled",
    "list_adapters",
    "pin_adapter",
    "remove_adapter",
    "remove_all_adapters",
    "set_active_adapters",
    "supports_tower_connector_lora",
)
"""What `AdapterManager` has."""

_ADD = "add_request(self, request_id, prompt, params, arrival_time, lora_request, *_)"
_ADDED = "add_request(_, _, _, lora_request=_, **_)"
_BY_NAME = "gives the adapter by name"
_CALLED = "what a worker calls on the manager"
_CHECK = "@classmethod\ndef check_and_update_config(cls, vllm_config)"
_CUT = "adapted layers run between CUDA graphs"
_ENCODER = "what takes items, and what takes what was made of them"
_ITEMS = "tells the adapter of each item that an encoder takes, in its order"
_LOADED = "each process loads the plugin"
_MANAGED = "the manager has all that is called on it"
_QUESTIONS = "the workers are asked before and after it"
_RENAMED = "a model's renames, which are undone"
_REPLACED = "replaced"
_SHARDED = "what a rank has, and what all have together"
_SIZES = "self.output_partition_sizes; self.input_size_per_partition; self.bias"

_ASYNC_LLM = "v1/engine/async_llm.py"
_CORE = "v1/engine/core.py"
_LINEAR = "model_executor/layers/linear.py"
_LLM_ENGINE = "v1/engine/llm_engine.py"
_MIXIN = "v1/worker/lora_model_runner_mixin.py"
_MODELS = "entrypoints/openai/models/serving.py"
_RUNNER = "v1/worker/gpu_model_runner.py"
_SCHEDULER = "v1/core/sched/scheduler.py"
_UTILS = "model_executor/layers/utils.py"
_WEIGHTS = "model_executor/models/utils.py"
_WHISPER = "model_executor/models/whisper.py"

SEAMS = (
    # plugin.py: how vLLM comes to it
    Seam("plugins/__init__.py", "", "_ = 'vllm.general_plugins'", "the entry point's group"),
    Seam("engine/arg_utils.py", "EngineArgs.__post_init__", "load_general_plugins()", _LOADED),
    Seam(_CORE, "EngineCore.__init__", "load_general_plugins()", _LOADED),
    Seam(
        "v1/worker/worker_base.py",
        "WorkerWrapperBase.init_worker",
        "load_general_plugins()",
        _LOADED,
    ),
    # plugin.py: the configuration
    Seam(
        "platforms/__init__.py",
        "__getattr__",
        "name == 'current_platform'",
        "whose class is changed",
    ),
    Seam("platforms/cpu.py", "CpuPlatform", _CHECK, _REPLACED),
    Seam("platforms/cuda.py", "CudaPlatformBase", _CHECK, _REPLACED),
    Seam(
        "platforms/cpu.py",
        "CpuPlatform.check_and_update_config",
        "vllm_config.lora_config is not None",
        "where compilation is turned off",
    ),
    Seam(
        "config/vllm.py",
        "VllmConfig.__post_init__",
        "current_platform.check_and_update_config(self)",
        "calls what is replaced",
    ),
    Seam(
        "config/vllm.py",
        "VllmConfig",
        "lora_config: _; model_config: _; parallel_config: _; scheduler_config: _; "
        "compilation_config: _; additional_config: _",
        "read",
    ),
    Seam("config/vllm.py", "", "def get_current_vllm_config_or_none(*_)", "called"),
    Seam(
        "config/__init__.py",
        "",
        "from _ import VllmConfig, get_current_vllm_config_or_none",
        "imported from there",
    ),
    Seam(
        "config/lora.py",
        "LoRAConfig",
        "max_loras: _ = Field(default=1, **_)",
        "1 is taken for not set",
    ),
    Seam(
        "config/lora.py",
        "LoRAConfig",
        "max_cpu_loras: _; fully_sharded_loras: _; enable_tower_connector_lora: _",
        "read",
    ),
    Seam("config/scheduler.py", "SchedulerConfig", "max_num_seqs: _", "a slot for each request"),
    Seam(
        "config/parallel.py",
        "ParallelConfig",
        "tensor_parallel_size: _; pipeline_parallel_size: _",
        "more than one is refused",
    ),
    # graphs.py: what is captured, and where a compiled model is cut
    Seam(
        "config/compilation.py",
        "CompilationConfig",
        "mode: _; cudagraph_mode: _; splitting_ops: _",
        _CUT,
    ),
    Seam("config/compilation.py", "CUDAGraphMode", "NONE = 0; PIECEWISE = 1", _CUT),
    Seam("config/compilation.py", "CompilationMode", "VLLM_COMPILE = 3", _CUT),
    Seam(
        "config/compilation.py",
        "CompilationConfig",
        "def splitting_ops_contain_attention(self)",
        "called",
    ),
    Seam(
        "config/__init__.py",
        "",
        "from _ import CompilationConfig, CompilationMode, CUDAGraphMode",
        "imported from there",
    ),
    Seam(
        "config/vllm.py",
        "VllmConfig.__post_init__",
        "self.compilation_config.set_splitting_ops_for_v1(**_)",
        _CUT,
    ),
    Seam(
        "compilation/partition_rules.py",
        "should_split",
        "packet_name in splitting_ops",
        _CUT,
    ),
    # plugin.py and layers.py: W0 of the layers that a CPU packs
    Seam(_UTILS, "", "def dispatch_cpu_unquantized_gemm(layer, remove_weight)", _REPLACED),
    Seam(
        _UTILS,
        "dispatch_cpu_unquantized_gemm",
        "layer._",
        "called with a module that has a weight alone",
        among=("weight", "cpu_linear", "bias", "_cpu_unpacked_conv_weight"),
    ),
    Seam(
        _UTILS,
        "cpu_unquantized_gemm",
        "layer.cpu_linear(x, weight, bias)",
        "the product of a packed weight",
    ),
    Seam(
        _LINEAR,
        "UnquantizedLinearMethod.process_weights_after_loading",
        "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm",
        "found when it is called, so that the one in its place is",
    ),
    Seam(
        _LINEAR,
        "UnquantizedLinearMethod.process_weights_after_loading",
        "dispatch_cpu_unquantized_gemm(layer, remove_weight=_)",
        "calls what is replaced",
    ),
    # layers.py: the linear layers
    Seam(_LINEAR, "LinearMethodBase", "def apply(self, layer, x, bias)", _REPLACED),
    Seam(
        _LINEAR,
        "UnquantizedLinearMethod.create_weights",
        "layer.register_parameter('weight', _)",
        "W0 as it was loaded",
    ),
    Seam(
        _LINEAR,
        "LinearBase.__init__",
        "self.quant_method; self.input_size; self.params_dtype; self.skip_bias_add",
        "read",
    ),
    Seam(
        _LINEAR,
        "ReplicatedLinear.__init__",
        "self.output_partition_sizes; self.bias",
        "the sizes of what is merged",
    ),
    Seam(_LINEAR, "ColumnParallelLinear.__init__", _SIZES, "the sizes of what is merged"),
    Seam(_LINEAR, "RowParallelLinear.__init__", _SIZES, "the sizes of what is merged"),
    # shards.py
    Seam(_LINEAR, "LinearBase.__init__", "self.tp_rank; self.tp_size", _SHARDED),
    Seam(_LINEAR, "QKVParallelLinear.__init__", "self.num_kv_head_replicas", _SHARDED),
    Seam(
        "distributed/communication_op.py",
        "",
        "def tensor_model_parallel_all_reduce(input_)",
        _SHARDED,
    ),
    Seam(
        "distributed/communication_op.py",
        "",
        "def tensor_model_parallel_all_gather(input_, dim=-1)",
        _SHARDED,
    ),
    *(
        Seam(
            _LINEAR,
            f"{name}.forward",
            "self.quant_method.apply(self, _, _)",
            "calls what is replaced",
        )
        for name in ("ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear")
    ),
    *(
        seam
        for name in ("MergedColumnParallelLinear", "QKVParallelLinear")
        for seam in (
            Seam(_LINEAR, "", f"class {name}(ColumnParallelLinear)", "has its forward"),
            Seam(_LINEAR, name, "def forward(self, *_)", "has its base's", among=()),
        )
    ),
    # model.py: the model
    Seam("model_executor/utils.py", "", "def get_packed_modules_mapping(model, *_)", "called"),
    Seam("model_executor/models/interfaces.py", "", "def supports_multimodal(model, *_)", "called"),
    Seam(
        "model_executor/models/__init__.py",
        "",
        "from _ import supports_multimodal",
        "imported from there",
    ),
    Seam(
        "v1/worker/gpu/mm/lora.py",
        "set_active_mm_loras",
        "model.get_mm_mapping()",
        "a model's language layers",
    ),
    Seam(
        "model_executor/models/module_mapping.py",
        "MultiModelKeys",
        "language_model: _",
        "a model's language layers",
    ),
    Seam(
        "config/model.py",
        "ModelConfig",
        "@_\ndef is_encoder_decoder(self)",
        "an encoder's layers take items",
    ),
    # names.py: what layers are called in transformers
    Seam(
        "lora/worker_manager.py",
        "WorkerLoRAManager._load_adapter",
        "getattr(model, 'hf_to_vllm_mapper', None)",
        _RENAMED,
    ),
    Seam(_WEIGHTS, "WeightsMapper", "def get_rename_mapper(self)", _RENAMED),
    Seam(_WEIGHTS, "WeightsMapper", "def map_name(self, key)", _RENAMED),
    Seam(
        _WEIGHTS,
        "WeightsMapper",
        "orig_to_new_suffix: _; orig_to_new_prefix: _; orig_to_new_substr: _",
        _RENAMED,
    ),
    # encoder.py: which requests' items it takes
    *(
        Seam(_RUNNER, f"GPUModelRunner.{place}", code, _ITEMS)
        for place, code in (
            ("_prepare_inputs", "self.set_active_loras(_, _, _)"),
            ("_batch_mm_inputs_from_scheduler", "mm_lora_refs.append((req_id, _))"),
            ("_execute_mm_encoder", "self.lora_manager.supports_tower_connector_lora()"),
            (
                "_execute_mm_encoder",
                "self.model.get_mm_lora_token_counts(modality=_, mm_kwargs=_, num_mm_embeds=_)",
            ),
            ("_execute_mm_encoder", "token_lora_mapping.extend([lora_id] * tower_tokens)"),
            (
                "_execute_mm_encoder",
                "LoRAMapping(tuple(token_lora_mapping), _, type=LoRAMappingType.TOWER, **_)",
            ),
            (
                "_execute_mm_encoder",
                "self.lora_manager.set_active_adapters(lora_requests, tower_mapping)",
            ),
            ("_execute_mm_encoder", "model.embed_multimodal(**mm_kwargs_batch)"),
            ("_execute_mm_encoder", "encoder_outputs.extend(batch_outputs)"),
            ("_preprocess", "model_kwargs.update({'encoder_outputs': encoder_outputs})"),
        )
    ),
    Seam("lora/layers/utils.py", "LoRAMapping", "type: _", "tells items from tokens"),
    Seam(
        "config/vllm.py",
        "VllmConfig",
        "@_\ndef use_v2_model_runner(self)",
        "its order of items is another",
    ),
    Seam(
        "v1/core/encoder_cache_manager.py",
        "EncoderDecoderCacheManager.check_and_update_cache",
        "return False",
        "what an encoder made of an item is never another request's, with another adapter",
    ),
    # encoder.py: Whisper
    Seam(_WHISPER, "WhisperModel.__init__", "self.encoder", _ENCODER),
    Seam(_WHISPER, "WhisperModel.forward", "torch.cat(encoder_outputs, dim=0)", _ENCODER),
    Seam(
        _WHISPER, "WhisperCrossAttention.forward", "self.kv_proj(encoder_hidden_states)", _ENCODER
    ),
    Seam(_WHISPER, "WhisperAttention.__init__", "CrossAttention(_, _, _, **_)", _ENCODER),
    Seam(
        "model_executor/layers/attention/__init__.py",
        "",
        "from _ import CrossAttention",
        "imported from there",
    ),
    # model.py and layers.py: how compiled code finds a layer by its name
    Seam("config/compilation.py", "CompilationConfig", "static_forward_context: _", "written to"),
    Seam(
        "forward_context.py",
        "create_forward_context",
        "ForwardContext(no_compile_layers=vllm_config.compilation_config.static_forward_context, "
        "**_)",
        "what was written is found there",
    ),
    Seam("forward_context.py", "", "def get_forward_context(*_)", "called"),
    # manager.py: what workers call
    Seam(_MIXIN, "", "from _ import LRUCacheWorkerLoRAManager", "replaced by that name"),
    Seam(
        _MIXIN,
        "LoRAModelRunnerMixin.load_lora_model",
        "LRUCacheWorkerLoRAManager(_, _, _)",
        "makes the manager",
    ),
    *(
        Seam(_MIXIN, f"LoRAModelRunnerMixin.{place}", f"self.lora_manager.{call}", _CALLED)
        for place, call in (
            ("load_lora_model", "create_lora_manager(_, _)"),
            ("_set_active_loras", "set_active_adapters(_, _)"),
            ("maybe_setup_dummy_loras", "get_dummy_lora_warmup_rank(_)"),
            ("maybe_setup_dummy_loras", "dummy_lora_cache()"),
            ("maybe_setup_dummy_loras", "add_dummy_lora(_, rank=_)"),
            ("maybe_remove_all_loras", "remove_all_adapters()"),
            ("add_lora", "add_adapter(_)"),
            ("remove_lora", "remove_adapter(_)"),
            ("pin_lora", "pin_adapter(_)"),
            ("list_loras", "list_adapters()"),
        )
    ),
    Seam(_MIXIN, "", "self.lora_manager._", _MANAGED, MANAGER),
    Seam(_RUNNER, "", "self.lora_manager._", _MANAGED, MANAGER),
    Seam("v1/worker/gpu/mm/lora.py", "", "lora_manager._", _MANAGED, MANAGER),
    Seam(
        _MIXIN,
        "LoRAModelRunnerMixin._set_active_loras",
        "LoRAMapping(token_lora_mapping, _, **_)",
        "tells the adapter of each token",
    ),
    Seam("lora/layers/utils.py", "LoRAMapping", "index_mapping: _", "the adapter of each token"),
    Seam(
        "lora/layers/utils.py",
        "LoRAMapping.__post_init__",
        "self.index_mapping = tuple(self.index_mapping)",
        "a key",
    ),
    Seam(
        "lora/layers/__init__.py",
        "",
        "from _ import LoRAMapping, LoRAMappingType",
        "imported from there",
    ),
    Seam(
        "v1/worker/gpu_input_batch.py",
        "InputBatch.add_request",
        "self.request_lora_mapping[req_index] = 0",
        "0 is no adapter",
    ),
    Seam("v1/worker/gpu/lora_utils.py", "", "NO_LORA_ID = 0", "0 is no adapter"),
    # requests.py: what names an adapter, and what caches go by
    Seam(
        "lora/request.py",
        "LoRARequest",
        "lora_name: _; lora_int_id: _; lora_path: _; base_model_name: _; load_inplace: _",
        "read and made",
    ),
    Seam(
        "v1/core/kv_cache_utils.py",
        "_gen_lora_extra_hash_keys",
        "lora_request.lora_path",
        "the prefix cache goes by the path, which says the content",
    ),
    # core.py: the engine's loop
    Seam(
        _CORE,
        "EngineCore.__init__",
        "self.vllm_config; self.model_executor; self.scheduler; self.batch_queue",
        "read once it is made",
    ),
    Seam(_CORE, "EngineCore", "def add_request(self, request, *_)", _REPLACED),
    Seam(_CORE, "EngineCoreProc._handle_client_request", "self.add_request(_, _)", "reaches it"),
    Seam(_CORE, "EngineCore.remove_lora", "self.model_executor.remove_lora(_)", "reaches it"),
    Seam(_CORE, "EngineCore.step", "self.scheduler.schedule(_)", _QUESTIONS),
    Seam(_CORE, "EngineCore.step_with_batch_queue", "self.scheduler.schedule(_)", _QUESTIONS),
    Seam(
        _SCHEDULER,
        "Scheduler",
        "def _handle_blocked_waiting_request(self, request)",
        "replaced in an engine's own",
    ),
    Seam(
        _SCHEDULER,
        "Scheduler.schedule",
        "ready_to_schedule = self._handle_blocked_waiting_request(request)",
        "a request whose adapter is being read is left out of the step",
    ),
    Seam(_SCHEDULER, "Scheduler.__init__", "self.requests: dict[str, Request] = _", "by name"),
    Seam("v1/core/sched/output.py", "SchedulerOutput", "num_scheduled_tokens: _", "whose they are"),
    Seam(
        _SCHEDULER,
        "Scheduler.update_from_output",
        "error_req_ids.update(self.encoder_cache_mismatch_reqs)",
        "ends a request whose adapter cannot be read again",
    ),
    *(
        Seam(
            f"v1/executor/{file}_executor.py",
            f"{cls}.collective_rpc",
            "def collective_rpc(self, method, timeout, args, kwargs, non_block, *_)",
            "asks the workers in between",
        )
        for file, cls in (("uniproc", "UniProcExecutor"), ("multiproc", "MultiprocExecutor"))
    ),
    Seam("config/parallel.py", "ParallelConfig", "world_size: _", "one worker, or many"),
    Seam(
        "v1/worker/worker_base.py",
        "WorkerWrapperBase",
        "def __getattr__(self, attr)",
        "its worker's",
    ),
    Seam("v1/worker/gpu_worker.py", "Worker", "self.model_runner", "called with a worker"),
    Seam("v1/worker/cpu_worker.py", "CPUWorker", "self.model_runner", "called with a worker"),
    # frontend.py: the engines
    Seam(_LLM_ENGINE, "LLMEngine", f"def {_ADD}", _REPLACED),
    Seam(_LLM_ENGINE, "LLMEngine", "def add_lora(self, lora_request)", _REPLACED),
    Seam(_LLM_ENGINE, "LLMEngine", "def remove_lora(self, lora_id)", _REPLACED),
    Seam(_LLM_ENGINE, "LLMEngine", "def pin_lora(self, lora_id)", _REPLACED),
    Seam(_LLM_ENGINE, "LLMEngine", "def list_loras(self)", _REPLACED),
    Seam(_LLM_ENGINE, "LLMEngine.__init__", "self.vllm_config", "read"),
    Seam(
        "entrypoints/common/offline.py",
        "OfflineInferenceMixin",
        f"self.llm_engine.{_ADDED}",
        _BY_NAME,
    ),
    Seam(_ASYNC_LLM, "AsyncLLM", f"async def {_ADD}", _REPLACED),
    Seam(_ASYNC_LLM, "AsyncLLM", "async def add_lora(self, lora_request)", _REPLACED),
    Seam(_ASYNC_LLM, "AsyncLLM", "async def remove_lora(self, lora_id)", _REPLACED),
    Seam(_ASYNC_LLM, "AsyncLLM", "async def pin_lora(self, lora_id)", _REPLACED),
    Seam(_ASYNC_LLM, "AsyncLLM.__init__", "self.vllm_config; self.output_processor", "read"),
    Seam(_ASYNC_LLM, "AsyncLLM.generate", f"self.{_ADDED}", _BY_NAME),
    Seam(_ASYNC_LLM, "AsyncLLM.encode", f"self.{_ADDED}", _BY_NAME),
    Seam(
        "v1/engine/output_processor.py",
        "OutputProcessor.__init__",
        "self.request_states",
        "the requests that run",
    ),
    Seam(
        "v1/engine/output_processor.py",
        "RequestState.__init__",
        "self.lora_request",
        "the requests that run",
    ),
    Seam(
        _CORE,
        "EngineCoreProc._invoke_utility_method",
        "str(e)",
        "an error's text comes back from another process",
    ),
    # frontend.py: the server's names
    Seam(
        _MODELS,
        "OpenAIServingModels",
        "async def load_lora_adapter(self, request, base_model_name)",
        _REPLACED,
    ),
    Seam(_MODELS, "OpenAIServingModels", "async def unload_lora_adapter(self, request)", _REPLACED),
    Seam(_MODELS, "OpenAIServingModels", "async def resolve_lora(self, lora_name)", _REPLACED),
    Seam(
        _MODELS,
        "OpenAIServingModels",
        "async def _check_load_lora_adapter_request(self, request, *_)",
        "called",
    ),
    Seam(_MODELS, "OpenAIServingModels", "def is_base_model(self, model_name, *_)", "called"),
    Seam(
        _MODELS,
        "OpenAIServingModels.__init__",
        "self.engine_client; self.lora_requests; self.lora_resolver_lock",
        "read and written to",
    ),
    Seam(
        "entrypoints/serve/lora/protocol.py",
        "LoadLoRAAdapterRequest",
        "lora_name: _; lora_path: _",
        "read",
    ),
    Seam(
        "entrypoints/serve/exception_handling/error_response.py",
        "",
        "def create_error_response(message, err_type, status_code, *_)",
        "called",
    ),
    Seam(
        "entrypoints/serve/__init__.py",
        "",
        "from _ import create_error_response",
        "imported from there",
    ),
)


def find_vllm() -> Path:
    """The folder of the vLLM that is installed. Raises BackendError where there is none."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise BackendError("vLLM is not installed: pip install 'flora-llm[vllm]'")
    return Path(spec.submodule_search_locations[0])


def check(root: Path, seams: Sequence[Seam] = SEAMS) -> list[str]:
    """A line for each seam that vLLM's folder lacks."""
    missing: set[Seam] = set()
    with _no_garbage_collection():
        for file in {seam.file for seam in seams}:  # by files, as a tree is large
            path = root / file
            tree = ast.parse(path.read_bytes()) if path.exists() else None
            here = [seam for seam in seams if seam.file == file]
            missing |= {seam for seam in here if tree is None or not _holds(tree, seam)}
    return [str(seam) for seam in seams if seam in missing]


def check_installed() -> None:
    """Raise BackendError where the vLLM that is installed lacks what the plugin stands on."""
    root = find_vllm()
    if missing := check(root):
        raise BackendError(
            f"flora's plugin does not fit the vLLM in {root}; VLLM_PLUGINS='' starts it without "
            f"flora. What is missing: {'; '.join(missing)}"
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Trees have no cycles, and would set off collections, slow ones where vLLM is imported."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _holds(tree: ast.Module, seam: Seam) -> bool:
    scope = find_place(tree, seam.place)
    if scope is None:
        return False
    if seam.among is None:
        return all(any(find_code(scope, pattern)) for pattern in patterns(seam))
    (pattern,) = patterns(seam)
    return all(_name(node) in seam.among for node in find_code(scope, pattern))


def patterns(seam: Seam) -> list[ast.AST]:
    """The parts of a seam's code."""
    head = "def " in seam.code or seam.code.startswith("class ")
    parts = ast.parse(f"{seam.code}: ..." if head else seam.code).body
    return [part.value if isinstance(part, ast.Expr) else part for part in parts]


def find_place(tree: ast.Module, place: str) -> ast.AST | None:
    """A class or function by its dotted name; the last one where it is defined repeatedly."""
    scope: ast.AST | None = tree
    for name in filter(None, place.split(".")):
        body = getattr(scope, "body", ())
        scope = next((node for node in reversed(body) if getattr(node, "name", None) == name), None)
    return scope


def find_code(scope: ast.AST, pattern: ast.AST) -> Iterator[ast.AST]:
    """What is as a pattern says, anywhere in a class or function."""
    kind = type(pattern)
    return (node for node in ast.walk(scope) if type(node) is kind and _matches(pattern, node))


def _name(node: ast.AST) -> str:
    name: str = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", "")
    return name


def _matches(pattern: Any, node: Any) -> bool:
    match pattern:
        case "_" | ast.Name(id="_"):
            return True
        case ast.FunctionDef() | ast.AsyncFunctionDef() if type(node) is type(pattern):
            return (
                pattern.name == node.name
                and _takes(pattern.args, node.args)
                and _has(pattern.decorator_list, node.decorator_list)
            )
        case ast.ClassDef(name=name, bases=bases):
            return isinstance(node, ast.ClassDef) and name == node.name and _has(bases, node.bases)
        case ast.ImportFrom(module=module, names=names):
            return (
                isinstance(node, ast.ImportFrom)
                and _matches(module, node.module)
                and _has(names, node.names)
            )
        case ast.AnnAssign(target=target, value=value):
            return (
                isinstance(node, ast.AnnAssign)
                and _matches(target, node.target)
                and (value is None or _matches(value, node.value))
            )
        case ast.Call(keywords=[*keywords, ast.keyword(arg=None)]):  # **_
            return (
                isinstance(node, ast.Call)
                and _matches(pattern.func, node.func)
                and _matches(pattern.args, node.args)
                and _has(keywords, node.keywords)
            )
        case ast.AST():
            return type(node) is type(pattern) and all(
                _matches(getattr(pattern, field), getattr(node, field))
                for field in pattern._fields
                if field != "ctx"  # whether it is read or written
            )
        case list():
            return len(pattern) == len(node) and all(map(_matches, pattern, node))
    return bool(pattern == node)


def _has(patterns: list[Any], nodes: list[Any]) -> bool:
    return all(any(_matches(pattern, node) for node in nodes) for pattern in patterns)


def _takes(pattern: ast.arguments, node: ast.arguments) -> bool:
    """Whether a function can be called with a pattern's parameters, in this order."""
    expected = [argument.arg for argument in pattern.args]
    names = [argument.arg for argument in (*node.posonlyargs, *node.args)]
    if pattern.vararg is None:
        return names == expected and not (node.vararg or node.kwonlyargs or node.kwarg)
    needed = len(names) - len(node.defaults)
    return names[: len(expected)] == expected and needed <= len(expected) and all(node.kw_defaults)


def main(folder: str | None = None) -> int:
    """A line for each seam, of the installed vLLM or a wheel's folder; 1 where one is missing."""
    from typer import echo

    root = find_vllm() if folder is None else Path(folder, "vllm")
    missing = check(root)
    for seam in SEAMS:
        echo(f"{'missing' if str(seam) in missing else 'ok':7}  {seam}")
    echo(f"{root}: {len(SEAMS)} seams, {len(missing)} missing")
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
