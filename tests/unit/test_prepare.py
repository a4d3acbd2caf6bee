"""From recipe to tokens: the account adds up, a broken cache is built again, processes change nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

from simpo.data import cache, workers
from simpo.data import ledger as ledgers
from simpo.data import prepare as data_prepare
from simpo.data.ledger import Dropped, Ledger, SplitLedger, describe_lengths
from simpo.data.prepare import prepare_pairs
from simpo.data.workers import WorkersFailed, map_in_processes


def rows(count, start=0):
    return [{"prompt": f"question {i}?", "chosen": f"yes {i}.", "rejected": "no."} for i in range(start, start + count)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in content))
    return path


@pytest.fixture
def messy(tmp_path):
    """20 rows: 14 good, among them a twin and a long one, and 6 that each fail in their own way."""
    bad = [
        "{broken\n",
        {"prompt": "q", "chosen": "a"},
        {"prompt": "q", "chosen": "a", "rejected": " "},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1},
        {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"},
    ]
    long = {"prompt": "word " * 80, "chosen": "yes " * 50, "rejected": "no"}
    return write(tmp_path / "messy.jsonl", [*rows(12), long, rows(1)[0], *bad])


def prepare(recipe, tokenizer):
    return prepare_pairs(recipe, tokenizer, progress=False)


def test_every_row_is_accounted_for(messy, build_tokenizer, data_recipe):
    recipe = data_recipe(messy, validation_fraction=0, max_dropped_fraction=0.5, max_length=60, max_prompt_length=30)
    prepared = prepare(recipe, build_tokenizer("chatml"))
    account = prepared.ledger.splits["train"]
    assert (account.input, account.kept, len(prepared.train)) == (20, 14, 14)
    counts = {reason: entry["count"] for reason, entry in account.dropped.items()}
    assert counts == {"malformed": 2, "missing column": 1, "empty": 1, "identical": 1, "tie": 1}
    assert (account.duplicates, account.same_prompt) == (1, 1)
    (long,) = [row for row in prepared.train if row["row_id"] == "messy.jsonl/train#12"]
    assert len(long["chosen_ids"]) == 60
    assert account.cut["prompt_left"]["pairs"] == account.cut["chosen_right"]["pairs"] == 1
    assert account.cut["rejected_right"] == {"pairs": 0, "tokens": 0}
    assert prepared.eval is None
    assert account.lengths["chosen"]["max"] == 60 - long["chosen_start"]
    assert sum(account.lengths["prompt"]["histogram"]["counts"]) == 14


def test_columns_and_types(messy, build_tokenizer, data_recipe):
    recipe = data_recipe(messy, max_dropped_fraction=0.5, validation_fraction=0.2)
    prepared = prepare(recipe, build_tokenizer("chatml"))
    assert {name: str(feature) for name, feature in prepared.train.features.items()} == {
        "row_id": "Value('string')",
        "chosen_ids": "List(Value('int32'))",
        "chosen_start": "Value('int32')",
        "rejected_ids": "List(Value('int32'))",
        "rejected_start": "Value('int32')",
        "chosen_gaps": "List(Value('int32'))",
        "rejected_gaps": "List(Value('int32'))",
        "shared_prefix": "Value('int32')",
        "prompt_text": "Value('string')",
        "chosen_text": "Value('string')",
        "rejected_text": "Value('string')",
        "score_chosen": "Value('float64')",
        "score_rejected": "Value('float64')",
        "more_ids": "List(List(Value('int32')))",
        "more_starts": "List(Value('int32'))",
        "more_scores": "List(Value('float64'))",
    }
    for row in prepared.train:
        shared = row["shared_prefix"]
        assert row["chosen_ids"][:shared] == row["rejected_ids"][:shared]
        assert row["chosen_ids"][shared] != row["rejected_ids"][shared]
    splits = prepared.ledger.splits
    assert splits["train"].input + splits["eval"].input == 20
    assert len(prepared.fingerprint) == 32


def test_duplicates_go_only_when_asked_and_repeats_stay(messy, build_tokenizer, data_recipe):
    keys = {"validation_fraction": 0, "max_dropped_fraction": 0.3}
    kept = prepare(data_recipe({str(messy): 2.0}, drop_duplicates=True, **keys), build_tokenizer("chatml"))
    account = kept.ledger.splits["train"]
    assert (account.input, account.kept) == (40, 26)  # two passes of 14, each without its twin
    assert account.dropped["duplicate"] == {
        "count": 2,
        "examples": [
            {"row_id": "messy.jsonl/train#13", "detail": "equal to an earlier row"},
            {"row_id": "messy.jsonl/train#13~2", "detail": "equal to an earlier row"},
        ],
    }
    account.check()


def test_eval_prompts_that_are_trained_on_are_told(tmp_path, build_tokenizer, data_recipe):
    write(tmp_path / "set" / "train.jsonl", rows(10))
    write(tmp_path / "set" / "test.jsonl", rows(5, 8))
    ledger = prepare(data_recipe(tmp_path / "set"), build_tokenizer("chatml")).ledger
    assert ledger.eval_prompts_in_train == 2


def test_too_many_dropped_stops_with_reasons_and_rows(messy, build_tokenizer, data_recipe):
    recipe = data_recipe(messy, validation_fraction=0)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=r"6 of 20 train rows are dropped \(30\.0%\)") as caught:
            prepare(recipe, build_tokenizer("chatml"))
        assert "max_dropped_fraction 0.2" in str(caught.value)
        assert "2 malformed" in str(caught.value)
        assert "messy.jsonl/train#14: messy.jsonl line 15: not JSON" in str(caught.value)


def test_no_pair_left_is_an_error(tmp_path, build_tokenizer, data_recipe):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}])
    with pytest.raises(ValueError, match="none of 1 train rows gives a pair"):
        prepare(data_recipe(path, validation_fraction=0, max_dropped_fraction=1.0), build_tokenizer("chatml"))


def test_overlong_error_names_the_row(tmp_path, build_tokenizer, data_recipe):
    path = write(tmp_path / "a.jsonl", [*rows(3), {"prompt": "q " * 99, "chosen": "a", "rejected": "b"}])
    recipe = data_recipe(path, validation_fraction=0, overlong="error", max_length=50, max_prompt_length=40)
    with pytest.raises(ValueError, match=r"row a\.jsonl/train#3 is too long: \d+ prompt \+ \d+ chosen"):
        prepare(recipe, build_tokenizer("chatml"))


def test_empty_system_turn_replaces_the_default_one_where_the_template_takes_it(tmp_path, build_tokenizer, data_recipe):
    path = write(tmp_path / "a.jsonl", rows(2))
    recipe = data_recipe(path, validation_fraction=0, auto_insert_empty_system_msg=True)
    smol = prepare(recipe, build_tokenizer("smollm")).train[0]["prompt_text"]
    assert smol.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")
    assert "system" not in prepare(recipe, build_tokenizer("gemma")).train[0]["prompt_text"]


# --- the cache -------------------------------------------------------------------------------------------------------


def test_second_call_tokenises_nothing(messy, build_tokenizer, data_recipe, monkeypatch):
    recipe = data_recipe(messy, max_dropped_fraction=0.5)
    first = prepare(recipe, build_tokenizer("chatml"))
    monkeypatch.setattr(data_prepare, "RowTokenizer", None)
    monkeypatch.setattr(data_prepare.source_files, "load_splits", None)
    second = prepare(recipe, build_tokenizer("chatml"))
    assert second.train[:] == first.train[:]
    assert second.eval[:] == first.eval[:]
    assert second.ledger == first.ledger
    assert second.ledger.fingerprint == first.ledger.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 100},
        {"max_prompt_length": 7},
        {"overlong": "drop"},
        {"seed": 1},  # decides the hold-out
        {"validation_fraction": 0.3},
        {"system_prompt": "Be brief."},
        {"chat_template": "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"},
        {"drop_duplicates": True},
        {"max_train_samples": 5},
        {"prompt_column": "prompt"},
        {"dataset_splits": ["train"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_key_that_matters_changes_the_fingerprint(change, messy, build_tokenizer, data_recipe):
    keys = {"max_dropped_fraction": 1.0, "max_length": 90}
    before = prepare(data_recipe(messy, **keys), build_tokenizer("chatml")).ledger.fingerprint
    assert prepare(data_recipe(messy, **{**keys, **change}), build_tokenizer("chatml")).ledger.fingerprint != before


def test_keys_that_do_not_matter_keep_the_fingerprint(tmp_path, build_tokenizer, data_recipe):
    write(tmp_path / "set" / "train.jsonl", rows(5))
    write(tmp_path / "set" / "test.jsonl", rows(2))
    tokenizer = build_tokenizer("chatml")
    before = prepare(data_recipe(tmp_path / "set"), tokenizer).ledger.fingerprint
    tokenizer("some text", padding="max_length", max_length=9, truncation=True)
    other = data_recipe(tmp_path / "set", seed=7, beta=5.0, max_dropped_fraction=0.9, preprocessing_num_workers=2)
    assert prepare(other, tokenizer).ledger.fingerprint == before


def test_content_and_tokenizer_change_the_fingerprint(messy, build_tokenizer, data_recipe):
    recipe = data_recipe(messy, max_dropped_fraction=1.0, validation_fraction=0)
    prints = {prepare(recipe, build_tokenizer(kind)).ledger.fingerprint for kind in ("chatml", "llama3", "words")}
    messy.write_text(messy.read_text().replace("question 1?", "question one?"))
    prints.add(prepare(recipe, build_tokenizer("chatml")).ledger.fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize("damage", ["truncate", "remove", "ledger", "other rows"])
def test_broken_cache_is_rebuilt_and_said(damage, messy, build_tokenizer, data_recipe, tmp_path, capsys):
    recipe = data_recipe(messy, max_dropped_fraction=0.5)
    first = prepare(recipe, build_tokenizer("chatml"))
    expected = first.train[:]
    (folder,) = (tmp_path / "cache").iterdir()
    if damage == "truncate":
        content = (folder / "train.arrow").read_bytes()
        (folder / "train.arrow").unlink()
        (folder / "train.arrow").write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        (folder / "eval.arrow").unlink()
    elif damage == "ledger":
        (folder / "ledger.json").write_text("{")
    else:
        (folder / "train.arrow").unlink()
        (folder / "train.arrow").write_bytes((folder / "eval.arrow").read_bytes())
    capsys.readouterr()
    again = prepare(recipe, build_tokenizer("chatml"))
    assert again.train[:] == expected
    said = " ".join(capsys.readouterr().err.split())  # the console may wrap anywhere in the folder's name
    assert "is broken" in said
    assert "building it again" in said
    stores = [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]  # those put aside
    assert stores == [first.ledger.fingerprint]


def test_cache_that_cannot_be_written_is_said_and_does_not_stop(messy, build_tokenizer, data_recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    recipe = data_recipe(messy, max_dropped_fraction=0.5, cache_dir=str(tmp_path / "file" / "below"))
    assert len(prepare(recipe, build_tokenizer("chatml")).train) > 5
    assert "not written" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="numbers of pairs lie in memory here")
def test_a_disk_that_is_full_of_numbers_is_said_and_does_not_stop(
    messy, build_tokenizer, data_recipe, monkeypatch, capsys
):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "_LARGE", 1)
    monkeypatch.setattr(os, "posix_fallocate", fail)
    assert len(prepare(data_recipe(messy, max_dropped_fraction=0.5), build_tokenizer("chatml")).train) > 5
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 7, 20])
def test_however_pairs_are_cut_into_batches_they_are_the_same(size, messy, build_tokenizer, data_recipe, monkeypatch):
    """With duplicates dropped, so that the store is written twice; 7 pairs divide what there is, 20 are more."""
    keys = {"validation_fraction": 0, "max_dropped_fraction": 0.5, "drop_duplicates": True}
    whole = prepare(data_recipe(messy, **keys), build_tokenizer("chatml"))
    monkeypatch.setattr(cache, "BATCH_ROWS", size)
    monkeypatch.setattr(cache, "_LARGE", 1)  # all numbers of pairs lie in files
    monkeypatch.setattr(workers, "CHUNK_ROWS", 3)
    cut = prepare(data_recipe(messy, **keys, cache_dir=f"{messy}.cache"), build_tokenizer("chatml"))
    assert cut.train[:] == whole.train[:]
    assert cut.ledger == whole.ledger
    assert cut.fingerprint == whole.fingerprint


def test_what_killed_processes_left_goes_after_a_day(messy, build_tokenizer, data_recipe, tmp_path):
    for name, age_h in (("old", 25), ("new", 1)):
        left = tmp_path / "cache" / f".new-{name}"
        left.mkdir(parents=True)
        (left / "train.arrow").write_bytes(b"half of it")
        for path in (left / "train.arrow", left):
            os.utime(path, (time.time() - 3600 * age_h,) * 2)
    key = prepare(data_recipe(messy, max_dropped_fraction=0.5), build_tokenizer("chatml")).ledger.fingerprint
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".new-new", key]


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "wanted", "expected"), [(1999, 8, 1), (4000, 8, 2), (10**6, 3, 3), (10**6, 1, 1), (0, None, 1)]
)
def test_a_process_is_started_for_every_2000_rows_and_no_more_than_wanted(num_rows, wanted, expected):
    assert workers._num_processes(num_rows, wanted) == expected


def test_two_processes_give_what_one_gives(tmp_path, build_tokenizer, data_recipe, monkeypatch):
    monkeypatch.setattr(workers, "ROWS_PER_PROCESS", 50)
    monkeypatch.setattr(workers, "CHUNK_ROWS", 30)
    content = rows(200)
    content[77] = {"prompt": "q"}
    path = write(tmp_path / "a.jsonl", content)
    tokenizer = build_tokenizer("llama3")
    results = []
    for count in (1, 2):
        recipe = data_recipe(path, preprocessing_num_workers=count, cache_dir=str(tmp_path / f"cache{count}"))
        results.append(prepare(recipe, tokenizer))
    assert results[0].train[:] == results[1].train[:]
    assert results[0].ledger == results[1].ledger
    with pytest.raises(ValueError, match=r"row a\.jsonl/train#\d+ is too long"):
        prepare(
            data_recipe(path, preprocessing_num_workers=2, overlong="error", max_length=9, max_prompt_length=4),
            tokenizer,
        )


@pytest.mark.long
def test_script_without_main_guard_is_not_run_again_by_the_processes(tmp_path, build_tokenizer):
    """multiprocessing's spawn would import the script in every child."""
    write(tmp_path / "a.jsonl", rows(60))
    build_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(
        "print('script runs')\n"
        "from transformers import AutoTokenizer\n"
        "from simpo.data import prepare, workers\n"
        "from simpo.recipe import load_recipe\n"
        "workers.ROWS_PER_PROCESS, workers.CHUNK_ROWS = 20, 10\n"
        "recipe = load_recipe({'model_name_or_path': 'none', 'dataset_mixer': {'a.jsonl': 1.0}, 'cache_dir': 'cache',\n"
        "                      'preprocessing_num_workers': 2})\n"
        "prepared = prepare.prepare_pairs(recipe, AutoTokenizer.from_pretrained('tokenizer'))\n"
        "print(len(prepared.train), 'pairs')\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["script runs", "57 pairs"]
    assert "this process alone" not in done.stderr


class Fragile:
    """A job that ends its process."""

    def __call__(self, job):
        import os

        os._exit(3)


def test_process_that_dies_is_told_from_wrong_data():
    with pytest.raises(WorkersFailed, match="ended early"):
        list(map_in_processes(Fragile, [1, 2, 3], 2))
    with pytest.raises(WorkersFailed, match="cannot be sent"):
        list(map_in_processes(lambda: None, [1], 1))


def test_processes_that_cannot_be_started_are_told_from_wrong_data(monkeypatch):
    def refuse(environment):
        raise OSError("no memory")

    monkeypatch.setattr(workers, "_start", refuse)
    with pytest.raises(WorkersFailed, match=r"no further process could be started \(no memory\)"):
        list(map_in_processes(Fragile, [1], 2))


def test_processes_that_fail_are_replaced_by_this_one(messy, build_tokenizer, data_recipe, monkeypatch, capsys):
    def fail(*_):
        raise WorkersFailed("none left")
        yield

    monkeypatch.setattr(workers, "map_in_processes", fail)
    monkeypatch.setattr(workers, "ROWS_PER_PROCESS", 5)
    recipe = data_recipe(messy, max_dropped_fraction=0.5, preprocessing_num_workers=2, validation_fraction=0)
    assert len(prepare(recipe, build_tokenizer("chatml")).train) == 14
    assert "in this process alone: none left" in capsys.readouterr().err


# --- the ledger ------------------------------------------------------------------------------------------------------


def test_ledger_saves_and_loads(messy, build_tokenizer, data_recipe, tmp_path):
    ledger = prepare(data_recipe(messy, max_dropped_fraction=0.5), build_tokenizer("chatml")).ledger
    ledger.save(tmp_path / "deep" / "audit.json")
    assert Ledger.load(tmp_path / "deep" / "audit.json") == ledger
    content = json.loads((tmp_path / "deep" / "audit.json").read_text())
    assert content["splits"]["train"]["seam_shifted_share"] == 0.0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["audit.json"]


def test_lengths_are_counted_in_bins_that_double():
    found = describe_lengths(np.array([5, 16, 40]))
    assert found["histogram"] == {"edges": [0, 16, 32, 64], "counts": [1, 1, 1]}
    assert (found["mean"], found["min"], found["p50"], found["max"]) == (20.33, 5, 16, 40)
    assert describe_lengths(np.array([], dtype=int)) == {}


def test_ledger_refuses_a_row_that_is_missing():
    account = SplitLedger(input=3, kept=1)
    account.add_dropped([Dropped("a", "tie", "x")])
    with pytest.raises(AssertionError, match="3 rows in, 1 kept, 1 dropped"):
        account.check()


def test_examples_per_reason_are_few():
    account = SplitLedger(input=50)
    account.add_dropped(Dropped(f"a#{i}", "tie", "x") for i in range(50))
    assert account.dropped["tie"]["count"] == 50
    assert [example["row_id"] for example in account.dropped["tie"]["examples"]] == [f"a#{i}" for i in range(5)]


def test_printed_ledger_marks_trained_text_without_colour(messy, build_tokenizer, data_recipe):
    recipe = data_recipe(messy, max_dropped_fraction=0.5, validation_fraction=0.2, max_length=60, max_prompt_length=30)
    ledger = prepare(recipe, build_tokenizer("chatml")).ledger
    assert ledger.splits["train"].examples[0]["chosen_prompt"].startswith("<|im_start|>user\n")
    ledger.notes.append("noted beside the tables")
    stream = io.StringIO()
    ledger.render(Console(file=stream, width=120, color_system=None))
    text = stream.getvalue()
    assert "<|im_start|>assistant↵\n⟦yes " in text
    assert ".<|im_end|>⟧" in text
    assert "rows in" in text
    assert "dropped: missing column" in text
    assert "held out by prompt" in text
    assert "\nnoted beside the tables\n" in text
    assert "\x1b" not in text


def test_the_fullest_bin_of_a_histogram_has_the_longest_bar():
    lines = ledgers._bars({"edges": [0, 16, 32, 64], "counts": [4, 1, 0]}, 20).splitlines()
    assert [line.count("█") for line in lines] == [20, 5, 0]


def test_real_data_is_kept_whole(real_data, smol_model, data_recipe):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smol_model)
    prepared = prepare(data_recipe(real_data / "code_humanevalpack"), tokenizer)
    account = prepared.ledger.splits["train"]
    assert (account.input, account.kept, account.seam_shifted) == (888, 888, 0)
    assert account.shared_prefix_share > 0.8  # one-token bugs: nearly everything is shared
    assert len(prepared.eval) == 96


def test_a_tilde_in_a_sources_name_is_no_later_pass(tmp_path, build_tokenizer, data_recipe):
    path = tmp_path / "mix~v2.jsonl"
    path.write_text(4 * (json.dumps({"prompt": "p", "chosen": "yes", "rejected": "no"}) + "\n"))
    kept = prepare(data_recipe(path, drop_duplicates=True, validation_fraction=0.0), build_tokenizer("chatml"))
    assert len(kept.train) == 1
