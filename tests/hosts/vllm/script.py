"""Scripts that import vLLM, which changes much of what others in one process would see."""

import json
import subprocess
import sys
from typing import Any

import pytest

TIMEOUT_SECONDS = 240.0


def run_script(script: str, *arguments: Any) -> Any:
    """What a script prints last, as JSON."""
    pytest.importorskip("vllm")
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise AssertionError(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])
