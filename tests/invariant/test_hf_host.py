"""The Trainer of transformers around this project's pairs and losses trains what the native trainer trains."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_hosts import (
    METRICS,
    TOLERANCE,
    assert_same_run,
    first_rows,
    native_recipe,
    read_rows,
    run_host,
    run_native,
    settings,
)
from miniature import write_pairs
from safetensors.torch import load_file

from simpo.display import Display
from simpo.hosts.hf import SimPOConfig, SimPOTrainer
from simpo.hosts.hf.run import run_recipe
from simpo.parallel.mesh import Mesh, MeshSizes
from simpo.recipe import load_recipe
from simpo.run.stopping import NonFiniteError, OutOfMemory
from simpo.trainer import Trainer

DPO = {"loss_type": "dpo", "beta": 0.1}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 pairs: steps of 4 leave one pair for the last step, and with two processes nothing for one of them."""
    return write_pairs(tmp_path_factory.mktemp("rows") / "train.jsonl", 21, seed=3)


@pytest.fixture(scope="module")
def native(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One epoch: six steps, the last of one pair."""
    return run_native(tiny_model, pairs, tmp_path_factory.mktemp("native") / "run", max_steps=6)


# --- one process -----------------------------------------------------------------------------------------------------


def test_losses_gradients_and_weights_are_the_native_trainers(
    tiny_model: Path, pairs: Path, native: dict[str, Any], tmp_path: Path
) -> None:
    host = run_host(tiny_model, pairs, tmp_path / "run", max_steps=6)
    assert_same_run(host, native)
    for name, value in native["weights"].items():
        torch.testing.assert_close(host["weights"][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "gradient_checkpointing": True},
        {"max_tokens_per_micro_batch": 100},
        {"pack": False, "share_prompt": False},
    ],
    ids=["accumulation, checkpointing", "token limit", "padded"],
)
def test_the_update_does_not_depend_on_how_it_is_computed(
    tiny_model: Path, pairs: Path, native: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert_same_run(run_host(tiny_model, pairs, tmp_path / "run", max_steps=6, **changes), native)


def test_want_of_memory_is_one_line_that_names_the_key(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.31 GiB.")

    monkeypatch.setattr("simpo.hosts.hf.trainer.compute_pair_logps", too_much)
    line = r"^step 1: out of memory \(2.31 GiB more were asked for\); a smaller max_tokens_per_micro_batch than 100, or"
    with pytest.raises(OutOfMemory, match=line):
        run_host(tiny_model, pairs, tmp_path / "run", max_tokens_per_micro_batch=100)


def test_lora_trains_the_native_trainers_adapters(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    native = run_native(
        tiny_model,
        pairs,
        tmp_path / "native",
        **{"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": targets},
    )
    host = run_host(tiny_model, pairs, tmp_path / "host", lora=True)
    assert all("lora" in name for name in host["weights"])
    assert_same_run(host, native)


def trainer_of(model: Any, pairs: Path, folder: Path, *, peft_config: Any = None, **changes: Any) -> SimPOTrainer:
    args = SimPOConfig(report_to=[], disable_tqdm=True, save_strategy="no", **settings(folder, **changes))
    return SimPOTrainer(str(model), args, train_dataset=read_rows(pairs), peft_config=peft_config)


def test_dropout_of_adapters_is_left_on_and_that_of_the_model_is_not(
    model_folder: Any, pairs: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    adapters = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = model_folder(attention_dropout=0.2)
    model = trainer_of(folder, pairs, tmp_path / "run", peft_config=adapters).model
    assert {m.p for name, m in model.named_modules() if name.endswith("lora_dropout.default")} == {0.3}
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")} == {0.0}


def test_arguments_that_were_changed_count_and_those_that_came_too_late_are_refused(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    """As a trial of `hyperparameter_search` sets them. A run with them from the start is the same run."""
    changes = {"beta": 10.0, "gradient_accumulation_steps": 1}
    trainer = trainer_of(tiny_model, pairs, tmp_path / "changed")
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    trainer.train()
    expected = trainer_of(tiny_model, pairs, tmp_path / "given", **changes)
    expected.train()
    assert trainer.recipe.beta == 10.0
    for ours, theirs in zip(trainer.state.log_history, expected.state.log_history, strict=True):
        assert [ours.get(name) for name in METRICS] == [theirs.get(name) for name in METRICS]
    trainer.args.beta = 2.0
    trainer.get_eval_dataloader(trainer.train_dataset)
    assert trainer.recipe.beta == 2.0
    for name, value in {"max_length": 80, "pack": False, "router_aux_loss_coef": 0.1}.items():
        before = getattr(trainer.args, name)
        setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match=rf"^{name}: changed after pairs and model"):
            trainer.train()
        setattr(trainer.args, name, before)


def test_a_second_training_has_nothing_of_the_first(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """In a notebook: the first was stopped by a loss that is not finite."""
    trainer = trainer_of(tiny_model, pairs, tmp_path / "run", max_steps=1)
    with mock.patch.object(trainer, "_pair_losses", side_effect=trainer._pair_losses) as losses:
        losses.side_effect = lambda *args, f=trainer.__class__._pair_losses, **options: [
            each * math.nan if place == 0 else each for place, each in enumerate(f(trainer, *args, **options))
        ]
        with pytest.raises(NonFiniteError):
            trainer.train()
    trainer.train()
    assert trainer.state.global_step == 1


def test_weights_alone_are_no_run_to_go_on_from(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model, pairs, tmp_path / "run", max_steps=2, save_only_model=True)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.train()
    with pytest.raises(ValueError, match=r"checkpoint-1 holds weights alone \(save_only_model\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_leaks_into_sets_that_are_not_compared_are_refused(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    args = SimPOConfig(report_to=[], clean={"leaks": "exact"}, **settings(tmp_path / "run"))
    rows = read_rows(pairs)
    with pytest.raises(ValueError, match=r"^clean.leaks: the sets of a mapping are not compared"):
        SimPOTrainer(str(tiny_model), args, train_dataset=rows, eval_dataset={"held": rows[:4]})


def test_a_damaged_checkpoint_is_noticed_whatever_names_it(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model, pairs, tmp_path / "run", max_steps=2)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 4
    (folder / "model.safetensors").write_bytes(content)
    for name in (folder, str(folder)):
        with pytest.raises(ValueError, match="checkpoint-1 is damaged"):
            trainer_of(tiny_model, pairs, tmp_path / "run", max_steps=2).train(resume_from_checkpoint=name)


def test_a_loaded_bf16_model_is_trained_in_fp32(
    tiny_model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    args = SimPOConfig(report_to=[], disable_tqdm=True, save_strategy="no", **settings(tmp_path / "run", bf16=True))
    trainer = SimPOTrainer(model, args, train_dataset=read_rows(pairs))
    assert "kept in float32" in capsys.readouterr().out
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.state.log_history[0]["loss"] > 0


def test_evaluation_is_the_mean_over_all_pairs_at_any_batch_size(
    tiny_model: Path, pairs: Path, pair_files: Path, tmp_path: Path
) -> None:
    values = []
    for size in (1, 3, 10):
        args = SimPOConfig(report_to=[], per_device_eval_batch_size=size, **settings(tmp_path / f"run{size}"))
        held_out = {"a": read_rows(pair_files / "test.jsonl"), "b": read_rows(pairs)}
        values.append(SimPOTrainer(str(tiny_model), args, eval_dataset=held_out).evaluate())
    for later in values[1:]:
        for name in ("eval_a_loss", "eval_a_rewards/margins", "eval_b_loss", "eval_b_logps/chosen"):
            assert later[name] == pytest.approx(values[0][name], rel=TOLERANCE)
    assert values[0]["eval_a_pairs"] == 10
    assert values[0]["eval_b_pairs"] == 21


def test_a_resumed_run_goes_on_with_the_right_pairs(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    saving = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4}
    whole = run_host(tiny_model, pairs, tmp_path / "run", **saving)
    resumed = run_host(tiny_model, pairs, tmp_path / "run", **saving, resume=str(tmp_path / "run" / "checkpoint-4"))
    assert [line["step"] for line in resumed["lines"]] == list(range(1, 10))  # the first four come from the checkpoint
    for ours, theirs in zip(resumed["lines"], whole["lines"], strict=True):
        assert [ours[name] for name in METRICS] == [theirs[name] for name in METRICS]
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name


def test_a_checkpoint_of_other_data_is_refused(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run_host(tiny_model, pairs, tmp_path / "run", **saving)
    other = write_pairs(tmp_path / "other.jsonl", 21, seed=4)
    with pytest.raises(ValueError, match="belongs to a run with other settings: the training data"):
        run_host(tiny_model, other, tmp_path / "run", **saving, resume=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("changed", [{"lr_scheduler_type": "linear"}, {"adam_beta2": 0.95}, {"warmup_steps": 1}])
def test_a_checkpoint_of_another_schedule_or_optimizer_is_refused(
    tiny_model: Path, pairs: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run_host(tiny_model, pairs, tmp_path / "run", **saving)
    last = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match=f"belongs to a run with other settings: {next(iter(changed))} "):
        run_host(tiny_model, pairs, tmp_path / "run", **saving | changed, resume=last)


@pytest.mark.parametrize(("of", "said"), [("loss", "a loss is not finite"), ("gradient", "the gradient norm is nan")])
def test_what_is_no_number_stops_before_the_update(
    tiny_model: Path, pairs: Path, tmp_path: Path, of: str, said: str
) -> None:
    first = first_rows(tiny_model, pairs, tmp_path / "plan")
    outcome = run_host(tiny_model, pairs, tmp_path / "run", poison=first[0], of=of, warmup_steps=0)
    assert outcome["error"].startswith(f"step 1: {said}; nothing was updated")
    assert first[0] in outcome["error"]
    assert_untouched(outcome, tiny_model)


def assert_untouched(outcome: dict[str, Any], model: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    assert outcome["weights"]
    assert all(torch.equal(before[name], value) for name, value in outcome["weights"].items())


# --- losses with a reference -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native_dpo(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_native(tiny_model, pairs, tmp_path_factory.mktemp("native") / "dpo", max_steps=6, **DPO)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}])
def test_dpo_is_the_native_trainers(
    tiny_model: Path, pairs: Path, native_dpo: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    host = run_host(tiny_model, pairs, tmp_path / "run", max_steps=6, **DPO, **changes)
    assert_same_run(host, native_dpo)
    assert host["lines"][0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert host["lines"][-1]["loss"] < 0.69


@pytest.mark.parametrize(
    "keys",
    [{"loss_type": "confpo"}, {"wpo_weights": True, "reward_calibration": True}],
    ids=["confpo", "wpo and rc"],
)
def test_what_is_known_of_tokens_trains_as_in_the_native_trainer(
    two_ranks: Any, tiny_model: Path, pairs: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    native = run_native(tiny_model, pairs, tmp_path / "native", **keys)
    halved = {"gradient_accumulation_steps": 1}
    for host in two_ranks.run(run_host, tiny_model, pairs, tmp_path / "two", **halved, **keys):
        assert_same_run(host, native)


def test_each_pair_has_the_margin_of_its_scores_here_and_in_the_native_trainer(
    two_ranks: Any, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    """The first step's loss from its pairs' margins M, which another gamma does not change while nothing is trained."""
    rows = [{**row, "score_chosen": 1 + index % 5, "score_rejected": 0.5} for index, row in enumerate(read_rows(pairs))]
    scored = tmp_path / "scored.jsonl"
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = {"score_margin": 1.5, "gamma_beta_ratio": 0.8}
    native = run_native(tiny_model, scored, tmp_path / "native", **keys)
    for host in two_ranks.run(run_host, tiny_model, scored, tmp_path / "two", gradient_accumulation_steps=1, **keys):
        assert_same_run(host, native)
    trainer = Trainer(native_recipe(tiny_model, scored, tmp_path / "look", **keys), display=Display(quiet=True))
    plan, losses = next(trainer.loader.plans(0, 1)), []
    gaps = [row["score_chosen"] - row["score_rejected"] for row in rows]
    for micro_batch in trainer.loader.micro_batches(plan):
        logps = trainer._logps(micro_batch.pairs)
        for row_id, chosen, rejected in zip(
            micro_batch.pairs.row_ids, logps.chosen_mean, logps.rejected_mean, strict=True
        ):
            share = min(max(gaps[int(row_id.rpartition("#")[2])] / (sum(gaps) / len(gaps)), 0), 1.5)
            losses.append(math.log1p(math.exp(-2.0 * (chosen - rejected - 0.8 * share).item())))
    assert native["lines"][0]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    with pytest.raises(ValueError, match="score_margin: 21 of 21 pairs have no score"):
        run_native(tiny_model, pairs, tmp_path / "none", **keys)


def test_lists_train_as_in_the_native_trainer_and_hold_what_their_rows_say(
    two_ranks: Any, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    """Scored lists of 2 to 5 responses: tokens, starts and scores of each, and the same steps on both sides."""
    rows, lists = read_rows(pairs), []
    for index, row in enumerate(rows):
        texts = [
            row["rejected"],
            row["chosen"],
            *(other["chosen"] for other in rows[index + 1 : index + 1 + index % 4]),
        ]
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in texts]
        scores = [0.5, 9.0, *(1.0 + k for k in range(len(texts) - 2))]
        lists.append({"prompt": row["prompt"], "all_generated_responses": texts, "all_rm_scores": scores})
    scored = tmp_path / "lists.jsonl"
    scored.write_text("".join(json.dumps(row) + "\n" for row in lists), encoding="utf-8")
    keys = {"loss_type": "plackett_luce", "beta": 3.0}
    native = run_native(tiny_model, scored, tmp_path / "native", **keys)
    for host in two_ranks.run(run_host, tiny_model, scored, tmp_path / "two", gradient_accumulation_steps=1, **keys):
        assert_same_run(host, native)
    trainer = Trainer(native_recipe(tiny_model, scored, tmp_path / "look", **keys), display=Display(quiet=True))
    left_out = trainer.data.ledger.splits["train"].noticed.get("response of a list left out", {"count": 0})["count"]
    store, held = trainer.loader.store, 0
    for index in range(len(store)):
        pair, row = store[index], lists[int(store[index].row_id.rpartition("#")[2])]
        assert set(pair.scores) <= set(row["all_rm_scores"])
        assert (pair.scores[0], pair.scores[-1]) == (9.0, 0.5)
        held += len(pair.scores)
        for ids, start, score in zip(pair.more_ids, pair.more_starts, pair.scores[1:-1], strict=True):
            text = row["all_generated_responses"][row["all_rm_scores"].index(score)]
            assert trainer.tokenizer.decode(ids[start:-1]).strip() == text.strip()
            assert ids[:start] == pair.chosen_ids[:start]
    assert held == sum(len(row["all_rm_scores"]) for row in lists) - left_out
    assert held > 2 * len(store) + 10


def test_dpo_on_two_processes_is_dpo_on_one(
    two_ranks: Any, tiny_model: Path, pairs: Path, pair_files: Path, native_dpo: dict[str, Any], tmp_path: Path
) -> None:
    held_out = {"held_out": pair_files / "test.jsonl", "eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}
    one = run_host(tiny_model, pairs, tmp_path / "one", **held_out, **DPO)
    halved = {"gradient_accumulation_steps": 1, "per_device_eval_batch_size": 3}
    for host in two_ranks.run(run_host, tiny_model, pairs, tmp_path / "two", **held_out, **halved, **DPO):
        assert_same_run(host, native_dpo)
        for ours, theirs in zip(host["evaluations"], one["evaluations"], strict=True):
            for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/chosen"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5)
    assert one["evaluations"][-1]["eval_rewards/margins"] != pytest.approx(0, abs=1e-3)


def test_a_resumed_dpo_run_keeps_its_reference(tiny_model: Path, pairs: Path, pair_files: Path, tmp_path: Path) -> None:
    held_out = {"held_out": pair_files / "test.jsonl", "eval_strategy": "steps", "eval_steps": 4}
    saving = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, **held_out, **DPO}
    whole = run_host(tiny_model, pairs, tmp_path / "run", **saving)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    resumed = run_host(tiny_model, pairs, tmp_path / "run", **saving, resume=str(checkpoint))
    for kind in ("lines", "evaluations"):
        for ours, theirs in zip(resumed[kind], whole[kind], strict=True):
            for name in ("loss", "eval_loss", "rewards/margins", "eval_rewards/margins"):
                assert ours.get(name) == theirs.get(name)
    (checkpoint / "reference.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"reference\.npz is not as it was saved"):
        run_host(tiny_model, pairs, tmp_path / "run", **saving, resume=str(checkpoint))


def test_a_resumed_dpo_run_with_other_held_out_pairs_is_refused(
    tiny_model: Path, pairs: Path, pair_files: Path, tmp_path: Path
) -> None:
    def trainer(**held_out: Any) -> SimPOTrainer:
        values = settings(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1, **DPO)
        args = SimPOConfig(report_to=[], disable_tqdm=True, **values)
        return SimPOTrainer(str(tiny_model), args, train_dataset=read_rows(pairs), eval_dataset=held_out)

    test = read_rows(pair_files / "test.jsonl")
    trainer(a=test, b=test[:4]).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    trainer(b=test[:4]).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="has no reference log-probs of these held-out pairs"):
        trainer(a=test[:5]).train(resume_from_checkpoint=checkpoint)


def test_before_training_the_model_is_its_own_reference_and_later_pairs_have_none(
    tiny_model: Path, pairs: Path, pair_files: Path, tmp_path: Path
) -> None:
    args = SimPOConfig(report_to=[], save_strategy="no", disable_tqdm=True, **settings(tmp_path / "run", **DPO))
    rows, held_out = read_rows(pairs), read_rows(pair_files / "test.jsonl")
    trainer = SimPOTrainer(str(tiny_model), args, train_dataset=rows, eval_dataset=held_out)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != pytest.approx(math.log(2), rel=1e-3)
    with pytest.raises(ValueError, match="were not there when training began"):
        trainer.evaluate(rows)


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_tokens_per_micro_batch": 100},
    ],
    ids=["plain", "accumulation, checkpointing", "token limit"],
)
def test_two_processes_make_the_update_of_one(
    two_ranks: Any, tiny_model: Path, pairs: Path, native: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """In the last step one process has a pair and the other has none."""
    hosts = two_ranks.run(run_host, tiny_model, pairs, tmp_path / "run", max_steps=6, **changes)
    for host in hosts:
        assert host["world"] == 2
        assert host["wrapper"] == "DistributedDataParallel"
        assert_same_run(host, native)


def test_two_processes_evaluate_each_pair_once(
    two_ranks: Any, tiny_model: Path, pairs: Path, pair_files: Path, tmp_path: Path
) -> None:
    held_out = {"held_out": pair_files / "test.jsonl", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    one = run_host(tiny_model, pairs, tmp_path / "one", **held_out)["evaluations"][0]
    halved = {"gradient_accumulation_steps": 1, "per_device_eval_batch_size": 3}
    for host in two_ranks.run(run_host, tiny_model, pairs, tmp_path / "two", **held_out, **halved):
        assert host["evaluations"][0]["eval_pairs"] == 10
        for name in ("eval_loss", "eval_rewards/margins", "eval_logps/rejected"):
            assert host["evaluations"][0][name] == pytest.approx(one[name], rel=2e-5)


def test_lora_on_two_processes_is_lora_on_one(two_ranks: Any, tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    one = run_host(tiny_model, pairs, tmp_path / "one", lora=True)
    for host in two_ranks.run(run_host, tiny_model, pairs, tmp_path / "two", lora=True, gradient_accumulation_steps=1):
        assert_same_run(host, one)


def test_a_loss_that_is_no_number_on_one_process_stops_both(
    two_ranks: Any, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    row = first_rows(tiny_model, pairs, tmp_path / "plan")[0]
    changes = {"gradient_accumulation_steps": 1, "warmup_steps": 0}
    outcomes = two_ranks.run(run_host, tiny_model, pairs, tmp_path / "run", poison=row, **changes)
    assert outcomes[0]["error"] == outcomes[1]["error"]
    assert sum(f"rank {rank}: {row}" in outcomes[0]["error"] for rank in (0, 1)) == 1
    for outcome in outcomes:
        assert_untouched(outcome, tiny_model)


@pytest.mark.parametrize("keys", [{}, {"save_dtype": "float32"}], ids=["rounded", "float32"])
def test_a_recipes_model_is_evaluated_as_it_is_written(
    keys: dict[str, Any], tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A model that comes in bf16, and steps that bf16 cannot tell apart: fp32 masters differ from what is written."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half, source = tmp_path / "half", tiny_recipe["model_name_or_path"]
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(source).save_pretrained(half)
    small = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 2}
    recipe = {**tiny_recipe, **small, "model_name_or_path": str(half), "save_strategy": "no", "device": "cpu", **keys}
    run_recipe(load_recipe(recipe))
    run = Path(recipe["output_dir"])
    lines = read_rows(run / "metrics.jsonl")
    saved = [line for line in lines if "eval_saved_loss" in line]
    written = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
    assert written.dtype == (torch.float32 if keys else torch.bfloat16)
    assert ("| eval_saved_loss |" in (run / "model" / "README.md").read_text(encoding="utf-8")) == (not keys)
    if keys:
        assert saved == []
        return
    (line,) = saved
    again = {**recipe, "model_name_or_path": str(run / "model"), "output_dir": str(tmp_path / "again")}
    expected = Trainer(load_recipe(again), display=Display(quiet=True)).evaluate()
    assert line["eval_saved_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    assert abs([x for x in lines if "eval_loss" in x][-1]["eval_loss"] - expected["eval_loss"]) > 1e-6


def test_weights_in_4_bits_go_to_the_gpu_of_their_process(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(recipe: Any, device: torch.device) -> None:
        raise Placed(device)

    monkeypatch.setattr("simpo.hosts.hf.run.join_launched_world", lambda args: Mesh(MeshSizes(), device=args.device))
    monkeypatch.setattr("simpo.hosts.hf.run.quantization_options", place)
    monkeypatch.setattr(SimPOConfig, "device", torch.device("cuda", 1))
    with pytest.raises(Placed, match="cuda:1"):
        run_recipe(load_recipe({**tiny_recipe, "device": "cpu", "use_peft": True, "load_in_4bit": True}))


class Placed(Exception):
    """Where weights were about to go."""


# --- FSDP2, which accelerate gives to GPUs alone: here to CPUs, everything else as it is -----------------------------

FSDP2 = {
    **{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    **{"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    **{"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "ACCELERATE_MIXED_PRECISION": "no"},
}


def train_under_fsdp2(recipe: dict[str, Any]) -> str:
    """What `accelerate launch` with recipes/accelerate/fsdp2.yaml runs."""
    from accelerate import state
    from accelerate.utils import DistributedType

    began = state.AcceleratorState.__init__

    def begin(self: Any, *args: Any, **options: Any) -> None:
        began(self, *args, **options)
        if (plugin := options.get("fsdp_plugin")) is not None:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = plugin, DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with mock.patch.dict(os.environ, FSDP2), mock.patch.object(state.AcceleratorState, "__init__", begin):
        try:
            run_recipe(load_recipe(recipe))
        finally:
            state.AcceleratorState._reset_state(True)
    return "finished"


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_accelerates_fsdp2_leaves_the_native_trainers_model(
    bf16: bool, two_ranks: Any, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    keys = {"device": "cpu", "bf16": bf16, "max_steps": 3, "save_dtype": "float32", "logging_steps": 1}
    whole = {**tiny_recipe, **keys, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "native")}
    Trainer(load_recipe(whole), display=Display(quiet=True)).run()
    halved = {**whole, "gradient_accumulation_steps": 1, "output_dir": str(tmp_path / "fsdp2")}
    assert two_ranks.run(train_under_fsdp2, halved) == ["finished"] * 2
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("native", "fsdp2"))
    lines = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("native", "fsdp2")]
    # In bfloat16 the native trainer's one process computes by autocast, and these by weights of that format.
    within = 0.02 if bf16 else 1e-5
    for name in METRICS[:1] + METRICS[3:]:
        pairs = [[line[name] for line in each if name in line] for each in lines]
        assert pairs[0] == pytest.approx(pairs[1], rel=within, abs=within), name
    for name, weight in ours.items() if not bf16 else ():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-6)
