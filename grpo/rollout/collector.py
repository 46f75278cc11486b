"""From prompts to what a step learns from, here and now: nothing is sampled ahead of the step that it is for."""

from collections.abc import Callable, Mapping, Sequence

from grpo.interfaces import Batch, PromptStream, Recorder, Weights
from grpo.rollout.drawing import Draw, Drawer, check_versions
from grpo.run.stopping import StopRequest
from grpo.types import Groups, Prompt, Stats


class InlineCollector:
    """A `Collector` that makes each batch when it is asked for. `held_out` may be empty: then nothing is evaluated."""

    def __init__(
        self,
        drawer: Drawer,
        weights: Weights,
        recorder: Recorder,
        stop: StopRequest,
        held_out: Sequence[Prompt] = (),
    ) -> None:
        self.drawer, self.weights, self.recorder, self.stop, self.held_out = drawer, weights, recorder, stop, held_out
        self.prompts: PromptStream = drawer.prompts

    def next(self, step: int, sampled: Callable[[], None]) -> Batch:
        """The batch of a step, from the next prompts. Raises WeightSyncError for a sample of other weights."""
        draw, record = Draw(step), self.recorder
        while self.drawer.wants(draw):
            with record.phase("rollout"):
                prompts = self.drawer.take(draw)
                groups = self.drawer.sample(draw, prompts)
                check_versions(groups, self.weights.version, self.weights.version)
            sampled()
            with record.phase("reward"), self.stop.abortable():
                self.drawer.score(draw, groups)
        with record.phase("advantage"):
            return self.drawer.batch(draw)

    def evaluate(self, step: int) -> tuple[Groups, Stats]:
        """Scored groups of the held-out prompts, and their scores."""
        groups = self.drawer.evaluate(self.held_out, step)
        with self.stop.abortable():
            return self.drawer.scores(groups)

    def state(self) -> Mapping[str, object]:
        """Where the stream of prompts is."""
        return self.prompts.state()

    def restore(self, step: int, prompts: Mapping[str, object], drawn: bytes) -> None:
        """Goes back to after a step. What a run that sampled ahead had drawn then is drawn again."""
        self.prompts.restore(prompts)

    def recorded(self, step: int) -> Mapping[str, object]:
        """What became of prompts up to that step."""
        return self.drawer.prompts.recorded(step)

    def drawn(self, step: int) -> Callable[[], bytes]:
        """Nothing."""
        return bytes

    def stop_ahead(self) -> None:
        """Nothing works ahead."""
