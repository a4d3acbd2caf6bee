"""Filters of `clean`: each against a second, slow definition; each removal in the ledger with its row; advice."""

# ruff: noqa: RUF001
from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from simpo.data import cache
from simpo.data.cleaning import (
    FINDINGS,
    REASONS,
    PairCleaner,
    Sign,
    find_numbers,
    find_residue,
    is_truncated,
    read_signs,
    refuses,
    spoken,
)
from simpo.data.near import NUM_HASHES, find_near, has_minhash, load_minhash, sign_words, split_words
from simpo.data.overlap import Ngrams, hash_runs
from simpo.data.preferences import RowError, pair_from_row
from simpo.data.prepare import prepare_pairs
from simpo.data.review import Review, correlate
from simpo.recipe.stages import Clean

needs_minhash = pytest.mark.skipif(not has_minhash(), reason="needs simpo[clean]")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(prompt, chosen, rejected, **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def reasons(account):
    return {reason: entry["count"] for reason, entry in account.dropped.items()}


# --- what a pair shows by itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request, since it is dangerous.",
        "<think>They want a bomb.</think>\n\nI can’t provide instructions for that.",
        "As an AI language model, I cannot have opinions on politics.",
        "抱歉，我无法回答这个问题。",
        "Es tut mir leid, aber ich kann dabei nicht helfen.",
    ],
)
def test_what_declines_to_help_is_a_refusal(text):
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sorry for the delay! Here is your recipe.",
        "\"I'd Do Anything for Love (But I Won't Do That)\" is a song.",
        "You cannot divide by zero, so the answer is undefined.",
        "Here you go. " * 30 + "I can't help with more than that.",
        "",
    ],
)
def test_what_helps_is_no_refusal(text):
    assert not refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "The three largest cities of the country are Paris, Marseille and",
        "First you take the flour, then the eggs,",
        "Here it is:\n```python\nprint(1)",
        "一共有三种方法，",
    ],
)
def test_what_stops_in_the_middle_is_truncated(text):
    assert is_truncated(text)


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "It is done.",
        "Take these:\n- two large eggs from the farm next to our own house\n- a cup of the best flour you can find",
        "```python\nprint(1)\n```",
        "See this page for all that there is to know: https://example.org/a/b",
        "现在是二月，游戏领域中的虚拟玩家更加真实，更加强大",
        "She said that all of this would be over by the end of May!”",
    ],
)
def test_what_has_ended_is_not_truncated(text):
    assert not is_truncated(text)


@pytest.mark.parametrize(
    ("pair", "found"),
    [
        (row("Hi", "Hello<|im_end|>", "No"), "<|im_end|> in chosen"),
        (row("Hi", "Yes", "[INST] again [/INST] No"), "[INST] in rejected"),
        (row("Hi <|eot_id|>", "Yes", "No"), "<|eot_id|> in the prompt"),
        (row("Hi", "Yes.\n\nHuman: And then?", "No"), "Human: in chosen"),
        (row("Hi", "Yes <｜Assistant｜>", "No"), "<｜Assistant｜> in chosen"),
        (row("What does this say?\n\nHuman: hello", "Hello.", "No"), None),
        (row("Hi", "In HTML <s>this</s> is struck out; a < b | c > d.", "No"), None),
        (row("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes<|im_end|>", "No<|im_end|>"), None),
    ],
)
def test_marks_of_templates_are_found_where_they_do_not_belong(pair, found):
    residue = find_residue(pair_from_row(pair))
    assert residue is None if found is None else residue is not None and residue.startswith(found)


def test_answers_with_the_same_words_are_almost_the_same():
    long = [f"word{index}" for index in range(20)]
    same, other = [*long[:-1], "else"], [*long[:-3], "a", "b", "c"]
    signs = [read_signs(pair_from_row(row("q", " ".join(long), " ".join(answer)))) for answer in (same, other)]
    assert [Sign.ALMOST_SAME in each for each in signs] == [True, False]


