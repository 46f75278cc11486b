"""Rewards over the network: many requests side by side, repeated while a service does not answer, each paid for once.

A request that fails is a `Failure`, never a reward of 0; the registry decides what it does.
"""

import asyncio
import hashlib
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config import Config, RewardFunction
from grpo.config.text import first_line
from grpo.errors import ConfigError, DeadlineExceeded, RewardError
from grpo.rewards.judge import BadReply, address, read_reply, request_body, shown
from grpo.rewards.pool import Call
from grpo.rewards.process import Failure
from grpo.rewards.replies import ReplyCache

if TYPE_CHECKING:
    import httpx
    from tenacity import RetryCallState

LONGEST_REPLY = 4 * 2**20
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between two requests for the same reward; they double, and are spread at random."""
BUSY = {408, 425, 429, 500, 502, 503, 504, 529}
"""Answers of a service that may do better later."""


class NoReply(Exception):
    """What a second request may mend; `wait` seconds are what the service asks for."""

    def __init__(self, kind: str, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.kind, self.wait = kind, wait


class OutOfBudget(Exception):
    """`reward_http.max_requests` are spent."""


class HttpRewards:
    """The rewards of a run that are services; calls side by side, the same results in the same order."""

    def __init__(self, config: Config, rewards: Sequence[RewardFunction], folder: Path | None = None) -> None:
        """Connects to nothing. Raises ConfigError for a token or a file of authorities that is missing."""
        self.config, self.rewards = config, tuple(rewards)
        self.settings = config.reward_http
        self.headers = [_headers(reward) for reward in self.rewards]
        self.cache = ReplyCache(folder)
        self.requests = self.retries = self.cached = 0
        """Of the last `run`."""
        try:
            self.trusted = ssl.create_default_context(cafile=self.settings.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"reward_http.ca_file: must be a PEM file of authorities, but {self.settings.ca_file}: "
                f"{first_line(error)}; correct it"
            ) from None

    def run(self, calls: Sequence[Call], tolerated: int) -> list[float | Failure | None]:
        """The outcome of each call, in order. After more than `tolerated` failures no further call is begun: None.

        Raises DeadlineExceeded if all together take longer than `deadlines.reward`, RewardError where
        `reward_http.max_requests` are spent.
        """
        self.requests = self.retries = self.cached = 0
        return asyncio.run(self._run(calls, tolerated))

    async def _run(self, calls: Sequence[Call], tolerated: int) -> list[float | Failure | None]:
        import httpx

        limits = httpx.Limits(max_connections=self.settings.concurrency)
        outcomes: list[float | Failure | None] = [None] * len(calls)
        learned: dict[str, float] = {}
        asked: dict[str, asyncio.Future[float | Failure]] = {}
        left = iter(enumerate(calls))
        failed, spent = 0, False

        async def serve(client: httpx.AsyncClient) -> None:
            nonlocal failed, spent
            for place, call in left:
                if failed > tolerated or spent:
                    return
                try:
                    outcomes[place] = await self._outcome(client, call, asked, learned)
                except OutOfBudget:
                    spent = True
                failed += isinstance(outcomes[place], Failure)

        seconds = self.config.deadlines.reward
        try:
            async with (
                asyncio.timeout(seconds),
                # the environment's proxies and .netrc decide nothing
                httpx.AsyncClient(
                    limits=limits, trust_env=False, verify=self.trusted, proxy=self.settings.proxy, timeout=None
                ) as client,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(min(self.settings.concurrency, len(calls))):
                    group.create_task(serve(client))
        except TimeoutError:
            raise DeadlineExceeded(
                f"rewards must be done within deadlines.reward = {seconds:g} s, but {self._names()} took longer; make "
                "it faster, or raise reward_http.concurrency or deadlines.reward"
            ) from None
        finally:
            self.cache.keep(learned)
        if spent:
            raise RewardError(
                f"reward_http.max_requests = {self.settings.max_requests} are spent; raise it and name it in "
                "run.allow_drift to go on"
            )
        return outcomes

    async def _outcome(
        self,
        client: "httpx.AsyncClient",
        call: Call,
        asked: dict[str, "asyncio.Future[float | Failure]"],
        learned: dict[str, float],
    ) -> float | Failure:
        """The reward of one call; equal requests are sent once."""
        reward = self.rewards[call.function]
        body = request_body(reward, call.prompt, call.sample.text)
        key = hashlib.sha256(address(reward).encode() + b"\n" + body).hexdigest()[:32]
        if self.settings.cache:
            if (known := self.cache.rewards.get(key)) is not None:
                self.cached += 1
                return known
            if key in asked:
                self.cached += 1
                return await asyncio.shield(asked[key])
        future = asked[key] = asyncio.get_running_loop().create_future()
        try:
            outcome = await self._asked(client, call.function, body)
        except BaseException:
            future.cancel()
            raise
        future.set_result(outcome)
        if self.settings.cache and not isinstance(outcome, Failure):
            learned[key] = outcome
        return outcome

    async def _asked(self, client: "httpx.AsyncClient", place: int, body: bytes) -> float | Failure:
        """Requests until there is a reply, at most `reward_http.attempts`."""
        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

        def wait(state: "RetryCallState") -> float:
            error = state.outcome.exception() if state.outcome else None
            asked_for = error.wait if isinstance(error, NoReply) else 0.0
            return max(asked_for, spread(state))

        spread = wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(NoReply),
                stop=stop_after_attempt(self.settings.attempts),
                wait=wait,
                reraise=True,
            ):
                with attempt:
                    self.retries += attempt.retry_state.attempt_number > 1
                    return read_reply(self.rewards[place], await self._reply(client, place, body))
        except BadReply as error:
            return Failure("bad_reply", str(error))
        except NoReply as error:
            return Failure(error.kind, f"{error}, {self.settings.attempts} times", outside=True)
        raise AssertionError("the last attempt returns or raises")

    async def _reply(self, client: "httpx.AsyncClient", place: int, body: bytes) -> bytes:
        """The content of a reply to one request. Raises NoReply, BadReply, OutOfBudget."""
        import httpx

        if self.settings.max_requests is not None and self.cache.requests >= self.settings.max_requests:
            raise OutOfBudget
        self.cache.requests += 1
        self.requests += 1
        try:
            async with (
                asyncio.timeout(self.settings.seconds),
                client.stream("POST", address(self.rewards[place]), content=body, headers=self.headers[place]) as reply,
            ):
                content = bytearray()
                async for chunk in reply.aiter_raw():
                    content += chunk
                    if len(content) > LONGEST_REPLY:
                        raise BadReply(f"answered with more than {LONGEST_REPLY} bytes")
        except TimeoutError:
            raise NoReply("timeout", f"took longer than reward_http.seconds = {self.settings.seconds:g}") from None
        except httpx.HTTPError as error:
            raise NoReply("connection", f"cannot be reached ({first_line(error) or type(error).__name__})") from None
        if reply.status_code in BUSY:
            asked_for = _seconds(reply.headers.get("retry-after"))
            raise NoReply("status", f"answered {reply.status_code}: {shown(bytes(content))}", asked_for)
        if reply.status_code != 200:
            raise BadReply(f"answered {reply.status_code}: {shown(bytes(content))}")
        return bytes(content)

    def _names(self) -> str:
        return ", ".join(reward.name for reward in self.rewards)


def _headers(reward: RewardFunction) -> dict[str, str]:
    headers = {"content-type": "application/json", "accept": "application/json", "accept-encoding": "identity"}
    if reward.token_variable is None:
        return headers
    token = os.environ.get(reward.token_variable, "").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"rewards: {reward.url} needs a token in the environment variable {reward.token_variable}, which "
            f"{'holds no token' if token else 'is not set'}; set it where the driver runs"
        )
    return headers | {"authorization": f"Bearer {token}"}


def _seconds(text: str | None) -> float:
    """Of a Retry-After header; 0 for a date, which would compare clocks."""
    try:
        return max(0.0, min(float(text or 0), 3600.0))
    except ValueError:
        return 0.0
