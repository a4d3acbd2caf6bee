"""The recipe: what is accepted, what it resolves to, and what a wrong one is told."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from simpo.core.losses import LOSSES, ListLogps, PairLogps
from simpo.recipe import KEYS, Recipe, keys, load_recipe, nearest_key
from simpo.recipe.aliases import ALIASES, INPUT_KEYS, KNOWN_ELSEWHERE, REFUSED
from simpo.recipe.checks import in_vain
from simpo.recipe.declare import declared_key, in_section
from simpo.recipe.vocabulary import check_vocabulary

REPO = Path(__file__).resolve().parents[2]
WILD = Path(__file__).parent / "recipes_in_the_wild"


def recipe(overrides=None, **values) -> Recipe:
    return load_recipe({"model_name_or_path": "m", **values}, overrides)


def refusal(overrides=None, **values) -> str:
    """The message a recipe is refused with."""
    with pytest.raises(ValueError) as caught:
        recipe(overrides, **values)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    return str(caught.value)


def megatron_options() -> list[str]:
    lines = (WILD / "megatron-options.txt").read_text().splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


# --- import ----------------------------------------------------------------------------------------------------------


def test_importing_the_recipe_loads_no_framework():
    code = (
        "import sys; import simpo.recipe; "
        "print(*[m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- documentation ---------------------------------------------------------------------------------------------------


def test_every_key_says_what_it_means_what_is_allowed_and_its_default():
    for doc in KEYS.values():
        assert doc.meaning.endswith("."), doc.name
        assert doc.allowed, doc.name
        assert doc.default, doc.name


def test_a_key_is_declared_once_and_careful_where_no_flag_is_given():
    """One line adds a key: it is checked, explained, part of a run's identity, and refused where no host takes it."""
    field = in_section("optimisation")(3, "A new key.", ge=1)

    class Longer(Recipe):
        new_key: keys.Whole = field

    assert Longer(model_name_or_path="m").new_key == 3
    with pytest.raises(ValueError, match="new_key"):
        Longer(model_name_or_path="m", new_key=0)
    key = declared_key("new_key", Longer.model_fields["new_key"])
    assert (key.section, key.meaning, key.allowed, key.default) == ("optimisation", "A new key.", "whole, >= 1", "3")
    assert (key.may_change, key.decides_tokens, key.hf, key.megatron, key.shown) == (False, False, "refused", "", False)
    assert declared_key("new_key", keys._data(3, "A new key.")).decides_tokens


def test_a_run_may_be_resumed_with_other_keys_where_the_results_are_the_same():
    changing = {name for name, key in KEYS.items() if key.may_change}
    assert changing >= {"activation_offload", "optimizer_offload", "tp", "output_dir", "report_to", "cache_dir"}
    assert not changing & {"optim", "torch_compile", "beta", "seed", "learning_rate", "master_dtype", "max_length"}


def test_no_name_means_two_things():
    tables = [set(KEYS), set(ALIASES), set(INPUT_KEYS), set(KNOWN_ELSEWHERE)]
    assert len(set.union(*tables)) == sum(map(len, tables))
    assert set(REFUSED) <= set(KNOWN_ELSEWHERE)
    assert all(alias.target in KEYS or alias.target in INPUT_KEYS for alias in ALIASES.values())
    assert all(target in KEYS for target, _ in INPUT_KEYS.values())


# --- published recipes -----------------------------------------------------------------------------------------------

PUBLISHED = {  # name: beta, gamma/beta, learning rate, max_length, max_prompt_length; arXiv:2405.14734, its repository
    "mistral-7b-base-simpo": (2.0, 0.8, 3e-7, 1024, 512),
    "mistral-7b-instruct-simpo": (2.5, 0.1, 5e-7, 2048, 1800),
    "llama-3-8b-base-simpo": (2.0, 0.5, 6e-7, 2048, 1800),
    "llama-3-8b-instruct-simpo": (2.5, 0.55, 1e-6, 2048, 1800),
    "llama-3-8b-instruct-simpo-v2": (10.0, 0.3, 1e-6, 2048, 1800),
    "gemma-2-9b-it-simpo": (10.0, 0.5, 8e-7, 2048, 1800),
}