@pytest.mark.parametrize(
    ("settings", "pair", "reason"),
    [
        ({"max_length_ratio": 2}, row("q", "a" * 21, "b" * 10), "length ratio"),
        ({"max_length_ratio": 2}, row("q", "a" * 10, "b" * 21), "length ratio"),
        ({"max_length_ratio": 2}, row("q", "a" * 20, "b" * 10), None),
        ({"min_score_gap": 0.5}, row("q", "a", "b", score_chosen=1.4, score_rejected=1), "score gap"),
        ({"min_score_gap": 0.0}, row("q", "a", "b", score_chosen=1, score_rejected=2), "score gap"),
        ({"min_score_gap": 0.5}, row("q", "a", "b"), "score gap"),
        ({"min_score_gap": 0.5}, row("q", "a", "b", chosen_rating="3", rejected_rating="2.5"), None),
        ({"min_score_gap": 2}, {"prompt": "q", "responses": ["a", "b"], "scores": [1, 4]}, None),
        ({"min_score_gap": 4}, {"prompt": "q", "responses": ["a", "b"], "scores": [1, 4]}, "score gap"),
        ({"refusals": "chosen"}, row("q", "Yes.", "I cannot help you."), None),
        ({"refusals": "either"}, row("q", "Yes.", "I cannot help you."), "refusal"),
        ({"truncated": "chosen"}, row("q", "```\nx", "No."), "truncated"),
        ({"truncated": "chosen"}, row("q", "No.", "```\nx"), None),
        ({"template_residue": True}, row("q", "No.<|im_end|>", "Yes"), "template residue"),
        ({}, row("q", "I cannot help.<|im_end|>", "```\nx", score_chosen=1, score_rejected=2), None),
    ],
)
def test_a_pair_goes_for_the_filter_that_was_asked_for(settings, pair, reason):
    examine = PairCleaner(Clean(**settings))
    if reason is None:
        assert set(examine(pair_from_row(pair))) == set(FINDINGS)
    else:
        with pytest.raises(RowError) as raised:
            examine(pair_from_row(pair))
        assert raised.value.reason == reason
        assert reason in REASONS.values()


def test_an_answer_in_another_language_goes():
    pytest.importorskip("py3langid", reason="needs simpo[clean]")
    english = "The library closes at six, so please return the books before you leave."
    german = "Die Bibliothek schließt um sechs, bitte geben Sie die Bücher vorher zurück."
    pairs = {name: pair_from_row(row(english, english, other)) for name, other in (("de", german), ("en", "42, ok"))}
    for languages in (["en"], ["prompt"]):
        examine = PairCleaner(Clean(languages=languages))
        examine(pairs["en"])
        with pytest.raises(RowError, match="rejected is de"):
            examine(pairs["de"])
    PairCleaner(Clean(languages=["en", "de"]))(pairs["de"])
    with pytest.raises(ValueError, match=r"clean\.languages = 'english': no such language; .* such as 'en'"):
        PairCleaner(Clean(languages=["english"]))


def test_filters_go_to_other_processes_as_they_are():
    asked = {"max_length_ratio": 3, "template_residue": True, "refusals": "either", "truncated": "either"}
    clean = Clean(**asked, benchmarks={"b.jsonl": 1.0})
    examine = PairCleaner(clean, Ngrams(["one two three four five six seven eight"], 13))
    there = pickle.loads(pickle.dumps(examine))
    good = pair_from_row(row("q?", "yes indeed", "no, never"))
    assert there(good) == examine(good)
    for bad in ("yes" * 40, "x<|eot_id|>", "I cannot help.", "```\nx", "One two three four five six seven eight"):
        with pytest.raises(RowError):
            there(pair_from_row(row("q?", bad, "no, it is not so at all")))


@pytest.mark.parametrize("settings", [{"near_duplicates": True}, {"leaks": "near"}])
def test_what_is_not_installed_is_said_before_anything_is_read(settings, monkeypatch):
    monkeypatch.setattr("simpo.data.near.has_minhash", lambda: False)
    load_minhash.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'simpo\[clean\]'"):
        PairCleaner(Clean(**settings))


