"""What a terminal shows of a run: a live line where the output is a terminal, one plain line a step elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from grpo.config.text import clean
from grpo.types import Stats

# Short names of the phases that a step's line times.
TIMED = {"rollout": "rollout", "train": "train", "weight_sync": "sync"}


def clock(seconds: float) -> str:
    """151 -> "2:31", 3751 -> "1:02:31"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def learned(row: Stats) -> str:
    """What a step's row says of its success: the mean reward, or the loss of a supervised step; "" if it made none."""
    named = {"reward": row.get("reward/mean"), "loss": row.get("train/loss")}
    return next((f"{name} {value:.3f}" for name, value in named.items() if value is not None), "")


class RunProgress:
    """Tells a person how a run of `steps` steps goes. Lines carry no text of the model that is not escaped."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self._steps = steps
        self._started = time.monotonic()
        self._first_step_at: float | None = None
        self._first_step = 0
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """Prints one line with the time since the start: `[ 12.3s] engine 0 ready`."""
        self._print(f"[{time.monotonic() - self._started:5.1f}s] {text}")

    def phase(self, name: str) -> None:
        """Shows what is running; "" for nothing."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, phase=name.replace("_", " "))

    def rewind(self, step: int) -> None:
        """The next step is the one after `step`."""
        self._first_step, self._first_step_at = step, None

    def step_started(self) -> None:
        """The time that is left is reckoned from here: the start of the actors tells nothing about it."""
        if self._first_step_at is None:
            self._first_step_at = time.monotonic()
            if self.console.is_terminal and self._live is None:
                self._start_live()

    def step_done(self, step: int, row: Stats) -> None:
        """`row` is the step's row of metrics.jsonl."""
        left = clock(self._seconds_left(step))
        speed = f"{row['step/tokens_per_second']:.0f} tok/s"
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=step, reward=learned(row), speed=speed, left=f"{left} left")
            return
        parts = [f"step {step}/{self._steps}", *filter(None, [learned(row)])]
        if "train/entropy" in row:
            parts.append(f"entropy {row['train/entropy']:.2f}")
        times = [f"{name} {row[f'phase/{phase}']:.1f}s" for phase, name in TIMED.items() if f"phase/{phase}" in row]
        self._print("  ".join([*parts, speed, " ".join(times), f"left {left}"]))

    def eval_done(self, step: int, prompts: int, scores: Stats) -> None:
        """Prints accuracy, pass@k and maj@k, or the loss of a warm-up, as far as `scores` has them."""
        shown = {key.removeprefix("eval/"): value for key, value in scores.items()}
        ranks = [f"{name} {shown[name]:.2f}" for name in shown if name == "accuracy" or "@" in name]
        ranks += [f"loss {shown['loss']:.4f}"] if "loss" in shown else []
        self._print(f"eval at step {step}: {', '.join(ranks)} ({prompts} prompts)")

    def close(self) -> None:
        """Gives the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _start_live(self) -> None:
        self._live = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=8),
            *(TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("reward", "speed", "phase")),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=self.console,
        )
        self._task = self._live.add_task("", total=self._steps, reward="", speed="", phase="", left="")
        self._live.start()

    def _seconds_left(self, step: int) -> float:
        """Evaluations and saves between the steps count as part of their cost."""
        assert self._first_step_at is not None, "step_started comes before step_done"
        return (time.monotonic() - self._first_step_at) / (step - self._first_step) * (self._steps - step)

    def _print(self, text: str) -> None:
        encoding = self.console.encoding
        safe = clean(text).encode(encoding, "backslashreplace").decode(encoding)
        self.console.print(Text(safe), soft_wrap=True)  # Text: neither markup nor emoji codes are read
