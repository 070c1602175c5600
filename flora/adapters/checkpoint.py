"""An adapter's folder, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

Only safetensors is ever opened. A folder is checked as a whole, and all that is wrong with it is
reported at once: file, tensor, what was found, what was expected.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from flora.adapters.config import AdapterConfig, Shape
from flora.adapters.core import Adapter, Base, LayerFactors, Layers, all_finite, identity_of
from flora.adapters.kinds import get_kind
from flora.adapters.targets import targeted
from flora.errors import InvalidAdapterError, UsageError, faults

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
SHARED_PREFIX = "base_model."
PREFIX = f"{SHARED_PREFIX}model."
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CONFIG_BYTES = 4 * 2**20

Params = dict[str, dict[str, Tensor]]
"""Module name -> tensor name -> tensor, as a kind's own files name them."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a folder may ask for: the largest rank, and the largest file in bytes."""

    rank: int = 1024
    file_bytes: int = 8 * 2**30


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """An adapter as its files hold it, in its kind's own parameters.

    params: those of each layer.
    shared: those of all layers together, by name.
    """

    kind: str
    config: AdapterConfig
    params: Params
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    base_model: str | None = None

    @cached_property
    def identity(self) -> str:
        tensors = {
            f"{module}.{name}": tensor
            for module, own in self.params.items()
            for name, tensor in own.items()
        }
        return identity_of(self.kind, self.config.arithmetic(), tensors | dict(self.shared))

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by their names in the file."""
        return {f"{SHARED_PREFIX}{name}": tensor for name, tensor in self.shared.items()} | {
            f"{PREFIX}{module}.{name}": tensor
            for module, own in self.params.items()
            for name, tensor in own.items()
        }

    def sizes(self) -> dict[str, dict[str, int]]:
        """The sizes "out" and "in" of each layer, as far as its tensors say."""
        found: dict[str, dict[str, int]] = {}
        for module, own in self.params.items():
            shapes = _layer_shapes(self.kind, self.config, module)
            found[module] = {
                dim: size
                for name, tensor in own.items()
                for dim, size in zip(shapes[name], tensor.shape, strict=True)
                if isinstance(dim, str)
            }
        return found

    def fill(self, base: Layers) -> dict[str, LayerFactors]:
        """Each layer in the one form of all kinds, in at least fp32, of whatever values.

        Raises InvalidAdapterError, naming each layer that cannot be filled.
        """
        kind, extras = get_kind(self.kind), self.config.extras()
        meant = [base.shapes[m] for m, own in self.params.items() if own.keys() - extras.keys()]
        largest = [max(sizes) for sizes in zip(*meant, strict=True)]
        common = _exact(self.shared)
        if largest and not common:
            common = dict(self.config.derived(*largest))
        layers, faults = {}, []
        for module, own in self.params.items():
            try:
                with torch.no_grad():
                    params = common | _exact(own)
                    layers[module] = kind.fill(self.config, module, params, base)
            except InvalidAdapterError as error:
                faults.append(f"{module}: {error}")
        if faults:
            raise InvalidAdapterError("; ".join(faults))
        return layers

    def adapter(self, base: Layers) -> Adapter:
        """The adapter, ready to use.

        base: the model that it is for.

        Raises InvalidAdapterError, naming each layer that cannot be filled, is of another size than
        the model's, or comes out as NaN or Inf.
        """
        layers, faults = self.fill(base), []
        for module, factors in layers.items():
            expected = base.shapes[module]
            if any(n not in (None, m) for n, m in zip(factors.size, expected, strict=True)):
                found = list(factors.size)
                faults.append(f"{module}: is of size {found}, expected {list(expected)}")
        parts = [
            (f"{module}: {name}", tensor)
            for module, factors in layers.items()
            for name, tensor in factors.parts()
        ]
        faults += [f"{name} comes out as NaN or Inf" for name in _not_finite(parts)]
        if faults:
            raise InvalidAdapterError("; ".join(faults))
        return Adapter(kind=self.kind, identity=self.identity, layers=layers)


def parse_config(raw: Mapping[str, Any]) -> tuple[str, AdapterConfig]:
    """The kind and the typed config of an `adapter_config.json`.

    A key that the kind does not know passes only where its value is null, false or empty.
    Raises InvalidAdapterError, naming every key that does not hold.
    """
    config = get_kind(raw.get("peft_type")).Config
    name = raw["peft_type"].upper()
    fields = config.model_fields
    found = [
        f"{key!r:.80} = {value!r:.80} is not supported"
        for key, value in raw.items()
        if value and key not in fields and key not in config.inert
    ]
    if found:
        found.append(f"what is supported of {name}: {', '.join(sorted(fields))}")
    try:
        typed = config(**{key: value for key, value in raw.items() if key in fields})
    except ValidationError as error:
        found.insert(0, faults(error))
    if found:
        raise InvalidAdapterError(f"{CONFIG_FILE}: {'; '.join(found)}")
    return name, typed


def read_checkpoint(
    folder: str | os.PathLike[str], base: Base | None = None, limits: Limits | None = None
) -> Checkpoint:
    """Read and check an adapter's folder.

    base: the model that it is for; without it the sizes are only checked against each other.
    Raises UsageError where there is no such folder, InvalidAdapterError for all its faults at once.
    """
    folder, limits = Path(folder), limits or Limits()
    if not folder.is_dir():
        raise UsageError(f"there is no adapter folder {str(folder)!r}")
    try:
        return _read(folder, base, limits)
    except InvalidAdapterError as error:
        raise InvalidAdapterError(f"adapter {str(folder)!r}: {error}") from error


def write_checkpoint(folder: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write an adapter's folder as PEFT reads it; an older one there is replaced as a whole."""
    folder = Path(folder)
    check_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": checkpoint.kind,
        "base_model_name_or_path": checkpoint.base_model,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        **checkpoint.config.model_dump(exclude_none=True),
    }
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors().items()
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        save_file(tensors, new / TENSORS_FILE, metadata={"format": "pt"})
        (new / CONFIG_FILE).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def check_writable(folder: Path) -> None:
    """Raise UsageError where a folder's name is taken by anything but an adapter."""
    if not folder.exists() or (folder / CONFIG_FILE).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UsageError(f"{str(folder)!r} exists and is no adapter's folder; name another")


