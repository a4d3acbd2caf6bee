"""Files, folders, mixes and splits: what is read, what is held out, and what is said when something is missing."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_outcomes import outcome

from simpo.data import files
from simpo.data.files import read_file
from simpo.data.preferences import RowError
from simpo.data.sources import find_sources, fingerprint_sources, load_splits


def rows(count, start=0):
    return [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(start, start + count)]


def write_jsonl(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_any(path, content):
    """`content` in the format of the path's ending."""
    if ".jsonl" in path.name:
        return write_jsonl(path, content)
    if ".json" in path.name:
        data = json.dumps(content).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_rows(name, tmp_path):
    assert list(read_file(write_any(tmp_path / name, rows(5)))) == rows(5)


def test_json_of_columns_or_one_named_list_or_lines(tmp_path):
    columns = {key: [row[key] for row in rows(3)] for key in rows(1)[0]}
    for content in (json.dumps(columns), json.dumps({"data": rows(3)}), "\n".join(json.dumps(r) for r in rows(3))):
        (tmp_path / "a.json").write_text(content)
        assert list(read_file(tmp_path / "a.json")) == rows(3)


def test_rows_are_named_after_their_place_in_the_file(tmp_path, data_recipe):
    splits = load_splits(data_recipe(write_jsonl(tmp_path / "pairs.jsonl", rows(4)), validation_fraction=0))
    assert [row.row_id for row in splits.train] == [f"pairs.jsonl/train#{i}" for i in range(4)]
    assert len(splits.eval) == 0


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train.jsonl.gz", "test.jsonl.gz"),
        ("train.jsonl", "validation.json"),
        ("train_prefs.parquet", "test_prefs.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/part.jsonl", "eval/part.jsonl"),
        ("train_0.jsonl", "dev.csv"),
    ],
)
def test_folder_with_train_and_test(train, test, tmp_path, data_recipe):
    for name, content in ((train, rows(6)), (test, rows(2, 100))):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write_any(tmp_path / "set" / name, content)
    (tmp_path / "set" / "README.md").write_text("no rows")
    splits = load_splits(data_recipe(tmp_path / "set"))
    assert [row.row for row in splits.train] == rows(6)
    assert [row.row for row in splits.eval] == rows(2, 100)
    assert next(iter(splits.train)).row_id.startswith("set/train")
    assert splits.notes == []


def test_folder_of_shards_without_split_names_is_all_train(tmp_path, data_recipe):
    for part in range(3):
        write_jsonl(tmp_path / "set" / f"part{part}.jsonl", rows(2, 10 * part))
    splits = load_splits(data_recipe(tmp_path / "set", validation_fraction=0))
    assert [row.row["prompt"] for row in splits.train] == ["q0", "q1", "q10", "q11", "q20", "q21"]
    assert list(splits.train)[-1].row_id == "set/train#5"


def test_json_file_that_holds_splits(tmp_path, data_recipe):
    (tmp_path / "both.json").write_text(json.dumps({"train": rows(4), "test": rows(1, 50)}))
    splits = load_splits(data_recipe(tmp_path / "both.json"))
    assert (len(splits.train), len(splits.eval)) == (4, 1)


def test_saved_dataset(tmp_path, data_recipe):
    import datasets

    datasets.disable_progress_bars()
    try:
        saved = {"train": datasets.Dataset.from_list(rows(4)), "test": datasets.Dataset.from_list(rows(2, 9))}
        datasets.DatasetDict(saved).save_to_disk(tmp_path / "both")
        saved["train"].save_to_disk(tmp_path / "one")
    finally:
        datasets.enable_progress_bars()
    both = load_splits(data_recipe(tmp_path / "both"))
    assert [row.row for row in both.train] == rows(4)
    assert [row.row for row in both.eval] == rows(2, 9)
    recipe = data_recipe(tmp_path / "one", validation_fraction=0)
    assert len(load_splits(recipe).train) == 4
    before = fingerprint_sources(find_sources(recipe))
    (tmp_path / "one" / "below").mkdir()
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"what datasets leaves there")
    assert fingerprint_sources(find_sources(recipe)) == before


