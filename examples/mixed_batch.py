"""One batch, three rows: a FLoRA, a LoRA, and the base model.

    python examples/mixed_batch.py [MODEL]

MODEL is a folder or a repository of the hub; a tiny random model stands for it where it is not
given. The two adapters are random, to show that each row follows its own.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import typer
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flora


def main(source: str | None) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        if source is None:
            source = save_tiny_model(Path(scratch, "model"))
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        adapters = {
            "flora": flora.FloraConfig(r=2, target_modules="all-linear", init_weights=False),
            "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        }
        for name, config in adapters.items():
            save_adapter(model, config, Path(scratch, name))
        flora.attach(model, {name: Path(scratch, name) for name in adapters})

    prompt = torch.randint(3, model.config.get_text_config().vocab_size, (1, 8))
    names = ["flora", "lora", "__base__"]
    mixed = generate(model, prompt.repeat(3, 1), names)
    for row, name in enumerate(names):
        alone = generate(model, prompt, [name])
        said = "the same alone" if torch.equal(mixed[row], alone[0]) else "another one alone"
        typer.echo(f"{name:8} {mixed[row].tolist()}  {said}")
    flora.detach(model)


def generate(model: Any, prompts: torch.Tensor, names: list[str]) -> torch.Tensor:
    """The new tokens of each row, `[rows, 8]`."""
    output: torch.Tensor = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        adapter_names=names,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
    )
    return output[:, prompts.shape[1] :]


def save_adapter(model: Any, config: PeftConfig, folder: Path) -> None:
    """Let PEFT make an adapter's folder; the model is as it was afterwards."""
    with_adapter = get_peft_model(model, config)
    with_adapter.save_pretrained(folder)
    with_adapter.unload()


def save_tiny_model(folder: Path) -> str:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main(*(sys.argv[1:] or [None]))
