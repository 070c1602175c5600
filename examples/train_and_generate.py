"""Train two adapters in the same batches, save them, and let one batch use both.

    python examples/train_and_generate.py [MODEL]

MODEL is a folder or a repository of the hub; a tiny random model of bytes stands for it where it is
not given. Each adapter learns one line by heart.
"""

import sys
import tempfile
from pathlib import Path

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flora
from flora.hosts.loading import load_model
from flora.training.data import Example, RowStream, collate, tokenize
from flora.training.trainer import JointTrainer, parse_recipe

PROMPT = "Say: "
LINES = {"ruby": "puts 1 + 1", "rust": "let x = 2;"}
RECIPES = {
    "ruby": {"peft_type": "FLORA", "r": 2, "learning_rate": 2e-2},
    "rust": {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "learning_rate": 5e-3},
}
STEPS = 40
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def main(source: str | None) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = load_model(source or save_tiny_model(Path(scratch, "model")))
        rows = {
            name: list(
                tokenize(Example(adapter=name, prompt=PROMPT, completion=line), tokenizer, 64)
            )
            for name, line in LINES.items()
        }
        recipes = {name: parse_recipe(raw) for name, raw in RECIPES.items()}
        with JointTrainer(model, recipes) as trainer:
            batches = RowStream(rows, per_adapter=1, seed=0)
            for step, batch in zip(range(STEPS), batches, strict=False):
                losses = trainer.step(collate(batch, tokenizer.pad_token_id))
                if step % 10 == 0 or step == STEPS - 1:
                    said = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
                    typer.echo(f"step {step + 1:3}  {said}")
            trainer.save(Path(scratch, "adapters"), source)
        flora.attach(model, {name: Path(scratch, "adapters", name) for name in LINES})

    names = [*LINES, "__base__"]
    batch = tokenizer([PROMPT] * len(names), return_tensors="pt")
    output = model.generate(
        **batch,
        adapter_names=names,
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    for name, answer in zip(names, answers, strict=True):
        typer.echo(f"{name:8} {answer!r}")


def save_tiny_model(folder: Path) -> str:
    """A random model whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *letters])}
    bytes_alone = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, **SPECIAL)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main(*(sys.argv[1:] or [None]))