def settings(r: Recipe) -> tuple[float, ...]:
    return r.beta, r.gamma_beta_ratio, r.learning_rate, r.max_length, r.max_prompt_length


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_authors_recipes_run_unchanged_and_resolve_to_their_numbers(name):
    r = load_recipe(WILD / f"{name}.yaml")
    beta, ratio, *rest = PUBLISHED[name]
    if name == "mistral-7b-instruct-simpo":
        ratio = 0.12  # their file says gamma 0.3 with beta 2.5; the table in the paper's repository says 0.1
    assert settings(r) == pytest.approx((beta, ratio, *rest))
    accumulation = 8 if name.startswith("mistral") else 16
    assert r.pairs_per_step(world=64 // accumulation) == 128
    assert (r.lr_scheduler_type, r.warmup_ratio, r.num_train_epochs, r.optim) == ("cosine", 0.1, 1.0, "adamw_torch")
    assert (r.eval_strategy, r.eval_steps, r.save_steps, r.report_to) == ("steps", 400, 1_000_000, ["wandb"])
    assert (r.master_dtype, r.bf16, r.sft_weight) == ("float32", True, 0.0)
    assert r.attn_implementation is None
    named = [notice.split(":")[0] for notice in r.notices]
    assert sorted(named) == ["attn_implementation", "do_eval", "log_level"]


def test_quoted_jinja_in_a_recipe_survives():
    assert load_recipe(WILD / "gemma-2-9b-it-simpo.yaml").chat_template.startswith("{{ bos_token }}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_our_recipes_have_the_published_settings(name):
    r = load_recipe(REPO / "recipes" / f"{name}.yaml", processes=4)
    assert settings(r) == PUBLISHED[name]
    assert r.pairs_per_step(world=4) == 128
    assert r.notices == ()


@pytest.mark.parametrize("path", sorted((REPO / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_here_is_complete_and_says_what_it_is_for(path):
    r = load_recipe(path)
    r.require("dataset_mixer", "output_dir")
    assert r.notices == ()
    head = path.read_text().split("\n\n")[0]
    assert "Hardware:" in head
    assert all(line.startswith("#") for line in head.splitlines())


def test_megatron_options_pass_unchanged():
    r = load_recipe({}, megatron_options())
    assert (r.loss_type, r.beta, r.gamma_beta_ratio, r.sft_weight, r.label_smoothing) == ("sigmoid", 2.5, 1.4, 0.0, 0.0)
    assert (r.per_device_train_batch_size, r.gradient_accumulation_steps) == (1, 32)
    assert (r.learning_rate, r.lr_scheduler_type, r.warmup_ratio, r.max_grad_norm) == (5e-7, "constant", 0.0, 1.0)
    assert (r.adam_beta1, r.adam_beta2, r.weight_decay, r.seed, r.bf16) == (0.9, 0.95, 0.1, 42, True)
    assert (r.max_length, r.max_steps, r.save_steps, r.logging_steps) == (32768, 5000, 50, 1)
    assert (r.model_name_or_path, r.output_dir) == ("./model_from_hf/qwen", "./ckpt/simpo")
    assert r.dataset_mixer == {"./dataset/pairs.jsonl": 1.0}
    assert r.eval_strategy == "no"  # --eval-iters 0
    used = {word for word in megatron_options() if word.startswith("--")}
    noticed = {notice.split(":")[0] for notice in r.notices}
    assert len(noticed) == len(r.notices), "one line for each"
    mapped = {"load", "data_path", "eval_steps"}  # read, with a line about their format or their being unused
    assert noticed - mapped < {option.lstrip("-").replace("-", "_") for option in used}


def test_megatron_options_in_a_yaml_file(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(
        "load: m\nmicro-batch-size: 2\nglobal-batch-size: 128\nlr: 1e-6\nsimpo-beta: 2.5\ngamma_beta_ratio: 1.4\n"
    )
    r = load_recipe(path, processes=4)
    assert (r.per_device_train_batch_size, r.gradient_accumulation_steps, r.beta) == (2, 16, 2.5)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "value", "key", "resolved"),
    [
        ("evaluation_strategy", "epoch", "eval_strategy", "epoch"),
        ("simpo_beta", 3, "beta", 3.0),
        ("simpo_loss_type", "hinge", "loss_type", "hinge"),
        ("simpo_label_smoothing", 0.1, "label_smoothing", 0.1),
        ("simpo_gamma_beta_ratio", 0.7, "gamma_beta_ratio", 0.7),
        ("gamma-beta-ratio", 0.7, "gamma_beta_ratio", 0.7),
        ("pref_ftx", 0.1, "sft_weight", 0.1),
        ("cpo_alpha", 0.1, "sft_weight", 0.1),
        ("simpo_gamma", 1.5, "gamma_beta_ratio", 0.75),
        ("dataset_num_proc", 4, "preprocessing_num_workers", 4),
        ("use_bnb_nested_quant", True, "bnb_4bit_use_double_quant", True),
        ("no_cuda", True, "device", "cpu"),
        ("use_cpu", True, "device", "cpu"),
        ("use_cpu", False, "device", "auto"),
        ("activation_checkpointing", True, "gradient_checkpointing", True),
        ("loss_type", "simpo", "loss_type", "sigmoid"),
        ("loss_type", ["ipo"], "loss_type", "ipo"),
        ("lr", 1e-5, "learning_rate", 1e-5),
        ("dataset_name", "a/b", "dataset_mixer", {"a/b": 1.0}),
        ("dataset_train_split", "train_prefs", "dataset_splits", ["train_prefs", "test"]),
        ("warmup_steps", 0.2, "warmup_ratio", 0.2),
        ("torch_dtype", "auto", "master_dtype", "float32"),
        ("torch_dtype", None, "master_dtype", "float32"),
        ("report_to", "none", "report_to", []),
        ("report_to", "wandb", "report_to", ["wandb"]),
        ("eval_strategy", False, "eval_strategy", "no"),
        ("lora_target_modules", "q_proj, v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("optim", "adamw_bnb_8bit", "optim", "adamw_8bit"),
        ("activation_offloading", True, "activation_offload", True),
        ("use_liger", True, "use_liger_kernel", True),
    ],
)
def test_other_names_and_spellings(alias, value, key, resolved):
    adapters = {"use_peft": True} if key.startswith(("lora_", "bnb_")) else {}
    assert getattr(recipe(**{alias: value}, **adapters), key) == resolved


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"simpo_beta": 2}, {"beta": 2}),
        ({"pref_ftx": 0.1}, {"sft_weight": 0.1}),
        ({"pref_ftx": 0.1}, {"cpo_alpha": 0.1}),
        ({"max-length": 100}, {"max_length": 100}),
        ({"gamma": 1}, {"gamma_beta_ratio": 0.5}),
        ({"simpo_gamma": 1}, {"gamma_beta_ratio": 0.5}),
        ({"global_batch_size": 128}, {"gradient_accumulation_steps": 2}),
        ({"dataset_name": "a"}, {"dataset_mixer": {"a": 1}}),
        ({"use_cpu": True}, {"device": "cuda"}),
    ],
)
def test_two_names_of_one_key_are_refused_naming_both(one, other):
    message = refusal(**one, **other)
    assert next(iter(one)) in message
    assert next(iter(other)) in message


@pytest.mark.parametrize(("loss", "advice"), [("sigmoid", "'cpo'"), (["hinge"], "'cpo_hinge'"), ("ipo", "ratio 0")])
def test_a_recipe_for_trl_does_not_train_simpos_loss_of_the_same_name(loss, advice):
    assert advice in refusal(loss_type=loss, cpo_alpha=1.0)


def test_what_trl_and_this_package_mean_alike_is_read():
    assert recipe(loss_type="ipo", cpo_alpha=0.5, gamma_beta_ratio=0.0).sft_weight == 0.5
    assert recipe(loss_type="simpo", cpo_alpha=0.5).sft_weight == 0.5


@pytest.mark.parametrize("name", sorted(set(KNOWN_ELSEWHERE) - {"stage"}))
def test_a_key_known_elsewhere_gives_exactly_one_line(name):
    notices = recipe(**{name: False}).notices
    assert len(notices) == 1
    assert notices[0].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"fp16": True}, "bf16"),
        ({"bf16": False, "fp16": True}, "bf16"),
        ({"load_in_8bit": True}, "load_in_4bit"),
        ({"fsdp_cpu_offload": True}, "offload_param_device"),  # once a key here
        ({"stage": "dpo"}, "loss_type"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"torch_dtype": "float16"}, "bfloat16"),
    ],
)
def test_what_would_train_something_else_is_refused_with_advice(values, advice):
    message = refusal(**values)
    assert list(values)[-1] in message
    assert advice in message


