"""The terms of the reward: built in, a function of the user, a service or a judge; and how services are asked."""

from pydantic import Field, model_validator

from grpo.config.fields import HttpUrl, Line, Pattern, Place, RewardName, Seconds, Variable
from grpo.config.section import Section

JUDGE_PROMPT = """Judge an answer to a question.

Question:
{question}

Reference answer:
{answer}

Answer to judge:
{completion}

Compare its result with the reference. End with a line "Score: N", N from 0 (wrong) to 10 (right)."""


class Judge(Section):
    """How a language model judges a completion."""

    model: Line
    """Name of the model at the server."""
    prompt: str = JUDGE_PROMPT
    """The user's message; `{question}`, `{completion}` and `{answer}` are replaced."""
    score: Pattern = r"(?i)\bscore\W*(\d+(?:\.\d+)?)"
    """Regular expression whose only group is the verdict: a number, or one of `words`. The last match counts."""
    words: dict[str, float] = {}
    """Verdicts in words and their numbers, such as {"yes": 1, "no": 0}; case does not matter."""
    scale: tuple[float, float] = (0.0, 10.0)
    """The verdicts that are a reward of 0 and of 1. A number outside is a failed call."""
    max_tokens: int = Field(512, ge=1, le=1_000_000)
    """Longest reply, in tokens; one that is cut is a failed call."""
    temperature: float = Field(0.0, ge=0, le=2)
    """Sampling temperature of the judge."""

    @model_validator(mode="after")
    def _check(self) -> "Judge":
        if "{completion}" not in self.prompt:
            raise ValueError("prompt: a judge needs what it judges; write {completion} where it shall stand")
        if not self.scale[0] < self.scale[1]:
            raise ValueError("scale: write the verdict that is worth 0 before the one that is worth 1, such as [0, 10]")
        return self


class RewardFunction(Section):
    """One term of the reward: of this program, a function of yours, or a service."""

    function: RewardName = "gsm8k"
    """A built-in reward (gsm8k, boxed, exact, math) or "module:function" with (prompt, completion, answer) -> float."""
    weight: float = Field(1.0, ge=-1e6, le=1e6)
    """Factor of this reward in the sum."""
    url: HttpUrl | None = None
    """Instead of a function: takes {"prompt", "completion", "answer"}, returns {"reward": number}; see reward_http."""
    judge: Judge | None = None
    """Makes `url` an OpenAI-compatible server (http://host/v1) whose model gives the reward."""
    token_variable: Variable | None = None
    """Environment variable of the driver that holds the bearer token for `url`."""

    @property
    def name(self) -> str:
        """What errors and the order of calls know it by."""
        return self.function if self.url is None else f"{self.url} ({self.judge.model})" if self.judge else self.url

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardFunction":
        if self.url is not None and "function" in self.model_fields_set and self.function != "gsm8k":
            raise ValueError("a reward is either a function or a url; write them as two rewards")
        if self.url is None and (self.judge or self.token_variable):
            raise ValueError("judge and token_variable belong to a url; name the server in url")
        return self


class RewardHttp(Section):
    """How rewards with a url are asked. What a failed call does is said by reward_code.on_failure and max_failures."""

    concurrency: int = Field(16, ge=1, le=4096)
    """Requests under way at once."""
    seconds: Seconds = 30
    """Longest time of one request."""
    attempts: int = Field(8, ge=1, le=100)
    """Requests for one reward while the service does not answer, is busy (429) or broken (5xx); waits grow to 30 s."""
    max_requests: int | None = Field(None, ge=1, le=1_000_000_000_000)
    """Most requests of the whole run, over all its starts; one more ends it. null: no limit."""
    cache: bool = True
    """Ask once for equal requests; replies are kept in the run's folder, so steps made again get the same rewards."""
    proxy: HttpUrl | None = None
    """Proxy for these requests; those that the environment names are not used."""
    ca_file: Place | None = None
    """PEM file of the authorities that are trusted instead of the system's."""
