"""Thousands of random recipes: each is a valid Recipe or a ValueError of one line that names the key."""

from __future__ import annotations

import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from simpo.core.losses import LOSSES
from simpo.recipe import KEYS, STAGE_KEYS, Recipe, load_recipe
from simpo.recipe.aliases import ALIASES, INPUT_KEYS, KNOWN_ELSEWHERE
from simpo.recipe.yaml import dump_yaml, parse_yaml

OUR_NAMES = [*KEYS, *ALIASES, *INPUT_KEYS]
ALL_NAMES = [*OUR_NAMES, *STAGE_KEYS, *KNOWN_ELSEWHERE]

thorough = settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
brief = settings(thorough, max_examples=120)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "no", "steps", "epoch", "1e-6", "simpo", "hinge", "bfloat16", "all", "none", "nan", "-1"]),
    st.sampled_from([0, 1, 2, -1, 0.5, 1.0, 1e-6, 10**400, -(10**400), b"x", 1j, object()]),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), scalars, max_size=3),
)


def attempt(*args, **kwargs) -> Recipe | str:
    """The recipe, or the one line it is refused with. Anything else fails the test."""
    try:
        recipe = load_recipe(*args, **kwargs)
    except ValueError as error:
        refusal = error
    else:
        assert isinstance(recipe, Recipe)
        return recipe
    message = str(refusal)
    assert type(refusal) is ValueError
    assert 0 < len(message) < 3000
    assert len(message.splitlines()) == 1
    return message


def assert_reads_back_equal(recipe: Recipe) -> None:
    again = load_recipe(parse_yaml(recipe.to_yaml(), where="saved"))
    assert again == recipe


@thorough
@given(name=st.sampled_from(OUR_NAMES), value=values)
def test_any_value_of_any_key_is_valid_or_refused_by_name(name, value):
    result = attempt({"model_name_or_path": "m", name: value})
    if isinstance(result, Recipe):
        assert_reads_back_equal(result)
    else:
        assert name in result


@thorough
@given(st.dictionaries(st.sampled_from(ALL_NAMES), values, max_size=6))
def test_any_mixture_of_known_keys_is_valid_or_refused(mapping):
    result = attempt({"model_name_or_path": "m", **mapping})
    if isinstance(result, Recipe):
        assert_reads_back_equal(result)
    else:
        assert any(name in result for name in mapping)


@brief
@given(st.text(min_size=1, max_size=80).filter(lambda name: name.replace("-", "_") not in ALL_NAMES))
@example("score.scorer")
def test_any_unknown_key_is_refused_with_a_known_one_or_none(name):
    result = attempt({"model_name_or_path": "m", name: 1})
    if "." in name and name.replace("-", "_").split(".")[0] in ("dataset_mixer", "gradient_checkpointing_kwargs"):
        return
    assert isinstance(result, str)
    assert "unknown key" in result
    if "nearest known key is " in result:
        assert result.split("nearest known key is ")[1].split("'")[1] in ALL_NAMES


@brief
@given(name=st.sampled_from(sorted(KEYS)), position=st.integers(0, 30), letter=st.sampled_from(string.ascii_lowercase))
def test_a_misspelt_key_names_a_close_one(name, position, letter):
    misspelt = name[:position] + letter + name[position + 1 :]
    if misspelt not in ALL_NAMES:
        assert "unknown key" in attempt({"model_name_or_path": "m", misspelt: 1})


