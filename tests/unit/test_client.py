"""The client of OpenAI's chat protocol: what one request gets, and what becomes of it when the server fails."""

from __future__ import annotations

import json
import time

import pytest
from chat_server import ChatServer, completion

from simpo.data.columns import RowError
from simpo.onpolicy import client as client_module
from simpo.onpolicy.client import Client, Request, for_the_protocol, read_choices

pytest.importorskip("openai")

ASK = ({"role": "user", "content": "How many legs has a spider?"},)
NOW = {"Retry-After": "0.01"}


def outcomes(client: Client, *contents: str, seeds=(None,)) -> dict[str, object]:
    requests = (
        (content, Request([{"role": "user", "content": content}], {"max_tokens": 9}, seeds)) for content in contents
    )
    return dict(client.chat_all(requests))


def test_many_requests_are_on_their_way_at_once_and_not_more_than_asked():
    def answer(body):
        time.sleep(0.02)
        return completion(body["messages"][0]["content"].upper())

    with ChatServer(answer) as server, Client(server.url, "small", concurrency=4) as client:
        found = outcomes(client, *"abcdefghijklmnop")
    assert {name: choices[0].text for name, choices in found.items()} == {name: name.upper() for name in found}
    assert len(found) == 16
    assert 2 <= server.most <= 4


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"<html>busy</html>", "not an answer"),
        (b"", "not an answer"),
        (b"[1, 2]", "not an answer"),
        ({"choices": []}, "not an answer"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, "not an answer"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}, "cut while thinking"),
        ({"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}, "not an answer"),
        (b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}', "not an answer"),
        ({"choices": [{"message": {"content": "", "tool_calls": [{}]}, "finish_reason": "tool_calls"}]}, "tool call"),
        (400, "refused"),
        ((503, NOW), "server error"),
        ((429, NOW), "server error"),
        (None, "no connection"),
        (0.4, "timeout"),
    ],
)
def test_a_request_fails_alone_with_its_reason(monkeypatch, reply, reason):
    monkeypatch.setattr(client_module, "RETRIES", 1)

    def answer(body):
        return reply if body["messages"][0]["content"] == "bad" else completion("fine")

    with ChatServer(answer) as server, Client(server.url, "small", timeout_s=0.2) as client:
        found = outcomes(client, "good", "bad", "better")
        assert [found[name][0].text for name in ("good", "better")] == ["fine", "fine"]
        assert isinstance(found["bad"], RowError)
        assert found["bad"].reason == reason
        with pytest.raises(RowError, match=reason):
            client.chat(Request([{"role": "user", "content": "bad"}], {}))


def test_what_passes_is_tried_again():
    replies = iter([(429, NOW), (500, NOW), (503, NOW), completion("at last")])
    with ChatServer(lambda _: next(replies)) as server, Client(server.url, "small") as client:
        assert client.chat(Request(ASK, {}))[0].text == "at last"
    assert len(server.asked) == 4


def test_a_server_that_is_gone_ends_the_work_with_one_line(monkeypatch):
    monkeypatch.setattr(client_module, "RETRIES", 0)
    with ChatServer(lambda _: 500) as server, Client(server.url, "small", concurrency=2) as client:
        with pytest.raises(
            ValueError, match=r"2[01] requests in a row went without an answer.*the same command goes on"
        ):
            outcomes(client, *map(str, range(1000)))
        assert len(server.asked) < 30


def test_n_answers_by_one_request_where_the_server_takes_n():
    def answer(body):
        return completion(*"abc"[: body.get("n", 1)], logprobs="logprobs" in body)

    with ChatServer(answer) as server, Client(server.url) as client:
        client.try_out({"temperature": 0.5}, num_choices=3, logprobs=True)
        choices = client.chat(Request(ASK, {}, seeds=(7, 8, 9)))
    assert [choice.text for choice in choices] == ["a", "b", "c"]
    assert all((choice.logprob, choice.num_tokens, choice.finished) == (-0.5, 1, True) for choice in choices)
    assert [body["n"] for body in server.asked] == [3, 3]
    assert {"model": "small", "n": 3, "seed": 7, "logprobs": True}.items() <= server.asked[1].items()