# --- what all pairs show together ------------------------------------------------------------------------------------


def table(rng, count, prompts=6, answers=4):
    """Pairs of few prompts and answers, so that everything happens."""
    rows = []
    for index in range(count):
        prompt, (chosen, rejected) = rng.randrange(prompts), rng.sample(range(answers), 2)
        scores = (rng.randrange(3), rng.randrange(3)) if rng.random() < 0.7 else (None, None)
        rows.append(
            {
                "row_id": f"r/train#{index}" + "~2" * (later := rng.random() < 0.3),
                "later_pass": 2 * later,
                "prompt_key": prompt * 7 - 9,
                "signs": 0,
                "answers_key": hash((prompt, *sorted((chosen, rejected)))),
                "answers_turned": chosen > rejected,
                "chosen_chars": rng.randrange(50),
                "rejected_chars": rng.randrange(50),
                "score_chosen": scores[0],
                "score_rejected": scores[1],
                "signature": bytes(NUM_HASHES),
            }
        )
    schema = {"row_id": pa.string(), "prompt_key": pa.int64(), **FINDINGS}
    return pa.Table.from_pylist(rows, pa.schema(schema)), rows


def review(clean, **tables):
    """Of these tables; split -> index of each pair that goes -> its reason and detail."""
    keep = {name: np.ones(len(each), bool) for name, each in tables.items()}
    numbers = {
        name: {"prompt_key": each["prompt_key"].to_numpy(), **find_numbers(each)} for name, each in tables.items()
    }
    row_ids = {name: each["row_id"] for name, each in tables.items()}
    found = Review(numbers, keep, row_ids, Clean(**clean))
    gone = {}
    for name, ids in row_ids.items():
        gone[name] = {ids.to_pylist().index(each.row_id): (each.reason, each.detail) for each in found.removed(name)}
        assert set(gone[name]) == set(np.flatnonzero(~keep[name]))
    return gone, found.advise()


@pytest.mark.parametrize("seed", range(8))
def test_contradicted_pairs_are_those_with_a_turned_twin(seed):
    data, rows = table(random.Random(seed), 30)
    slow = {
        i
        for i, a in enumerate(rows)
        for b in rows
        if a["answers_key"] == b["answers_key"] and a["answers_turned"] != b["answers_turned"]
    }
    assert set(review({"contradictions": True}, train=data)[0]["train"]) == slow
    reported = [line for line in review({}, train=data)[1] if "contradicts" in line]
    assert reported == ([f"pairs that another pair contradicts: {len(slow)} (clean.contradictions)"] if slow else [])


@pytest.mark.parametrize("seed", range(8))
def test_one_pair_of_each_prompt_stays_the_one_with_the_largest_gap(seed):
    data, rows = table(random.Random(seed), 30)
    best = {}
    for index, each in enumerate(rows):
        key = (each["prompt_key"], "~" in each["row_id"])
        scores = each["score_chosen"], each["score_rejected"]
        gap = -np.inf if None in scores else scores[0] - scores[1]
        if key not in best or gap > best[key][0]:
            best[key] = (gap, index)
    removed = review({"one_pair_a_prompt": True}, train=data)[0]["train"]
    assert set(range(30)) - set(removed) == {index for _, index in best.values()}
    for index, (reason, detail) in removed.items():
        key = (rows[index]["prompt_key"], "~" in rows[index]["row_id"])
        assert (reason, detail) == ("further pair of its prompt", f"{rows[best[key][1]]['row_id']} is kept")


