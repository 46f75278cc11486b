"""The comparison of presets: what a run leaves, what is run again, and that the docs tell what is kept."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import learning
from benchmarks.learning import KEPT, PRESETS, ROOT, SETTINGS, config_of, ended, keep, load, main, spread, table, tell
from benchmarks.learning_plot import curve, picture
from grpo.config import Config
from grpo.config.variants import with_preset

STEPS = SETTINGS["run.steps"]


def make_run(preset: str, seed: int, level: float) -> learning.Run:
    reward = [round(level + 0.01 * step, 4) for step in range(STEPS)]
    return {
        **{"preset": preset, "seed": seed, "settings": SETTINGS},
        **{"reward": reward, "clipped": [0.01] * STEPS},
    }


def write_metrics(folder: Path, steps: int = STEPS, outcome: str = "ok") -> None:
    """As a run of `grpo train` leaves it that was killed after step 2 and went on from step 1."""
    rows: list[dict[str, object]] = [{"event": "start", "step": 0}]
    for step in (1, 2, *range(2, steps + 1)):
        again = len(rows) > 2 and step == 2
        clips = {"train/clip_low": 0.01, "train/clip_high": 0.02}
        rows.append({"event": "step", "step": step, "reward/mean": step / 20 + 0.001 * again, **clips})
    rows += [
        {"event": "eval", "step": steps, "eval/accuracy": 0.87},
        {"event": "end", "step": steps, "outcome": outcome},
    ]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"event": "cut o')


def test_what_is_kept_of_a_run(tmp_path):
    write_metrics(tmp_path / "run")
    found = ended(tmp_path / "run", "gspo", 3)
    assert found is not None
    assert (found["preset"], found["seed"], found["settings"]) == ("gspo", 3, SETTINGS)
    assert found["reward"] == [0.05, 0.101, *(round(step / 20, 4) for step in range(3, STEPS + 1))]
    assert found["clipped"] == [0.03] * STEPS


@pytest.mark.parametrize("steps, outcome", [(STEPS, "interrupted"), (STEPS - 1, "ok")])
def test_a_run_that_broke_off_or_is_shorter_has_not_ended(tmp_path, steps, outcome):
    write_metrics(tmp_path / "run", steps, outcome)
    assert ended(tmp_path / "run", "gspo", 0) is None
    assert ended(tmp_path / "nothing", "gspo", 0) is None


def test_only_what_is_missing_is_run_and_seeds_go_first(tmp_path, monkeypatch, capsys):
    made = []

    def pretend(folder: Path, preset: str, seed: int) -> None:
        made.append((preset, seed))
        write_metrics(folder)

    monkeypatch.setattr(learning, "make", pretend)
    kept = tmp_path / "kept.jsonl"
    keep(kept, {("grpo", 0): make_run("grpo", 0, 0.5)})
    options = ["--seeds", "2", "--presets", "grpo", "dapo", "--out", str(tmp_path), "--kept", str(kept)]
    main([*options, "--at-most", "0"])
    assert made == []
    main([*options, "--at-most", "2"])
    assert made == [("dapo", 0), ("grpo", 1)]
    main(options)
    main(options)
    assert made == [("dapo", 0), ("grpo", 1), ("dapo", 1)]
    assert list(load(kept)) == [("grpo", 0), ("grpo", 1), ("dapo", 0), ("dapo", 1)]
    assert capsys.readouterr().out.endswith(table(load(kept)) + "\n")


def test_runs_of_another_budget_are_not_mixed_in(tmp_path, capsys):
    kept = tmp_path / "kept.jsonl"
    kept.write_text(json.dumps(make_run("grpo", 0, 0.5) | {"settings": {"run.steps": 3}}) + "\n")
    with pytest.raises(SystemExit):
        main(["--kept", str(kept), "--at-most", "0"])
    assert "share their budget, but" in (said := capsys.readouterr().err)
    assert "'run.steps': 3" in said


def test_the_table_compares_seed_by_seed():
    runs = {("dapo", seed): make_run("dapo", seed, 0.5 + 0.1 * seed) for seed in (0, 1)}
    runs |= {("gspo", seed): make_run("gspo", seed, 0.48 + 0.1 * seed) for seed in (0, 1, 2)}
    *_, dapo, gspo = table(runs).splitlines()
    assert dapo == "| `dapo` | 2 | 56.5 ± 7.1 | 60.5 ± 7.1 | 64.5 ± 7.1 |  | 1.0% |"
    assert gspo == "| `gspo` | 3 | 59.5 ± 10.0 | 63.5 ± 10.0 | 67.5 ± 10.0 | -2.0 ± 0.0 | 1.0% |"
    assert (spread([]), spread([0.5]), spread([0.01, 0.03], "+")) == ("", "50.0", "+2.0 ± 1.4")


def test_the_picture_has_a_panel_for_each_preset_and_no_room_between_mean_and_band():
    runs = [make_run(preset, seed, 0.5 + 0.02 * seed) for preset in PRESETS for seed in range(3)]
    root = ElementTree.fromstring(picture(runs))
    tag = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{tag}polygon")) == len(PRESETS)
    assert len(root.findall(f"{tag}polyline")) == len(PRESETS) ** 2
    assert len(root.findall(f"{tag}circle")) == len(runs) + len(PRESETS)
    words = [element.text for element in root.iter(f"{tag}text")]
    assert [f"{preset}, 3 seeds" in words for preset in PRESETS] == [True] * len(PRESETS)
    assert curve(runs[:3])[1] == (2, pytest.approx(0.53), pytest.approx(0.02))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_is_the_quickstart_with_the_preset_alone(preset):
    config = Config.model_validate(with_preset(config_of(preset)))
    plain = Config.model_validate(with_preset(config_of("dapo")))
    assert config.algorithm.preset == preset
    assert config.train == plain.train and config.eval == plain.eval and config.data == plain.data
    assert {key: value for key, value in config.rollout if key != "refill"} == {
        key: value for key, value in plain.rollout if key != "refill"
    }


def test_the_table_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    other = "| preset | what it fills in |\n|---|---|\n| `grpo` | x |\n"
    page.write_text(f"{other}\nwords\n\n| preset | seeds | steps of old |\n|---|\n| `dapo` | 1 |\n\nmore\n")
    new = table({("dapo", 0): make_run("dapo", 0, 0.5)})
    tell(page, new)
    tell(page, new)
    assert page.read_text() == f"{other}\nwords\n\n{new}\n\nmore\n"


def test_the_docs_tell_what_is_kept():
    runs = load(KEPT)
    assert set(PRESETS) <= {preset for preset, _ in runs}
    assert picture(learning.in_order(runs)) == KEPT.with_suffix(".svg").read_text(encoding="utf-8")
    assert table(runs) in (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