def test_single_requests_where_the_server_gives_fewer_at_once_than_are_wanted():
    """As llama.cpp's, which refuses more than it has slots."""

    def answer(body):
        return (
            400
            if body.get("n", 1) > 4
            else completion(*(f"{body['seed']} {place}" for place in range(body.get("n", 1))))
        )

    with ChatServer(answer) as server, Client(server.url, "small") as client:
        client.try_out({}, num_choices=5, logprobs=False)
        assert len(client.chat(Request(ASK, {}, seeds=tuple(range(5))))) == 5
        assert not client.takes_n


@pytest.mark.parametrize("refuses", [(), ("n",), ("logprobs",), ("n", "logprobs")])
def test_single_requests_where_the_server_does_not(refuses):
    """It ignores what it does not know, or refuses it."""

    def answer(body):
        return 400 if any(name in body for name in refuses) else completion(f"seed {body['seed']}")

    with ChatServer(answer) as server, Client(server.url, "small") as client:
        client.try_out({}, num_choices=3, logprobs=True)
        assert (client.takes_n, client.gives_logprobs) == (False, False)
        server.asked.clear()
        choices = client.chat(Request(ASK, {"max_tokens": 5}, seeds=(7, 8, 9)))
    assert [choice.text for choice in choices] == ["seed 7", "seed 8", "seed 9"]
    assert [(choice.logprob, choice.num_tokens) for choice in choices] == [(None, 2)] * 3
    assert len(server.asked) == 3
    assert not any({"n", "logprobs"} & body.keys() for body in server.asked)


def test_fewer_answers_than_asked_are_asked_for_again():
    def answer(body):
        return completion(*["first", "second", "third"][: 2 if "n" in body else 1])

    with ChatServer(answer) as server, Client(server.url, "small") as client:
        choices = client.chat(Request(ASK, {}, seeds=(1, 2, 3)))
    assert [choice.text for choice in choices] == ["first", "second", "first"]
    assert [body["seed"] for body in server.asked] == [1, 3]


def test_the_limit_of_tokens_under_its_newer_name():
    def answer(body):
        return (400, {"Says": "use max_completion_tokens"}) if "max_tokens" in body else completion("yes")

    with ChatServer(answer) as server, Client(server.url, "small") as client:
        client.try_out({})
        client.chat(Request(ASK, {"max_tokens": 8}))
    assert server.asked[-1]["max_completion_tokens"] == 8


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-17")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    with ChatServer(lambda _: 401) as server:
        client = Client(server.url, "small", key_variable="MY_KEY")
        with client, pytest.raises(ValueError, match="401") as error:
            client.try_out({})
        with Client(server.url, "small") as client, pytest.raises(RowError):
            client.chat(Request(ASK, {}))
    assert server.keys == ["Bearer secret-17", "Bearer none"]
    assert "secret-17" not in str(error.value)
    with pytest.raises(ValueError, match="NO_KEY"):
        Client(server.url, "small", key_variable="NO_KEY")


def test_what_is_wrong_with_the_server_is_said_before_any_work():
    with ChatServer(lambda body: completion("x") if body["model"] == "small" else 404, ("small", "large")) as server:
        with Client(server.url, "smal") as client, pytest.raises(ValueError, match=r"'smal'.*404.*small, large"):
            client.try_out({})
        with Client(server.url) as client, pytest.raises(ValueError, match=r"name the model to ask.*small, large"):
            client.try_out({})
        bare = server.url.removesuffix("/v1")
        with Client(bare, "small") as client:
            client.try_out({})
    with Client(server.url, "small") as client, pytest.raises(ValueError, match=r"127\.0\.0\.1.*no server answers"):
        client.try_out({})
    with pytest.raises(ValueError, match="is not the URL of a server"):
        Client("localhost:8000")


