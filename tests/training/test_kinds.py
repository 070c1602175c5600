"""One training batch holds every trainable kind, and each adapter's gradient is PEFT's alone."""

import copy

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from flora.adapters.checkpoint import read_checkpoint
from flora.adapters.kinds import KINDS, get_kind
from flora.errors import UsageError
from flora.training.data import RowBatch
from flora.training.trainer import JointTrainer, parse_recipe
from tests import zoo

RECIPES = {
    "flora": {"peft_type": "FLORA", "r": 2},
    "lora": {"peft_type": "LORA", "r": 3, "lora_alpha": 5.0},
    "rslora": {"peft_type": "LORA", "r": 2, "use_rslora": True},
    "dora": {"peft_type": "LORA", "r": 2, "use_dora": True},
    "ia3": {"peft_type": "IA3"},
    "hira": {"peft_type": "HIRA", "r": 2},
    "vera": {"peft_type": "VERA", "r": 4},
    "drawn": {"peft_type": "VERA", "r": 3, "save_projection": False},
    "loha": {"peft_type": "LOHA", "r": 2, "alpha": 3.0},
    "lokr": {"peft_type": "LOKR", "r": 2, "decompose_both": True},
}
NOT_FOR = {"GPT2": {"loha", "lokr"}}
"""Pairs that PEFT does not take."""


def batch_of(model, names, columns=7):
    ids = zoo.rows(model, len(names), columns)["input_ids"]
    return RowBatch(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone(), adapters=names
    )


def test_every_kind_of_the_table_is_tried_here():
    trainable = {name for name in KINDS if get_kind(name).Config.trainable}
    assert trainable == {recipe["peft_type"] for recipe in RECIPES.values()}


@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target")
@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "StarCoder2"])
def test_gradients_beside_all_other_kinds_are_those_of_peft_alone(architecture, tmp_path):
    model = zoo.build(architecture).double()
    recipes = {
        name: parse_recipe(raw | {"learning_rate": 1e-2, "target_modules": zoo.targets(model)})
        for name, raw in with_feedforward(model).items()
        if name not in NOT_FOR.get(architecture, ())
    }
    order = [*recipes, *reversed(recipes)]
    batch = batch_of(model, order)
    generator = torch.Generator().manual_seed(1)
    with JointTrainer(copy.deepcopy(model), recipes) as trainer:
        for name in recipes:
            for leaf in trainer.adapters.leaves(name):
                noise = 0.2 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
                leaf.data = (leaf.data + noise).bfloat16().double()
        losses = trainer.losses(batch)
        torch.stack([*losses.values()]).sum().backward()
        trainer.save(tmp_path)
        for name in recipes:
            own = [row for row, adapter in enumerate(order) if adapter == name]
            ids = batch.input_ids[own]
            alone = PeftModel.from_pretrained(
                copy.deepcopy(model), tmp_path / name, is_trainable=True
            ).double()
            logits = alone(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = cross_entropy(logits, ids[:, 1:].flatten())
            loss.backward()
            torch.testing.assert_close(losses[name].detach(), loss.detach(), rtol=1e-9, atol=0)
            expected = {
                key.replace(".default", "").removeprefix("base_model.model."): parameter.grad
                for key, parameter in alone.named_parameters()
                if parameter.requires_grad
            }
            found = {
                f"{module}.{tensor}": leaf.grad
                for module, leaves in trainer.adapters.params[name].items()
                for tensor, leaf in leaves.items()
            }
            assert found.keys() == {k.replace("vector.weight", "vector") for k in expected}
            for key, grad in expected.items():
                ours = found[key.replace("vector.weight", "vector")]
                size = grad.abs().max()
                assert (ours - grad).abs().max() <= 1e-9 * size + 1e-13, (name, key)


def with_feedforward(model):
    layers = zoo.feedforward(model, zoo.targets(model))
    return RECIPES | {"ia3": RECIPES["ia3"] | {"feedforward_modules": layers}}


def test_every_kind_learns_in_one_batch(tmp_path):
    model = zoo.build("Llama")
    recipes = {name: parse_recipe(raw | {"learning_rate": 3e-2}) for name, raw in RECIPES.items()}
    batch = batch_of(model, list(recipes))
    with JointTrainer(model, recipes) as trainer:
        first = trainer.step(batch)
        for _ in range(20):
            last = trainer.step(batch)
        trainer.save(tmp_path)
    assert all(last[name] < 0.99 * first[name] for name in recipes), (first, last)
    for name in recipes:
        assert read_checkpoint(tmp_path / name).kind == RECIPES[name]["peft_type"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"peft_type": "ADALORA"}, "ADALORA cannot be trained here"),
        ({"peft_type": "OFT"}, "'OFT' is not supported"),
    ],
)
def test_a_kind_that_cannot_be_trained_is_refused_at_once(raw, said):
    with pytest.raises(UsageError, match=said):
        parse_recipe(raw | {"learning_rate": 1e-3})
