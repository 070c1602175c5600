"""Offline generation by vLLM, whose engine is a process of its own."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora.errors import UsageError
from flora.hosts.loading import find_model
from flora.hosts.offline import Sampling
from flora.machine import HUGE_PAGES

LOGGING = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""vLLM would log among the answers."""


class VllmEngine:
    """See `Engine`."""

    def __init__(self, llm: Any, requests: Mapping[str, Any], sampling: Sampling) -> None:
        self.llm, self.requests = llm, requests
        self.tokenizer = llm.get_tokenizer()
        self.room: int | None = llm.llm_engine.model_config.max_model_len
        self.params = llm.get_default_sampling_params()
        self.params.temperature = sampling.temperature
        self.params.max_tokens = sampling.new_tokens
        self.params.detokenize = False  # what ends within a character would lack its end

    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[str | None]) -> list[str]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            self.params,
            lora_request=[None if name is None else self.requests[name] for name in adapters],
            use_tqdm=False,
        )
        answers: list[str] = self.tokenizer.batch_decode(
            [output.outputs[0].token_ids for output in outputs], skip_special_tokens=True
        )
        return answers


def load(model: str, adapters: Mapping[str, Path], sampling: Sampling, *, rows: int) -> VllmEngine:
    """See `load_engine`. All adapters are resident, and all of them are checked here."""
    model = find_model(model)
    for name, value in (LOGGING | HUGE_PAGES).items():
        os.environ.setdefault(name, value)  # its processes inherit it
    from transformers import AutoConfig
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        llm = LLM(
            model,
            # vLLM's own "auto" would take fp32 weights in 16 bits.
            dtype=getattr(config.get_text_config(), "dtype", None) or "auto",
            enable_lora=True,
            max_loras=rows,
            max_cpu_loras=max(rows, len(adapters)),
            max_num_seqs=rows,
            seed=sampling.seed,
            load_format="safetensors",
            disable_log_stats=True,
        )
    except (ValueError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"vLLM cannot load the model {model!r}: {reason}") from None
    requests = {
        name: LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(adapters.items(), 1)
    }
    for request in requests.values():
        llm.llm_engine.add_lora(request)
    return VllmEngine(llm, requests, sampling)
