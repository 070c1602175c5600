"""The operator for one linear layer, beside its base's product, LoRA by bmm, PEFT and the limit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.adapters.core import LayerFactors
from flora.bank import join_factors
from flora.bench.limit import bandwidth, synchronize
from flora.bench.turns import check_systems, measure_in_turns, speed_ratio
from flora.ops import backend_name
from flora.ops.adapted_linear import prepare
from flora.ops.costs import layer_costs
from flora.ops.factors import WeightProduct
from flora.ops.plan import ACTIVATION_SIDE, WEIGHT_SIDE, Costs, make_plan

SYSTEMS = ("flora", "flora-activation", "flora-weight", "bmm", "peft")
"""What is measured beside the base: the plan's choice; each side by itself; LoRA by bmm as in the
paper; PEFT's layer. The two last run LoRA, all of FLoRA's own FLoRA, and "flora" both."""

MOST_PRODUCT = 1 << 38
"""Multiplications in one product: what takes more is left out, as nobody would wait for it."""

LEAST_SECONDS = 0.2
BUSY_ROWS = 512
"""At so many rows a product is bound by arithmetic, not by W0's bytes."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Rows of one token each through a layer; the rows take the distinct adapters in turns."""

    out_features: int
    in_features: int
    rows: int
    distinct: int
    rank: int

    @property
    def layer(self) -> str:
        return f"{self.out_features}x{self.in_features}"

    def product(self, rows: int) -> int:
        """The multiplications of W0's product with so many rows."""
        return rows * self.out_features * self.in_features


def measure(
    load: Load,
    *,
    dtype: torch.dtype,
    device: torch.device,
    systems: Sequence[str] = SYSTEMS,
    backend: str = "auto",
    repeats: int,
) -> list[dict[str, Any]]:
    """A record of each system with each kind that it runs, `seconds` for one layer, in turns.

    A record's `limit_seconds`: the base's product for all pairs of the rows, or for the rows and
    one pass over each adapter's modulated W0, whichever is less; then the factors' bytes, and the
    additive part's operations at the speed that the base has with many rows.
    Raises UsageError for another system, BackendError.
    """
    check_systems(systems, SYSTEMS)
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    weight_OI = normal(load.out_features, load.in_features) / load.in_features**0.5
    weight_OI = weight_OI.to(device, dtype)
    base = partial(F.linear, weight=weight_OI)
    copies = load.rows * load.rank

    def product(rows: int) -> Callable[[], Tensor]:
        return partial(base, normal(rows, load.in_features).to(device, dtype))

    runs: dict[str, Callable[[], object]] = {"base": product(load.rows)}
    if load.product(copies) <= MOST_PRODUCT:
        runs["wide base"] = product(copies)
    runs["busy base"] = product(BUSY_ROWS)
    found: list[tuple[str, str]] = []
    for system, kind, run in _systems(load, weight_OI, systems, backend, generator):
        runs[f"{system} {kind}"] = run
        found.append((system, kind))
    with torch.no_grad():
        seconds = measure_in_turns(
            {name: _until_done(run, device, name) for name, run in runs.items()},
            repeats=repeats,
            least_seconds=LEAST_SECONDS,
            warm=True,
        )
    limits = _limits(load, weight_OI, {name: median(values) for name, values in seconds.items()})
    own = seconds["base"]
    facts = asdict(load) | {
        "layer": load.layer,
        "tokens": 1,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend_name(backend, device),
    }
    records = [facts | {"system": "base", "kind": None, "rank": None, "seconds": median(own)}]
    for system, kind in found:
        times = seconds[f"{system} {kind}"]
        limit = limits[kind]
        records.append(
            facts
            | {
                "system": system,
                "kind": kind,
                "seconds": median(times),
                "ratio_to_base": speed_ratio(times, own),
                "limit_seconds": limit,
                "times_limit": median(times) / limit,
            }
        )
    return records


def explain(load: Load, *, dtype: torch.dtype, device: torch.device, backend: str = "auto") -> str:
    """What the plan picks for FLoRA, and what it expects of each side, in a line."""
    weight_OI = torch.ones(load.out_features, load.in_features, dtype=dtype, device=device)
    costs = layer_costs(weight_OI, backend, grad=False)
    rows = tuple(row % load.distinct for row in range(load.rows))
    plan = make_plan(
        rows,
        (load.rank,) * load.distinct,
        (0,) * load.distinct,
        (False,) * load.distinct,
        tokens=1,
        has_weight=True,
        grad=False,
        costs=costs,
    )
    of_group = load.rows / load.distinct
    active = costs.of_product(load.rows * load.rank)
    weight = load.distinct * (costs.of_modulation(load.rank) + costs.of_product(round(of_group)))
    moved = len(plan.weight_side)
    picked = {0: "the activation side", load.distinct: "the weight side"}.get(
        moved, f"the weight side for {moved} adapters"
    )
    return (
        f"{load.layer}, {load.rows} rows, {load.distinct} adapters of "
        f"rank {load.rank}: {picked}; activation side {load.rows * load.rank} copies, "
        f"{1e6 * active:.0f} µs; weight side {load.distinct} modulations, {1e6 * weight:.0f} µs"
    )


