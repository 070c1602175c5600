"""A batch by the openai client: what a server is asked; real servers in the demo's slow tests."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from flora.bench import processes
from flora.bench.processes import CONNECTIONS, Server
from flora.bench.served import Client, serve
from flora.errors import FloraError

NAMES = ["ruby", "base", "perl"]
OPTIONS = {"tokens": 80, "eager": True}

UVICORN_SECONDS = 5
"""For so long a server keeps a connection that is idle; `timeout_keep_alive` in its settings."""


class Stub(ThreadingHTTPServer):
    """A server that answers with the name that it is asked for, once it is asked for all NAMES."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.connections = 0
        self.all_here = threading.Barrier(len(NAMES), timeout=10)
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept

            def setup(self) -> None:
                super().setup()
                stub.connections += 1

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append({"path": self.path} | body)
                stub.all_here.wait()
                known = body["model"] in NAMES
                choice = {"index": 0, "text": f"by {body['model']}", "finish_reason": "stop"}
                answer = {"choices": [choice]} if known else {"error": {"message": "no such model"}}
                content = json.dumps(answer).encode()
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def failure(self, reason: str) -> FloraError:
        return FloraError(f"the stub {reason}")


@pytest.fixture
def stub() -> Iterator[Stub]:
    pytest.importorskip("openai")
    with Stub() as stub:
        thread = threading.Thread(target=stub.serve_forever)
        thread.start()
        yield stub
        stub.shutdown()
        thread.join()


def test_all_are_asked_at_once_and_answer_in_order(stub, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # where nobody is
    own = {"ignore_eos": True, "repetition_penalty": 1.1}
    with closing(Client(stub)) as client:
        found = client.complete(NAMES, "# x\n", new_tokens=5, **own)
    assert found == ["by ruby", "by base", "by perl"]
    assert sorted(body.pop("model") for body in stub.asked) == sorted(NAMES)
    settings = {"prompt": "# x\n", "max_tokens": 5, "temperature": 0} | own
    assert stub.asked == [{"path": "/v1/completions"} | settings] * len(NAMES)


def test_a_connection_is_left_before_the_server_leaves_it(stub, monkeypatch):
    assert CONNECTIONS.keepalive_expiry < UVICORN_SECONDS / 2
    monkeypatch.setattr(CONNECTIONS, "keepalive_expiry", 0.2)
    with closing(Client(stub)) as client:
        for idle, expected in ((0, 3), (0.5, 3), (0, 6)):
            client.complete(NAMES, "x", new_tokens=1)
            assert stub.connections == expected
            time.sleep(idle)


def test_a_refusal_is_an_error(stub):
    said = r"the stub failed a request \(.*no such model.*\)"
    with closing(Client(stub)) as client, pytest.raises(FloraError, match=said):
        client.complete(["ruby", "nobody", "perl"], "x", new_tokens=1)


def test_a_server_that_is_gone_is_an_error(stub):
    stub.url = "http://127.0.0.1:1"
    said = r"the stub failed a request \(Connection error"
    with closing(Client(stub)) as client, pytest.raises(FloraError, match=said):
        client.complete(["ruby"], "x", new_tokens=1)


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[Server]:
    """The servers that are started, each a process that does nothing."""
    idle = tmp_path / "idle"
    idle.write_text("#!/bin/sh\nexec sleep 600\n")
    idle.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(idle))
    started: list[Server] = []
    init = Server.__init__

    def remember(server: Server, *args: object, **kwargs: object) -> None:
        init(server, *args, **kwargs)
        started.append(server)

    monkeypatch.setattr(Server, "__init__", remember)
    return started


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, FloraError])
def test_both_servers_end_with_what_stops_the_start(started, monkeypatch, stopped):
    def stop(server: Server) -> None:
        raise stopped(server.name)

    monkeypatch.setattr(Server, "wait", stop)
    with (
        pytest.raises(stopped, match="vLLM's server"),
        serve("model", "float32", {"ruby": Path("ruby")}, **OPTIONS),
    ):
        pass
    assert len(started) == 2
    assert not any(psutil.pid_exists(server.process.pid) for server in started)
    assert not any(server.log.exists() for server in started)


def test_only_one_of_them_has_adapters(started, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr(Server, "wait", lambda _: None)
    folders = {"ruby": Path("/a/ruby"), "perl": Path("/a/perl")}
    with serve("model", "float32", folders, **OPTIONS) as clients:
        assert [client.server for client in clients] == started
        plain, own = (server.process.args for server in started)
    assert "--enable-lora" not in plain
    assert own[-3:] == ["--lora-modules", "ruby=/a/ruby", "perl=/a/perl"]
    for command in (plain, own):
        assert {"--enforce-eager", "--no-enable-prefix-caching"} <= set(command)
        assert command[command.index("--max-model-len") + 1] == "80"
