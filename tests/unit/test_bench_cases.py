"""The benchmark's pairs: the same on every call, of the lengths they claim, or a reason why not."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from peers.cases import (
    CASES,
    Case,
    CaseSkipped,
    build_pairs,
    describe_pairs,
    find_cases,
    load_pairs,
    save_pairs,
)
from peers.models import check_model, tokenizer_folder
from peers.sides import IGNORED, ColumnTable, pad_pairs, pairs_as_dataset, trl_columns

from simpo.core.packing import iterate_steps, shared_prefix_length
from simpo.data.loader import PairStore


def build(name: str, count: int = 12, **options):
    given = {"vocab_size": 50, "tokenizer": None, "data": None} | options
    return build_pairs(find_cases(name)[0], count, **given)


def padded_over_real(pairs, group: int) -> float:
    """Tokens after padding each group of pairs to its longest row, over those before."""
    groups = [
        [len(ids) for p in step for ids in (p.chosen_ids, p.rejected_ids)]
        for step in iterate_steps(pairs, pairs_per_step=group)
    ]
    return sum(max(group) * len(group) for group in groups) / sum(sum(group) for group in groups)


# --- names -----------------------------------------------------------------------------------------------------------


def test_cases_are_found_by_name_by_lengths_and_by_path(pair_files: Path):
    assert [case.name for case in find_cases("all")] == list(CASES)
    assert find_cases("hh,hh") == [CASES["hh"]]
    assert find_cases("30/20/10")[0].lengths == (30, 20, 10)
    own = find_cases(f"chat, {pair_files / 'train.jsonl'}")[1]
    assert (own.name, own.kind) == ("train.jsonl", "file")


@pytest.mark.parametrize("names", ["chat,hhh", "", "chat,", "missing.jsonl", "20/10", "20/0/10"])
def test_an_unknown_case_is_refused_with_what_is_allowed(names):
    with pytest.raises(ValueError, match=r"chat, hh, longprompt|at least one token"):
        find_cases(names)


def test_an_unknown_model_is_refused_with_what_is_allowed(tmp_path: Path):
    with pytest.raises(ValueError, match=r"neither a folder .* nor one of llama-1b, llama-3b, llama-8b"):
        check_model(str(tmp_path))


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat", "40/20/30"])
def test_synthetic_pairs_are_the_same_on_every_call(name):
    assert build(name) == build(name)
    assert len({pair.row_id for pair in build(name)}) == 12


def test_fixed_pairs_have_their_lengths_and_share_exactly_the_prompt():
    for pair in build("40/20/30"):
        assert (pair.chosen_start, len(pair.chosen_ids), len(pair.rejected_ids)) == (40, 60, 70)
        assert shared_prefix_length(pair.chosen_ids, pair.rejected_ids) == 40
        assert max(pair.chosen_ids + pair.rejected_ids) < 50


def test_drawn_lengths_have_their_means_and_pad_as_measured_chat_does():
    few = build("chat", 20, warm_up=4)
    assert len(few) == 24
    assert describe_pairs(few[4:])["prompt"] == pytest.approx(173, rel=0.01)
    pairs = build("chat", 4000)
    lengths = describe_pairs(pairs)
    assert [lengths[name] for name in ("prompt", "chosen", "rejected")] == pytest.approx([173, 263, 277], rel=2e-3)
    for group, measured in ((2, 1.56), (4, 1.94), (8, 2.33)):
        assert padded_over_real(pairs, group) == pytest.approx(measured, rel=0.05)


def test_real_pairs_stand_for_their_file(tiny_model: Path, pair_files: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = str(pair_files / "train.jsonl")
    options = {"vocab_size": 1000, "tokenizer": tiny_model}
    every, few = build(file, 40, **options), build(file, 8, **options)
    assert len({pair.row_id for pair in every}) == 40
    assert few == build(file, 8, **options)
    mean = statistics.mean(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in every)
    assert statistics.mean(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in few) == pytest.approx(
        mean, rel=0.1
    )
    with pytest.raises(CaseSkipped, match="has 40 pairs and 41 are needed"):
        build(file, 41, **options)
    with pytest.raises(CaseSkipped, match="not in the model's vocabulary of 100"):
        build(file, 8, **options | {"vocab_size": 100})


def test_missing_data_and_a_missing_tokenizer_are_reasons_to_skip(tmp_path: Path, tiny_model: Path):
    with pytest.raises(CaseSkipped, match="no folder en_hh_helpful in the data folder"):
        build("hh", tokenizer=tiny_model, data=str(tmp_path))
    (tmp_path / "en_hh_helpful").mkdir()
    with pytest.raises(CaseSkipped, match="`make model`"):
        build("hh", data=str(tmp_path))


def test_random_weights_use_the_small_models_tokenizer_where_it_is(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokenizer_folder("llama-1b") is None
    folder = tmp_path / "simpo" / "models" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer_folder("llama-1b") == folder


def test_pairs_survive_their_file(tmp_path: Path):
    pairs = build("chat", 3)
    save_pairs(pairs, tmp_path / "pairs.json")
    assert load_pairs(tmp_path / "pairs.json") == pairs


def test_a_case_has_a_name_for_files():
    assert Case("200/350/350", "", "fixed").slug == "200-350-350"


# --- what each side is handed ----------------------------------------------------------------------------------------


def test_every_side_is_handed_the_same_tokens_and_labels():
    pairs = build("chat", 3)
    batch = pad_pairs(pairs, pad_token_id=49)
    for index, pair in enumerate(pairs):
        columns = trl_columns(pair)
        for row, side in ((index, "chosen"), (len(pairs) + index, "rejected")):
            ids, start = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_start")
            size = len(ids)
            assert batch.input_ids[row].tolist() == ids + [49] * (batch.input_ids.shape[1] - size)
            assert batch.attention_mask[row].sum() == size
            assert batch.labels[row, :size].tolist() == columns[f"{side}_labels"] == [IGNORED] * start + ids[start:]
            assert (batch.labels[row, size:] == IGNORED).all()
            assert columns[f"{side}_input_ids"] == ids
        assert columns["prompt_input_ids"] == pair.chosen_ids[: pair.chosen_start]


def test_a_table_in_memory_reads_as_a_dataset_does():
    """So that this trainer's side runs where `datasets` is not installed."""
    pairs = build("chat", 5)
    dataset = pairs_as_dataset(pairs)
    stores = [PairStore(dataset), PairStore(ColumnTable({name: dataset[name][:] for name in dataset.column_names}))]
    assert [stores[0][i] for i in range(5)] == [stores[1][i] for i in range(5)] == pairs
    assert len(stores[1]) == 5
    assert (stores[0].response_lengths == stores[1].response_lengths).all()
    assert str(stores[0].shapes) == str(stores[1].shapes)


# --- where little is installed ---------------------------------------------------------------------------------------


def test_cases_and_operations_need_torch_transformers_and_numpy_alone():
    others = ("datasets", "trl", "pyarrow", "pydantic", "rich", "typer", "peft", "liger_kernel", "matplotlib")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others})); sys.path[:0] = {sys.path}\n"
        "import peers.cases, peers.flops, peers.models, peers.sides"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_real_pairs_are_skipped_where_datasets_is_not_installed(tiny_model: Path, pair_files: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CaseSkipped, match="needs datasets"):
        build(str(pair_files / "train.jsonl"), tokenizer=tiny_model)
