"""Trap 6: slicing to `max_length - longer` leaves a response of no tokens, and the other side still too long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import tokenize_pair

from simpo.data.preferences import Pair, RowError
from simpo.data.tokenize import plan_cut

LENGTHS = st.integers(1, 5000)


@given(LENGTHS, LENGTHS, LENGTHS, st.integers(2, 4096), st.none() | st.integers(1, 4096))
def test_plan_obeys_both_limits_and_leaves_no_side_empty(prompt, chosen, rejected, max_length, max_prompt_length):
    cut = plan_cut(prompt, chosen, rejected, max_length=max_length, max_prompt_length=max_prompt_length)
    kept = prompt - cut.prompt, chosen - cut.chosen, rejected - cut.rejected
    assert all(count >= 1 for count in kept)
    assert kept[0] + max(kept[1:]) <= max_length
    if prompt + max(chosen, rejected) <= max_length:
        assert kept == (prompt, chosen, rejected)
    else:
        assert kept[0] + max(kept[1:]) == max_length  # nothing is thrown away that would have fitted


@pytest.mark.parametrize("overlong", ["truncate", "drop", "error"])
def test_each_policy(overlong, build_tokenizer):
    pair = Pair("data/train#7", "question " * 40, "yes " * 90, "no " * 3)
    call = {"max_length": 60, "max_prompt_length": 20, "overlong": overlong}
    if overlong == "truncate":
        tokens = tokenize_pair(pair, build_tokenizer("chatml"), **call)
        assert len(tokens.chosen_ids) == 60
        assert len(tokens.rejected_ids) < 60
    elif overlong == "drop":
        with pytest.raises(RowError) as caught:
            tokenize_pair(pair, build_tokenizer("chatml"), **call)
        assert caught.value.reason == "overlong"
    else:
        with pytest.raises(ValueError, match=r"data/train#7 .*max_length 60") as caught:
            tokenize_pair(pair, build_tokenizer("chatml"), **call)
        assert not isinstance(caught.value, RowError)
