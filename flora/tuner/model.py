"""FLoRA over a whole model in PEFT: where the layers go, what they share, and mixed batches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from flora.errors import InvalidAdapterError, UnknownAdapterError, UsageError
from flora.tuner.config import FloraConfig, input_of
from flora.tuner.layer import BASE, FloraLinear


class FloraModel(BaseTuner):  # type: ignore[misc]
    """What `get_peft_model` makes of a model and a `FloraConfig`."""

    prefix = "flora_"
    tuner_layer_cls = FloraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._share_inputs(adapter_name)

    def _create_and_replace(
        self,
        config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise UsageError(f"{current_key} cannot be adapted: its layer reads the weight only")
        if isinstance(target, FloraLinear):
            target.update_layer(adapter_name, config, current_key)
        else:
            layer = FloraLinear(target, adapter_name, config, current_key)
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's last step with new or loaded factors: their type, and here their sharing."""
        for layer in self._layers(adapter_name).values():
            for params in (layer.flora_A, layer.flora_B):
                param = params[adapter_name]
                exact = torch.promote_types(param.dtype, torch.float32)
                param.data = param.data.to(exact if autocast_adapter_dtype else layer.base_dtype)
        self._share_inputs(adapter_name)

    def _share_inputs(self, adapter_name: str) -> None:
        if not self.peft_config[adapter_name].share_input:
            return
        shared: dict[tuple[str, torch.Size], nn.Parameter] = {}
        for name, layer in self._layers(adapter_name).items():
            own = layer.flora_B[adapter_name]
            first = shared.setdefault((input_of(name), own.shape), own)
            if first is not own:
                layer.flora_B[adapter_name] = first

    def _layers(self, adapter_name: str) -> dict[str, FloraLinear]:
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, FloraLinear) and adapter_name in module.flora_B
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: FloraConfig,
        adapter_name: str,
        state_dict: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Loading writes shared factors one over the other: they have to be equal in the file."""
        if config.share_input:
            shared: dict[tuple[str, torch.Size], Tensor] = {}
            for key, tensor in state_dict.items():
                module, _, name = key.rpartition(".")
                if name != "flora_B":
                    continue
                first = shared.setdefault((input_of(module), tensor.shape), tensor)
                if not torch.equal(first, tensor):
                    raise InvalidAdapterError(
                        f"share_input is set, but {key} differs from those that read the same input"
                    )
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:  # noqa: ARG002
        """Give each layer the `adapter_names` of a mixed batch, in inference and in training.

        Beams and returned sequences repeat each row, but an encoder sees the rows as they were.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_names(names)
        copies = max(_asked(kwargs, "num_beams"), _asked(kwargs, "num_return_sequences"))
        repeated = [name for name in names for _ in range(copies)]
        get_encoder = getattr(self.model, "get_encoder", None)
        # Where there is no encoder, transformers gives the model itself.
        encoder = get_encoder() if get_encoder is not None else self.model
        once = set() if encoder in (None, self.model) else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                partial(_add_names, list(names) if module in once else repeated), with_kwargs=True
            )
            for module in self.model.modules()
            if isinstance(module, FloraLinear | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_names(self, names: Sequence[str]) -> None:
        if isinstance(names, str):
            raise UsageError(f"adapter_names is a list with one name for each row, not {names!r}")
        unknown = sorted(set(names) - {BASE} - set(self.peft_config))
        if unknown:
            raise UnknownAdapterError(f"no adapter has these names: {', '.join(unknown)}")
        checkpointed = (getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        if self.training and any(checkpointed):
            raise UsageError(
                "adapter_names with gradient checkpointing: its second forward would not see them; "
                "turn one of them off"
            )


def _add_names(
    names: Sequence[str],
    _module: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _asked(kwargs: Mapping[str, Any], name: str) -> int:
    """What a call of `generate` asks for, by argument or by its `generation_config`."""
    default = getattr(kwargs.get("generation_config"), name, None)
    return int(kwargs.get(name) or default or 1)
