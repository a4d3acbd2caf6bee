"""Mixtures: what an entry says for itself, and metrics by source."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests
from rich.console import Console

from simpo.data.prepare import prepare_pairs
from simpo.data.rows import source_of
from simpo.data.sources import find_sources, fingerprint_sources, load_splits, uses_seed
from simpo.evaluation.results import Comparison, Evaluation, PairRecord, build_evaluation, compare
from simpo.recipe import load_recipe


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def plain(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"what is {i}?", "chosen": f"it is {i}.", "rejected": "nothing."} for i in range(count)]


def dialogues(count: int) -> list[dict[str, Any]]:
    asked = [[turn("user", f"hello {i}"), turn("assistant", "yes?"), turn("user", "go on")] for i in range(count)]
    return [{"prompt": each, "chosen": "I will.", "rejected": "No."} for each in asked]


def renamed(count: int) -> list[dict[str, Any]]:
    names = {"prompt": "Frage", "chosen": "gut", "rejected": "schlecht"}
    return [{names[name]: text for name, text in row.items()} for row in plain(count)]


def one_answer(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"q {i}", "response": f"answer {n}", "score": n, "honesty": -n}
        for i in range(count)
        for n in range(2)
    ]


def rendered(count: int) -> list[dict[str, Any]]:
    ask = "[INST] what is {} [/INST]"
    return [{"prompt": ask.format(i), "chosen": " " + str(i), "rejected": " nothing"} for i in range(count)]


OWN = {
    "columns": (renamed, {"prompt_column": "Frage", "chosen_column": "gut", "rejected_column": "schlecht"}),
    "score": (one_answer, {"score_column": "honesty"}),
    "system prompt": (plain, {"system_prompt": "Be brief."}),
    "template": (plain, {"chat_template": tokenizers_for_tests.WORDS_ONLY}),
    "no template": (plain, {"chat_template": "none"}),
    "text as it is": (rendered, {"rendered_text": "keep"}),
    "all turns": (dialogues, {"train_on": "all_assistant_turns"}),
    "cap": (plain, {"max_train_samples": 3}),
}
"""What an entry may say for itself -> rows that show it, and the keys."""


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def tokens(data: Any) -> dict[str, Any]:
    return {row.pop("row_id"): row for row in data.train}


@pytest.mark.parametrize("case", OWN)
def test_a_source_with_keys_of_its_own_is_prepared_as_if_they_were_the_recipes(
    case: str, write: Any, data_recipe: Any, build_tokenizer: Any
) -> None:
    rows, own = OWN[case]
    usual, special = write("usual", dialogues(4)), write("special", rows(6))
    tokenizer, keys = build_tokenizer("chatml"), {"validation_fraction": 0}
    mixed = tokens(prepare_pairs(data_recipe({usual: 1.0, special: own}, **keys), tokenizer, progress=False))
    alone = tokens(prepare_pairs(data_recipe(usual, **keys), tokenizer, progress=False))
    assert {name: row for name, row in mixed.items() if source_of(name) == "usual.jsonl"} == alone
    by_recipe = tokens(prepare_pairs(data_recipe(special, **keys, **own), tokenizer, progress=False))
    found = {name: row for name, row in mixed.items() if source_of(name) == "special.jsonl"}
    if case == "cap":
        assert len(found) == len(by_recipe) == 3  # each a choice of its own
        return
    assert found == by_recipe
    without = data_recipe({special: 1.0, usual: 1.0}, **keys, max_dropped_fraction=1.0)
    assert tokens(prepare_pairs(without, tokenizer, progress=False)) != mixed


def test_rows_held_out_are_read_by_their_own_keys_too(write: Any, data_recipe: Any, build_tokenizer: Any) -> None:
    mixer = {write("usual", plain(10)): 1.0, write("special", renamed(10)): OWN["columns"][1]}
    data = prepare_pairs(data_recipe(mixer, validation_fraction=0.3), build_tokenizer("chatml"), progress=False)
    assert {source_of(row["row_id"]) for row in data.eval} == {"usual.jsonl", "special.jsonl"}
    assert len(data.train) + len(data.eval) == 20


def test_lists_are_kept_but_of_sources_whose_own_columns_name_a_pair(
    write: Any, data_recipe: Any, build_tokenizer: Any
) -> None:
    lists = [{"prompt": f"what is {i}?", "responses": list("abcd"), "scores": [4, 4, 2, 1]} for i in range(3)]
    mixer = {
        write("lists", lists): 1.0,
        write("named", [{**row, "gut": "a", "schlecht": "d"} for row in lists]): {
            "chosen_column": "gut",
            "rejected_column": "schlecht",
        },
    }
    recipe = data_recipe(mixer, validation_fraction=0, loss_type="plackett_luce")
    data = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)
    assert [row["more_scores"] for row in data.train] == [[4.0, 2.0]] * 3 + [[]] * 3, "that of the best too"
    (note,) = [line for line in data.ledger.notes if "keep_lists" in line]
    assert note.startswith("keep_lists: without effect on ")
    assert "named.jsonl: chosen_column or rejected_column names a pair" in note


def test_the_scores_of_a_list_are_its_own(write: Any, data_recipe: Any, build_tokenizer: Any) -> None:
    """Also where another rater scored its pair: 2 would rank the worst response first."""
    row = {"prompt": "q", "chosen": "a", "rejected": "d", "score_chosen": 9, "score_rejected": 2}
    path = write("lists", [{**row, "responses": list("abcd"), "scores": [0.4, 0.3, 0.2, 0.1]}])
    recipe = data_recipe(path, validation_fraction=0, loss_type="plackett_luce")
    (found,) = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False).train
    assert [found["score_chosen"], *found["more_scores"], found["score_rejected"]] == [0.4, 0.3, 0.2, 0.1]


def test_a_filter_leaves_out_responses_of_lists_too(write: Any, data_recipe: Any, build_tokenizer: Any) -> None:
    responses = ["a b c d", "a b c", "a b " + 12 * "c ", "a b"]
    rows = [{"prompt": f"what is {i}?", "responses": responses, "scores": [4, 3, 2, 1]} for i in range(2)]
    keys = {"validation_fraction": 0, "loss_type": "plackett_luce", "clean": {"max_length_ratio": 3}}
    data = prepare_pairs(data_recipe(write("lists", rows), **keys), build_tokenizer("chatml"), progress=False)
    assert [row["more_scores"] for row in data.train] == [[3.0]] * 2
    left_out = data.ledger.splits["train"].noticed["response of a list left out"]
    assert left_out["count"] == 2
    assert "length ratio: chosen has 7 characters, rejected 2" in str(left_out)


def test_a_cap_is_a_seeded_choice_after_the_fraction(write: Any, data_recipe: Any) -> None:
    path, other = write("a", plain(20)), write("b", plain(5))

    def chosen(entry: Any, **keys: Any) -> list[str]:
        splits = load_splits(data_recipe({path: entry, other: 1.0}, validation_fraction=0, **keys))
        assert [row.row_id for row in splits.train][-5:] == [f"b.jsonl/train#{i}" for i in range(5)]
        return [row.row_id for row in splits.train][:-5]

    capped = chosen({"fraction": 0.5, "max_train_samples": 4})
    assert len(capped) == 4
    assert set(capped) <= set(chosen(0.5))
    assert capped != chosen({"fraction": 0.5, "max_train_samples": 4}, seed=1)
    assert len(chosen({"fraction": 2.0, "max_train_samples": 30})) == 30
    assert len(chosen({"max_train_samples": 50})) == 20
    recipe = data_recipe({path: {"max_train_samples": 4}}, validation_fraction=0)
    assert load_splits(recipe).notes == [f"dataset_mixer: {path}: 4 of 20 rows (max_train_samples)"]
    files = {"data_files": {"train": path, "test": other}}
    for entry, decides in ((files, False), ({**files, "max_train_samples": 4}, True)):
        recipe = data_recipe({"json": entry})
        assert uses_seed(recipe, find_sources(recipe)) is decides


def test_what_an_entry_does_not_say_leaves_stored_data_valid(write: Any, data_recipe: Any) -> None:
    path = write("a", plain(3))
    before = fingerprint_sources(find_sources(data_recipe({path: 1.0})))
    assert fingerprint_sources(find_sources(data_recipe({path: {"train_on": None}}))) == before
    assert fingerprint_sources(find_sources(data_recipe({path: {"train_on": "answer"}}))) != before


def test_a_template_file_of_an_entry_counts_by_its_text(write: Any, data_recipe: Any, build_tokenizer: Any) -> None:
    template = Path(write("t", [])).with_suffix(".jinja")
    recipe = data_recipe({write("a", plain(3)): {"chat_template": str(template)}}, validation_fraction=0)
    found = []
    for text in (tokenizers_for_tests.WORDS_ONLY, tokenizers_for_tests.CHATML):
        template.write_text(text)
        found.append(prepare_pairs(recipe, build_tokenizer("chatml"), progress=False).train[0]["prompt_text"])
    assert found == ["user: what is 0?\nassistant: ", "<|im_start|>user\nwhat is 0?<|im_end|>\n<|im_start|>assistant\n"]
    template.unlink()
    with pytest.raises(ValueError, match=r"dataset_mixer: .*a\.jsonl: chat_template: .*neither Jinja text nor a file"):
        prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"train_on": "everything"}, "train_on: must be one of answer, all_assistant_turns"),
        ({"rendered_text": True}, "rendered_text: must be one of auto, keep, render"),
        ({"max_train_samples": 0}, "max_train_samples: must be at least 1"),
        ({"max_train_samples": 1.5}, "max_train_samples: a whole number is needed"),
        ({"prompt_column": 1}, "prompt_column: text is needed"),
        ({"split": ["train", None]}, "split: a list of names is needed, without null"),
        ({"columns": []}, "columns: a list of names is needed"),
        ({"data_files": {}}, "data_files: a list of names is needed"),
        ({"data_files": {"train": []}}, "data_files: a list of names is needed"),
        ({"max_length": 10}, "'max_length' is not known here; a dataset may have .*max_train_samples"),
    ],
)
def test_settings_of_an_entry_are_checked(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe({"model_name_or_path": "m", "dataset_mixer": {"a": own}})


def test_an_empty_split_in_a_saved_recipe_is_none() -> None:
    recipe = load_recipe({"model_name_or_path": "m", "dataset_mixer": {"a": {"split": [], "fraction": 0.5}}})
    assert recipe.dataset_mixer == {"a": {"fraction": 0.5}}


def test_the_datasets_of_trl_are_entries_of_the_mixer() -> None:
    datasets = [{"path": "org/a", "name": "en", "split": "train"}, {"path": "org/b", "columns": ["chosen"]}]
    recipe = load_recipe({"model_name_or_path": "m", "datasets": datasets, "test_split_size": 0.2})
    assert recipe.dataset_mixer == {"org/a": {"config": "en", "split": ["train"]}, "org/b": {"columns": ["chosen"]}}
    assert recipe.validation_fraction == 0.2
    with pytest.raises(ValueError, match=r"datasets.*a list of \{path: NAME"):
        load_recipe({"model_name_or_path": "m", "datasets": {"a": 1.0}})


@pytest.mark.parametrize(
    ("row_id", "source"),
    [
        ("pairs.jsonl/train#12", "pairs.jsonl"),
        ("org/set/train_prefs#0~3", "org/set"),
        ("a#1/b/train#2", "a#1/b"),
        ("row 7", ""),
        ("a/b", ""),
        ("a/train#x", ""),
    ],
)
def test_a_row_id_names_its_source(row_id: str, source: str) -> None:
    assert source_of(row_id) == source


def test_a_split_with_a_slash_is_no_part_of_the_source(tmp_path: Path, data_recipe: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"old/train": plain(2)}))
    first, *_ = load_splits(data_recipe(tmp_path / "a.json", dataset_splits=["old/train"])).train
    assert source_of(first.row_id) == "a.json"


# --- what evaluations say of each source -----------------------------------------------------------------------------


def records(counts: dict[str, int], seed: int) -> list[PairRecord]:
    rng = random.Random(seed)
    ids = [f"{source}/test#{i}" for source, count in counts.items() for i in range(count)]
    return [PairRecord(row_id, rng.gauss(-9, 3), rng.gauss(-10, 3), 5, 7) for row_id in ids]


def evaluated(pairs: list[PairRecord]) -> Evaluation:
    said = {"split": None, "data_fingerprint": "", "generations": (), "settings": {}, "versions": {}}
    return build_evaluation(pairs, model="m", data="d", **said)


def render(result: Evaluation | Comparison) -> str:
    console = Console(file=io.StringIO(), width=160)
    result.render(console)
    return console.file.getvalue()


def test_each_sources_numbers_are_those_of_an_evaluation_of_its_pairs_alone() -> None:
    counts = {"org/web": 40, "[maths].jsonl": 13, "code": 1}
    evaluations = [evaluated(records(counts, seed)) for seed in (1, 2)]
    whole, comparison = evaluations[0], compare(*evaluations)
    assert [(each.name, each.num_pairs) for each in whole.by_source] == list(counts.items())
    for result, difference in zip(whole.by_source, comparison.by_source, strict=True):
        own = [evaluated([p for p in each.pairs if source_of(p.row_id) == result.name]) for each in evaluations]
        alone = compare(*own)
        assert repr(result[2:]) == repr((own[0].accuracy, own[0].margin))  # one pair has no interval, and nan != nan
        assert repr(difference[2:]) == repr((alone.accuracy_difference, alone.accuracy_test, alone.margin))
        assert not own[0].by_source
    (maths,) = (each for each in json.loads(json.dumps(whole.to_dict()))["by_source"] if "maths" in each["name"])
    assert maths["accuracy"]["low"] < maths["accuracy"]["value"] < maths["accuracy"]["high"]
    assert "[maths].jsonl (13 pairs): accuracy" in render(whole)
    assert "[maths].jsonl (13 pairs): accuracy, points" in render(comparison)


@pytest.mark.parametrize("ids", [("a/test#0", "a/test#1"), ("a/test#0", "pair 1")])
def test_pairs_of_one_source_or_of_no_known_one_are_not_told_apart(ids: tuple[str, str]) -> None:
    evaluation = evaluated([PairRecord(row_id, -5.0, -6.0, 3, 4) for row_id in ids])
    for result in (evaluation, compare(evaluation, evaluation)):
        assert "by_source" not in result.to_dict()
        assert render(result).count("margin M") == 1


def test_the_ledger_counts_each_sources_rows(write: Any, data_recipe: Any, build_tokenizer: Any) -> None:
    empty = {"prompt": "q", "chosen": "a", "rejected": " "}
    mixer = {write("good", plain(6)): 1.0, write("[bad]", [*plain(2), empty, empty, plain(1)[0]]): 2.0}
    recipe = data_recipe(mixer, validation_fraction=0, max_dropped_fraction=1.0, drop_duplicates=True)
    ledger = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False).ledger
    assert ledger.splits["train"].sources == {
        "good.jsonl": {"kept": 6, "dropped": {}},
        "[bad].jsonl": {"kept": 2, "dropped": {"empty": 4, "duplicate": 4}},
    }
    console = Console(file=io.StringIO(), width=160)
    ledger.render(console)
    assert "[bad].jsonl" in console.file.getvalue()
    assert "2 (25.0%), 80.0% dropped" in console.file.getvalue()
    one = prepare_pairs(data_recipe(write("good", plain(6))), build_tokenizer("chatml"), progress=False).ledger
    one.render(console := Console(file=io.StringIO(), width=160))
    assert "by source" not in console.file.getvalue()
