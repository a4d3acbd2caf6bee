"""Whatever a row holds: it is trained on or dropped with a reason; never a traceback, never unaccounted for."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import trained_texts

from simpo.data import columns
from simpo.data.cleaning import PairCleaner
from simpo.data.preferences import RowError, pair_from_row
from simpo.data.prepare import RowTokenizer, prepare_pairs
from simpo.data.rows import RawRow
from simpo.data.tokenize import PairTokenizer
from simpo.recipe.stages import Clean

few = settings(  # where each example tokenises or writes files
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

COLUMNS = sorted(
    {
        *columns.PROMPT_COLUMNS,
        *columns.CHOSEN_COLUMNS,
        *columns.REJECTED_COLUMNS,
        *columns.SYSTEM_COLUMNS,
        *(name for names in (*columns.SCORED_COLUMNS, *columns.SCORE_PAIR_COLUMNS) for name in names),
        *(name for names in columns.PREFERENCE_COLUMNS for name in names),
        *(*columns.ANSWER_COLUMNS, *columns.SCORE_COLUMNS, "rejected_messages", "label", "context"),
        *("output", "history", "other"),
    }
)
LIKELY = st.sampled_from(["prompt", "chosen", "rejected", "messages", "instruction", "output"])
TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        *("", " ", "yes", "no", "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "\n\nHuman:", "\ud800"),
        *("<|im_end|>", "a<|im_end|>", "<|im_end|>b", "<|im_start|>user\n", "\x00", "word " * 40, "[", "[[", "{}"),
        *('[{"role": "user", "content": "a"}]', "[{'role': 'user', 'content': 'a'}]", '["a", "b"]', "[1, 2]", "[{'"),
    ]
)
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", None, 3])
MESSAGES = st.builds(lambda role, content: {"role": role, "content": content}, ROLES, TEXTS | st.none())
SHAREGPT = st.builds(lambda role, content: {"from": role, "value": content}, ROLES, TEXTS | st.integers())
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS | MESSAGES | SHAREGPT,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(MESSAGES, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "type", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
ANYTHING = st.dictionaries(LIKELY | st.sampled_from(COLUMNS), VALUES, max_size=6) | VALUES

ANSWERS = TEXTS | st.sampled_from(["yes.", "no.", "perhaps", "A longer answer.", "word " * 30, "é😀\n"])
USER_TURN = st.builds(lambda text: [{"role": "user", "content": text}], ANSWERS)
SAYS = st.builds(lambda text: [{"role": "assistant", "content": text}], ANSWERS)
DIALOGUE = st.builds(lambda text: f"\n\nHuman: why?\n\nAssistant: {text}", ANSWERS)
SHAPES = st.one_of(
    st.fixed_dictionaries({"prompt": ANSWERS, "chosen": ANSWERS, "rejected": ANSWERS}),
    st.fixed_dictionaries({"prompt": USER_TURN, "chosen": SAYS, "rejected": SAYS}),
    st.builds(lambda q, a, b: {"chosen": q + a, "rejected": q + b}, USER_TURN, SAYS, SAYS),
    st.fixed_dictionaries({"chosen": DIALOGUE, "rejected": DIALOGUE}),
    st.fixed_dictionaries({"instruction": ANSWERS, "input": ANSWERS, "output": st.lists(ANSWERS, max_size=3)}),
    st.fixed_dictionaries(
        {
            "prompt": ANSWERS,
            "all_generated_responses": st.lists(ANSWERS, min_size=2, max_size=2),
            "all_rm_scores": st.lists(st.floats(), min_size=2, max_size=2),
        }
    ),
)
"""Rows of a known shape, with contents that are mostly fine."""


@st.composite
def spoiled(draw):
    """A row of a known shape in which one column is gone or holds anything."""
    row = draw(SHAPES)
    name = draw(st.sampled_from(sorted(row)))
    if draw(st.booleans()):
        return {**row, name: draw(VALUES)}
    return {key: value for key, value in row.items() if key != name}


WORDS = st.sampled_from(
    ["Oslo", "-3 C", "It snows.", 'a "b"\n\\c', "<think>\nhm\n</think>\n\nYes.", "hm</think>No.", "é😀"]
)
PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, WORDS), min_size=1, max_size=2)
CALLS = st.lists(
    st.builds(
        lambda name, value: {"name": name, "arguments": {"place": value}}, st.sampled_from(["look", "ask"]), WORDS
    ),
    min_size=1,
    max_size=2,
)
ACTS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": WORDS | PARTS},
    optional={"reasoning_content": WORDS, "tool_calls": CALLS, "weight": st.just(1)},
)
REPLIES = st.fixed_dictionaries({"role": st.sampled_from(["tool", "user"]), "content": WORDS | PARTS})


@st.composite
def trajectories(draw):
    """A question, with tools or without, and two answers of one turn or more."""
    turns = [[draw(ACTS)] for _ in range(2)]
    for answer in turns:
        for _ in range(draw(st.integers(0, 2))):
            answer += [draw(REPLIES), draw(ACTS)]
    row = {"prompt": [{"role": "user", "content": draw(WORDS)}], "chosen": turns[0], "rejected": turns[1]}
    return {**row, "tools": [{"name": "look", "parameters": {}}]} if draw(st.booleans()) else row


ROWS = SHAPES | spoiled() | trajectories() | ANYTHING
REASONS = {"missing column", "empty", "identical", "malformed", "tie", "unpaired", "not text"}
LATER_REASONS = {
    *REASONS,
    "template",
    "rewritten by the template",
    "overlong",
    "no prompt",
    "identical after truncation",
}


def pair_or_error(row):
    """What `pair_from_row` gives or raises as a refusal; anything else it raises goes through."""
    try:
        return pair_from_row(row)
    except RowError as error:
        return error


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ROWS)
def test_row_gives_a_sound_pair_or_a_reason(row):
    pair = pair_or_error(row)
    if isinstance(pair, RowError):
        assert pair.reason in REASONS
        assert pair.detail
        return
    chosen, rejected = pair.answers
    assert chosen != rejected
    for answer in (chosen, rejected):
        assert answer[0]["role"] == answer[-1]["role"] == "assistant"
        assert all(turn["content"].strip() or "tool_calls" in turn for turn in answer if turn["role"] == "assistant")
    assert pair.turns[-1]["role"] in ("user", "tool")
    assert pair.turns[-1]["role"] == "tool" or pair.turns[-1]["content"].strip()


@pytest.mark.parametrize("kind", ["chatml", "gemma", "empty_thinking"])
def test_rows_are_kept_or_dropped_and_kept_ones_are_sound(kind, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    limits = {"max_length": 24, "max_prompt_length": 12, "overlong": "truncate"}
    prepare = RowTokenizer(
        tokenizer, pair_from_row, PairCleaner(Clean()), **limits, chat_template=tokenizer.chat_template
    )

    @few
    @given(st.lists(ROWS, max_size=8))
    def check(content):
        chunk = prepare([RawRow(f"x#{i}", row) for i, row in enumerate(content)])
        kept = chunk.table.to_pylist()
        named = [row["row_id"] for row in kept] + [row.row_id for row in chunk.dropped]
        assert sorted(named) == sorted(f"x#{i}" for i in range(len(content)))
        assert {row.reason for row in chunk.dropped} <= LATER_REASONS
        assert all(row.detail for row in chunk.dropped)
        for row in kept:
            for side in ("chosen", "rejected"):
                assert 1 <= row[f"{side}_start"] < len(row[f"{side}_ids"]) <= 24
            assert row["chosen_ids"] != row["rejected_ids"]

    check()


@pytest.mark.parametrize(
    "kind",
    [
        *("agent", "chatml", "cuts", "channels", "empty_thinking", "empty_header", "asked", "wait"),
        *("llama3", "gemma", "words"),
    ],
)
def test_what_a_kept_row_says_is_what_is_trained_and_nothing_else(kind, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    tokenize = PairTokenizer(tokenizer, max_length=4000)

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(trajectories())
    def check(row):
        pair = pair_or_error(row)
        if isinstance(pair, RowError):
            return
        (tokens,) = tokenize([pair])
        if isinstance(tokens, RowError):
            assert tokens.reason in LATER_REASONS
            return
        for answer, trained in zip(pair.answers, trained_texts(tokens, tokenizer), strict=True):
            said = [turn for turn in answer if turn["role"] == "assistant"]
            assert len(trained) == len(said)
            for turn, text in zip(said, trained, strict=True):
                thought = turn.get("reasoning_content", "").removeprefix("<think>\n")
                words = [thought, *turn["content"].replace("<think>", "</think>").split("</think>")]
                words += [call["function"]["name"] for call in turn.get("tool_calls", ())]
                assert all(word.strip() in text for word in words)
                end = "<end_of_turn>" if kind == "gemma" else tokenizer.eos_token
                end = "<|wait|>" if kind == "wait" and "tool_calls" in turn else end
                assert text.count(end) == (kind != "words" or turn is said[-1])
                assert text.count("<think>") <= str(turn).count("</think>") + ("reasoning_content" in turn)

    check()


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(content=st.lists(ROWS, min_size=1, max_size=30), seed=st.integers(0, 9))
def test_file_of_anything_is_accounted_for_or_refused_in_words(content, seed, tmp_path, build_tokenizer, data_recipe):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in content]
    lines.insert(seed % len(lines), "{ not json")
    lines.append(json.dumps({"prompt": "sound", "chosen": "yes", "rejected": "no"}))
    lines.append(json.dumps({"prompt": "sound too", "chosen": "yes", "rejected": "no"}))
    path.write_text("\n".join(lines))
    recipe = data_recipe(
        path, seed=seed, max_dropped_fraction=1.0, validation_fraction=0.2, max_length=40, max_prompt_length=20
    )
    try:
        prepared = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)
    except ValueError as refusal:
        if "train rows gives a pair" not in str(refusal):  # both sound rows may have been held out
            raise
        return
    splits = prepared.ledger.splits.values()
    assert sum(split.kept + split.num_dropped for split in splits) == len(lines)


SAYABLE = ANSWERS.filter(lambda text: text and "\ud800" not in text and "\x00" not in text)  # empty is null in CSV
SCORES = st.sampled_from([1, 2.5, -3, 4])
ASKED = st.builds(lambda text: [{"role": "user", "content": text}], SAYABLE)
SAID = st.builds(lambda text: [{"role": "assistant", "content": text}], SAYABLE)
CALLS = st.builds(
    lambda name, key, text: [
        {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": {key: text}}}]},
        {"role": "tool", "name": name, "content": text},
        {"role": "assistant", "content": "so"},
    ],
    *(st.sampled_from(["add", "look"]), st.sampled_from(["a", "b"]), SAYABLE),
)
TOOLS = st.none() | st.builds(
    lambda key: [{"name": "add", "parameters": {key: {"type": "string"}}}], st.sampled_from(["a", "b"])
)
TABLES = {
    "texts": {"prompt": SAYABLE, "chosen": SAYABLE, "rejected": SAYABLE},
    "texts with scores": {
        **{"prompt": SAYABLE, "chosen": SAYABLE, "rejected": SAYABLE},
        **{"score_chosen": SCORES | st.none(), "score_rejected": SCORES | st.none()},
    },
    "calls": {"prompt": ASKED, "chosen": CALLS, "rejected": SAID, "tools": TOOLS},
    "messages": {"prompt": ASKED, "chosen": SAID, "rejected": SAID},
    "scored lists": {
        "prompt": SAYABLE,
        "responses": st.lists(SAYABLE, min_size=1, max_size=3),
        "scores": st.just([1, 2]),
    },
    "one answer a row": {"prompt": st.sampled_from(["a", "b", "c"]), "response": SAYABLE, "helpfulness": SCORES},
    "ms-swift": {"messages": st.builds(lambda q, a: q + a, ASKED, SAID), "rejected_response": SAYABLE},
    "a preference": {"context": ASKED, "response1": SAYABLE, "response2": SAYABLE, "overall_preference": SCORES},
}
SOUND = {
    **{"prompt": "sound", "chosen": "yes", "rejected": "no", "score_chosen": 2, "score_rejected": 1},
    **{"responses": ["no", "yes"], "scores": [1, 2], "response": "yes", "helpfulness": 1},
    **{"rejected_response": "no", "response1": "yes", "response2": "no", "overall_preference": -1},
}


def write_table(path, content):
    """Rows that have the same columns, in the format that the path's ending stands for."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            for row in content:
                writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        datasets.Dataset.from_list(content).save_to_disk(path)
    return path


