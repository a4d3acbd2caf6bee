"""Trap 33: rendered text was rendered again, or one row that mentions a marker switched the template off for all."""

from __future__ import annotations

import json

import pytest
from tokenizers_for_tests import tokenize_pair, trained_texts

from simpo.data.preferences import Pair, RowError, pair_from_row
from simpo.data.prepare import prepare_pairs

ASKED = "<|im_start|>user\nName a planet.<|im_end|>\n<|im_start|>assistant\n"
HEADERS = "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
RENDERED = {
    "chatml": (ASKED, "<|im_end|>"),
    "smollm": (f"<|im_start|>system\nBe brief.<|im_end|>\n{ASKED}", "<|im_end|>"),
    "llama3": (f"{HEADERS[0]}A planet?<|eot_id|>{HEADERS[1]}", "<|eot_id|>"),
    "gemma": ("<bos><start_of_turn>user\nA planet?<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    "mistral": ("[INST] A planet? [/INST]", "</s>"),
}


@pytest.mark.parametrize("kind", RENDERED)
@pytest.mark.parametrize("ends", [True, False], ids=["with its end", "without"])
def test_rendered_text_is_kept_with_one_start_and_one_end(kind, ends, build_tokenizer):
    tokenizer, (prompt, end) = build_tokenizer(kind), RENDERED[kind]
    pair = Pair("r", prompt, "Mars." + end * ends, "The Moon." + (end + "\n") * ends)
    tokens = tokenize_pair(pair, tokenizer, max_length=200)
    bos = {"llama3": "<|begin_of_text|>", "gemma": "<bos>", "mistral": "<s>"}.get(kind, "")
    assert tokenizer.decode(tokens.chosen_ids) == bos + prompt.removeprefix(bos) + "Mars." + end
    assert trained_texts(tokens, tokenizer) == [["Mars." + end], ["The Moon." + end]]
    assert list(tokens.notes) == ["text that was rendered already kept as it is; see rendered_text"]


def test_the_same_tokens_come_of_a_row_and_of_its_rendering(build_tokenizer):
    for kind in ("chatml", "llama3", "gemma"):
        tokenizer = build_tokenizer(kind)
        ours = tokenize_pair(Pair("r", "Why?", "Yes.", "No."), tokenizer, max_length=200)
        kept = tokenize_pair(Pair("r", ours.prompt_text, "Yes.", "No."), tokenizer, max_length=200)
        assert (kept.chosen_ids, kept.rejected_ids) == (ours.chosen_ids, ours.rejected_ids)
        assert (kept.chosen_start, kept.rejected_start) == (ours.chosen_start, ours.rejected_start)


TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
BEGINS = {
    "mark": ("chatml", TURNS),
    "text": ("chatml", TURNS.replace("{{ '<|'", "{{ m.content + '\n' if m.role == 'system' else '<|'")),
    "blank": ("mistral", "{{ bos_token + ' ' }}" + TURNS),
}


@pytest.mark.parametrize("begins", BEGINS)
@pytest.mark.parametrize("system", [None, "Be brief."], ids=["user first", "system first"])
def test_rendered_text_is_told_whichever_turn_it_begins_with(begins, system, build_tokenizer):
    kind, template = BEGINS[begins]
    tokenizer, template = build_tokenizer(kind), template + "{{ '<|assistant|>' if add_generation_prompt else '' }}"
    row = {"prompt": "Why?", "chosen": "Yes.", "rejected": "No.", "system": system}
    ours = tokenize_pair(pair_from_row(row), tokenizer, max_length=500, chat_template=template)
    rendered = Pair("r", ours.prompt_text, "Yes.", "No.")
    kept = tokenize_pair(rendered, tokenizer, max_length=500, chat_template=template)
    assert list(kept.notes) == ["text that was rendered already kept as it is; see rendered_text"]
    assert (kept.chosen_ids, kept.rejected_ids) == (ours.chosen_ids, ours.rejected_ids)


@pytest.mark.parametrize("prompt", ["What does <|im_end|> do?", "<|im_start|>", f"Is {ASKED} one?"])
def test_a_text_that_mentions_a_marker_is_a_text(prompt, build_tokenizer):
    tokens = tokenize_pair(Pair("r", prompt, "Yes.", "No."), build_tokenizer("chatml"), max_length=200)
    assert tokens.prompt_text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert tokens.notes == {}


def test_rows_are_told_apart_one_by_one_and_counted(tmp_path, build_tokenizer, data_recipe, capfd):
    prompt, end = RENDERED["chatml"]
    rows = [{"prompt": f"City {n}?", "chosen": f"Bern {n}.", "rejected": "No."} for n in range(9)]
    rows[4] = {"prompt": "What does <|im_end|> do?", "chosen": "It ends a turn.", "rejected": "Nothing."}
    rows[7] = {"prompt": prompt, "chosen": "Mars." + end, "rejected": "The Moon." + end}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepared = prepare_pairs(data_recipe(file, validation_fraction=0), build_tokenizer("chatml"), progress=False)
    texts = prepared.train["prompt_text"]
    assert texts[7] == prompt
    assert all(text.startswith("<|im_start|>user\n") and text.count("<|im_start|>") == 2 for text in texts)
    said = "train: 1 rows: text that was rendered already kept as it is; see rendered_text (rows.jsonl/train#7"
    assert said in capfd.readouterr().err
    assert prepared.ledger.notices[0].startswith(said)


def test_the_key_decides_for_all(build_tokenizer):
    tokenizer, (prompt, end) = build_tokenizer("chatml"), RENDERED["chatml"]
    pair, plain = Pair("r", prompt, "Mars." + end, "The Moon."), Pair("r", "A planet?\n", "Mars.", "The Moon.")
    with pytest.raises(RowError, match=r"rewritten by the template|end-of-turn"):
        tokenize_pair(Pair("r", prompt, f"a{end}b", "c"), tokenizer, max_length=200, rendered_text="render")
    again = tokenize_pair(pair, tokenizer, max_length=200, rendered_text="render")
    assert again.prompt_text.startswith("<|im_start|>user\n<|im_start|>user\n")
    kept = tokenize_pair(plain, tokenizer, max_length=200, rendered_text="keep")
    assert tokenizer.decode(kept.chosen_ids) == "A planet?\nMars.<|im_end|>"
    assert list(kept.notes) == ["text kept as it is; see rendered_text"]


def test_whole_renderings_that_begin_alike_part_behind_the_header(build_tokenizer):
    prompt, end = RENDERED["chatml"]
    row = {"chosen": f"{prompt}The red one.{end}", "rejected": f"{prompt}The moon.{end}"}
    tokenizer = build_tokenizer("chatml")
    tokens = tokenize_pair(pair_from_row(row), tokenizer, max_length=200)
    assert tokens.prompt_text == prompt
    assert trained_texts(tokens, tokenizer) == [["The red one.<|im_end|>"], ["The moon.<|im_end|>"]]


def test_a_recipes_system_prompt_is_not_put_before_rendered_text(build_tokenizer):
    prompt, _ = RENDERED["chatml"]
    pair = pair_from_row({"prompt": prompt, "chosen": "Mars.", "rejected": "No."}, system_prompt="Be brief.")
    tokens = tokenize_pair(pair, build_tokenizer("chatml"), max_length=200)
    assert tokens.prompt_text == prompt
    assert "without the system prompt" in next(iter(tokens.notes))
