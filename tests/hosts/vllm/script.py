"""Scripts that import vLLM, which changes much of what others in one process would see."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

TIMEOUT_SECONDS = 240.0


def run_script(script: str, *arguments: Any) -> Any:
    """What a script prints last, as JSON; it and what it started end in time."""
    pytest.importorskip("vllm")
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise AssertionError(f"{output[-2000:]}\n{errors[-4000:]}")
    return json.loads(output.splitlines()[-1])
