"""What the tests of rewards share: configurations, groups, and a look at the processes that a scorer leaves."""

import time
from pathlib import Path

from grpo.config import Config
from grpo.rewards.registry import RewardScorer
from grpo.rewards.sandbox import landlock
from grpo.types import Group, Prompt, Sample


def configured(*rewards, deadline=60.0, **reward_code):
    """Rewards by name or (name, weight); the keywords are keys of reward_code."""
    rewards = [reward if isinstance(reward, tuple) else (reward, 1.0) for reward in rewards]
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "rewards": [{"function": function, "weight": weight} for function, weight in rewards],
            "reward_code": {"max_failures": 1.0} | ({} if landlock.abi() else {"isolation": "none"}) | reward_code,
            "deadlines": {"reward": deadline},
        }
    )


def grouped(*texts_PG):
    groups = []
    for row, texts_G in enumerate(texts_PG):
        prompt = Prompt(id=f"file:{row}", question=f"q{row}", answer=f"#### {row}", token_ids=(1,))
        samples = [Sample(prompt.id, i, (1,), (2,), (0.0,), ((0, 0),), "stop", text) for i, text in enumerate(texts_G)]
        groups.append(Group(prompt, tuple(samples)))
    return groups


def rewards_of(config, groups):
    with RewardScorer(config) as scorer:
        return [group.rewards_G for group in scorer.score(groups)]


def failed_kinds(scorer):
    """{"timeout": 1}: the kinds of failure of the last score that happened."""
    prefix = "reward/failures_"
    return {key.removeprefix(prefix): int(n) for key, n in scorer.failures().items() if key.startswith(prefix) and n}


def processes_of(folder):
    """Living processes whose HOME lies in the folder: workers, their supervisors and all they started, by pid."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes()
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"HOME={folder}/".encode() in environment and state not in "ZX":
            found.append(int(path.name))
    return found


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