def test_fraction_is_a_seeded_choice_and_not_the_first_rows(tmp_path, data_recipe):
    path = write_jsonl(tmp_path / "a.jsonl", rows(100))
    chosen = {}
    for seed in (1, 2):
        recipe = data_recipe({str(path): 0.3}, seed=seed, validation_fraction=0)
        chosen[seed] = [row.row_id for row in load_splits(recipe).train]
        assert chosen[seed] == [row.row_id for row in load_splits(recipe).train]
        assert len(set(chosen[seed])) == 30
    assert chosen[1] != chosen[2]
    assert chosen[1] != [f"a.jsonl/train#{i}" for i in range(30)]


def test_fraction_above_one_gives_whole_passes_and_a_part(tmp_path, data_recipe):
    path = write_jsonl(tmp_path / "a.jsonl", rows(10))
    ids = [row.row_id for row in load_splits(data_recipe({str(path): 2.5}, validation_fraction=0)).train]
    assert len(ids) == len(set(ids)) == 25
    names = [f"a.jsonl/train#{i}" for i in range(10)]
    assert ids[:20] == names + [f"{name}~2" for name in names]
    assert {name.removesuffix("~3") for name in ids[20:]} < set(names)


def test_mix_takes_fractions_of_train_and_test_splits_whole(tmp_path, data_recipe):
    for name in ("one", "two"):
        write_jsonl(tmp_path / name / "train.jsonl", rows(20))
        write_jsonl(tmp_path / name / "test.jsonl", rows(4, 90))
    splits = load_splits(data_recipe({str(tmp_path / "one"): 0.5, str(tmp_path / "two"): 1.0}))
    assert sum(row.row_id.startswith("one/") for row in splits.train) == 10
    assert sum(row.row_id.startswith("two/") for row in splits.train) == 20
    assert len(splits.eval) == 8


def test_two_sources_with_one_name_keep_their_paths(tmp_path, data_recipe):
    paths = [write_jsonl(tmp_path / folder / "a.jsonl", rows(1)) for folder in "xy"]
    splits = load_splits(data_recipe({str(path): 1.0 for path in paths}, validation_fraction=0))
    assert [row.row_id for row in splits.train] == [f"{path}/train#0" for path in paths]


def test_hold_out_keeps_each_prompt_on_one_side(tmp_path, data_recipe):
    content = [{"prompt": f"q{i % 40}", "chosen": f"yes {i}", "rejected": "no"} for i in range(200)]
    content.append({"broken": 1})
    recipe = data_recipe(write_jsonl(tmp_path / "a.jsonl", content), validation_fraction=0.1)
    splits = load_splits(recipe)
    held, trained = ({row.row.get("prompt") for row in rows} - {None} for rows in (splits.eval, splits.train))
    assert held.isdisjoint(trained)
    assert len(held | trained) == 40
    assert len(splits.train) + len(splits.eval) == 201
    assert 20 <= len(splits.eval) <= 25
    assert "held out by prompt" in splits.notes[0]
    assert [row.row_id for row in splits.eval] == [row.row_id for row in load_splits(recipe).eval]


def test_hold_out_comes_before_repeats(tmp_path, data_recipe):
    path = write_jsonl(tmp_path / "a.jsonl", rows(20))
    splits = load_splits(data_recipe({str(path): 2.0}, validation_fraction=0.1))
    assert len(splits.eval) == 2
    assert len(splits.train) == 36


def test_sample_limits_are_a_seeded_choice(tmp_path, data_recipe):
    write_jsonl(tmp_path / "set" / "train.jsonl", rows(50))
    write_jsonl(tmp_path / "set" / "test.jsonl", rows(20))
    splits = load_splits(data_recipe(tmp_path / "set", max_train_samples=7, max_eval_samples=3))
    assert (len(splits.train), len(splits.eval)) == (7, 3)
    numbers = [int(row.row_id.split("#")[1]) for row in splits.train]
    assert numbers == sorted(numbers) != list(range(7))


