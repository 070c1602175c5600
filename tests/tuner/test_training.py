"""Training FLoRA as a PEFT method: plain loops, the Trainer, checkpointing, autocast."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from flora.errors import UsageError
from flora.tuner import FloraConfig

IDS = torch.arange(1, 33).reshape(4, 8)


def llama(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_cache": False,
        "initializer_range": 0.3,
    }
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(dtype)
    config = FloraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **fields)
    return get_peft_model(base, config)


def gradients(model, **kwargs):
    model(input_ids=IDS, labels=IDS, **kwargs).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def train(model, steps, **kwargs):
    """The loss before and after some steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS, **kwargs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("share_input", [False, True])
def test_adamw_lowers_the_loss_and_leaves_the_base_alone(share_input):
    model = llama(share_input=share_input)
    before = {n: p.clone() for n, p in model.named_parameters()}
    first, last = train(model, steps=20)
    assert last < first - 0.5
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) is ("flora_" not in name), name


def test_the_ranks_part_ways():
    model = llama()
    train(model, steps=3)
    for name, param in model.named_parameters():
        if "flora_" in name:
            assert not torch.equal(param[0], param[1]), name


def test_trainer_trains_saves_and_resumes(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def trainer(model, steps):
        arguments = TrainingArguments(
            output_dir=tmp_path,
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=8,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        return Trainer(model=model, args=arguments, train_dataset=rows)

    model = llama(share_input=True)
    run = trainer(model, 16)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        loaded = PeftModel.from_pretrained(llama().unload(), tmp_path / "checkpoint-16")
        assert torch.equal(loaded(IDS).logits, expected)

    resumed = llama(share_input=True)
    trainer(resumed, 16).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    with torch.no_grad():
        assert torch.equal(resumed.eval()(IDS).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = llama(torch.float64)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    assert set(found) == set(expected)
    assert all("flora_" in name for name in found)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_autocast_trains_fp32_factors(base):
    model = llama(base)
    first, last = 0.0, 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, last = train(model, steps=15)
    assert last < first - 0.3
    assert {p.dtype for n, p in model.named_parameters() if "flora_" in n} == {torch.float32}


def test_a_bf16_base_trains_without_autocast():
    first, last = train(llama(torch.bfloat16), steps=15)
    assert last < first - 0.3


def test_a_mixed_batch_trains_each_adapter_on_its_own_rows():
    model = llama(torch.float64)
    model.add_adapter("rust", FloraConfig(r=3, target_modules="all-linear"))
    model.set_requires_grad(["default", "rust"])
    names = ["rust", "default", "__base__", "rust"]

    def grads_of(rows, mixed):
        labels = torch.full_like(IDS, -100)
        labels[rows] = IDS[rows]
        chosen = {"adapter_names": names} if mixed else {}
        model(input_ids=IDS, labels=labels, num_items_in_batch=1, **chosen).loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    mixed = grads_of([0, 1, 2, 3], mixed=True)
    assert {name.rpartition(".")[2] for name in mixed} == {"default", "rust"}
    for name, rows in {"default": [1], "rust": [0, 3]}.items():
        model.set_adapter(name)
        alone = grads_of(rows, mixed=False)
        model.set_requires_grad(["default", "rust"])
        assert {n.rpartition(".")[2] for n in alone} == {name}
        for path, grad in alone.items():
            torch.testing.assert_close(mixed[path], grad, msg=path)


def test_a_mixed_batch_with_gradient_checkpointing_is_refused():
    model = llama()
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(UsageError, match="gradient checkpointing"):
        model(IDS, adapter_names=["default"] * 4)
    model.eval()
    model(IDS, adapter_names=["default"] * 4)
