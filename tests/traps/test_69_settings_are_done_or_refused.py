"""Trap 69: settings that change training elsewhere were accepted with a notice, and nothing was done about them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, get_scheduler

from simpo.core.batch import build_batch
from simpo.hosts.hf import SimPOConfig
from simpo.hosts.hf.run import build_config
from simpo.model.head import compute_pair_logps
from simpo.model.load import load_model
from simpo.recipe import load_recipe
from simpo.run.optim import build_optimizer, learning_rate_at
from simpo.trainer import Trainer


def recipe(**keys: Any) -> Any:
    return load_recipe({"model_name_or_path": "m", **keys})


CHANGES_TRAINING = {
    "fp16": True, "neftune_noise_alpha": 5, "rpo_alpha": 1.0, "label_smoothing_factor": 0.1, "optim_args": "eps=1",
    "optim_target_modules": ["q"], "dataloader_drop_last": True, "data_seed": 7, "no_shuffle": True,
    "hidden_dropout": 0.1, "lr_decay_iters": 100, "rampup_batch_size": "8 8 100", "reference_free": True,
    "f_divergence_type": "js_divergence", "sync_ref_model": True, "ld_alpha": 0.5, "loss_weights": [1.0, 0.5],
    "max_samples": 100, "layers_to_transform": [1], "init_lora_weights": "pissa", "lora_target_parameters": ["w"],
    "model_init_kwargs": {"torch_dtype": "bfloat16"}, "adapter_name_or_path": "a", "eos_token": "</s>",
    "optimizer": "sgd", "train_sampling_strategy": "sequential", "eod_mask_loss": True, "train_samples": 1000,
    "fp8_format": "hybrid",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES_TRAINING)
def test_a_setting_that_is_not_supported_is_refused_with_what_to_do(name: str):
    with pytest.raises(ValueError, match=rf"^(this looks like a DPO recipe .*: )?{name} = .*: \w+"):
        recipe(**{name: CHANGES_TRAINING[name]})


def test_values_that_ask_for_what_is_done_anyway_are_not_refused():
    dumped = {"neftune_noise_alpha": None, "optim_args": "", "data_seed": None, "loss_weights": [1.0], "fp16": False}
    dumped |= {"optimizer": "adam", "lr_warmup_init": 0.0, "init_lora_weights": True, "f_divergence_type": "reverse_kl"}
    assert len(recipe(**dumped).notices) == len(dumped)


@pytest.mark.parametrize(
    "keys", [{"use_dora": True}, {"use_rslora": True}, {"lora_r": 8}, {"lora_alpha": 32}, {"lora_target_modules": "q"}]
)
def test_settings_of_adapters_are_not_passed_over_where_nothing_asks_for_adapters(keys: dict[str, Any]):
    with pytest.raises(ValueError, match=r"= .*: adapters are trained with use_peft: true alone; set it, or use_peft"):
        recipe(**keys)
    assert recipe(**keys, use_peft=True).use_peft
    full = recipe(**keys, use_peft=False)
    said = [line for line in full.notices if "not used, since use_peft is false" in line]
    assert bool(said) == (keys != {"lora_alpha": 32})  # what is there anyway needs no line
    assert recipe(lora_modules_to_save=None, use_dora=False).use_peft is False


@pytest.mark.parametrize("name", ["neftune_noise_alpha", "data_seed", "dataloader_drop_last", "bf16_full_eval"])
def test_the_trainers_own_arguments_are_refused_where_this_host_would_not_honour_them(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=name):
        SimPOConfig(output_dir=str(tmp_path), report_to=[], **{name: 1})


# --- the end of the learning rate's decay -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.01}},
        {"lr_decay_style": "cosine", "min_lr": 1e-5},
        {"lr_scheduler_type": "linear", "min_lr": 1e-5},
    ],
)
def test_rates_end_where_transformers_schedules_do(keys: dict[str, Any], tmp_path: Path):
    ours = recipe(learning_rate=1e-3, dataset_mixer={"a": 1}, output_dir=str(tmp_path), **keys)
    args = build_config(ours, torch.device("cpu"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, 3, 21, args.lr_scheduler_kwargs)
    for step in range(22):
        assert learning_rate_at(step, 21, ours) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert learning_rate_at(21, 21, ours) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr is missing"),
        ({"lr_scheduler_type": "constant", "min_lr": 1e-7}, "nothing decays"),
        ({"learning_rate": 1e-6, "min_lr": 1e-6}, "must be less than learning_rate"),
        ({"lr_scheduler_kwargs": {"num_cycles": 3}}, "only min_lr or min_lr_rate"),
    ],
)
def test_an_end_that_cannot_be_is_refused(keys: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        recipe(**keys)


# --- adapters --------------------------------------------------------------------------------------------------------

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "num_train_epochs": 1, "max_steps": 3}


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path):
    model = load_model(recipe(model_name_or_path=str(tiny_model), use_rslora=True, **LORA), device=torch.device("cpu"))
    scales = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert scales == {8 / math.sqrt(4)}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft 0.21 on transformers 5.23
def test_dora_trains_magnitudes_and_its_export_computes_what_was_trained(tiny_recipe: dict[str, Any]):
    """The start-up check holds its packed rows against ordinary ones; vectors are not decayed."""
    keys = {"use_dora": True, "weight_decay": 0.1, "learning_rate": 1e-2}
    trainer = Trainer(load_recipe({**tiny_recipe, **LORA, **keys}))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "magnitude" in name}
    groups = build_optimizer(trainer.model, trainer.recipe).param_groups
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    result = trainer.run()
    trained = dict(trainer.model.named_parameters())
    assert len(before) == 14
    assert all(id(trained[name]) in spared for name in before)
    assert all(not torch.equal(trained[name], value) for name, value in before.items())

    ids = torch.randint(5, 250, (1, 24), generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    packed = build_batch([trainer.loader.store[0]], pack=True, share_prompt=True)
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_recipe["model_name_or_path"])
    saved = PeftModel.from_pretrained(base, result.model_dir).eval()
    with torch.no_grad():
        alone = saved(input_ids=ids).logits
        merged = saved.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, alone, rtol=1e-4, atol=1e-4)
        pair, logps = trainer.loader.store[0], compute_pair_logps(trainer.model, packed)
        logits = merged(input_ids=torch.tensor([pair.chosen_ids])).logits[0, pair.chosen_start - 1 : -1]
        wanted = torch.tensor(pair.chosen_ids[pair.chosen_start :])
        by_hand = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    assert logps.chosen_sum.item() == pytest.approx(by_hand.item(), abs=1e-3)
