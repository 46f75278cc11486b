"""Fake runs, written through the real recorder: what tests of the run folder start from."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from grpo.config import Config
from grpo.observe.progress import RunProgress
from grpo.observe.recorder import RunRecorder
from grpo.types import Group, Prompt, Sample, Stats

HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> \x1b[31mred\x1b[0m [bold]x[/bold] \u202e {{ 7 * 7 }}"


def make_config(**sections: dict[str, object]) -> Config:
    return Config.model_validate({"model": {"path": "models/tiny"}, "run": {"name": "fake", "steps": 3}} | sections)


def make_group(
    rewards_G: Sequence[float], step: int = 1, row: int = 0, text: str = "#### 4", truncated: int = 0
) -> Group:
    """A scored group; completion i has 10 + i tokens, the first `truncated` ones were cut."""
    prompt = Prompt(f"fake:{row}", f"Question {row}: what is 2 + 2?", "4", tuple(range(5)))
    samples = tuple(
        Sample(
            prompt_id=prompt.id,
            index=index,
            prompt_ids=prompt.token_ids,
            output_ids=tuple(range(10 + index)),
            logprobs=(-0.5,) * (10 + index),
            versions=((0, step - 1),),
            finish_reason="length" if index < truncated else "stop",
            text=f"{text} ({index})",
            reward=reward,
        )
        for index, reward in enumerate(rewards_G)
    )
    return Group(prompt, samples)


SYNC: Stats = {"sync/seconds": 0.05, "sync/bytes": 3.4e6}
"""What a weight sync reports."""


MISMATCH: Stats = {
    f"train/{name}": value
    for name, value in {
        "rollout_kl_k1": 1e-4, "rollout_abs_diff_bounded": 2e-3,
        "rollout_abs_diff_p99": 0.1, "rollout_abs_diff_max": 0.4, "rollout_prob_diff_max": 0.1,
        "rollout_far": 0.0, "rollout_perplexity_ratio": 1.001, "weight_mean": 1.0,
        "weight_min": 0.7, "weight_max": 1.5, "weight_above": 0.0, "weight_below": 0.0, "ess_tokens": 0.999,
        "ess_sequences": 0.95, "chi2_tokens": 1e-3, "chi2_sequences": 0.05, "dropped_tokens": 0.0,
        "dropped_sequences": 0.0, "weights_le_1": 500.0, "weights_le_+Inf": 1000.0,
    }.items()
}  # fmt: skip
"""How sampler and trainer differ."""


def make_stats(step: int, steps: int = 1) -> Stats:
    """What the trainer reports of a step; the numbers move as in a run that learns."""
    done = step / steps
    return {
        "train/loss": 0.01 - 0.03 * done,
        "train/clip_low": 0.01,
        "train/clip_high": 0.02 * done,
        "train/approx_kl": 0.001 + 0.002 * done,
        "train/entropy": 0.9 - 0.5 * done,
        "train/grad_norm": 0.8 - 0.2 * done,
        "train/learning_rate": 1e-4,
        "train/rollout_kl": 1e-4,
        "train/rollout_abs_diff": 2e-3,
        "train/ratio_max": 1.6,
        **MISMATCH,
        "train/tokens": 4000.0,
        "train/updates": 4.0,
        "train/seconds_forward": 0.7,
        "rollout/effective_groups": 0.75,
    }


def write_run(run_dir: Path, steps: int, eval_every: int = 0, text: str = "#### 4", end: bool = True) -> Path:
    """Writes a run's folder; `eval_every` 0: no evaluation, `end` False: as a killed run leaves it."""
    config = make_config(run={"name": "fake", "steps": max(steps, 1), "dir": str(run_dir)})
    recorder = RunRecorder(config, run_dir, quiet_progress(config), ["grpo", "train", "run.yaml", f"run.dir={run_dir}"])
    recorder.__enter__()
    with recorder.phase("weight_sync"):
        recorder.log_sync({"sync/self_test_diff": 1e-6} | SYNC, "digest 0")
    if eval_every:
        _evaluate(recorder, 0, steps, text)
    for step in range(1, steps + 1):
        _step(recorder, step, steps, text)
        if eval_every and (step % eval_every == 0 or step == steps):
            _evaluate(recorder, step, steps, text)
    if end:
        recorder.__exit__(None, None, None)
    return run_dir


def quiet_progress(config: Config) -> RunProgress:
    return RunProgress(config.run.steps, Console(quiet=True))


def _step(recorder: RunRecorder, step: int, steps: int, text: str) -> None:
    right = round(8 * (0.2 + 0.6 * step / steps))
    groups = [make_group([1.0] * (right - row) + [0.0] * (8 - right + row), step, row, text, row) for row in range(2)]
    with recorder.step(step):
        for name in ("rollout", "reward", "advantage", "train", "weight_sync"):
            with recorder.phase(name):
                sum(range(20_000 if name in ("rollout", "train") else 2_000))
                recorder.log_sync(SYNC if name == "weight_sync" else {}, f"digest {step}")
        recorder.log_step(step, groups, make_stats(step, steps))


def _evaluate(recorder: RunRecorder, step: int, steps: int, text: str) -> None:
    accuracy = 0.25 + 0.6 * step / steps
    scores = {"accuracy": accuracy, "pass@4": accuracy + 0.1, "maj@8": accuracy + 0.05}
    rest = {"reward": accuracy, "completion_tokens": 14.0, "truncated_ratio": 0.02}
    with recorder.phase("eval"):
        groups = [make_group([float(accuracy > 0.5)], step + 1, row, f"{text} after {step}") for row in range(3)]
        recorder.log_eval(step, groups, {f"eval/{key}": value for key, value in (scores | rest).items()})
