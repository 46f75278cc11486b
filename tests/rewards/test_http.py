"""Rewards over the network, against a real HTTP server on this machine."""

import json
import os
import threading

import pytest

from grpo.config import Config
from grpo.errors import CheckpointError, ConfigError, DeadlineExceeded, RewardError, ServiceLost
from grpo.rewards import http
from grpo.rewards.registry import RewardScorer
from grpo.run.layout import REWARD_CACHE
from tests.reward_helpers import failed_kinds, grouped
from tests.rewards.service import service, slowly

TEXTS = (["a", "bb"], ["ccc", "dddd"])


def asking(*rewards, deadline=30.0, on_failure="drop_sample", max_failures=1.0, **reward_http):
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "rewards": list(rewards),
            "reward_http": reward_http,
            "reward_code": {"max_failures": max_failures, "on_failure": on_failure},
            "deadlines": {"reward": deadline},
        }
    )


def length(_, body):
    return {"reward": len(body["completion"]) / 10}


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)


def scored(config, *texts_PG, folder=None):
    with RewardScorer(config, folder) as scorer:
        return [group.rewards_G for group in scorer.score(grouped(*(texts_PG or TEXTS)))], scorer


def test_each_sample_has_its_reward_in_order_and_is_asked_with_question_and_answer():
    with service(length) as (url, seen):
        rewards, scorer = scored(asking({"url": url, "weight": 2.0}))
    assert rewards == [[0.2, 0.4], [pytest.approx(0.6), 0.8]]
    assert sorted(seen.requests, key=lambda body: len(body["completion"]))[2] == {
        "prompt": "q1",
        "completion": "ccc",
        "answer": "#### 1",
    }
    assert scorer.failures()["reward/requests"] == 4


def test_weights_add_up_with_functions_and_other_services():
    with service(length) as (url, _), service(lambda *_: {"reward": 1}) as (other, _seen):
        config = asking({"function": "gsm8k"}, {"url": url}, {"url": other, "weight": 10.0})
        rewards, _ = scored(config, ["#### 0", "#### 9"])
    assert rewards == [[pytest.approx(1 + 0.6 + 10), pytest.approx(0.6 + 10)]]


def test_requests_go_side_by_side_but_no_more_than_allowed():
    gate = threading.Barrier(4, timeout=20)  # answers only where four are under way

    def answer(*_):
        gate.wait()
        return {"reward": 1}

    with service(answer) as (url, seen):
        scored(asking({"url": url}, concurrency=4, cache=False), ["a"] * 4, ["b"] * 4)
    assert seen.most == 4


@pytest.mark.parametrize("first", [(503, b"busy"), (429, b"slow down", {"retry-after": "0.01"}), None, (500, b"")])
def test_a_service_that_recovers_costs_nothing(first):
    with service(lambda number, body: first if number <= 3 else length(number, body)) as (url, _):
        rewards, scorer = scored(asking({"url": url}))
    assert rewards == [[0.1, 0.2], [0.3, 0.4]]
    assert failed_kinds(scorer) == {}
    assert scorer.failures()["reward/retries"] == 3


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"<html>", "something else than JSON: '<html>'"),
        ({"reward": "1"}, "a finite number"),
        ({"reward": True}, "a finite number"),
        (b'{"reward": NaN}', "a finite number"),
        (b'{"reward": 1e999}', "a finite number"),
        (b'{"reward": 1' + b"0" * 400 + b"}", "a finite number"),
        ({"score": 1}, "a finite number"),
        ([1], "a finite number"),
        (b"[" * 100_000, "JSON"),
        ((401, b"who are you\x1b[2J"), r"answered 401: 'who are you\x1b[2J'"),
        ((404, b""), "answered 404"),
        ((307, b""), "answered 307"),
    ],
)
def test_a_reply_without_a_reward_is_a_failure_never_a_zero_and_is_not_asked_for_again(reply, said):
    with service(lambda number, body: reply if body["completion"] == "bb" else length(number, body)) as (url, seen):
        rewards, scorer = scored(asking({"url": url}), ["a", "bb", "ccc"])
        assert rewards == [[0.1, 0.3]]
        assert failed_kinds(scorer) == {"bad_reply": 1}
        assert len(seen.requests) == 3
        with pytest.raises(RewardError) as caught:
            scored(asking({"url": url}, on_failure="abort"), ["a", "bb", "ccc"])
    assert said in str(caught.value)
    assert url in str(caught.value) and "sample 1" in str(caught.value)


def test_a_service_that_is_gone_is_worth_another_start_and_no_sample_is_lost_to_it():
    with service(length) as (url, _):
        pass
    with pytest.raises(ServiceLost, match="cannot be reached .* 2 times.*connection"):
        scored(asking({"url": url}, attempts=2, max_failures=0.1))


def test_one_call_of_many_may_time_out():
    gate = threading.Event()

    def answer(number, body):
        if body["completion"] == "bb":
            gate.wait(20)
        return length(number, body)

    with service(answer) as (url, _):
        rewards, scorer = scored(asking({"url": url}, seconds=1, attempts=1), ["a", "bb", "ccc"])
        gate.set()
    assert rewards == [[0.1, 0.3]]
    assert failed_kinds(scorer) == {"timeout": 1}


