"""An LLM judge: what it is asked, and how its reply is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.config import RewardFunction
from grpo.rewards.judge import LONGEST_VERDICT, BadReply, address, read_reply, request_body
from grpo.rewards.registry import RewardScorer
from grpo.types import Prompt
from tests.reward_helpers import grouped
from tests.rewards.service import service
from tests.rewards.test_http import asking

PROMPT = Prompt("file:0", "What is {answer}?", "4", (1,))


def judged(**judge):
    return RewardFunction.model_validate({"url": "http://host/v1/", "judge": {"model": "big", **judge}})


def replied(text, reason="stop"):
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"message": message, "finish_reason": reason}]}).encode()


def test_the_request_is_a_chat_completion_and_placeholders_are_replaced_once():
    reward = judged(prompt="Q {question} C {completion} A {answer}", max_tokens=7)
    assert address(reward) == "http://host/v1/chat/completions"
    assert json.loads(request_body(reward, PROMPT, "{question}{answer}")) == {
        "model": "big",
        "messages": [{"role": "user", "content": "Q What is {answer}? C {question}{answer} A 4"}],
        "temperature": 0.0,
        "max_tokens": 7,
    }


@pytest.mark.parametrize(
    ("reply", "judge", "reward"),
    [
        ("Good.\nScore: 10", {}, 1.0),
        ("score: 0", {}, 0.0),
        ("**Score:** 7.5", {}, 0.75),
        ("Score: 2 at first sight. But then\nScore: 9", {}, 0.9),
        ("verdict=3", {"score": r"verdict=(\d)", "scale": [1, 5]}, 0.5),
        ("-1", {"score": r"(-?\d)", "scale": [-1, 1]}, 0.0),
        ("[[YES]]", {"score": r"\[\[(\w+)\]\]", "words": {"yes": 1, "no": 0}}, 1.0),
        ("no", {"score": r"(yes|no)", "words": {"Yes": 1, "No": -0.5}}, -0.5),
    ],
)
def test_the_last_verdict_counts(reply, judge, reward):
    assert read_reply(judged(**judge), replied(reply)) == reward


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (replied("I cannot judge that"), "no verdict"),
        (replied("Score: 11"), "within judge.scale"),
        (replied("maybe", "stop"), "no verdict"),
        (replied("Score: 5", "length"), "raise judge.max_tokens"),
        (replied(None), "message is NoneType"),
        (b'{"choices": []}', "no choices"),
        (b'{"error": {"message": "no such model"}}', "no choices"),
        (b"[]", "no choices"),
        (b"null", "no choices"),
        (b"oops", "JSON"),
    ],
)
def test_a_reply_without_a_verdict_is_no_reward(content, said):
    with pytest.raises(BadReply, match=said):
        read_reply(judged(), content)


def test_a_group_that_may_be_absent_and_words_that_are_no_numbers_are_no_reward():
    with pytest.raises(BadReply, match="no verdict"):
        read_reply(judged(score=r"Score(: \d)?"), replied("Score"))
    with pytest.raises(BadReply, match="within judge.scale"):
        read_reply(judged(score=r"(\w+)"), replied("nan"))
    assert read_reply(judged(), replied("x " * 3 * LONGEST_VERDICT + "Score: 10")) == 1.0


@given(st.binary(max_size=200) | st.text().map(replied))
def test_a_reply_is_a_reward_or_a_bad_reply(content):
    for reward in (judged(), RewardFunction.model_validate({"url": "http://host"})):
        try:
            assert 0.0 <= read_reply(reward, content) <= 10.0
        except BadReply as error:
            assert str(error).isprintable()


def test_a_judge_over_the_network():
    def answer(_, body):
        right = "four" in body["messages"][0]["content"].partition("Answer to judge:")[2]
        return json.loads(replied(f"Score: {10 if right else 0}"))

    with service(answer) as (url, seen):
        config = asking({"url": f"{url}/v1", "judge": {"model": "big"}})
        with RewardScorer(config) as scorer:
            assert scorer.score(grouped(["it is four", "five"]))[0].rewards_G == [1.0, 0.0]
    assert set(seen.paths) == {"/v1/chat/completions"}
