"""The processes of a measurement: each with an engine of its own, and with a log."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self, cast

import httpx
import psutil  # type: ignore[import-untyped]

from flora.errors import FloraError
from flora.machine import HUGE_PAGES

BASE_MODEL = "base"
"""The name that servers know the model by."""

IDLE_SECONDS = 1.5
"""For a second after its last step an engine's worker keeps its core busy, on a CPU the one that
all engines have: only then it is another's turn."""

CONNECTIONS = httpx.Limits(keepalive_expiry=2.0)
"""Clients leave a connection before the server does, which it does after five idle seconds: else a
request may meet its end."""

START_SECONDS = 3600.0
STOP_SECONDS = 60.0
POLL_SECONDS = 0.2


def environment(system: str) -> dict[str, str]:
    """What a system's processes run with."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        **HUGE_PAGES,
        **os.environ,
        "VLLM_PLUGINS": "" if system in ("base", "vllm-lora") else "flora",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }


class Child:
    """A process that ends with the block it is opened for; its log is kept where it failed.

    name: what an error calls it.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], **pipes: Any
    ) -> None:
        self.name, self.failed = name, False
        file, path = tempfile.mkstemp(prefix="flora-bench-", suffix=".log")
        self.log = Path(path)
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file} | pipes
        self.process = subprocess.Popen(command, env=environment, **streams)  # noqa: S603
        os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:  # which closes its pipes
            family = self.family()
            self.stop()
            _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
            for process in {*left, *self.family()} if left else ():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        if not self.failed:
            self.log.unlink()

    def stop(self) -> None:
        """Have it end in its own way."""
        self.process.terminate()

    def family(self) -> list[psutil.Process]:
        """The process with those that it started; none once it has ended."""
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory_bytes(self) -> int:
        """What the process and those that it started hold in memory."""
        held = 0
        for process in self.family():
            try:
                held += process.memory_info().rss
            except psutil.NoSuchProcess:  # it has ended since
                continue
        return held

    def failure(self, reason: str) -> FloraError:
        """What to raise where it does not do its work."""
        self.failed = True
        return FloraError(f"{self.name} {reason}; its log is {self.log}")


class Worker(Child):
    """`flora.bench.engine`; what it is asked first is its job."""

    def __init__(self, name: str, system: str) -> None:
        command = [sys.executable, "-m", "flora.bench.engine"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        super().__init__(name, command, environment(system), **pipes)
        self._tasks = cast("IO[str]", self.process.stdin)
        self._answers = cast("IO[str]", self.process.stdout)

    def ask(self, task: Any) -> Any:
        """A task's answer. Raises FloraError where the process has ended."""
        with suppress(BrokenPipeError):  # then there is no answer
            self._tasks.write(f"{json.dumps(task)}\n")
            self._tasks.flush()
        line = self._answers.readline()
        if not line:
            raise self.failure("ended")
        return json.loads(line)

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self._tasks.close()


class Server(Child):
    """vLLM's server on a free port of this machine.

    options:  of its engine, as `LLM` takes them.
    adapters: the folder of each, by its name.
    """

    def __init__(
        self,
        name: str,
        system: str,
        options: Mapping[str, Any],
        adapters: Mapping[str, Path],
        **other: str,
    ) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--served-model-name", BASE_MODEL, *_flags(options)]
        if adapters:
            command += ["--lora-modules", *(f"{n}={folder}" for n, folder in adapters.items())]
        super().__init__(name, command, environment(system) | other)

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Until it answers. Raises FloraError where it does not."""
        deadline = time.monotonic() + seconds
        with httpx.Client(base_url=self.url, trust_env=False) as http:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise self.failure("ended")
                with suppress(httpx.HTTPError):
                    if http.get("/health").is_success:
                        return
                time.sleep(POLL_SECONDS)
        raise self.failure(f"did not start within {seconds:.0f} s")


def _flags(options: Mapping[str, Any]) -> list[str]:
    """An engine's options as its server's command line has them."""
    flags = []
    for option, value in options.items():
        name = option.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
