"""Offline generation by transformers, in this process."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora.hosts.loading import load_model
from flora.hosts.offline import Sampling
from flora.hosts.transformers import attach


class TransformersEngine:
    """See `Engine`."""

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.room: int | None = getattr(model.config, "max_position_embeddings", None)
        self.settings: dict[str, Any] = {
            "max_new_tokens": sampling.new_tokens,
            "do_sample": sampling.temperature > 0,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if sampling.temperature > 0:
            self.settings["temperature"] = sampling.temperature

    def generate(self, prompts: Sequence[list[int]], adapters: Sequence[str | None]) -> list[str]:
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt")
        output = self.model.generate(
            **batch.to(self.model.device), adapter_names=list(adapters), **self.settings
        )
        answers: list[str] = self.tokenizer.batch_decode(
            output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answers


def load(
    model: str,
    adapters: Mapping[str, Path],
    sampling: Sampling,
    *,
    rows: int,  # noqa: ARG001  (a batch of any size runs)
) -> TransformersEngine:
    """See `load_engine`."""
    from transformers import set_seed

    loaded, tokenizer = load_model(model)
    attach(loaded, adapters)
    set_seed(sampling.seed)
    return TransformersEngine(loaded, tokenizer, sampling)
