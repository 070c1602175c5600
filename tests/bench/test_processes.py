"""The processes of a measurement: they end with it, and one that ends before is an error."""

import os
import sys

import psutil
import pytest

from flora.bench import processes
from flora.bench.processes import Child, Server, Worker, _flags, environment
from flora.bench.systems import SYSTEMS
from flora.errors import FloraError

CHILDREN = """
import subprocess, sys, time
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("began", flush=True)
time.sleep(600)
"""


def test_a_child_ends_with_its_block_and_its_log_too(monkeypatch):
    monkeypatch.setattr(processes, "STOP_SECONDS", 1.0)  # its own child does not end with it
    command = [sys.executable, "-c", CHILDREN]
    with Child("it", command, dict(os.environ)) as child:
        while not child.log.read_text():
            pass
        family = child.family()
        assert len(family) == 2
        assert child.memory_bytes() > 1 << 20
    assert not child.log.exists()
    _, left = psutil.wait_procs(family, timeout=10)
    for process in left:
        process.kill()
    assert child.process.returncode is not None
    assert child.memory_bytes() == 0


def test_a_worker_that_ends_is_an_error_that_names_its_log():
    said = r"^the engine x ended; its log is \S+$"
    with pytest.raises(FloraError, match=said) as caught, Worker("the engine x", "base") as worker:
        worker.ask({"no": "job"})
    assert "TypeError" in worker.log.read_text()
    assert str(worker.log) in str(caught.value)
    worker.log.unlink()


def test_a_server_that_ends_is_an_error_that_names_its_log(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    server = Server("the server", "flora", {}, {"a": tmp_path})
    with pytest.raises(FloraError, match=r"^the server ended; its log is \S+$"), server:
        server.wait()
    server.log.unlink()


def test_the_plugin_is_on_for_what_is_floras(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    plugins = {s: environment(s)["VLLM_PLUGINS"] for s in ("base", *SYSTEMS)}
    assert plugins == {"base": "", "flora": "flora", "vllm-lora": "", "bmm": "flora"}
    assert environment("base")["VLLM_CPU_KVCACHE_SPACE"] == "2"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert environment("base")["VLLM_CPU_KVCACHE_SPACE"] == "7"
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    assert environment("base")["GLIBC_TUNABLES"] == ""
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert "hugetlb" in environment("base")["GLIBC_TUNABLES"]


def test_options_as_a_command_line():
    options = {"max_loras": 3, "enable_lora": True, "enable_prefix_caching": False}
    options |= {"additional_config": {"flora": {"backend": "eager"}}}
    assert _flags(options) == [
        "--max-loras",
        "3",
        "--enable-lora",
        "--no-enable-prefix-caching",
        "--additional-config",
        '{"flora": {"backend": "eager"}}',
    ]
