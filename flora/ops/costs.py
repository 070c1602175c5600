"""What a layer's two sides cost on this machine: measured once, and kept in the cache folder."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flora.machine import cache_folder, processor
from flora.ops import Operands, backend_name, get_backend
from flora.ops.factors import BatchFactors, Pages, WeightProduct
from flora.ops.plan import ACTIVATION_SIDE, WEIGHT_SIDE, Costs, make_plan

logger = logging.getLogger(__name__)

COPIES = (2, 8, 16, 32, 64, 128, 256, 512)
"""Of one token by one pair, through W0; a large layer is measured at the first few."""

LAYER_SECONDS = 0.2
"""What one round of a layer's measurement may take before it goes to no more copies."""

ROUNDS = 3
"""All is timed so often, one after the other: what disturbs for a while spoils no time in all."""

TIMED_SECONDS = 0.004
"""What is timed is repeated for so long in a round, and the shortest time of all counts."""

MODULATED_TOKENS = 16
"""Of the one row by which modulations are measured, less the product of as many copies."""

MOST_PAIRS = 16


DEFAULT_COSTS = Costs()

FEW_COPIES = 7
"""So many more than its tokens are not worth a modulation of W0 to a group.

Measured on two cores of a Xeon (AVX-512), 1536×576, fp32, 8 rows: 90 µs for a modulation, 100 for
a second copy of each.
"""


class _Layer(NamedTuple):
    """What costs depend on, beside the machine."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device
    backend: str
    grad: bool


_known: dict[_Layer, Costs] = {}


def costs_for(
    rows: tuple[int, ...],
    pairs: tuple[int, ...],
    *,
    tokens: int,
    weight: Tensor | None,
    backend: str,
    grad: bool,
) -> Costs:
    """What a layer's plan goes by: its own costs, where a modulation of W0 may be worth it.

    Arguments as those of `make_plan`; weight: W0, if it can be read.
    """
    if weight is None or _most_more_copies(rows, pairs) * tokens <= FEW_COPIES:
        return DEFAULT_COSTS
    return layer_costs(weight, backend, grad=grad)


@lru_cache(maxsize=512)
def _most_more_copies(rows: tuple[int, ...], pairs: tuple[int, ...]) -> int:
    """How many more than its rows a group has on the activation side, of all groups the most.

    What a wrong row means the plan says.
    """
    rows_of = Counter(rows)
    return max(
        (own * (count - 1) for group, count in enumerate(pairs) if (own := rows_of[group])),
        default=0,
    )


def layer_costs(weight_OI: Tensor, backend: str, *, grad: bool) -> Costs:
    """The costs in seconds of layers like this one; with `grad` those of forward and backward.

    Where they are not known yet they are measured: in less than a second, a large layer in a few.
    """
    O, I = weight_OI.shape  # noqa: E741
    device = weight_OI.device
    layer = _Layer(O, I, weight_OI.dtype, device, backend_name(backend, device), grad)
    if layer in _known:
        return _known[layer]
    if layer.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return Costs()  # nothing can be timed while a graph is captured
    path = _path(layer)
    costs = _read(path)
    if costs is None:
        start = time.perf_counter()
        costs = _measure(weight_OI.detach(), backend, grad=grad)
        logger.info("measured %s in %.2f s: %s", layer, time.perf_counter() - start, costs)
        _write(path, costs)
    _known[layer] = costs
    return costs


def forget_costs() -> None:
    """Have the costs of all layers measured again."""
    _known.clear()
    shutil.rmtree(_folder(), ignore_errors=True)


def _folder() -> Path:
    return cache_folder() / "costs"


def _path(layer: _Layer) -> Path:
    cuda = layer.device.type == "cuda"
    machine = (
        torch.cuda.get_device_name(layer.device) if cuda else processor(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        torch.__version__,
        _code(),
    )
    key = json.dumps([*map(str, (*layer, *machine))])
    return _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


@cache
def _code() -> str:
    """A hash of what is measured, and of how: what another version kept says nothing of this."""
    folder = Path(__file__).parent
    sources = sorted(path for end in ("py", "cpp", "h") for path in folder.rglob(f"*.{end}"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _read(path: Path) -> Costs | None:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Costs).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None  # not measured yet


def _write(path: Path, costs: Costs) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(asdict(costs), file)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("a layer's costs cannot be kept, and are measured in each run: %s", error)


def _measure(weight_OI: Tensor, backend: str, *, grad: bool) -> Costs:
    runs = {
        pairs: _one_row(weight_OI, backend, MODULATED_TOKENS, pairs, WEIGHT_SIDE, grad=grad)
        for pairs in (1, MOST_PAIRS)
    }
    shortest = {pairs: _seconds(run, weight_OI.device) for pairs, run in runs.items()}
    deadline = time.perf_counter() + LAYER_SECONDS
    product_runs, product = {}, {}
    for copies in COPIES:
        run = _one_row(weight_OI, backend, copies // 2, 2, ACTIVATION_SIDE, grad=grad)
        product_runs[copies], product[copies] = run, _seconds(run, weight_OI.device)
        if copies >= MODULATED_TOKENS and time.perf_counter() > deadline:
            break
    for _ in range(ROUNDS - 1):
        for times, own in ((shortest, runs), (product, product_runs)):
            for key, run in own.items():
                times[key] = min(times[key], _seconds(run, weight_OI.device))
    one, many = shortest.values()
    return Costs(
        product=tuple(product.items()),
        modulation=one - product[MODULATED_TOKENS],
        pair=max(0.0, (many - one) / (MOST_PAIRS - 1)),
    )


def _one_row(
    weight_OI: Tensor, backend: str, tokens: int, pairs: int, side: Costs, *, grad: bool
) -> Callable[[], object]:
    """The operator for one row, with one adapter, on a side that is given."""
    O, I = weight_OI.shape  # noqa: E741
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        x_SNI = weight_OI.new_ones(1, tokens, I).requires_grad_(grad)
        exact = torch.promote_types(weight_OI.dtype, torch.float32)
        in_PI, out_PO = (
            weight_OI.new_ones(pairs + 1, width, dtype=exact).requires_grad_(grad)
            for width in (I, O)
        )
        factors = BatchFactors(
            pairs=(pairs,), ranks=(0,), biased=(False,), hadamard=Pages((in_PI, out_PO))
        )
        plan = make_plan(
            (0,), (pairs,), (0,), (False,), tokens=tokens, has_weight=True, grad=grad, costs=side
        )
        base = WeightProduct(weight_OI)
        operands = Operands(base, factors, plan, weight_OI, None, pure=True)
        linear = get_backend(backend, weight_OI.device).prepare(x_SNI, operands)
    dy_SNO = weight_OI.new_ones(1, tokens, O)

    def run() -> None:
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            y_SNO = linear(x_SNI)
            if grad:
                torch.autograd.grad(y_SNO, (x_SNI, in_PI, out_PO), dy_SNO)

    return run


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of several times, as what disturbs only adds."""
    run()
    shortest, deadline = float("inf"), time.perf_counter() + TIMED_SECONDS
    while (start := time.perf_counter()) < deadline or shortest == float("inf"):
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        shortest = min(shortest, time.perf_counter() - start)
    return shortest
