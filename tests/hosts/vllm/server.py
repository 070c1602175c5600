"""A vLLM server in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 240


class Server:
    """One that is starting with some adapters, by name, and with the base as `tiny`.

    folder: where its log is written.
    """

    def __init__(
        self, folder: Path, model: Path, adapters: Mapping[str, Path], *options: str
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        common = ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "16"]
        common += ["--enable-lora", "--enforce-eager", "--served-model-name", "tiny"]
        modules = [f"{name}={path}" for name, path in adapters.items()]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *common, *options, "--lora-modules", *modules],
                env=os.environ
                | {
                    "VLLM_CPU_KVCACHE_SPACE": "1",
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                    "VLLM_SERVER_DEV_MODE": "1",  # for the worker's own list of adapters
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.5)
            else:
                return
        raise AssertionError(self.log.read_text()[-4000:])

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/{route}", json=body, timeout=60)

    def load(self, name: str, folder: Path, **more: Any) -> httpx.Response:
        return self.post("v1/load_lora_adapter", lora_name=name, lora_path=str(folder), **more)