def test_generate_during_eval_says_what_to_set_instead():
    assert "num_eval_generations" in recipe(generate_during_eval=True).notices[0]


def test_settings_of_four_bits_without_them_are_said():
    (notice,) = recipe(use_peft=True, bnb_4bit_quant_type="fp4").notices
    assert notice.startswith("bnb_4bit_quant_type: not used, since load_in_4bit is false")


@pytest.mark.parametrize(
    ("clean", "said"),
    [
        ({"leaks_from": "eval"}, "clean.leaks_from: not used, since clean.leaks is keep"),
        ({"leaks": "exact", "similarity": 0.8}, "clean.similarity: not used, since neither"),
        ({"benchmark_ngram": 8}, "clean.benchmark_ngram: not used, since clean.benchmarks is not set"),
        ({"leaks": "near", "leaks_from": "eval", "similarity": 0.8}, None),
    ],
)
def test_settings_of_cleaning_that_is_off_are_said(clean, said):
    assert [notice[: len(said or "")] for notice in recipe(clean=clean).notices] == ([said] if said else [])


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.2}, "warmup_ratio"),
        ({"lr_scheduler_type": "constant"}, None),
        ({"eval_strategy": "no", "num_eval_generations": 4, "validation_fraction": 0}, "num_eval_generations"),
    ],
)
def test_a_key_that_another_makes_idle_is_said(keys, named):
    lines = in_vain(load_recipe({"model_name_or_path": "m", **keys}))
    assert [line.partition(":")[0] for line in lines] == ([named] if named else [])


def test_a_models_file_that_is_not_json_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        check_vocabulary(load_recipe({"model_name_or_path": str(tmp_path)}))


