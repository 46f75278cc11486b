"""The logical clock: which weights may make the samples of a step. The one place that says so.

Step k trains batch k and makes version k of the weights; version 0 is the start. Weights are published, for engines to
sample from, at the start, after every `sync.every`-th step, and where a policy is evaluated. With
s = `rollout.max_staleness`, batch k is sampled from the newest published version that is at most k - 1 - s
(`between_batches`), or from that one and newer ones, token by token (`in_flight`).
"""

from dataclasses import dataclass

from grpo.config import Config


@dataclass(frozen=True)
class Clock:
    """Of one start of a run, which began with version `base`: older ones are not to be had, whatever the rule says."""

    staleness: int
    every: int
    in_flight: bool
    eval_every: int
    evaluates: bool
    last: int
    base: int = 0

    @classmethod
    def of(cls, config: Config, held_out: bool, base: int = 0) -> "Clock":
        """The clock of a configuration; `held_out` says whether there are prompts to evaluate."""
        in_flight = config.rollout.max_staleness > 0 and config.rollout.update == "in_flight"
        run, every = config.run, config.sync.every
        return cls(config.rollout.max_staleness, every, in_flight, config.eval.every, held_out, run.steps, base)

    def evaluated(self, step: int) -> bool:
        """Whether held-out prompts are scored with the policy after that step."""
        return self.evaluates and (step in (0, self.last) or due(step, self.eval_every))

    def published(self, version: int) -> bool:
        """Whether engines get these weights."""
        return version in (0, self.base) or due(version, self.every) or self.evaluated(version)

    def oldest(self, step: int) -> int:
        """The oldest version that a sample of the step's batch may have; `between_batches` the only one."""
        version = max(step - 1 - self.staleness, self.base, 0)
        while not self.published(version):
            version -= 1
        return version

    def newest(self, step: int) -> int:
        """The newest version that a sample of the step's batch may have."""
        return max(step - 1, 0) if self.in_flight else self.oldest(step)

    def known(self, step: int) -> int:
        """The last batch by whose outcomes the prompts of the step's batch may be chosen, however early others are."""
        return step - 1 - self.staleness

    def furthest(self, trained: int) -> int:
        """The last step whose batch may be sampled once that many steps are trained."""
        return min(trained + 1 + self.staleness, self.last)


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after this one; 0 means never."""
    return every > 0 and step % every == 0