unit = st.floats(0, 1, exclude_max=True)
positive = st.floats(1e-9, 1e6)
count = st.integers(1, 10**6)
line = st.text(min_size=1, max_size=20).filter(str.strip)
VALID = {
    "beta": positive,
    "gamma_beta_ratio": st.floats(0, 100),
    "sft_weight": st.floats(0, 10),
    "sft_reduction": st.sampled_from(["pairs", "tokens"]),
    "learning_rate": st.floats(0, 1),
    "max_length": st.integers(2, 10**6),
    "warmup_ratio": st.floats(0, 1),
    "per_device_train_batch_size": count,
    "gradient_accumulation_steps": count,
    "num_train_epochs": positive,
    "max_steps": st.one_of(count, st.just(-1)),
    "adam_beta1": unit,
    "adam_epsilon": positive,
    "validation_fraction": unit,
    "eval_steps": st.one_of(st.floats(0.001, 0.999), count, st.none()),
    "save_steps": count,
    "seed": st.integers(0, 2**32 - 1),
    "output_dir": st.one_of(line, st.none()),
    "run_name": line,
    "chat_template": line,
    "system_prompt": line,
    "dataset_mixer": st.dictionaries(line, positive, min_size=1, max_size=3),
    "dataset_splits": st.lists(line, min_size=1, max_size=3),
    "report_to": st.lists(st.sampled_from(["wandb", "tensorboard", "trackio", "mlflow"]), max_size=2),
    "lora_target_modules": st.lists(st.text(string.ascii_letters, min_size=1), min_size=1, max_size=3),
    "overlong": st.sampled_from(["truncate", "drop", "error"]),
    "resume_from_checkpoint": st.one_of(st.booleans(), line, st.none()),
    **dict.fromkeys(["pack", "share_prompt", "bf16", "use_peft", "gradient_checkpointing"], st.booleans()),
}


@brief
@given(values=st.fixed_dictionaries({}, optional=VALID), loss=st.sampled_from(list(LOSSES)))
def test_valid_recipes_are_accepted_saved_and_read_back_equal(values, loss):
    adapters = {"use_peft": True} if "lora_target_modules" in values else {}
    recipe = load_recipe({"model_name_or_path": "m", "loss_type": loss, **adapters, **values})
    assert_reads_back_equal(recipe)
    assert recipe.loss_at_zero_margin() >= 0
    assert loss in recipe.describe_loss()
    assert load_recipe(recipe, {"logging_steps": 1}) == recipe


@thorough
@given(st.text(max_size=200))
def test_any_text_read_back_from_yaml_is_the_same(text):
    assert parse_yaml(dump_yaml({"key": text, "list": [text]}), where="x") == {"key": text, "list": [text]}


yaml_pieces = st.sampled_from(
    [
        *["beta", ": ", "\n", "- ", "[", "]", "{", "}", "'", '"', "|\n", "&a", "*a", "!!int ", "1e-6", "# ", "? "],
        *["---\n", "\t", "  ", "null", "%YAML 1.1\n", "...", "<<: ", "@", "`", "\x00", "é", "seed: 1\n"],
        "model_name_or_path: m\n",
    ]
)


@thorough
@given(st.one_of(st.lists(yaml_pieces, max_size=20).map("".join).map(str.encode), st.binary(max_size=200)))
def test_any_file_is_a_recipe_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        attempt(path)


words = st.one_of(
    st.sampled_from([f"--{name}" for name in ALL_NAMES]),
    st.sampled_from([f"--{name.replace('_', '-')}" for name in ALL_NAMES]),
    st.tuples(st.sampled_from(OUR_NAMES), st.sampled_from(["1", "0.5", "x", "", "[a]", "{a: 1}", "null"])).map(
        "=".join
    ),
    st.sampled_from(
        ["1", "-1", "1e-6", "true", "no", "x", "[", "{", "{a: 1}", "--", "=", "a=b", "--dataset_mixer.x=1"]
    ),
    st.text(max_size=12),
)


@thorough
@given(st.lists(words, max_size=6))
def test_any_overrides_are_taken_or_refused(arguments):
    attempt({"model_name_or_path": "m"}, arguments)


@brief
@given(name=st.sampled_from(OUR_NAMES), text=st.text(max_size=20))
def test_any_text_as_an_override_is_taken_or_refused_by_name(name, text):
    result = attempt({"model_name_or_path": "m"}, [f"--{name}={text}"])
    if isinstance(result, str):
        assert name in result


@pytest.mark.parametrize("source", [None, 3, b"x", ["a"], "\x00", "x" * 5000, {3: 4}, {None: 1}])
def test_a_source_that_is_no_recipe_is_refused(source):
    assert isinstance(attempt(source), str)


@pytest.mark.parametrize("overrides", ["--beta 3", [3], 3, [None], {3: 4}])
def test_overrides_that_are_none_are_refused(overrides):
    assert isinstance(attempt({"model_name_or_path": "m"}, overrides), str)