def test_what_is_relative_to_a_key_follows_it_where_the_key_is_changed_later():
    """As each trial of a sweep does."""
    base = {"model_name_or_path": "m", "beta": 2.0, "gamma": 1.0, "learning_rate": 1e-5}
    base |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    changed = load_recipe(load_recipe(base), ["--beta=10", "--learning_rate=1e-6"])
    again = load_recipe(changed, {"max_steps": 5})
    for recipe in (changed, again):
        assert recipe.gamma_beta_ratio * recipe.beta == pytest.approx(1.0)
        assert recipe.min_lr == pytest.approx(1e-7)
    assert load_recipe(changed, {"gamma_beta_ratio": 0.3}).gamma_beta_ratio == 0.3
    assert load_recipe(changed, {"min_lr": 2e-8}).min_lr == 2e-8


@pytest.mark.parametrize("given", ["text", "file", "own"])
def test_a_template_needs_tokens_that_the_model_has(tmp_path: Path, given: str):
    files = {"config.json": {"vocab_size": 2}, "tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1, "<turn>": 2}}}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    text, own, file = "{{ '<turn>' }}", tmp_path / "chat_template.jinja", tmp_path / "template.jinja"
    own.write_text(text if given == "own" else "{{ 'a' }}")
    file.write_text(text)
    template = {"text": text, "file": str(file), "own": None}[given]
    with pytest.raises(ValueError, match=r"there is none for '<turn>' \(2\), which the template"):
        check_vocabulary(load_recipe({"model_name_or_path": str(tmp_path), "chat_template": template}))


def test_nearest_key_prefers_ours():
    assert nearest_key("gama_beta_ratio") == "gamma_beta_ratio"
    assert nearest_key("per-device-train-batchsize") == "per_device_train_batch_size"
    assert nearest_key("temperature") == nearest_key("tempertaure") == "generate.temperature"


@pytest.mark.parametrize("name", ["\x00" * 1000, "zzqqxx", "wibble_wobble"])
def test_a_key_that_none_is_near_is_refused_without_a_guess(name):
    assert nearest_key(name) is None
    for key, lists in ((name, "simpo keys"), (f"generate.{name}", "simpo keys generate")):
        with pytest.raises(ValueError, match=f"unknown key .*; `{lists}` lists") as refused:
            load_recipe({"model_name_or_path": "m", key: 1})
        assert "nearest" not in str(refused.value)


# --- precision, attention --------------------------------------------------------------------------------------------


def test_bf16_weights_need_insisting():
    r = recipe(torch_dtype="bfloat16")
    assert r.master_dtype == "float32"
    assert "master_dtype: bfloat16" in r.notices[0]
    assert recipe(torch_dtype="bfloat16", master_dtype="bfloat16").master_dtype == "bfloat16"
    assert recipe(torch_dtype="bfloat16", overrides={"master_dtype": "bfloat16"}).notices == ()


def test_their_attention_is_kept_only_without_packing():
    packed = recipe(use_flash_attention_2=True)
    assert packed.attn_implementation is None
    assert "pack: false" in packed.notices[0]
    padded = recipe(attn_implementation="sdpa", pack=False, share_prompt=False)
    assert (padded.attn_implementation, padded.notices) == ("sdpa", ())
    assert recipe(attn_implementation="sdpa", pack=False).attn_implementation is None


def test_reentrant_checkpointing_is_noticed():
    r = recipe(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert r.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert "use_reentrant" in r.notices[0]


def test_options_of_the_step_that_exclude_each_other_are_refused():
    assert "4-bit" in refusal(torch_compile=True, load_in_4bit=True, use_peft=True)
    assert "fuses the same operations" in refusal(torch_compile=True, use_liger_kernel=True)
    assert "CPU memory already" in refusal(activation_offload=True, device="cpu")
    assert recipe(torch_compile=True, activation_offload=True, device="cuda").notices == ()


def test_four_bits_need_adapters():
    assert "use_peft" in refusal(load_in_4bit=True)
    assert recipe(load_in_4bit=True, use_peft=True).load_in_4bit


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_gets_its_own_defaults_and_saves_only_keys_it_reads(name, tmp_path):
    loss, r = LOSSES[name], recipe(loss_type=name)
    assert r.beta == loss.defaults.get("beta", 1.0)
    assert r.gamma_beta_ratio == loss.defaults.get("gamma_beta_ratio", 0.0)
    assert r.sft_weight == loss.sft_weight
    assert r.loss_values == loss.defaults
    assert r.notices == ()
    r.save(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert (again, again.notices) == (r, ())


@pytest.mark.parametrize("key", ["orpo_lambda", "alphapo_alpha", "slic_delta"])
def test_a_key_of_another_loss_is_refused(key):
    message = refusal(**{key: 0.5})
    assert key in message
    assert "sigmoid" in message
    owner = key.split("_")[0]
    assert getattr(recipe(loss_type=owner, **{key: 0.5}), key) == 0.5


@pytest.mark.parametrize(
    ("loss", "key"), [("cpo", "gamma_beta_ratio"), ("simper", "beta"), ("cpo", "gamma"), ("orpo", "beta")]
)
def test_a_general_key_the_loss_does_not_read_is_noticed(loss, key):
    r = recipe(loss_type=loss, **{key: 0.3})
    assert len(r.notices) == 1
    assert r.notices[0].startswith(f"{key}: not used")
    assert recipe(loss_type=loss) == r


def test_a_reference_model_is_announced_as_unused_without_a_loss_that_has_one():
    assert "never loaded" in recipe(ref_model_name_or_path="r").notices[0]
    assert recipe(ref_model_name_or_path="r", loss_type="dpo").notices == ()


def test_loss_at_zero_margin_by_hand():
    assert recipe().loss_at_zero_margin() == pytest.approx(math.log(1 + math.e))  # gamma = 1
    smoothed = recipe(label_smoothing=0.1).loss_at_zero_margin()
    assert smoothed == pytest.approx(0.9 * math.log(1 + math.e) + 0.1 * math.log(1 + 1 / math.e))
    assert recipe(loss_type="hinge").loss_at_zero_margin() == pytest.approx(2.0)
    assert recipe(loss_type="ipo").loss_at_zero_margin() == pytest.approx((0.5 + 0.25) ** 2)
    assert recipe(loss_type="dpo").loss_at_zero_margin() == pytest.approx(math.log(2))
    assert recipe(loss_type="slic", slic_delta=3).loss_at_zero_margin() == 3.0
    assert "pair term only" in recipe(loss_type="orpo").describe_loss()
    assert "without the sft term" in recipe(loss_type="cpo").describe_loss()


@pytest.mark.parametrize("name", LOSSES)
def test_predicted_loss_at_zero_margin_is_what_the_loss_computes(name):
    torch = pytest.importorskip("torch")
    r = recipe(loss_type=name)
    sums, lengths = torch.tensor([-6.0]), torch.tensor([5])
    low = {"low_sum": sums, "low_length": lengths}
    listed = {"lists": ListLogps(sums.repeat(2), lengths.repeat(2), (2,)), "scores": torch.tensor([1.0, 0.0])}
    logps = PairLogps(sums, sums, lengths, lengths, sums, sums, chosen_extras=low, rejected_extras=low, **listed)
    loss = LOSSES[name](logps, **r.loss_values).losses.item()
    own_term = 6.0 / 5 if name == "orpo" else 0.0  # "pair term only"
    assert loss - own_term == pytest.approx(r.loss_at_zero_margin(), abs=1e-6)


# --- checks across keys ----------------------------------------------------------------------------------------------


def test_prompt_limit_follows_a_short_max_length_but_must_fit_if_given():
    assert recipe().max_prompt_length == 1800
    assert recipe(max_length=512).max_prompt_length == 256
    assert recipe(max_prompt_length=None).max_prompt_length is None
    message = refusal(max_length=512, max_prompt_length=512)
    assert "max_prompt_length = 512" in message
    assert "max_length = 512" in message


def test_evaluation_strategy_is_derived():
    assert recipe().eval_strategy is None  # once at the end
    assert recipe(eval_steps=0.25).eval_strategy == "steps"
    by_logging = recipe(eval_strategy="steps", logging_steps=7)
    assert by_logging.eval_steps == 7
    assert "logging_steps" in by_logging.notices[0]
    unused = recipe(eval_strategy="epoch", eval_steps=5)
    assert unused.eval_steps is None
    assert unused.notices[0].startswith("eval_steps: not used")


def test_best_model_needs_every_checkpoint_evaluated():
    assert "eval_strategy" in refusal(load_best_model_at_end=True)
    assert "multiple" in refusal(load_best_model_at_end=True, eval_steps=40, save_steps=50)
    assert "multiple" in refusal(load_best_model_at_end=True, eval_steps=0.1, save_steps=50)
    assert recipe(load_best_model_at_end=True, eval_steps=25, save_steps=50).load_best_model_at_end
    assert recipe(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch").load_best_model_at_end


@pytest.mark.parametrize(
    ("metric", "resolved", "greater"),
    [
        ("loss", "eval_loss", False),
        ("eval_loss", "eval_loss", False),
        ("rewards/accuracies", "eval_rewards/accuracies", True),
        ("eval_rewards/margins", "eval_rewards/margins", True),
    ],
)
def test_which_metric_is_better_is_derived(metric, resolved, greater):
    r = recipe(metric_for_best_model=metric)
    assert (r.metric_for_best_model, r.greater_is_better) == (resolved, greater)
    assert "eval_rewards/accuracies" in refusal(metric_for_best_model="accuracy")


def test_global_batch_size_becomes_accumulation_for_the_processes_there_are(monkeypatch):
    assert recipe(global_batch_size=128).gradient_accumulation_steps == 64
    monkeypatch.setenv("WORLD_SIZE", "4")
    r = recipe(global_batch_size=128, per_device_train_batch_size=4)
    assert (r.gradient_accumulation_steps, r.pairs_per_step(4)) == (8, 128)
    message = refusal(global_batch_size=100, per_device_train_batch_size=3)
    assert "global_batch_size = 100" in message
    assert "3 x 4" in message


def test_dataset_configs_match_the_mixer():
    assert "dataset_configs" in refusal(dataset_mixer={"a": 1}, dataset_configs=["x", "y"])
    assert recipe(dataset_name="a", dataset_config="x").dataset_configs == ["x"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta", 0),
        ("beta", -1),
        ("beta", True),
        ("beta", "2"),
        ("beta", float("nan")),
        ("beta", float("inf")),
        ("beta", 10**400),
        ("gamma", -1),
        ("gamma_beta_ratio", -0.1),
        ("learning_rate", -1e-6),
        ("learning_rate", "1e-6"),
        ("label_smoothing", 0.5),
        ("warmup_ratio", 1.1),
        ("per_device_train_batch_size", 0),
        ("per_device_train_batch_size", 2.5),
        ("per_device_train_batch_size", True),
        ("gradient_accumulation_steps", 0),
        ("max_steps", 0),
        ("max_steps", -2),
        ("max_length", 1),
        ("logging_steps", 0),
        ("logging_steps", 0.5),
        ("eval_steps", 0),
        ("eval_steps", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("dataset_mixer", {}),
        ("dataset_mixer", {"a": 0}),
        ("dataset_mixer", {"a": True}),
        ("dataset_mixer", {1: 1.0}),
        ("dataset_mixer", ["a"]),
        ("dataset_splits", []),
        ("bf16", "yes"),
        ("bf16", 1),
        ("pack", None),
        ("model_name_or_path", ""),
        ("model_name_or_path", 3),
        ("lr_scheduler_type", "polynomial"),
        ("optim", "sgd"),
        ("optim", "paged_adamw_8bit"),
        ("torch_compile", "max-autotune"),
        ("report_to", "all"),
        ("loss_type", "SimPO"),
        ("overlong", "cut"),
        ("save_strategy", "best"),
        ("device", "tpu"),
        ("lora_target_modules", []),
        ("lora_target_modules", ["q_proj", None]),
        ("resume_from_checkpoint", 3),
        ("gradient_checkpointing_kwargs", [1]),
    ],
)
def test_a_value_out_of_range_is_refused_naming_the_key(key, value):
    assert key in refusal(**{key: value})


def test_a_range_error_names_the_spelling_used():
    message = refusal(simpo_beta=-1)
    assert "simpo_beta (beta) = -1" in message
    assert "x > 0" in message


def test_several_findings_come_in_one_line():
    message = refusal(beta=-1, seed="x")
    assert "beta" in message
    assert "seed" in message


def test_a_missing_model_says_so():
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        load_recipe({})


def test_what_a_command_needs_is_asked_for():
    with pytest.raises(ValueError, match="dataset_mixer and output_dir must be set"):
        recipe().require("model_name_or_path", "dataset_mixer", "output_dir")


# --- files -----------------------------------------------------------------------------------------------------------


def from_text(tmp_path: Path, text: str | bytes) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path)


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("1E-6", 1e-6), ("5e-07", 5e-7), (".5", 0.5), ("3", 3.0)])
def test_numbers_as_people_write_them(tmp_path, text, value):
    assert from_text(tmp_path, f"model_name_or_path: m\nlearning_rate: {text}\n").learning_rate == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_name_or_path: m\nbeta: 2\nseed: 1\nbeta: 3\n", "'beta' is given twice, on lines 2 and 4"),
        ("dataset_mixer:\n  a: 1\n  a: 2\n", "'a' is given twice, on lines 2 and 3"),
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("- a\n- b\n", "a list"),
        ("just words\n", "plain text"),
        ("42\n", "a single value"),
        ("a: [1\n", "line"),
        ("a: b: c\n", "line 1"),
        ("\ta: 1\n", "line 1"),
        ("1: 2\n", "key must be text"),
        ("a: &x 1\nb: *x\n", "anchors"),
        ("a: !!python/object:os.system {}\n", "tags"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: 1\n---\na: 2\n", "line 2"),
        ("beta: " + "9" * 5000, "too many digits"),
        ("learning_rate: on\nmodel_name_or_path: m\n", "learning_rate = True"),
        (b"\x80\x81\xff\x00", "UTF-8"),
        (b"a: \x00\x01", "not a text file"),
        (b"x" * 1_000_001, "larger than"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_words(tmp_path, text, says):
    with pytest.raises(ValueError) as caught:
        from_text(tmp_path, text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="a folder, not a recipe"):
        load_recipe(tmp_path)
    with pytest.raises(ValueError, match="path, a mapping or a Recipe"):
        load_recipe(3)


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    r = recipe(
        gamma=1.6,
        simpo_beta=2.5,
        dataset_mixer={"a/b": 0.5, "1e-6": 1},
        chat_template="{% if x %}\n'\"{{ 'é' }}: - #\t{% endif %}",
        run_name="2024-01-01",
        output_dir=Path("runs/x"),
        eval_steps=0.1,
        report_to=["wandb"],
        use_flash_attention_2=True,
        log_level="info",
        resume_from_checkpoint=True,
        use_peft=True,
        lora_target_modules=["q_proj"],
        max_prompt_length=None,
    )
    path = tmp_path / "recipe.yaml"
    r.save(path)
    again = load_recipe(path)
    assert again == r
    assert again.notices == ()
    assert path.read_text().startswith("# Resolved recipe, written by simpo ")


def test_recipes_are_equal_when_their_resolved_values_are():
    assert recipe(simpo_beta=2.0, gamma=1.0) == recipe()
    assert recipe(seed=1) != recipe(seed=2)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        recipe().beta = 3.0


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--beta", "3"], "beta", 3.0),
        (["--beta=3"], "beta", 3.0),
        (["beta=3"], "beta", 3.0),
        (["--learning-rate", "5e-7"], "learning_rate", 5e-7),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--use_peft"], "use_peft", True),
        (["--use_peft", "--beta", "3"], "use_peft", True),
        (["--use_peft", "beta=3"], "use_peft", True),
        (["--pack", "false"], "pack", False),
        (["--pack=false"], "pack", False),
        (["--run_name", "42"], "run_name", "42"),
        (["--run_name=a=b"], "run_name", "a=b"),
        (["--chat_template", "{{ x }}: {% y %}"], "chat_template", "{{ x }}: {% y %}"),
        (["--dataset_splits", "train_prefs", "test_prefs"], "dataset_splits", ["train_prefs", "test_prefs"]),
        (["--dataset_splits", "[a, b]"], "dataset_splits", ["a", "b"]),
        (["--dataset_splits=a,b"], "dataset_splits", ["a", "b"]),
        (["--report_to", "none"], "report_to", []),
        (["--dataset_mixer", "{x/y.z: 0.5}"], "dataset_mixer", {"x/y.z": 0.5}),
        (["--dataset_mixer.x/y.z=0.5"], "dataset_mixer", {"x/y.z": 0.5}),
        (["--dataset_mixer.a-b", "0.5"], "dataset_mixer", {"a-b": 0.5}),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint", True),
        (
            ["--resume_from_checkpoint", "runs/x/checkpoints/step-5"],
            "resume_from_checkpoint",
            "runs/x/checkpoints/step-5",
        ),
        (["--seed", "1", "--seed", "1"], "seed", 1),
    ],
)
def test_overrides_as_words(words, key, value):
    assert getattr(recipe(words), key) == value


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--beta"], "beta: a value is missing"),
        (["--beta", "--seed", "1"], "beta: a value is missing"),
        (["beta"], "unexpected 'beta'"),
        (["--"], "unexpected '--'"),
        (["---beta", "3"], "unexpected"),
        (["-beta", "3"], "unexpected '-beta'"),
        (["--bta", "3"], "'beta'"),
        (["--beta", "3", "--beta", "4"], "given twice"),
        (["--beta", "[3"], "beta"),
        (["--beta", "3", "4"], "unexpected '4'"),
        (["--simpo_beta", "3", "--beta", "4"], "beta and simpo_beta"),
        (["--pack.x=1"], "pack.x"),
    ],
)
def test_wrong_overrides_are_refused(words, says):
    assert says in refusal(words)