def find_adapters(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The adapters' folders in a folder, by name; the folder itself where it is one adapter.

    Raises UsageError where there is none.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        return {folder.resolve().name: folder}
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if not found:
        raise UsageError(
            f"{str(folder)!r} holds no adapter: no {CONFIG_FILE} in it or in its folders"
        )
    return {path.name: path for path in found}


def _read(folder: Path, base: Base | None, limits: Limits) -> Checkpoint:
    faults: list[str] = []
    try:
        tensors = _read_tensors(folder, limits)
    except InvalidAdapterError as error:
        tensors, faults = {}, [str(error)]
    try:
        raw = _read_config(folder / CONFIG_FILE)
        kind, config = parse_config(raw)
    except InvalidAdapterError as error:
        faults.insert(0, str(error))
    if faults:
        raise InvalidAdapterError("; ".join(faults))
    meant = None
    if base is not None and config.target_modules is not None:
        meant = targeted(config, base)
        if not meant:
            faults.append(f"{CONFIG_FILE}: target_modules mean no linear layer of the base model")
    params, shared = _sort(kind, config, tensors, meant or (), faults)
    extras = config.extras()
    own = {module for module, found in params.items() if found.keys() - extras.keys()}
    for module in sorted(params):
        shape = None if base is None else base.shapes.get(module)
        is_meant = module in own or module in (meant or ())
        shapes = _layer_shapes(kind, config, module) if is_meant else extras
        if base is not None and shape is None:
            faults.append(f"{module}: the base model has no such linear layer")
        elif meant is not None and module in own - meant:
            faults.append(f"{module}: target_modules do not mean this layer")
        missing = shapes.keys() - params[module].keys() - extras.keys() - config.optional
        faults += [f"{module}.{name} is missing" for name in shapes if name in missing]
        faults += _check(params[module], f"{module}.", shapes, shape, limits)
    common = config.shared()
    faults += [f"{SHARED_PREFIX}{name} is missing" for name in common if name not in shared]
    largest = None
    known = own | (meant or set())
    if base is not None and (sizes := [base.shapes[m] for m in known if m in base.shapes]):
        largest = max(out for out, _ in sizes), max(n for _, n in sizes)
    faults += _check(shared, SHARED_PREFIX, common, largest, limits)
    floats = [
        (name.removeprefix(PREFIX), tensor)
        for name, tensor in tensors.items()
        if tensor.dtype in FLOATS
    ]
    faults += [f"{name} holds NaN or Inf" for name in _not_finite(floats)]
    if not params and not faults:
        faults.append(f"{TENSORS_FILE}: no tensor in it")
    base_model = raw.get("base_model_name_or_path")
    if not isinstance(base_model, str | None):
        faults.append(f"{CONFIG_FILE}: base_model_name_or_path = {base_model!r:.80}: not a text")
    if faults:
        raise InvalidAdapterError("; ".join(faults))
    return Checkpoint(kind=kind, config=config, params=params, shared=shared, base_model=base_model)


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InvalidAdapterError(f"{path.name} is missing")
    if path.stat().st_size > CONFIG_BYTES:
        raise InvalidAdapterError(f"{path.name} is larger than {CONFIG_BYTES} bytes")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidAdapterError(f"{path.name} is not a JSON object")
    return raw


def _read_tensors(folder: Path, limits: Limits) -> dict[str, Tensor]:
    path = folder / TENSORS_FILE
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        if pickles:
            raise InvalidAdapterError(
                f"{pickles[0]} is a pickle and is never opened; have it saved as safetensors"
            )
        raise InvalidAdapterError(f"{TENSORS_FILE} is missing")
    if path.stat().st_size > limits.file_bytes:
        raise InvalidAdapterError(f"{TENSORS_FILE} is larger than {limits.file_bytes} bytes")
    try:
        # Read once, not mapped: what was checked is what is used, whatever becomes of the file.
        tensors: dict[str, Tensor] = load(path.read_bytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidAdapterError(f"{TENSORS_FILE} is not a safetensors file: {error}") from None
    return tensors


def _sort(
    kind: str,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    meant: Iterable[str],
    faults: list[str],
) -> tuple[Params, dict[str, Tensor]]:
    """Tensors by layer, and those of all layers; every layer that is meant has an entry."""
    # In one order, as the ranks of a sharded model fill the layers together.
    params: Params = {module: {} for module in sorted(meant)}
    shared = {}
    names = [*get_kind(kind).shapes(config, ""), *config.extras()]
    common = [f"{SHARED_PREFIX}{name}" for name in config.shared()]
    longest_first = sorted(names, key=len, reverse=True)
    for key, tensor in tensors.items():
        name = next((n for n in longest_first if key.endswith(f".{n}")), None)
        if key in common:
            shared[key[len(SHARED_PREFIX) :]] = tensor
        elif key.endswith(".base_layer.weight") and key.isprintable():
            faults.append(
                f"{key!r:.200}: the base's own weight; save with save_embedding_layers=False"
            )
        elif name is None or not (key.startswith(PREFIX) and key.isprintable()):
            expected = ", ".join([f"{PREFIX}<module>.{'|'.join(names)}", *common])
            faults.append(f"{key!r:.200}: not a tensor of {kind}; expected {expected}")
        else:
            params.setdefault(key[len(PREFIX) : -len(name) - 1], {})[name] = tensor
    return params, shared


def _layer_shapes(kind: str, config: AdapterConfig, module: str) -> Mapping[str, Shape]:
    return {**get_kind(kind).shapes(config, module), **config.extras()}


def _check(
    tensors: Mapping[str, Tensor],
    prefix: str,
    shapes: Mapping[str, Shape],
    size: tuple[int, int] | None,
    limits: Limits,
) -> list[str]:
    """What is wrong with tensors that belong together; size is their `(out, in)` where known."""
    faults = []
    sizes: dict[int | str, int] = {} if size is None else {"out": size[0], "in": size[1]}
    for name, dims in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            faults.append(f"{prefix}{name}: found {tensor.dtype}, expected a float type")
            continue
        if tensor.ndim == len(dims):
            # Without a base the first tensor of a layer says its sizes, and the others must agree.
            for dim, found in zip(dims, tensor.shape, strict=True):
                sizes.setdefault(dim, dim if isinstance(dim, int) else found)
        expected = [sizes.get(dim, dim) for dim in dims]
        if list(tensor.shape) != expected:
            faults.append(f"{prefix}{name}: found shape {list(tensor.shape)}, expected {expected}")
        elif any(sizes[dim] > limits.rank for dim in dims if dim == "rank" or isinstance(dim, int)):
            faults.append(f"{prefix}{name}: rank over the limit of {limits.rank}")
    return faults


def _not_finite(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """The names of tensors that hold NaN or Inf."""
    if all_finite(tensor for _, tensor in named):
        return []
    return [name for name, tensor in named if not tensor.isfinite().all()]


def _exact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In at least fp32."""
    return {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in tensors.items()}
