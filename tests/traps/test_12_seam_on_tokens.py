"""Trap 12: tokenising prompt and response apart changes the tokens at the seam."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import tokenize_pair, tokenize_pairs

from simpo.data.preferences import Pair, RowError
from simpo.data.prepare import prepare_pairs

PIECES = st.lists(
    st.sampled_from(["a.", "a", " ", "\n", "\n\n", "river", " river", "é", "河", "😀", ".", "  ", "4"]), max_size=6
)
TEXTS = PIECES.map("".join).filter(str.strip)


@pytest.mark.parametrize("kind", ["plain", "words", "plain_gpt4", "mistral", "chatml", "llama3"])
def test_tokens_are_those_of_the_full_text_and_the_seam_is_where_it_should_be(kind, build_tokenizer):
    tokenizer = build_tokenizer(kind)

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(TEXTS, TEXTS, TEXTS)
    def check(prompt, chosen, rejected):
        pair = Pair("r", prompt, chosen, rejected)
        (tokens,) = tokenize_pairs([pair], tokenizer, max_length=500)
        if isinstance(tokens, RowError):
            return
        if kind.startswith("plain"):
            header, full = prompt, prompt + chosen + "<|end|>"
        else:
            turn = {"role": "user", "content": prompt}
            header = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
            answer = [turn, {"role": "assistant", "content": chosen}]
            full = tokenizer.apply_chat_template(answer, tokenize=False)
            full = full.rstrip("\n") if kind == "chatml" else full
            full = full.rstrip() + "<|end|>" if kind == "words" else full
        if kind != "words":  # there the end is added as a token behind text whose blanks are gone
            assert tokens.chosen_ids == tokenizer(full, add_special_tokens=False)["input_ids"]
        before = b"".join(_bytes(tokenizer, token) for token in tokens.chosen_ids[: tokens.chosen_start])
        through = before + _bytes(tokenizer, tokens.chosen_ids[tokens.chosen_start])
        seam = len(header.encode())
        assert len(before) <= seam < len(through)  # the first trained token is the one that ends behind the seam

    check()


def _bytes(tokenizer, token: int) -> bytes:
    """The bytes a byte-level token stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.all_special_ids:
        return text.encode()
    back = {char: byte for byte, char in bytes_to_unicode().items()}
    return bytes(back[char] for char in text)


def test_straddling_token_is_trained_and_counted(tmp_path, build_tokenizer, data_recipe):
    tokenizer = build_tokenizer("plain")
    joined = tokenizer(" answer", add_special_tokens=False)["input_ids"]
    tokens = tokenize_pair(Pair("r", "The ans", "wer is slow", "one"), tokenizer, max_length=100)
    assert len(joined) == 1
    assert tokens.seam_shifted
    assert tokenizer.decode(tokens.chosen_ids[tokens.chosen_start :]) == " answer is slow<|end|>"
    rows = [{"prompt": "The ans", "chosen": "wer is slow", "rejected": "one"}]
    rows += [{"prompt": f"The river {i}\n", "chosen": "runs.", "rejected": "is."} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = data_recipe(tmp_path / "p.jsonl", validation_fraction=0, chat_template="none")
    ledger = prepare_pairs(recipe, tokenizer, progress=False).ledger
    assert ledger.splits["train"].seam_shifted == 1
    assert ledger.splits["train"].seam_shifted_share == 0.25


def test_token_that_ends_in_blanks_straddles_too(build_tokenizer):
    """Tokenizers report character spans without the blanks; ".\\n\\n" reaches into the response all the same."""
    tokenizer = build_tokenizer("plain_gpt4")
    assert len(tokenizer(".\n\n", add_special_tokens=False)["input_ids"]) == 1
    tokens = tokenize_pair(Pair("r", "It is done.", "\n\nNext.", "no"), tokenizer, max_length=100)
    assert tokenizer.decode(tokens.chosen_ids[tokens.chosen_start :]) == ".\n\nNext.<|end|>"


def test_slow_tokenizer_finds_the_same_tokens(build_tokenizer):
    """A tokenizer without a Rust backend: the seam is the longest common token prefix."""
    fast = build_tokenizer("chatml")

    class Slow:
        """What transformers promises of every tokenizer, and nothing else."""

        is_fast = False
        eos_token, eos_token_id = fast.eos_token, fast.eos_token_id
        bos_token, bos_token_id = None, None
        chat_template = fast.chat_template
        all_special_ids = fast.all_special_ids
        added_tokens_decoder = fast.added_tokens_decoder
        apply_chat_template = staticmethod(fast.apply_chat_template)

        def __call__(self, text, add_special_tokens=True):
            return fast(text, add_special_tokens=add_special_tokens)

    pairs = [Pair("a", "Which river?", "The green one.", "No."), Pair("b", "q " * 50, "yes " * 40, "\nno")]
    for limit in (500, 40):
        assert tokenize_pairs(pairs, Slow(), max_length=limit) == tokenize_pairs(pairs, fast, max_length=limit)


def test_a_text_is_not_cut_at_a_token_that_another_may_cover(build_tokenizer):
    """With "\\n<|im_start|>" a token too, the prompt's last <|im_start|> is the end of that one: no place to cut at."""
    tokenizer = copy.deepcopy(build_tokenizer("chatml"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["\n<|im_start|>"]}, replace_extra_special_tokens=False)
    tokens = tokenize_pair(Pair("r", "Why?", "yes", "no"), tokenizer, max_length=500)
    text = tokens.prompt_text + "yes<|im_end|>"
    assert tokens.chosen_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("\n<|im_start|>") in tokens.chosen_ids


def test_a_rust_backend_that_gives_other_tokens_is_not_used(build_tokenizer):
    """A tokenizer may do more in Python than its backend does; its own call decides."""
    fast = copy.deepcopy(build_tokenizer("plain"))

    class Lowercasing(type(fast)):
        def _encode_plus(self, text, *args, **options):
            lowered = text.lower() if isinstance(text, str) else [each.lower() for each in text]
            return super()._encode_plus(lowered, *args, **options)

    fast.__class__ = Lowercasing
    tokens = tokenize_pair(Pair("r", "Which RIVER?", " The GREEN one.", " No."), fast, max_length=100)
    assert fast.decode(tokens.chosen_ids) == "which river? the green one.<|end|>"