def test_an_override_wins_whatever_name_either_side_uses():
    assert recipe({"simpo_beta": 3}, beta=5).beta == 3.0
    assert recipe({"beta": 3}, simpo_beta=5).beta == 3.0
    assert recipe(["--lr", "1e-5"], learning_rate=1e-6).learning_rate == 1e-5


def test_overriding_one_of_a_pair_drops_the_other():
    assert recipe({"gamma": 3}, gamma_beta_ratio=0.1).gamma == pytest.approx(3.0)
    assert recipe({"gamma_beta_ratio": 0.1}, gamma=3).gamma_beta_ratio == 0.1
    assert recipe({"global_batch_size": 8}, gradient_accumulation_steps=3).gradient_accumulation_steps == 4
    assert recipe({"gradient_accumulation_steps": 3}, global_batch_size=8).gradient_accumulation_steps == 3
    assert recipe({"dataset_name": "x"}, dataset_mixer={"a": 1}).dataset_mixer == {"x": 1.0}
    assert recipe({"dataset_mixer": {"x": 2}}, dataset_name="a").dataset_mixer == {"x": 2.0}


def test_one_dataset_of_the_mixer_can_be_overridden():
    both = recipe(["--dataset_mixer.b=0.5"], dataset_mixer={"a": 1})
    assert both.dataset_mixer == {"a": 1.0, "b": 0.5}


