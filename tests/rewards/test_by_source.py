"""Rewards of a source score its prompts alone, and each call is made for whom it is meant."""

from collections.abc import Sequence

from grpo.config import Config
from grpo.observe.metrics import summarize
from grpo.rewards.built_in import answers_by_source
from grpo.rewards.pool import Call
from grpo.rewards.registry import RewardScorer
from grpo.types import Group, Prompt, Sample

URL = "http://127.0.0.1:9/score"


def config() -> Config:
    sources = [
        {"name": "sums", "source": "a.jsonl"},
        {"name": "words", "source": "b.jsonl", "rewards": [{"function": "exact"}, {"url": URL, "weight": 0.5}]},
    ]
    return Config.model_validate({"model": {"path": "m"}, "data": {"sources": sources}, "eval": {"prompts": 0}})


def group(source: str, answer: str, *texts: str) -> Group:
    prompt = Prompt(f"{source}:1", "?", answer, (1,), source)
    samples = [
        Sample(prompt.id, index, (1,), (2,), (-0.5,), ((0, 0),), "stop", text) for index, text in enumerate(texts)
    ]
    return Group(prompt, tuple(samples))


class Service:
    """Gives 1 for a text of five letters."""

    requests = retries = cached = 0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def run(self, calls: Sequence[Call], tolerated: int) -> list[float]:
        self.asked += [call.sample.text for call in calls]
        return [float(len(call.sample.text) == 5) for call in calls]


def test_each_source_has_its_rewards() -> None:
    with RewardScorer(config()) as scorer:
        service = scorer.http = Service()  # type: ignore[assignment]
        groups = [
            group("sums", "#### 2", "so #### 2", "so #### 3"),
            group("words", "Paris", "Paris", "Lyon", "Milan"),
            group("sums", "#### 5", "#### 4", "#### 5"),
        ]
        scored = scorer.score(groups)
    assert [each.rewards_G for each in scored] == [[1.0, 0.0], [1.5, 0.0, 0.5], [0.0, 1.0]]
    assert service.asked == ["Paris", "Lyon", "Milan"]
    assert scorer.parts == {"gsm8k": [1.0, 0.0, 0.0, 1.0], "exact": [1.0, 0.0, 0.0], URL: [1.0, 0.0, 1.0]}
    stats = summarize(scored, step=1)
    assert (stats["reward/source/sums"], stats["reward/source/words"]) == (0.5, 2 / 3)


def test_prompts_without_a_source_have_no_row_of_their_own() -> None:
    plain = group("", "#### 2", "#### 2", "#### 3")
    run = Config.model_validate({"model": {"path": "m"}})
    with RewardScorer(run) as scorer:
        stats = summarize(scorer.score([plain]), step=1)
    assert [key for key in stats if key.startswith("reward/source")] == []


def test_answers_vote_as_their_source_says() -> None:
    votes = answers_by_source(config())
    assert votes["words"]("so #### Paris") == "paris" and votes["sums"]("so #### Paris") is None