def _systems(
    load: Load,
    weight_OI: Tensor,
    systems: Sequence[str],
    backend: str,
    generator: torch.Generator,
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    device, dtype = weight_OI.device, weight_OI.dtype
    sides: dict[str, Costs | None] = {
        "flora": None,
        "flora-activation": ACTIVATION_SIDE,
        "flora-weight": WEIGHT_SIDE,
    }
    rows = [row % load.distinct for row in range(load.rows)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x_SNI = normal(load.rows, 1, load.in_features).to(dtype)
    hadamard = [
        LayerFactors(
            hadamard_in=1 + 0.1 * normal(load.rank, load.in_features),
            hadamard_out=(1 + 0.1 * normal(load.rank, load.out_features)) / load.rank,
        )
        for _ in range(load.distinct)
    ]
    down = [normal(load.rank, load.in_features).to(dtype) for _ in hadamard]
    up = [(0.01 * normal(load.rank, load.out_features)).to(dtype) for _ in hadamard]
    additive = [LayerFactors(down=v, up=u) for v, u in zip(down, up, strict=True)]
    base = WeightProduct(weight_OI)
    heaviest = {
        "flora-activation": load.product(load.rows * load.rank),
        "flora-weight": load.distinct * load.product(load.rank),
    }
    for system in systems:
        if system in sides and heaviest.get(system, 0) <= MOST_PRODUCT:
            for kind, layers in (("FLORA", hadamard), ("LORA", additive)):
                if kind == "LORA" and system != "flora":
                    continue
                linear = prepare(
                    x_SNI,
                    base,
                    join_factors(layers, dtype),
                    rows,
                    weight=weight_OI,
                    pure=True,
                    backend=backend,
                    costs=sides[system],
                )
                yield system, kind, partial(linear, x_SNI)
        if system == "bmm":
            down_SIR = torch.stack([down[row].T for row in rows])
            up_SRO = torch.stack([up[row] for row in rows])
            yield system, "LORA", partial(_bmm, x_SNI, weight_OI, down_SIR, up_SRO)
        if system == "peft":
            layer = _peft_layer(weight_OI, down, up)
            names = [f"adapter{row}" for row in rows]
            yield system, "LORA", partial(layer, x_SNI, adapter_names=names)


def _bmm(x_SNI: Tensor, weight_OI: Tensor, down_SIR: Tensor, up_SRO: Tensor) -> Tensor:
    """The paper's baseline: two batched products of each row's own factors."""
    return torch.baddbmm(F.linear(x_SNI, weight_OI), torch.bmm(x_SNI, down_SIR), up_SRO)


def _peft_layer(weight_OI: Tensor, down: Sequence[Tensor], up: Sequence[Tensor]) -> Any:
    """PEFT's own linear layer, with LoRA adapters of these factors."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    O, I = weight_OI.shape  # noqa: E741
    plain = torch.nn.Linear(I, O, bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
    rank = down[0].shape[0]
    settings = {"r": rank, "lora_alpha": rank, "config": LoraConfig(r=rank, lora_alpha=rank)}
    layer: Any = Linear(plain, "adapter0", **settings)
    for number, (down_RI, up_RO) in enumerate(zip(down, up, strict=True)):
        name = f"adapter{number}"
        if number:
            layer.update_layer(name, **settings)
        layer.lora_A[name].weight.data = down_RI
        layer.lora_B[name].weight.data = up_RO.T.contiguous()
    return layer.eval()


def _until_done(run: Callable[[], object], device: torch.device, name: str) -> Callable[[], None]:
    """The run until the device has done it.

    On a GPU the replay of a CUDA graph, as to launch a layer's kernels takes longer than they do;
    but not PEFT's, which reads its names anew.
    """
    if device.type == "cuda" and not name.startswith("peft"):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay

    def timed() -> None:
        run()
        synchronize(device)

    return timed


def _limits(load: Load, weight_OI: Tensor, seconds: dict[str, float]) -> dict[str, float]:
    """The least seconds that each kind could take."""
    speed = bandwidth(weight_OI.device)
    width = load.in_features + load.out_features
    sides = [seconds["base"] + load.distinct * weight_OI.nbytes / speed]
    if "wide base" in seconds:
        sides.append(seconds["wide base"])
    pages = load.distinct * load.rank * width
    busy = seconds["busy base"] / load.product(BUSY_ROWS)
    return {
        "FLORA": min(sides) + 4 * pages / speed,
        "LORA": seconds["base"]
        + pages * weight_OI.itemsize / speed
        + busy * load.rows * load.rank * width,
    }