@pytest.mark.parametrize("side", ["train", "eval"])
@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_in_both_splits_leaves_one(seed, side):
    (train, a), (evaluated, b) = (table(random.Random(seed + n), 12, prompts=20) for n in (0, 50))
    both = {each["prompt_key"] for each in a} & {each["prompt_key"] for each in b}
    gone, advice = review({"leaks": "exact", "leaks_from": side}, train=train, eval=evaluated)
    for name, rows in (("train", a), ("eval", b)):
        slow = {index for index, each in enumerate(rows) if each["prompt_key"] in both}
        assert set(gone[name]) == (slow if name == side else set())
    assert not any("also trained on" in line for line in advice)
    counted = sum(each["prompt_key"] in both for each in b)
    _, lines = review({}, train=train, eval=evaluated)
    assert any(f"also trained on: {counted} of 12" in line for line in lines) == (counted > 0)


def test_scores_and_lengths_are_correlated_within_their_pairs():
    rng = np.random.default_rng(0)
    scores, lengths = rng.normal(size=(2, 50)), rng.normal(size=(2, 50))
    centred = [(each - each.mean(axis=0)).ravel() for each in (scores, lengths)]
    slow = np.corrcoef(*centred)[0, 1]
    assert correlate(scores[0] - scores[1], lengths[0] - lengths[1]) == pytest.approx(slow)
    assert correlate(np.zeros(3), np.ones(3)) == 0


# --- near-duplicates -------------------------------------------------------------------------------------------------


def shingles(words):
    padded = ["^", *words, "$"]
    return set(pairwise(padded))


def jaccard(a, b):
    return len(a & b) / len(a | b)


def edited(words, share, rng):
    """That share of the words replaced by others."""
    places = set(rng.sample(range(len(words)), round(share * len(words))))
    return [f"new{rng.randrange(10**6)}" if index in places else word for index, word in enumerate(words)]


def texts(count, rng, length=40):
    return [[f"w{rng.randrange(2000)}" for _ in range(length)] for _ in range(count)]


def as_matrix(many):
    return np.frombuffer(b"".join(sign_words(each) or b"" for each in many), np.uint8).reshape(-1, NUM_HASHES)


@needs_minhash
def test_near_rows_are_those_whose_words_are():
    rng = random.Random(1)
    originals = texts(60, rng)
    rows = [*originals, *(edited(each, share, rng) for each in originals for share in (0.02, 0.05, 0.4))]
    rng.shuffle(rows)
    nearest, similarity = find_near(as_matrix(rows), 0.7)
    sets = [shingles(each) for each in rows]
    similar = np.array([[jaccard(a, b) for b in sets[:i]] + [0] * (len(sets) - i) for i, a in enumerate(sets)])
    found = nearest >= 0
    assert found[similar.max(axis=1) >= 0.85].all()
    assert not found[similar.max(axis=1) < 0.55].any()
    exact = similar[np.flatnonzero(found), nearest[found]]
    assert np.abs(exact - similarity[found]).max() < 0.17  # four standard errors
    assert (nearest[found] < np.flatnonzero(found)).all()


@needs_minhash
@pytest.mark.parametrize("as_leaks", [False, True])
def test_near_rows_are_found_among_rows_that_begin_alike(as_leaks):
    rng = random.Random(4)
    (instruction,) = texts(1, rng, length=30)
    originals = [[*instruction, *each] for each in texts(1500, rng, length=20)]
    copies = [edited(each, 0.04, rng) for each in originals[:150]]
    assert 0.35 < jaccard(shingles(originals[0]), shingles(originals[1])) < 0.5
    nearest, _ = find_near(as_matrix([*originals, *copies]), 0.7, num_others=1500 if as_leaks else None)
    assert (nearest[1500:] == np.arange(150)).mean() > 0.95
    assert (nearest[:1500] >= 0).sum() == 0


@needs_minhash
def test_time_and_memory_do_not_depend_on_how_many_are_alike():
    rows = np.zeros((20_000, NUM_HASHES), np.uint8)
    nearest, similarity = find_near(rows, 0.7)
    assert (nearest[1:] >= 0).all()
    assert nearest[0] == -1
    assert (similarity[1:] == 1).all()
    assert find_near(rows[:0], 0.7)[0].shape == (0,)