def test_named_splits(tmp_path, data_recipe):
    for name, count in (("train_prefs", 5), ("test_prefs", 2), ("train_sft", 9), ("train_eval", 3)):
        write_jsonl(tmp_path / "set" / f"{name}.jsonl", rows(count))
    splits = load_splits(data_recipe(tmp_path / "set", dataset_splits=["train_prefs", "test_prefs"]))
    assert (len(splits.train), len(splits.eval)) == (5, 2)
    splits = load_splits(data_recipe(tmp_path / "set", dataset_splits=["train_sft"], validation_fraction=0))
    assert (len(splits.train), len(splits.eval)) == (9, 0)
    splits = load_splits(data_recipe(tmp_path / "set", dataset_splits=["train_prefs", "train_sft", "train_eval"]))
    assert (len(splits.train), len(splits.eval)) == (14, 3)  # what says train is trained on, unless it says eval too
    with pytest.raises(ValueError, match="no split 'train_gen'; its splits: test_prefs, train_eval, train_prefs"):
        load_splits(data_recipe(tmp_path / "set", dataset_splits=["train_gen", "test_prefs"]))
    with pytest.raises(ValueError, match="no split 'test_gen'"):
        load_splits(data_recipe(tmp_path / "set", dataset_splits=["train_prefs", "test_gen"]))


def test_rows_of_one_scored_answer_are_grouped_by_prompt(tmp_path, data_recipe):
    """As HelpSteer has them: best against worst; one answer alone and equal scores are drops, everything else stays."""

    def answer(prompt, text, helpfulness, **more):
        return {"prompt": prompt, "response": text, "helpfulness": helpfulness, "verbosity": 4 - helpfulness, **more}

    content = [answer("a", "good", 4), answer("b", "same", 2), answer("a", "bad", 0), answer("c", "alone", 3)]
    content += [answer("b", "as good", 2), rows(1)[0], answer("a", "fair", 2), answer("a", "good", 4, system="Rhyme.")]
    path = write_jsonl(tmp_path / "a.jsonl", content)

    def read(**keys):
        splits = load_splits(data_recipe(path, validation_fraction=0, **keys))
        assert splits.notes == ["a.jsonl/train: 7 rows of one answer are 4 prompts, best against worst (score_column)"]
        return {row.row_id.partition("#")[2]: outcome(row.row) for row in splits.train}

    wanted = {"0": ("a", "good", "bad"), "1": "tie", "3": "one answer", "5": ("q0", "yes 0", "no"), "7": "one answer"}
    assert read() == wanted
    assert read(score_column="verbosity") == {**wanted, "0": ("a", "bad", "good")}


def test_entry_says_its_own_splits_columns_and_fraction(tmp_path, data_recipe):
    for name, count in (("train_prefs", 10), ("test_prefs", 2), ("extra", 3)):
        write_jsonl(tmp_path / "set" / f"{name}.jsonl", [{**row, "messages": "other"} for row in rows(count)])
    place = str(tmp_path / "set")
    entry = {"split": ["train_prefs", "test_prefs"], "columns": ["prompt", "chosen", "rejected"], "fraction": 0.5}
    recipe = data_recipe({place: entry, "more of it": {"path": place, "split": "extra", "columns": ["prompt"]}})
    splits = load_splits(recipe)
    assert [row.row_id.partition("#")[0] for row in splits.train] == 5 * ["set/train_prefs"] + 3 * ["more of it/extra"]
    assert {tuple(row.row) for row in list(splits.train)[:5]} == {("prompt", "chosen", "rejected")}
    assert [row.row for row in splits.eval] == rows(2)
    assert [row.row for row in list(splits.train)[5:]] == [{"prompt": f"q{i}"} for i in range(3)]
    before = fingerprint_sources(find_sources(recipe))
    entry["columns"] = ["prompt", "chosen"]
    assert fingerprint_sources(find_sources(data_recipe({place: entry, "more of it": {"path": place}}))) != before
    with pytest.raises(ValueError, match="has no column 'choosen'; its columns: prompt, chosen, rejected, messages"):
        load_splits(data_recipe({place: {**entry, "columns": ["choosen"]}}))
    with pytest.raises(ValueError, match=r"no split 'train_prefs\[:9\]'.*a part of a split is a fraction"):
        load_splits(data_recipe({place: {"split": "train_prefs[:9]"}}))
    with pytest.raises(ValueError, match="is local and has no configurations"):
        find_sources(data_recipe({place: {"config": "en"}}))


