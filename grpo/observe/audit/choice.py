"""The choice of prompts, made once more: by the curriculum, if there is one, from the outcomes that the books hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.config.data import Curriculum
from grpo.data.curriculum import KEY, parsed
from grpo.data.stream import MixedStream, PromptStream
from grpo.errors import DataError
from grpo.observe.audit.proof import refuted, shown
from grpo.observe.audit.rules import check_prompts, natural
from grpo.observe.audit.seals import AGREES, WHOLE, Sealed
from grpo.run.clock import Clock
from grpo.store.files import json_object

SKIPPED = "a curriculum skips a turn by seed and pass rates alone"
RIGHT = "a pass rate is that of a group's rewards"


class Choice:
    """Takes the prompts of each batch as the run must have."""

    def __init__(self, stream: PromptStream | MixedStream) -> None:
        self.stream = stream
        self.curriculum: Curriculum | None = None
        self.clock: Clock | None = None

    def resume(self, rule: Mapping[str, Any] | None, clock: Clock, step: int) -> None:
        """A start, or a return to the checkpoint of a step, with the rule that it has. Raises ValueError."""
        known = self.stream.recorded(step).get(KEY)
        self.clock = clock
        self.curriculum = None if rule is None else Curriculum.model_validate(rule)
        self.stream.follow(self.curriculum)
        if self.stream.rates:
            self.stream.rates.restore(parsed(known))

    def check(
        self, where: str, step: int, row: Mapping[str, Any], kept: list[str], skipped: list[str], dropped: int
    ) -> None:
        """The batch of a step: the next prompts of the stream, and the turns that were skipped before them."""
        assert self.clock
        chosen = self.stream.choose(len(kept) + len(skipped) + dropped, self.clock.known(step))
        check_prompts(where, [prompt.id for prompt in chosen.prompts], kept, skipped, dropped)
        said = [tuple(turn) for turn in row.get(KEY, {}).get("not_drawn", ())]
        if said != chosen.skipped:
            wrong = next(iter(set(said) ^ set(chosen.skipped)), said[:1])
            found = f"{len(said)} turns are said to be and {len(chosen.skipped)} must be; they differ by {shown(wrong)}"
            raise refuted(where, SKIPPED, found, "a prompt was left out, or taken, without cause")
        if self.curriculum:
            names, pairs = [*kept, *skipped], [*row[KEY]["right"], *row[KEY]["replaced"]]
            outcomes = [(name, natural(right), natural(of)) for name, (right, of) in zip(names, pairs, strict=True)]
            if not all(right <= of > 0 for _, right, of in outcomes):
                raise ValueError("of a group's completions some are right")
            self.stream.record(step, outcomes)

    def check_right(
        self,
        where: str,
        row: Mapping[str, Any],
        sizes: Sequence[int],
        lines: Sequence[tuple[str, bytes]],
        drawn: tuple[str, Sequence[object]] | None,
    ) -> None:
        """Pass rates against sizes of groups and rewards: those in samples.jsonl, and all of a batch `drawn` ahead
        (the checkpoint that holds it, and rewards of its groups).
        """
        if not self.curriculum:
            return
        right = [right for right, _ in row[KEY]["right"]]
        if [of for _, of in row[KEY]["right"]] != list(sizes):
            raise refuted(where, RIGHT, "groups have other sizes than their pass rates say", "it is forged")
        for (place, line), booked in zip(lines, right, strict=False):
            self.check_rewards(place, json_object(line).get("rewards"), booked)
        for rewards, booked in zip(drawn[1] if drawn else [], right, strict=False):
            self.check_rewards(f"checkpoints/{drawn[0] if drawn else ''}", rewards, booked)

    def check_rewards(self, where: str, rewards: object, booked: int) -> None:
        """One group."""
        found = self.passed(rewards)
        if found != booked:
            said = f"its rewards are {shown(rewards)} and the books have {shown(booked)} right"
            raise refuted(where, RIGHT, said, "prompts were chosen by what did not happen")

    def passed(self, rewards: object) -> int:
        """How many of a group's rewards are right."""
        assert self.curriculum
        if not isinstance(rewards, list):
            raise TypeError(f"rewards are a list, and not {shown(rewards)}")
        return sum(reward >= self.curriculum.pass_reward for reward in rewards)

    def check_sealed(self, sealed: Sealed) -> None:
        """What a checkpoint knows of pass rates."""
        where = f"checkpoints/{sealed.name}/state.json"
        try:
            saved = parsed(sealed.commit.state["progress"]["prompts"].get(KEY))
        except DataError as error:
            raise refuted(where, WHOLE, shown(str(error)), "nothing can be resumed from it") from error
        known = parsed(self.stream.recorded(sealed.commit.step).get(KEY))
        odd = [name for name in {**saved, **known} if saved.get(name) != known.get(name)]
        if odd:
            found = f"{shown(odd[0])} has {shown(saved.get(odd[0]))} there and {shown(known.get(odd[0]))} in the books"
            raise refuted(where, AGREES, found, "a resume from it would choose other prompts")