def test_a_recipe_with_overrides_keeps_its_given_keys_and_derives_the_rest_anew():
    r = recipe(seed=7)
    assert load_recipe(r) is r
    changed = load_recipe(r, ["--loss_type", "cpo"])
    assert (changed.seed, changed.beta, changed.sft_weight) == (7, 0.1, 1.0)


def test_mapping_overrides_take_python_values():
    r = recipe({"output_dir": Path("runs/x"), "dataset_mixer.a": 0.5, "report_to": ("wandb", "mlflow")})
    assert (r.output_dir, r.dataset_mixer, r.report_to) == ("runs/x", {"a": 0.5}, ["wandb", "mlflow"])


def test_token_budget_without_packing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch counts packed tokens, and pack is false"):
        load_recipe({"model_name_or_path": "m", "pack": False, "max_tokens_per_micro_batch": 4096})


def test_dataset_mixture_of_the_alignment_handbook(tmp_path):
    one = {"id": "org/set", "config": "en", "split": "train_prefs", "columns": ["chosen", "rejected"], "weight": 0.5}
    mixture = {"datasets": [one, {"id": "org/other"}, {"id": "org/set"}], "seed": 3, "test_split_size": 0.1}
    recipe = load_recipe({"model_name_or_path": "m", "dataset_mixture": mixture})
    assert recipe.dataset_mixer == {
        "org/set 1": {
            **{"path": "org/set", "config": "en", "split": ["train_prefs"], "columns": ["chosen", "rejected"]},
            "fraction": 0.5,
        },
        "org/other": {},
        "org/set 2": {"path": "org/set"},
    }
    assert recipe.validation_fraction == 0.1
    assert any("seed chooses the rows" in line for line in recipe.notices)
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert load_recipe(recipe, {"dataset_name": "a.jsonl"}).dataset_mixer == {"a.jsonl": 1.0}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset_mixture": ["org/set"]}, r"a mapping with datasets: \[\{id: NAME"),
        ({"dataset_mixture": {"datasets": [{"name": "a"}]}}, r"a mapping with datasets: \[\{id: NAME"),
        ({"dataset_mixture": {"datasets": [{"id": "a"}], "shuffle": True}}, "shuffle is not known here"),
        (
            {"dataset_mixture": {"datasets": [{"id": "a", "data_dir": "b"}]}},
            "'data_dir' is not known here; a dataset may",
        ),
        ({"dataset_mixture": {"datasets": [{"id": "a"}], "test_split_size": 500}}, "test_split_size.*500"),
        ({"dataset_mixer": {"a": 1.0}, "dataset_mixture": {"datasets": [{"id": "a"}]}}, "two names of the same key"),
        ({"dataset_mixer": {"a": {"fraction": 0}}}, "'a': fraction: the fraction must be > 0"),
        ({"dataset_mixer": {"a": {"columns": 3}}}, "'a': columns: a list of names is needed"),
        ({"dataset_mixer": {"a": {"data_files": {"train": 1}}}}, "'a': data_files: a list of names is needed"),
    ],
)
def test_entries_of_the_mixer_that_say_what_is_not_known(keys, message):
    with pytest.raises(ValueError, match=message):
        load_recipe({"model_name_or_path": "m", **keys})


