"""Joint training gives each adapter what it would get alone."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flora.adapters.checkpoint import read_checkpoint
from flora.errors import FloraError, UsageError
from flora.training.data import Row, RowBatch, RowStream, collate
from flora.training.trainer import JointTrainer, Schedule, parse_recipe
from tests.tiny import tiny_llama

RECIPES = {
    "one": {"peft_type": "FLORA", "r": 1, "learning_rate": 8e-3},
    "three": {"peft_type": "FLORA", "r": 3, "learning_rate": 2e-3, "weight_decay": 0.01},
    "add": {
        "peft_type": "LORA",
        "r": 4,
        "use_rslora": True,
        "learning_rate": 1e-3,
        "target_modules": ["q_proj", "down_proj"],
    },
}


def random_rows(names, count=5, vocabulary=64):
    """Rows of unequal length, a few of each adapter."""
    generator = torch.Generator().manual_seed(3)

    def row(name):
        length = int(torch.randint(4, 12, (), generator=generator))
        tokens = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        return Row(adapter=name, tokens=tokens, labels=tokens)

    return {name: [row(name) for _ in range(count)] for name in names}


def train(model, names, rows, steps=20):
    recipes = {name: parse_recipe(RECIPES[name]) for name in names}
    stream = RowStream({name: rows[name] for name in names}, 2, seed=5)
    history = []
    with JointTrainer(model, recipes, seed=7) as trainer:
        for _, batch in zip(range(steps), stream, strict=False):
            history.append(trainer.step(collate(batch, pad=0)))
        weights = {
            name: {
                f"{module}.{key}": tensor.detach().clone()
                for module, own in trainer.adapters.params[name].items()
                for key, tensor in own.items()
            }
            for name in names
        }
    return weights, history


def test_joint_training_gives_the_weights_of_training_alone():
    model = tiny_llama(dtype=torch.float64)
    rows = random_rows(RECIPES)
    joint, history = train(model, list(RECIPES), rows)
    for name in RECIPES:
        alone, alone_history = train(model, [name], rows)
        for key, tensor in alone[name].items():
            torch.testing.assert_close(joint[name][key], tensor, rtol=0, atol=1e-8)
        for together, single in zip(history, alone_history, strict=True):
            assert together[name] == pytest.approx(single[name], abs=1e-8)
        start = parse_recipe(RECIPES[name])
        with JointTrainer(model, {name: start}, seed=7) as untrained:
            first = untrained.adapters.leaves(name)
        moved = [(a - b).abs().max() for a, b in zip(alone[name].values(), first, strict=True)]
        assert min(moved) > 1e-4


def test_the_learning_rates_follow_their_schedule():
    model, rows = tiny_llama(), random_rows(["one"])
    recipes = {"one": parse_recipe(RECIPES["one"])}
    moves = []
    with JointTrainer(model, recipes, schedule=Schedule(name="linear", steps=4)) as trainer:
        for _ in range(5):
            before = trainer.adapters.leaves("one")[0].detach().clone()
            trainer.step(collate(rows["one"], pad=0))
            moves.append((trainer.adapters.leaves("one")[0] - before).abs().max().item())
    assert moves[0] == pytest.approx(8e-3, rel=0.01)  # AdamW's first step is the learning rate
    assert moves[0] > moves[1] > moves[3] > moves[4] == 0


def test_an_adapter_that_is_not_in_the_batch_does_not_move():
    model, rows = tiny_llama(), random_rows(RECIPES)
    recipes = {name: parse_recipe(RECIPES[name]) for name in RECIPES}
    with JointTrainer(model, recipes) as trainer:
        before = [leaf.detach().clone() for leaf in trainer.adapters.leaves("three")]
        trainer.step(collate(rows["one"] + rows["add"], pad=0))
        after = trainer.adapters.leaves("three")
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_loss_is_each_adapters_own_mean():
    model = tiny_llama()
    rows = random_rows(["one", "three"])
    mixed = [rows["one"][0], rows["three"][0], rows["three"][1]]
    recipes = {name: parse_recipe(RECIPES[name]) for name in ("one", "three")}
    with JointTrainer(model, recipes) as trainer, torch.no_grad():
        losses = trainer.losses(collate(mixed, pad=0))
    # Both start as the identity, so the base model's own loss is the truth.
    for name, own in (("one", mixed[:1]), ("three", mixed[1:])):
        total = count = 0.0
        for row in own:
            ids = torch.tensor([row.tokens])
            n = len(row.tokens) - 1
            total += model(ids, labels=ids).loss.item() * n
            count += n
        assert losses[name].item() == pytest.approx(total / count, rel=1e-5)


def test_the_model_is_given_back():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[1].train()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    training = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    train(model, list(RECIPES), random_rows(RECIPES), steps=2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "_flora_host")
    assert [module.training for module in model.modules()] == training


def test_a_loss_that_is_not_finite_changes_no_adapter():
    model = tiny_llama()
    rows = random_rows(["one", "three"])
    recipes = {name: parse_recipe(RECIPES[name]) for name in ("one", "three")}
    with JointTrainer(model, recipes) as trainer:
        with torch.no_grad():
            trainer.adapters.leaves("three")[0].fill_(float("nan"))
        before = [leaf.detach().clone() for leaf in trainer.adapters.leaves("one")]
        with pytest.raises(FloraError, match="loss of three is not finite"):
            trainer.step(collate(rows["one"] + rows["three"], pad=0))
        after = trainer.adapters.leaves("one")
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_is_saved_is_read_by_us_and_by_peft(tmp_path):
    from peft import PeftModel

    import flora
    import flora.tuner  # registers FLORA with PEFT

    model, rows = tiny_llama(), random_rows(RECIPES)
    recipes = {name: parse_recipe(RECIPES[name]) for name in RECIPES}
    with JointTrainer(model, recipes) as trainer:
        for _ in range(3):
            trainer.step(collate([row for own in rows.values() for row in own], pad=0))
        trainer.save(tmp_path)
    ids = torch.tensor([rows["one"][0].tokens])
    flora.attach(model, {name: tmp_path / name for name in RECIPES})
    for name in RECIPES:
        with torch.no_grad():
            ours = model(ids, adapter_names=[name]).logits
            reader = PeftModel.from_pretrained(tiny_llama(), tmp_path / name)
            assert (ours - model(ids).logits).abs().max() > 1e-4
            torch.testing.assert_close(reader(ids).logits, ours, rtol=1e-4, atol=1e-5)
    assert read_checkpoint(tmp_path / "add").config.target_modules == ["down_proj", "q_proj"]


def test_a_setting_that_would_do_nothing_is_refused():
    with pytest.raises(UsageError, match="no such settings: lora_dropout"):
        parse_recipe(RECIPES["add"] | {"lora_dropout": 0.1})
    recipe = parse_recipe(RECIPES["add"] | {"init_lora_weights": "gaussian"})
    with pytest.raises(FloraError, match="'gaussian' cannot be trained here"):
        JointTrainer(tiny_llama(), {"add": recipe})


def test_mistakes_are_one_line():
    with pytest.raises(UsageError, match="learning_rate: Field required"):
        parse_recipe({"peft_type": "FLORA"})
    recipe = parse_recipe(RECIPES["one"] | {"target_modules": ["nothing"]})
    with pytest.raises(UsageError, match="x: target_modules mean no linear layer"):
        JointTrainer(tiny_llama(), {"x": recipe})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    rows = random_rows(["one", "add"])
    batch = collate(rows["one"] + rows["add"], pad=0)
    recipes = {name: parse_recipe(RECIPES[name]) for name in ("one", "add")}
    found = []
    for checkpointing in (False, True):
        model = tiny_llama()
        with JointTrainer(model, recipes, seed=3) as trainer:
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
                model.train()
            torch.stack([*trainer.losses(batch).values()]).sum().backward()
            found.append([leaf.grad for name in recipes for leaf in trainer.adapters.leaves(name)])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_what_could_not_be_used_is_not_trained(tmp_path):
    for name, change, said in (
        ("__base__", {}, "the name for no adapter"),
        ("x", {"share_input": True}, "share_input"),
    ):
        with pytest.raises(FloraError, match=said):
            JointTrainer(tiny_llama(), {name: parse_recipe(RECIPES["one"] | change)})
    with JointTrainer(tiny_llama(), {"x": parse_recipe(RECIPES["one"])}) as trainer:
        with torch.no_grad():
            trainer.adapters.leaves("x")[-1].fill_(float("inf"))
        with pytest.raises(FloraError, match="x holds NaN or Inf"):
            trainer.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings", [{"name": "linear"}, {"name": "constant", "warmup_steps": 3}], ids=str
)
def test_a_schedule_that_does_not_fit_together(settings):
    with pytest.raises(ValueError, match="schedule"):
        Schedule(**settings)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # inductor's
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_is_one_graph_and_trains_the_same(backend):
    """The rows' adapters change from step to step; "three" has none in the second and third."""
    torch.compiler.reset()
    recipes = {name: parse_recipe(RECIPES[name]) for name in RECIPES}
    tokens = torch.randint(1, 64, (4, 7), generator=torch.Generator().manual_seed(2))
    mixes = [["one", "three", "add", "one"], ["one", "add"] * 2, ["add"] * 4, ["three", "one"] * 2]
    counter = CompileCounterWithBackend(backend)
    found = []
    for compiled in (False, True):
        model = tiny_llama()
        if compiled:
            model.compile(backend=counter, dynamic=False)
        with JointTrainer(model, recipes, seed=7) as trainer:
            losses = [
                trainer.step(
                    RowBatch(
                        adapters=names,
                        input_ids=tokens,
                        attention_mask=torch.ones_like(tokens),
                        labels=tokens,
                    )
                )
                for names in mixes
            ]
            found.append((losses, [trainer.adapters.leaves(name) for name in recipes]))
    (losses, leaves), (expected, same) = found
    assert losses == [pytest.approx(own, rel=1e-5) for own in expected]
    torch.testing.assert_close(leaves, same, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