def test_files_named_under_the_format_that_reads_them(tmp_path, data_recipe):
    write_jsonl(tmp_path / "a1.jsonl", rows(2))
    write_jsonl(tmp_path / "a2.jsonl", rows(3, 10))
    write_any(tmp_path / "b.csv", rows(1, 50)).rename(tmp_path / "b.txt")
    write_jsonl(tmp_path / "held.jsonl", rows(2, 90))

    def read(mixer):
        splits = load_splits(data_recipe(mixer, validation_fraction=0))
        return [row.row for row in splits.train], [row.row for row in splits.eval]

    assert read({"json": {"data_files": str(tmp_path / "a*.jsonl")}}) == (rows(2) + rows(3, 10), [])
    assert read({"csv": {"data_files": [str(tmp_path / "b.txt")]}}) == (rows(1, 50), [])
    by_split = {"train": "a1.jsonl", "test": ["held.jsonl"]}
    assert read({str(tmp_path): {"data_files": by_split}}) == (rows(2), rows(2, 90))
    with pytest.raises(ValueError, match=r"json is how files are read.*write \{json: \{data_files"):
        find_sources(data_recipe({"json": 1.0}))
    with pytest.raises(ValueError, match=r"no such file: .*a3\.jsonl; did you mean .*a\d\.jsonl"):
        find_sources(data_recipe({"json": {"data_files": str(tmp_path / "a3.jsonl")}}))
    with pytest.raises(ValueError, match=r"b\.txt: unknown kind of file; use one of"):
        find_sources(data_recipe({str(tmp_path): {"data_files": "b.txt"}}))
    with pytest.raises(ValueError, match="is a file, so that there is nothing to choose"):
        find_sources(data_recipe({str(tmp_path / "a1.jsonl"): {"data_files": "x"}}))


def test_brackets_in_a_folder_or_a_file_are_no_pattern(tmp_path, data_recipe):
    folder = tmp_path / "runs[1]"
    write_jsonl(folder / "a[2].jsonl", rows(2))
    write_jsonl(folder / "b.jsonl", rows(1, 50))
    for names, expected in (("a[2].jsonl", rows(2)), ("[ab]*.jsonl", rows(2) + rows(1, 50))):
        recipe = data_recipe({str(folder): {"data_files": names}}, validation_fraction=0)
        assert [row.row for row in load_splits(recipe).train] == expected