@pytest.mark.parametrize("table", TABLES)
def test_same_rows_give_the_same_tokens_and_drops_in_every_format(table, tmp_path, build_tokenizer, data_recipe):
    tokenizer = build_tokenizer("agent" if table == "calls" else "chatml")
    keys = {"validation_fraction": 0, "max_dropped_fraction": 1.0, "max_length": 200, "max_prompt_length": 20}
    user, say = ([{"role": role, "content": text}] for role, text in (("user", "sound"), ("assistant", "yes")))
    messages = {"messages": user + say, "context": user}
    sound = {
        **SOUND,
        **messages,
        "tools": None,
        **({"prompt": user, "chosen": say, "rejected": [{**say[0], "content": "no"}]}),
    }
    sound = {name: (sound if table in ("messages", "calls") else {**SOUND, **messages})[name] for name in TABLES[table]}
    more = [{**sound, "response": "no", "helpfulness": 0}] if "response" in sound else []

    @few
    @given(content=st.lists(st.fixed_dictionaries(TABLES[table]), max_size=8))
    def check(content):
        content = [*content, sound, *more]
        results = {}
        for ending in ("jsonl", "json", "csv", "tsv", "parquet", "saved"):
            with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                path = write_table(Path(folder, f"rows.{ending}"), content)
                prepared = prepare_pairs(data_recipe(path, **keys), tokenizer, progress=False)
                account = prepared.ledger.splits["train"]
                drops = {reason: dropped["count"] for reason, dropped in account.dropped.items()}
                results[ending] = (prepared.fingerprint, account.input, account.kept, drops)
                assert account.input == account.kept + sum(drops.values())
                assert account.input == len(content) or table == "one answer a row"
        assert len({str(result) for result in results.values()}) == 1, results

    datasets.disable_progress_bars()
    check()
    datasets.enable_progress_bars()
