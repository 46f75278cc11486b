import io

import pytest
from rich.console import Console

from grpo.observe.progress import RunProgress, clock

ROW = {
    "reward/mean": 0.5123,
    "train/entropy": 0.4321,
    "step/tokens_per_second": 412.4,
    "phase/rollout": 1.23,
    "phase/train": 2.0,
    "phase/weight_sync": 0.06,
}


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("grpo.observe.progress.time.monotonic", lambda: self.now)


@pytest.fixture
def clock_(monkeypatch):
    return Clock(monkeypatch)


def plain(steps=45):
    out = io.StringIO()
    return RunProgress(steps, Console(file=out, width=80)), out


def test_a_step_is_one_line(clock_):
    progress, out = plain()
    progress.step_started()
    clock_.now += 36.6
    progress.step_done(12, ROW)
    assert out.getvalue() == (
        "step 12/45  reward 0.512  entropy 0.43  412 tok/s  rollout 1.2s train 2.0s sync 0.1s  left 1:41\n"
    )


def test_a_step_without_training_statistics(clock_):
    progress, out = plain(steps=2)
    progress.step_started()
    progress.step_done(2, {"reward/mean": 1.0, "step/tokens_per_second": 5.0, "phase/rollout": 1.0})
    assert out.getvalue() == "step 2/2  reward 1.000  5 tok/s  rollout 1.0s  left 0:00\n"


def test_time_left_counts_evaluations_between_the_steps(clock_):
    progress, out = plain(steps=4)
    for step in (1, 2):
        progress.step_started()
        clock_.now += 10
        progress.step_done(step, ROW)
        clock_.now += 20  # an evaluation
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["left 0:30", "left 0:40"]


def test_an_evaluation_is_one_line():
    progress, out = plain()
    scores = {"eval/accuracy": 0.714, "eval/pass@4": 0.9, "eval/maj@8": 0.8, "eval/reward": 0.7}
    progress.eval_done(20, 128, scores)
    assert out.getvalue() == "eval at step 20: accuracy 0.71, pass@4 0.90, maj@8 0.80 (128 prompts)\n"


def test_say_shows_the_time_since_the_start(clock_):
    progress, out = plain()
    clock_.now += 12.34
    progress.say("engine 0 ready")
    assert out.getvalue() == "[ 12.3s] engine 0 ready\n"


def test_say_is_one_line_without_markup_emoji_or_escapes(clock_):
    progress, out = plain()
    progress.say("[red]a[/red] :smile: \x1b[31mb\nstep 3/3 \u202e c\x9b")
    assert out.getvalue() == "[  0.0s] [red]a[/red] :smile: \\x1b[31mb\\nstep 3/3 \\u202e c\\x9b\n"


def test_a_long_line_is_not_wrapped():
    progress, out = plain()
    progress.say("x" * 300)
    assert out.getvalue().count("\n") == 1


def test_an_ascii_output_gets_escapes(clock_):
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    RunProgress(1, Console(file=out)).say("→ 4")
    out.flush()
    assert raw.getvalue() == b"[  0.0s] \\u2192 4\n"


def terminal(width=100):
    out = io.StringIO()
    return RunProgress(3, Console(file=out, width=width, force_terminal=True, color_system=None)), out


def test_a_terminal_gets_a_live_line():
    progress, out = terminal()
    progress.step_started()
    progress.phase("weight_sync")
    progress.step_done(1, ROW)
    progress.close()
    shown = out.getvalue()
    assert "step 1/3" in shown and "reward 0.512" in shown and "412 tok/s" in shown and "weight sync" in shown
    assert "left" in shown
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor must come back"


def test_the_live_line_fits_a_terminal_of_80_columns():
    progress, out = terminal(width=80)
    progress.step_started()
    for step in (1, 2, 3):
        progress.step_done(step, ROW)
    progress.phase("advantage")
    progress.close()
    last = out.getvalue().split("\r")[-1].split("\n")[0]
    assert "left" in last and "…" not in last, last


def test_closing_twice_or_before_the_first_step_is_fine():
    progress, out = terminal()
    progress.close()
    progress.step_started()
    progress.close()
    progress.close()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.6, "0:10"), (151, "2:31"), (3599.7, "1:00:00"), (3751, "1:02:31")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