def test_broken_lines_become_rows_that_say_where(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "q"}\n\n{"prompt": \n\xff\xfe\n' + b"[" * 100_000 + b"\n[1]\n")
    read = list(read_file(path))
    assert read[0] == {"prompt": "q"}
    assert [isinstance(row, RowError) for row in read] == [False, True, True, True, False]
    assert "a.jsonl line 3" in str(read[1])
    assert "a.jsonl line 4" in str(read[2])


def test_csv_row_with_too_many_cells(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen\na,b\nc,d,e\n")
    read = list(read_file(tmp_path / "a.csv"))
    assert read[0] == {"prompt": "a", "chosen": "b"}
    assert "a.csv line 3" in str(read[1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.json", b" ", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.csv", b"prompt,chosen\n", "no rows"),
        ("a.json", b'[{"a": 1},\n{"b" 2}]', r"a\.json: broken JSON at line 2"),
        ("a.json", b"3", "expected a list of rows"),
        ("a.jsonl.gz", b"\x1f\x8b\x08 broken", "cannot be read"),
        ("a.parquet", b"PAR1 nothing", "cannot be read as Parquet"),
        ("a.csv", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_file_that_cannot_be_read_is_named(name, content, message, tmp_path, data_recipe):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_splits(data_recipe(tmp_path / name))
    assert name in str(caught.value)


def test_missing_file_names_the_nearest_one(tmp_path, data_recipe):
    write_jsonl(tmp_path / "pairs.jsonl", rows(1))
    with pytest.raises(ValueError, match=r"no such file or folder: .*pair\.jsonl; did you mean .*pairs\.jsonl\?"):
        find_sources(data_recipe(tmp_path / "pair.jsonl"))
    with pytest.raises(ValueError, match=r"holds pairs\.jsonl"):
        find_sources(data_recipe(tmp_path / "quite" / "elsewhere"))


def test_unknown_ending_and_empty_folder(tmp_path, data_recipe):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"unknown kind of file '\.xlsx'; use one of \.jsonl"):
        find_sources(data_recipe(tmp_path / "a.xlsx"))
    with pytest.raises(ValueError, match="holds no file with rows"):
        find_sources(data_recipe(tmp_path))


def test_hub_dataset(monkeypatch, data_recipe):
    import datasets

    asked = []

    def fake(name, config, data_files=None):
        asked.append((name, config, data_files))
        return datasets.DatasetDict(train_prefs=datasets.Dataset.from_list(rows(3)))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    recipe = data_recipe(
        {"org/set": 1.0}, dataset_splits=["train_prefs"], dataset_configs=["small"], validation_fraction=0
    )
    assert [row.row_id for row in load_splits(recipe).train] == [f"set/train_prefs#{i}" for i in range(3)]
    assert asked == [("org/set", "small", None)]
    entry = {"config": "large", "data_files": "part1.parquet", "split": "train_prefs"}
    assert len(load_splits(data_recipe({"org/set": entry}, validation_fraction=0)).train) == 3
    assert asked[1:] == [("org/set", "large", ["part1.parquet"])]


def test_hub_out_of_reach(monkeypatch, data_recipe):
    import datasets

    def fake(name, config):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(
        ValueError, match=r"'org/set' is not a local file or folder, and could not be loaded from the hub.*OFFLINE"
    ):
        find_sources(data_recipe({"org/set": 1.0}))


@pytest.mark.parametrize("name", ["a.jsonl", "cache-a.jsonl"])
def test_fingerprint_follows_the_bytes(name, tmp_path, data_recipe):
    path = write_jsonl(tmp_path / name, rows(3))
    recipe = data_recipe(path)
    before = fingerprint_sources(find_sources(recipe))
    assert fingerprint_sources(find_sources(recipe)) == before
    write_jsonl(path, rows(3, 1))
    assert fingerprint_sources(find_sources(recipe)) != before


def test_real_folders_have_both_splits(real_data, data_recipe):
    splits = load_splits(data_recipe({str(real_data / "zh_oasst1"): 1.0, str(real_data / "code_humanevalpack"): 0.5}))
    assert len(splits.train) == 691 + 444
    assert len(splits.eval) == 76 + 96


def test_csv_asks_for_no_longer_cells_than_windows_can_count(tmp_path, monkeypatch):
    limit, asked = csv.field_size_limit, []
    monkeypatch.setattr(csv, "field_size_limit", lambda most: asked.append(most) or limit(most))
    (tmp_path / "a.csv").write_text("prompt,chosen\na,b\n")
    assert len(list(read_file(tmp_path / "a.csv"))) == 1
    assert max(asked) < 2**31


def test_csv_quote_that_is_never_closed(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,chosen\na,b\n\n"two\nlines",c\nd,"e\nf,g\nh,i\n')
    with pytest.raises(ValueError, match=r"a\.csv: the row that begins at line 6 has a quote that is never closed"):
        list(read_file(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text('prompt,chosen\n5" wide,b\n\n"two\nlines",c')
    assert list(read_file(tmp_path / "a.csv")) == [
        {"prompt": '5" wide', "chosen": "b"},
        {"prompt": "two\nlines", "chosen": "c"},
    ]


def test_messages_written_as_text_are_said_to_be_text(tmp_path, data_recipe):
    say = json.dumps([{"role": "assistant", "content": "yes"}])
    content = [{"prompt": "q", "chosen": say, "rejected": say.replace("yes", "no")} for _ in range(3)]
    recipe = data_recipe(write_jsonl(tmp_path / "a.jsonl", content), validation_fraction=0)
    (note,) = load_splits(recipe).notes
    assert note.startswith("a.jsonl/train: chosen, rejected: messages written as text are trained as text")
    write_jsonl(tmp_path / "a.jsonl", [*content, {**content[0], "rejected": "no"}])
    assert load_splits(recipe).notes == []


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    content=st.lists(st.recursive(st.none() | st.integers() | st.text(max_size=9), st.lists, max_leaves=6), max_size=6),
    indent=st.sampled_from([None, 1, "\t"]),
    behind=st.sampled_from(["", " \n", "]", ",", "x", '{"a": 1}']),
    block=st.integers(1, 20),
    ascii_only=st.booleans(),
)
def test_list_read_by_items_is_the_list_or_the_same_refusal(content, indent, behind, block, ascii_only, monkeypatch):
    def outcome(read, path):
        try:
            return list(read(path)) or f"{path}: the file has no rows"
        except ValueError as error:
            return str(error)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.json")
        path.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only) + behind, encoding="utf-8")
        monkeypatch.setattr(files, "_BLOCK", block)
        assert outcome(read_file, path) == outcome(files.load_json, path)


def test_a_line_that_is_not_utf8_says_how_to_save_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "naïve"}\n'.encode("latin-1") + b'{"prompt": "b"}\n')
    bad, good = read_file(tmp_path / "a.jsonl")
    assert bad.detail == "a.jsonl line 1: not UTF-8 (byte 0xef at place 14); save the file as UTF-8"
    assert good == {"prompt": "b"}


def test_csv_that_is_not_utf8_is_said_with_its_byte(tmp_path):
    text = "prompt,chosen\n" + "a,b\n" * 9000
    for bom in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.csv").write_bytes(bom + text.encode() + b"c,\xff\n")
        with pytest.raises(ValueError, match=f"invalid start byte at byte {len(text) + 2}"):
            list(read_file(tmp_path / "a.csv"))


def test_which_rows_are_held_out_is_in_the_fingerprint(tmp_path, data_recipe):
    """Trap 58, of what a file is for: the same bytes, split otherwise, are other data."""
    names = ["a.jsonl", "b.jsonl", "c.jsonl"]
    for start, name in enumerate(names):
        write_jsonl(tmp_path / name, rows(2, 10 * start))
    a, b, c = (str(tmp_path / name) for name in names)
    splits = ({"train": [a], "test": [b, c]}, {"train": [a, b], "test": [c]}, {"test": [a], "train": [b, c]})
    recipes = [data_recipe({"json": {"data_files": each}}) for each in splits]
    assert len({fingerprint_sources(find_sources(recipe)) for recipe in recipes}) == 3
    for name in ("test", "train", "val"):
        write_jsonl(tmp_path / "set" / name / "data.jsonl", rows(2))
    recipe = data_recipe(tmp_path / "set")
    before = fingerprint_sources(find_sources(recipe))
    (tmp_path / "set" / "test").rename(tmp_path / "set" / "old")
    assert fingerprint_sources(find_sources(recipe)) != before


def test_shards_of_older_hub_repositories_belong_to_their_split(tmp_path, data_recipe):
    for part, (split, start) in enumerate([("train", 0), ("train", 10), ("test", 20)]):
        name = f"{split}-0000{part % 2}-of-0000{2 if split == 'train' else 1}-a09b74b3ef9c3b5{part}.jsonl"
        write_jsonl(tmp_path / "set" / "data" / name, rows(2, start))
    splits = load_splits(data_recipe(tmp_path / "set"))
    assert [row.row for row in splits.train] == rows(2) + rows(2, 10)
    assert [row.row for row in splits.eval] == rows(2, 20)
