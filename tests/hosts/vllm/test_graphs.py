"""CUDA graphs are captured between the adapted layers, never with them.

Nothing is captured: there need not be a GPU.
"""

import json
from typing import Any

import pytest

from tests.hosts.vllm.script import run_script

SETTLED = """
import json, sys
from types import SimpleNamespace
import torch
from vllm.compilation.backends import split_graph
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from flora.errors import UsageError
from flora.hosts.vllm.graphs import capture_pieces, split_at_layers
from flora.hosts.vllm.layers import SUFFIX, opaque

WIDTH = 4
LAYERS = {name: SimpleNamespace(name=name, out_features=WIDTH) for name in ("q", "o")}
PRODUCTS = {f"{name}.{SUFFIX}": lambda x, bias, by=by: by * x for by, name in enumerate(LAYERS, 2)}

def pieces(operators, splitting):
    # What each piece gives to the others is new memory, unless it is one that is cut out.
    found = []

    def forward(x):
        for name in LAYERS:
            x = operators[name](None, torch.relu(x))
        return x + 1

    def backend(graph, _):
        model, parts = split_graph(graph, splitting)
        for part in parts:
            (output,) = [n for n in part.graph.graph.nodes if n.op == "output"]
            gives = bool(output.all_input_nodes)
            found.append([part.is_splitting_graph, gives])
        return model

    x = torch.arange(3.0 * WIDTH).view(3, WIDTH)
    config = VllmConfig()
    config.compilation_config.static_forward_context.update(PRODUCTS)
    with set_forward_context(None, config):
        y = torch.compile(forward, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(y, 6 * x + 1)
    return found

def settled(mode, graphs, more):
    config = CompilationConfig(mode=CompilationMode[mode], cudagraph_mode=graphs, **more)
    capture_pieces(config)
    config.set_splitting_ops_for_v1(all2all_backend="naive")
    try:
        cut = [split_at_layers(config) for _ in range(2)]  # as of a draft model, too
    except UsageError as error:
        return str(error)
    operators = {name: opaque(layer, into=cut[0]) for name, layer in LAYERS.items()}
    return [config.cudagraph_mode.name, cut, pieces(operators, config.splitting_ops)]

print(json.dumps([settled(*case) for case in json.loads(sys.argv[1])]))
"""

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("VLLM_COMPILE", "FULL_AND_PIECEWISE", {}),
    ("VLLM_COMPILE", "FULL", {}),
    ("NONE", "FULL", {}),
    ("VLLM_COMPILE", "NONE", {}),
    ("VLLM_COMPILE", "PIECEWISE", {"splitting_ops": ["vllm::other"]}),
    ("VLLM_COMPILE", "PIECEWISE", {"pass_config": {"fuse_attn_quant": True}}),
]


@pytest.fixture(scope="module")
def settled() -> list[Any]:
    found: list[Any] = run_script(SETTLED, json.dumps(CASES))
    return found


def test_what_is_captured_is_what_stands_between_the_layers(settled):
    compiled, full, *_ = settled
    assert compiled[:2] == ["PIECEWISE", [True, True]]
    assert [apart for apart, _ in compiled[2]] == [False, True, False, True, False]
    assert full == compiled


def test_a_layer_writes_to_memory_that_a_graph_has(settled):
    """What another graph reads of it has to lie where it lay as that was captured."""
    for apart, gives in settled[0][2]:
        assert gives != apart


def test_without_graphs_nothing_is_cut(settled):
    for mode, cut, pieces in settled[2:4]:
        assert (mode, cut, pieces) == ("NONE", [False, False], [[False, True]])


def test_graphs_that_would_hold_more_are_refused(settled):
    for refused in settled[4:]:
        assert "between attention and linear layers" in refused