def test_a_reply_that_trickles_ends_with_the_deadline_of_the_request():
    slow = service(slowly(20, {"reward": 1}))
    with slow as (url, _), pytest.raises(DeadlineExceeded, match="deadlines.reward = 0.5 s"):
        scored(asking({"url": url}, deadline=0.5))


def test_an_endless_reply_is_not_read_to_its_end():
    endless = service(lambda *_: b" " * (http.LONGEST_REPLY + 1))
    with endless as (url, _), pytest.raises(RewardError, match="more than 4194304 bytes"):
        scored(asking({"url": url}, on_failure="abort"), ["a", "b"])


def test_equal_requests_are_sent_once_and_a_later_start_knows_their_rewards(tmp_path):
    with service(length) as (url, seen):
        config = asking({"url": url})
        rewards, scorer = scored(config, ["a", "a", "bb"], folder=tmp_path)
        assert rewards == [[0.1, 0.1, 0.2]]
        assert (len(seen.requests), scorer.failures()["reward/cached"]) == (2, 1)
        with open(tmp_path / REWARD_CACHE, "a") as file:
            file.write('\n{"requests": 99, "rewa')  # a killed start
        scored(config, ["a", "ccc"], folder=tmp_path)
        assert [body["completion"] for body in seen.requests[2:]] == ["ccc"]
        scored(config, ["ccc", "bb"], folder=tmp_path)
        assert len(seen.requests) == 3
        scored(asking({"url": url}, cache=False), ["a", "a"], folder=tmp_path)
        assert len(seen.requests) == 5


def test_a_pipe_in_the_place_of_the_replies_is_named_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / REWARD_CACHE)
    with pytest.raises(CheckpointError, match="must be a regular file"):
        RewardScorer(asking({"url": "http://localhost:1"}), tmp_path)


def test_failures_are_not_kept(tmp_path):
    with service(lambda number, _: (400, b"") if number <= 2 else {"reward": 1}) as (url, seen):
        with pytest.raises(RewardError):
            scored(asking({"url": url}), ["a", "b"], folder=tmp_path)
        again, _ = scored(asking({"url": url}), ["a", "b"], folder=tmp_path)
    assert again == [[1, 1]]
    assert len(seen.requests) == 4


def test_the_budget_counts_every_request_of_every_start(tmp_path):
    with service(length) as (url, seen):
        config = asking({"url": url}, max_requests=5)
        scored(config, ["a", "b", "c"], folder=tmp_path)
        with pytest.raises(RewardError, match="reward_http.max_requests = 5 are spent"):
            scored(config, ["d", "e", "f"], folder=tmp_path)
        assert len(seen.requests) == 5
        assert json.loads((tmp_path / REWARD_CACHE).read_text().splitlines()[-1])["requests"] == 5
        with pytest.raises(RewardError):
            scored(config, ["g", "h"], folder=tmp_path)
        assert len(seen.requests) == 5


def test_the_environment_decides_nothing_but_the_named_token(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("JUDGE_KEY", " s3cret\n")
    with service(length) as (url, seen):
        scored(asking({"url": url, "token_variable": "JUDGE_KEY"}))
    assert {headers["authorization"] for headers in seen.headers} == {"Bearer s3cret"}


@pytest.mark.parametrize("value", [None, "", "two\nlines", "gehe\u00efm"])
def test_a_token_that_is_missing_or_none_is_said_at_once(monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ConfigError, match="environment variable JUDGE_KEY"):
        RewardScorer(asking({"url": "http://localhost:1", "token_variable": "JUDGE_KEY"}))


def test_a_file_of_authorities_that_is_none_is_said_at_once(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    for path in (tmp_path / "ca.pem", tmp_path / "absent.pem"):
        with pytest.raises(ConfigError, match="reward_http.ca_file"):
            RewardScorer(asking({"url": "https://localhost:1"}, ca_file=str(path)))


def test_services_are_tried_before_the_start():
    prompt = grouped(["a"])[0].prompt
    with (
        service(lambda *_: (403, b"no")) as (url, seen),
        RewardScorer(asking({"url": url})) as scorer,
        pytest.raises(RewardError, match="answered 403"),
    ):
        scorer.try_services(prompt)
    assert [body["completion"] for body in seen.requests] == ["#### 0"]
    with RewardScorer(asking({"url": url}, attempts=1)) as scorer, pytest.raises(ServiceLost):
        scorer.try_services(prompt)
    with service(length) as (url, _), RewardScorer(asking({"url": url})) as scorer:
        scorer.try_services(prompt)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([{"url": "ftp://host"}], "must be http"),
        ([{"url": "http://"}], "must be http"),
        ([{"url": "http://me:pw@host"}], "no password"),
        ([{"url": "http://host:99999"}], "[Pp]ort"),
        ([{"url": "http://host", "function": "my:f"}], "either a function or a url"),
        ([{"token_variable": "KEY"}], "belong to a url"),
        ([{"judge": {"model": "m"}}], "belong to a url"),
        ([{"url": "http://host", "judge": {"model": "m", "score": "a"}}], "one group"),
        ([{"url": "http://host", "judge": {"model": "m", "score": "("}}], "regular expression"),
        ([{"url": "http://host", "judge": {"model": "m", "prompt": "hello"}}], "completion"),
        ([{"url": "http://host", "judge": {"model": "m", "scale": [1, 1]}}], "scale"),
    ],
)
def test_what_cannot_be_asked_is_refused(rewards, said):
    with pytest.raises(ValueError, match=said):
        asking(*rewards)