def test_a_server_without_a_list_of_models_is_asked_all_the_same():
    with ChatServer(lambda _: completion("x"), models=None) as server, Client(server.url, "any") as client:
        client.try_out({})
        assert client.model == "any"


def test_a_server_that_sends_blanks_for_ever_is_given_up(monkeypatch):
    monkeypatch.setattr(client_module, "RETRIES", 0)
    monkeypatch.setattr(client_module, "GRACE_S", 0.1)
    with ChatServer(lambda _: "") as server, Client(server.url, "small", timeout_s=0.3) as client:
        assert outcomes(client, "a")["a"].reason == "timeout"


def test_thinking_apart_from_the_text_leaves_it_without_a_logprob():
    reply = completion("four", logprobs=True)
    assert read_choices(reply)[0].logprob == -0.5
    reply["choices"][0]["message"]["reasoning_content"] = "two and two"
    (choice,) = read_choices(reply)
    assert (choice.thought, choice.logprob) == (True, None)


def test_a_truncated_answer_is_not_finished():
    (choice,) = read_choices(completion("and so", finish="length"))
    assert (choice.finished, choice.num_tokens) == (False, 2)
    assert [choice.num_tokens for choice in read_choices(completion("a b", "c"))] == [None, None]


def test_tool_calls_go_as_the_protocol_has_them():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "own"}]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    sent = for_the_protocol(turns)
    assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": "ü"}
    assert [turn["tool_call_id"] for turn in sent[2:]] == [call["id"] for call in sent[1]["tool_calls"]]
    assert "id" not in call


def test_a_server_that_does_not_sample_is_refused():
    with ChatServer(lambda _: completion("the likeliest")) as server, Client(server.url, "small") as client:
        with pytest.raises(ValueError, match=r"the most likely token at temperature 0\.8 too"):
            client.try_out({"temperature": 0.8}, num_choices=2)
        client.try_out({"temperature": 0}, num_choices=1)
        client.try_out({"temperature": 0.1}, num_choices=2)


@pytest.mark.parametrize("content", [None, "", "\n\n"])
@pytest.mark.parametrize("takes_n", [True, False])
@pytest.mark.parametrize("gives_thought", [True, False])
def test_a_model_that_still_thinks_when_the_trial_ends_is_taken(content, takes_n, gives_thought):
    """As the reasoning parsers of vLLM and SGLang answer when max_tokens ends the thinking."""

    def answer(body):
        if body["max_tokens"] > 32:
            return completion(*"ab"[: body.get("n", 1)], logprobs="logprobs" in body)
        thought = {"reasoning_content": "Okay, the user wants"} if gives_thought else {}
        choice = {"message": {"role": "assistant", "content": content, **thought}, "finish_reason": "length"}
        return {"choices": [choice] * (body.get("n", 1) if takes_n else 1)}

    with ChatServer(answer) as server, Client(server.url, "small") as client:
        client.try_out({"temperature": 0.7, "max_tokens": 4096}, num_choices=2, logprobs=True)
        assert client.takes_n == takes_n
        choices = client.chat(Request(ASK, {"max_tokens": 4096}, seeds=(1, 2)))
    assert [choice.text for choice in choices] == (["a", "b"] if takes_n else ["a", "a"])
    assert all(choice.logprob == -0.5 for choice in choices)


def test_a_trial_without_text_that_was_not_cut_is_no_answer():
    reply = {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}
    said = r"gives no answer \(not an answer: a choice without text"
    with (
        ChatServer(lambda _: reply) as server,
        Client(server.url, "small") as client,
        pytest.raises(ValueError, match=said),
    ):
        client.try_out({})


def test_text_that_is_missing_is_told_from_text_that_is_empty():
    cut = {"message": {"role": "assistant", "reasoning_content": "Okay"}, "finish_reason": "length"}
    with pytest.raises(RowError, match=r"cut while thinking: .*raise max_tokens"):
        read_choices({"choices": [cut]})
    (choice,) = read_choices(completion("", finish="length"))
    assert (choice.text, choice.finished) == ("", False)