def test_keys_of_a_command_are_checked_and_kept_with_the_recipe(tmp_path: Path):
    given = {"model_name_or_path": "x", "generate": {"temperature": 0.5, "prompts": {"p.jsonl": 1.0}}}
    recipe = load_recipe(given, ["--generate.top-p", "0.9", "--generate.stop", "a,b"])
    assert (recipe.generate.temperature, recipe.generate.top_p, recipe.generate.stop) == (0.5, 0.9, ["a", "b"])
    assert load_recipe(recipe, {"beta": 3.0}).generate == recipe.generate
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert "\nscore:" not in (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"temperature": -1}, r"generate\.temperature = -1\.0: .*allowed: x >= 0"),
        ({"temprature": 1}, r"unknown key 'generate\.temprature': the nearest known key is 'generate\.temperature'"),
        ({"num_samples": "3"}, r"generate\.num_samples = '3': a number is needed, without quotes"),
        (3, r"generate = 3: a mapping is needed"),
        (
            {"backend": "tgi"},
            r"generate\.backend = 'tgi': not one of its values \(allowed: local, vllm, openai or ray\)",
        ),
    ],
)
def test_a_wrong_key_of_a_command_is_named_whole(section: object, message: str):
    with pytest.raises(ValueError, match=message):
        load_recipe({"model_name_or_path": "x", "generate": section})