@needs_minhash
def test_near_prompts_of_another_split_alone_count_as_leaks(tmp_path, build_tokenizer, data_recipe):
    rng = random.Random(2)
    words = texts(6, rng)
    train = [row(" ".join(each), "yes", "no") for each in words]
    train.append(row(" ".join(edited(words[0], 0.03, rng)), "yes", "no"))  # near, but in the same split
    test = [row(" ".join(edited(words[3], 0.03, rng)), "yes", "no"), row(" ".join(words[4]), "yes", "no")]
    write(tmp_path / "d" / "train.jsonl", train)
    write(tmp_path / "d" / "test.jsonl", test)
    tokenizer = build_tokenizer("chatml")
    audited = prepare_pairs(data_recipe(tmp_path / "d"), tokenizer, progress=False).ledger
    assert "eval pairs whose prompt is also trained on: 1 of 2, 1 more nearly so (clean.leaks)" in audited.advice
    ledger = prepare_pairs(data_recipe(tmp_path / "d", clean={"leaks": "near"}), tokenizer, progress=False).ledger
    entry = ledger.splits["train"].dropped["prompt in both splits"]
    assert sorted((each["row_id"], each["detail"]) for each in entry["examples"]) == [
        ("d/train#3", "nearly the prompt of d/test#0 of eval"),
        ("d/train#4", "the prompt of d/test#1 of eval"),
    ]
    assert ledger.splits["eval"].kept == 2
    assert not any("also trained on" in line for line in ledger.advice)


@needs_minhash
@pytest.mark.parametrize("large", [1, cache._LARGE])
def test_of_near_duplicate_prompts_the_first_stays_with_all_its_pairs(
    large, tmp_path, build_tokenizer, data_recipe, monkeypatch
):
    monkeypatch.setattr(cache, "_LARGE", large)  # bytes from which numbers of pairs lie in a file
    rng = random.Random(3)
    first, other = texts(2, rng)
    near = edited(first, 0.03, rng)
    prompts = [first, other, near, first, near]
    rows = [row(" ".join(each), f"yes {index}", "no") for index, each in enumerate(prompts)]
    path, tokenizer = write(tmp_path / "d.jsonl", rows), build_tokenizer("chatml")
    audited = prepare_pairs(data_recipe(path, validation_fraction=0), tokenizer, progress=False).ledger
    assert "pairs whose prompt nearly repeats an earlier one: 2 (clean.near_duplicates)" in audited.advice
    recipe = data_recipe(path, validation_fraction=0, clean={"near_duplicates": True})
    prepared = prepare_pairs(recipe, tokenizer, progress=False)
    assert prepared.train["row_id"][:] == [f"d.jsonl/train#{index}" for index in (0, 1, 3)]
    entry = prepared.ledger.splits["train"].dropped["near-duplicate prompt"]
    assert entry["count"] == 2
    assert {each["detail"] for each in entry["examples"]} == {"nearly the prompt of d.jsonl/train#0"}


# --- benchmarks ------------------------------------------------------------------------------------------------------


def contaminated_slowly(words, benchmarks, n):
    for text in benchmarks:
        theirs = split_words(text)
        size = min(n, len(theirs))
        runs = {tuple(theirs[at : at + size]) for at in range(len(theirs) - size + 1)}
        if size >= 8 and any(tuple(words[at : at + size]) in runs for at in range(len(words) - size + 1)):
            return True
    return False


@pytest.mark.parametrize("seed", range(6))
def test_contamination_is_a_run_of_words_in_common(seed):
    rng = random.Random(seed)
    benchmarks = [" ".join(rng.choice("abc") for _ in range(rng.randrange(5, 25))) for _ in range(12)]
    ngrams = Ngrams(benchmarks, 13)
    outcomes = Counter()
    for _ in range(200):
        words = [rng.choice("abc") for _ in range(rng.randrange(1, 30))]
        slow = contaminated_slowly(words, benchmarks, 13)
        assert (ngrams.find(words) is not None) == slow
        outcomes[slow] += 1
    assert min(outcomes.values()) > 5


