"""Trap 48: a configuration class that cannot be parsed beside its neighbours (`--model_revision` twice)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from alignment_standin import DataArguments, ModelArguments
from transformers import HfArgumentParser

from simpo.hosts.hf import SimPOConfig
from simpo.hosts.hf.config import KEYWORDS, RECIPE_FIELDS

WILD = Path(__file__).parents[1] / "unit" / "recipes_in_the_wild"


COMMAND = "--output_dir runs/x --beta 2.5 --gamma-beta-ratio 0.3 --learning_rate 5e-7 --model_name_or_path some/model"


def by_type(parsed: tuple[Any, ...]) -> dict[type, Any]:
    return {type(each): each for each in parsed}


@pytest.mark.filterwarnings("ignore")  # the peer's
def test_beside_trls_classes_in_any_order_from_the_command_line_and_from_yaml(tmp_path: Path):
    trl = pytest.importorskip("trl")
    classes = (trl.ScriptArguments, SimPOConfig, trl.ModelConfig)
    words = [*COMMAND.split(), "--model_revision", "v2", "--dtype", "bfloat16", "--attn_implementation", "sdpa"]
    words += ["--use_peft", "--lora_r", "8", "--dataset_name", "org/pairs", "--report_to", "none"]
    words += ["--model_init_kwargs", '{"trust_remote_code": true}']
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: runs/x\nbeta: 2.5\nlearning_rate: 5e-7\nmodel_revision: v2\nuse_peft: true\n")
    for order in itertools.permutations(classes):
        typed = by_type(HfArgumentParser(order).parse_args_into_dataclasses(words))
        read = by_type(HfArgumentParser(order).parse_yaml_file(str(file)))
        mixed = by_type(trl.TrlParser(order).parse_args_and_config(["--config", str(file), "--beta", "3"]))
        assert (typed[SimPOConfig].gamma_beta_ratio, typed[trl.ModelConfig].lora_r) == (0.3, 8)
        assert typed[SimPOConfig].to_recipe("some/model").trust_remote_code
        assert mixed[SimPOConfig].beta == 3.0
        for parsed in (typed, read, mixed):
            assert parsed[trl.ModelConfig].model_revision == "v2"
            assert parsed[SimPOConfig].learning_rate == 5e-7
            assert parsed[SimPOConfig].model_revision is None, "the script hands the other class's value on"


@pytest.mark.parametrize("order", [*itertools.permutations((ModelArguments, DataArguments, SimPOConfig))])
def test_beside_the_alignment_handbooks_classes(order: tuple[type, ...]):
    words = [*COMMAND.split(), "--chat_template", "{{ messages }}", "--preprocessing_num_workers", "2"]
    parser = HfArgumentParser(order)
    assert "--gamma_beta_ratio" in parser.format_help()
    parsed = by_type(parser.parse_args_into_dataclasses([*words, "--report_to", "none"]))
    assert parsed[DataArguments].chat_template == "{{ messages }}"
    assert parsed[SimPOConfig].beta == 2.5


@pytest.mark.parametrize("name", ["llama-3-8b-instruct-simpo", "gemma-2-9b-it-simpo", "llama-3-8b-base-simpo"])
def test_the_authors_recipes_are_read_by_their_parser(name: str):
    values = yaml.safe_load((WILD / f"{name}.yaml").read_text(encoding="utf-8"))
    values["report_to"] = []
    model, data, args = HfArgumentParser((ModelArguments, DataArguments, SimPOConfig)).parse_dict(values)
    assert (args.beta, args.gamma_beta_ratio) == (values["beta"], values["gamma_beta_ratio"])
    assert (args.learning_rate, args.get_warmup_steps(50)) == (values["learning_rate"], 5)
    assert (args.eval_strategy, args.do_eval) == ("steps", True)
    assert (model.torch_dtype, data.dataset_mixer) == (values.get("torch_dtype"), values["dataset_mixer"])


def test_words_that_a_parser_leaves_as_text_are_read_as_numbers():
    """Theirs builds the class a second time from its own attributes, and `--beta=10` stays text."""
    first = SimPOConfig(output_dir="runs/x", report_to=[], beta=2.5, gamma=1.0, warmup_ratio=0.2, model_revision="v2")
    own = {field.name for field in dataclasses.fields(first) if field.init}
    values = {name: value for name, value in vars(first).items() if name in own}
    again = SimPOConfig(**{**values, "beta": "10", "learning_rate": "5e-7", "save_steps": "7", "pack": "false"})
    assert (again.beta, again.gamma_beta_ratio, again.learning_rate, again.save_steps) == (10.0, 0.4, 5e-7, 7)
    assert again.pack is False
    assert again.get_warmup_steps(50) == 10
    with pytest.raises(ValueError, match="beta = 'much'"):
        SimPOConfig(output_dir="runs/x", beta="much")


def test_what_is_no_option_is_still_a_keyword_and_is_kept():
    assert set(KEYWORDS) < set(RECIPE_FIELDS)
    given = {"model_revision": "v2", "trust_remote_code": True, "chat_template": "{{ messages }}"}
    given |= {"auto_insert_empty_system_msg": True, "preprocessing_num_workers": 2, "attn_implementation": "sdpa"}
    assert set(given) == set(KEYWORDS)
    args = SimPOConfig(output_dir="runs/x", report_to=[], pack=False, share_prompt=False, **given)
    copies = [args, dataclasses.replace(args, seed=3), copy.deepcopy(args), pickle.loads(pickle.dumps(args))]
    for each in copies:
        recipe = each.to_recipe("some/model")
        assert {name: getattr(recipe, name) for name in given} == given
        assert given.items() <= each.to_dict().items()
