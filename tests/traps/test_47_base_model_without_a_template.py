"""Trap 47: a base model without a chat template trained on prompt and answer glued together, unsaid."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
from tokenizers_for_tests import trained_texts
from transformers.models.auto import tokenization_auto

from simpo.data.prepare import prepare_pairs
from simpo.data.templates import CHATML, install_chat_template, load_chat_template
from simpo.model.load import load_tokenizer
from simpo.recipe import load_recipe

ROW = {"prompt": "Which colour has that water?", "chosen": "The water is green.", "rejected": "Wet."}
MESSAGES = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "Yes.", "rejected": "No."}


@pytest.fixture
def base(build_tokenizer):
    return copy.deepcopy(build_tokenizer("plain"))


@pytest.fixture
def prepared(tmp_path, base, data_recipe):
    def prepare(row=ROW, **keys):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        return prepare_pairs(data_recipe(file, validation_fraction=0, **keys), base, progress=False)

    return prepare


@pytest.mark.parametrize("row", [ROW, MESSAGES])
def test_without_a_template_the_choices_are_named(prepared, row):
    with pytest.raises(
        ValueError, match=r"chat_template: the tokenizer has none .*chatml \(built in\), Jinja .*, or none"
    ):
        prepared(row)


def test_chatml_is_built_in_and_goes_with_the_tokenizer(prepared, base, tmp_path):
    install_chat_template(base, "chatml")  # as both trainers do
    data = prepared(chat_template="chatml")
    (row,) = data.train
    assert row["prompt_text"] == f"<|im_start|>user\n{ROW['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    trained = base.decode(row["chosen_ids"][row["chosen_start"] :])
    assert trained == "The water is green.<|im_end|><|end|>"
    assert data.ledger.notes == ["chat_template: this tokenizer writes each of chatml's marks as several tokens"]
    base.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text(encoding="utf-8") == CHATML


def test_a_file_goes_with_the_tokenizer_as_its_text(base, tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML.replace("im_start", "begin"), encoding="utf-8")
    install_chat_template(base, str(tmp_path / "own.jinja"))
    assert base.chat_template == CHATML.replace("im_start", "begin")


def test_a_named_template_of_several_is_the_one_that_is_saved(base):
    base.chat_template = {"default": CHATML, "short": CHATML.replace("role", "name")}
    install_chat_template(base, "short")
    assert base.chat_template["default"] == load_chat_template(base, "short") == CHATML.replace("role", "name")


@pytest.mark.parametrize("keys", [{"chat_template": "none"}, {"rendered_text": "keep"}])
def test_glued_text_on_request_is_counted_and_shown(prepared, base, keys, capfd):
    data = prepared(**keys)
    (row,) = data.train
    assert base.decode(row["chosen_ids"]) == ROW["prompt"] + ROW["chosen"] + "<|end|>"
    said = "train: 1 rows: prompt and answer glued together, without a template (rows.jsonl/train#0: "
    assert said in capfd.readouterr().err
    assert "that water?The water is green" in data.ledger.notices[0]


def test_messages_need_a_template_whatever_is_asked_for(prepared):
    with pytest.raises(ValueError, match=r"needs a chat template; set chat_template in the recipe to chatml"):
        prepared(MESSAGES, chat_template="none")


def test_chatml_ends_a_turn_once_where_its_marks_are_tokens(build_tokenizer):
    from tokenizers_for_tests import tokenize_pair

    from simpo.data.preferences import Pair

    tokenizer = build_tokenizer("chatml")
    tokens = tokenize_pair(Pair("r", "Why?", "Yes.", "No."), tokenizer, max_length=99, chat_template="chatml")
    assert trained_texts(tokens, tokenizer) == [["Yes.<|im_end|>"], ["No.<|im_end|>"]]


def test_the_template_that_a_run_was_given_by_name_is_in_its_model(tiny_recipe, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    from simpo.display import Display
    from simpo.recipe import load_recipe
    from simpo.trainer import Trainer

    folder = shutil.copytree(tiny_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    settings = {**tiny_recipe, "model_name_or_path": str(folder), "max_steps": 1}
    with pytest.raises(ValueError, match="chat_template: the tokenizer has none"):
        Trainer(load_recipe(settings), display=Display(quiet=True))
    Trainer(load_recipe({**settings, "chat_template": "chatml"}), display=Display(quiet=True)).run()
    assert AutoTokenizer.from_pretrained(f"{settings['output_dir']}/model").chat_template == CHATML


def test_beside_mistral_common_an_instruct_model_keeps_its_template(base, tmp_path, monkeypatch):
    """transformers would take that package's tokenizer, which knows of none; vLLM brings it along."""
    base.chat_template = CHATML
    base.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "tekken.json").write_text("{}")
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    monkeypatch.setattr(
        tokenization_auto, "_use_mistral_format", lambda *_, mistral_format, **__: asked.append(mistral_format)
    )
    asked = []
    tokenizer = load_tokenizer(load_recipe({"model_name_or_path": str(tmp_path)}))
    assert load_chat_template(tokenizer) == CHATML
    assert set(asked) == {False}