def test_pairs_that_hold_a_benchmark_go(tmp_path, build_tokenizer, data_recipe):
    question = "Tom has five red apples and gives two of them to each of his three friends; how many are left?"
    write(tmp_path / "bench" / "test.jsonl", [{"question": question, "answer": "none", "subject": "math"}])
    write(tmp_path / "bench" / "train.jsonl", [{"question": " ".join("xyz" * 9), "answer": [{"value": "a b"}]}])
    rows = [
        row(f"Please solve: {question.upper()}", "yes", "no"),
        row("What is red?", f"This reminds me. {question}", "no"),
        row("Tom has five red apples and gives two of them away", "yes", "no"),
        row(" ".join("xyz" * 5), "yes", "no"),
    ]
    settings = {"benchmarks": {str(tmp_path / "bench"): 1.0}}
    recipe = data_recipe(write(tmp_path / "d.jsonl", rows), validation_fraction=0, clean=settings)
    prepared = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)
    assert prepared.train["row_id"][:] == ["d.jsonl/train#2"]
    assert reasons(prepared.ledger.splits["train"]) == {"in a benchmark": 3}
    one = {str(tmp_path / "bench"): {"split": "test", "columns": ["question"]}}
    recipe = data_recipe(tmp_path / "d.jsonl", validation_fraction=0, clean={"benchmarks": one})
    assert len(prepare_pairs(recipe, build_tokenizer("chatml"), progress=False).train) == 2
    for entry, message in (
        ({"split": "dev"}, "no split 'dev'"),
        ({"columns": ["subject"]}, "no text of 8 words"),
        ({"columns": ["question", "anwser"]}, "no column 'anwser'; its columns: question, answer, subject"),
    ):
        recipe = data_recipe(tmp_path / "d.jsonl", clean={"benchmarks": {str(tmp_path / "bench"): entry}})
        with pytest.raises(ValueError, match=message):
            prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)
    recipe = data_recipe(tmp_path / "d.jsonl", clean={"benchmarks": {str(tmp_path / "missing"): 1.0}})
    with pytest.raises(ValueError, match=r"clean\.benchmarks: no such file"):
        prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)


# --- the recipe and the store ----------------------------------------------------------------------------------------


def test_what_is_asked_for_is_dropped_without_stopping_the_run_and_named(tmp_path, build_tokenizer, data_recipe):
    rows = [row(f"question {index}?", "I cannot help you.", "no") for index in range(9)] + [row("q?", "yes", "no")]
    path = write(tmp_path / "d.jsonl", rows)
    recipe = data_recipe(path, validation_fraction=0, clean={"refusals": "chosen"})
    prepared = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)
    account = prepared.ledger.splits["train"]
    assert (account.input, account.kept, reasons(account)) == (10, 1, {"refusal": 9})
    assert account.dropped["refusal"]["examples"][0] == {
        "row_id": "d.jsonl/train#0",
        "detail": "chosen declines to help: 'I cannot help you.'",
    }
    recipe = data_recipe(path, validation_fraction=0, clean={"refusals": "chosen", "min_score_gap": 1})
    with pytest.raises(ValueError, match=r"none of 10 train rows gives a pair:\n  10 score gap"):
        prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)


def test_every_dropped_row_is_listed_beside_the_ledger(tmp_path, build_tokenizer, data_recipe):
    rows = [row(f"question {index}?", "I cannot help you.", "no") for index in range(12)]
    rows += [row("q?", "yes", "no"), row("q?", "yes", "no"), row("q?", "maybe", "no"), row("q?", "same", "same")]
    settings = {"refusals": "chosen", "one_pair_a_prompt": True}
    recipe = data_recipe(write(tmp_path / "d.jsonl", rows), validation_fraction=0, drop_duplicates=True, clean=settings)
    for _ in range(2):  # built, then read from the store
        prepared = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)
        listed = prepared.save_ledger(tmp_path / "audit.json")
        assert listed == tmp_path / "audit.dropped.jsonl"
        found = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
        assert Counter(each["reason"] for each in found) == reasons(prepared.ledger.splits["train"])
        numbers = sorted(int(each["row_id"].rpartition("#")[2]) for each in found)
        assert numbers == [*range(12), 13, 14, 15]
        assert found[-1] == {
            "split": "train",
            "row_id": "d.jsonl/train#14",
            "reason": "further pair of its prompt",
            "detail": "d.jsonl/train#12 is kept",
        }
    kept = prepare_pairs(data_recipe(write(tmp_path / "e.jsonl", rows[12:13])), build_tokenizer("chatml"))
    assert kept.save_ledger(tmp_path / "audit.json") is None
    assert not listed.exists()


