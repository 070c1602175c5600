"""A vLLM server of a tiny model in a process of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from flora.bench import processes
from flora.errors import FloraError

START_SECONDS = 240.0

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 16,
    "enable_lora": True,
    "enforce_eager": True,
}

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for the worker's own list of adapters
}


class Server(processes.Server):
    """One with the plugin and some adapters, by name, and what its users ask of it."""

    def __init__(self, model: Path, adapters: Mapping[str, Path], **options: Any) -> None:
        options = OPTIONS | {"model": str(model)} | options
        super().__init__("the server", "flora", options, adapters, **ENVIRONMENT)

    def wait(self, seconds: float = START_SECONDS) -> None:
        try:
            super().wait(seconds)
        except FloraError:
            raise AssertionError(self.log.read_text()[-4000:]) from None

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/{route}", json=body, timeout=60)

    def load(self, name: str, folder: Path, **more: Any) -> httpx.Response:
        return self.post("v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **more)