def test_settings_and_benchmarks_decide_what_is_stored_and_defaults_do_not(tmp_path, build_tokenizer, data_recipe):
    path = write(tmp_path / "d.jsonl", [row(f"question {index}?", "yes", "no") for index in range(4)])
    bench = write(tmp_path / "bench.jsonl", [{"q": "one two three four five six seven eight nine"}])

    def stored(**clean):
        recipe = data_recipe(path, validation_fraction=0, clean=clean)
        return prepare_pairs(recipe, build_tokenizer("chatml"), progress=False).ledger.fingerprint

    assert stored() == stored(refusals="keep", similarity=0.7)
    before = stored(benchmarks={str(bench): 1.0})
    write(bench, [{"q": "question 1 and 2 and 3 and 4 and 5"}])
    prints = [stored(), stored(refusals="chosen"), stored(refusals="either"), before]
    assert len({*prints, stored(benchmarks={str(bench): 1.0})}) == 5


def test_advice_has_numbers_and_keys(tmp_path, build_tokenizer, data_recipe):
    rows = [
        row("a?", "long answer", "short", score_chosen=3, score_rejected=1),
        row("b?", "a long answer too", "none", score_chosen=2, score_rejected=1),
        row("b?", "none", "a long answer too", score_chosen=1, score_rejected=2),
        row("c?", "I cannot help you.", "fine", score_chosen=1, score_rejected=0),
        row("d?", "Yes<|im_end|>", "yes"),
        row("e?", "```\nx = 1", "y"),
    ]
    recipe = data_recipe(write(tmp_path / "d.jsonl", rows), validation_fraction=0)
    advice = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False).ledger.advice
    assert advice[0].startswith(
        "chosen is longer in 83.3% of the pairs, shorter in 16.7%: length alone (the longer answer) is right in 83.3%"
    )
    assert advice[1].startswith("scores and lengths of a pair's answers: r = +0.")
    assert advice[1].endswith("over 4 pairs; chosen scores lower in 1 (clean.min_score_gap)")
    assert advice[2:] == [
        "pairs that another pair contradicts: 2 (clean.contradictions)",
        "chosen answers that decline to help: 1 (16.7%; clean.refusals)",
        "chosen answers that stop in the middle: 1 (16.7%; clean.truncated)",
        "pairs with marks of a chat template in their texts: 1 (16.7%; clean.template_residue)",
    ]


@pytest.mark.parametrize(("words", "size", "runs"), [(12, 13, 0), (13, 13, 1), (15, 13, 3)])
def test_a_text_has_as_many_runs_as_places_to_begin(words, size, runs):
    hashes = hash_runs([str(number) for number in range(words)], size)
    assert len(hashes) == len(set(hashes.tolist())) == runs


def test_an_answer_says_what_its_assistant_says():
    turns = [{"role": "assistant", "content": "I look."}, {"role": "tool", "content": "I cannot help you."}]
    assert spoken([*turns, {"role": "assistant", "content": "Blue."}]) == "I look.\nBlue."


def test_a_split_without_pairs_leaks_nothing():
    data, _ = table(random.Random(0), 5)
    gone, advice = review({"leaks": "exact", "leaks_from": "train"}, train=data, eval=data.slice(0, 0))
    assert gone == {"train": {}, "eval": {}}
    assert not any("also trained on" in line for line in advice)
