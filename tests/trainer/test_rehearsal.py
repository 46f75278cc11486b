"""What ranks try before the first step leaves no trace, and what is wrong ends all of them with a sentence."""

from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config
from grpo.errors import CheckpointError, ConfigError
from tests.models import tiny_folder
from tests.ranks import free_port, run_ranks
from tests.trainer.test_policy_trainer import ROWS, moving_parts, open_trainer, settings


def start_twice(rank: int, world_size: int, port: int, configs: list[Config]) -> list[Any]:
    """For each configuration: the state after a start and after a step, without a rehearsal and with one."""
    from grpo.trainer import policy_trainer

    rehearse = policy_trainer.rehearse_update
    answers = []
    for config in configs:
        states = []
        for function in (lambda *arguments: None, rehearse):
            policy_trainer.rehearse_update = function
            trainer = open_trainer(config, rank, world_size, port)
            start = moving_parts(trainer)
            stats = trainer.step(ROWS, 1)
            states.append((start, stats["train/loss"], stats["train/grad_norm"], moving_parts(trainer)))
        answers.append((*states, trainer.tolerance))
    trainer.close()
    return answers


@pytest.mark.slow
def test_an_update_that_is_thrown_away_leaves_every_bit_as_it_was(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    cases = [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")]
    configs = [settings(folder, model={"dtype": dtype}, train={"zero_stage": stage}) for stage, dtype in cases]
    for answers in run_ranks(2, start_twice, free_port(), configs):
        for (without, with_one, tolerance), case in zip(answers, cases, strict=True):
            assert without == with_one, case
            assert without[0] != without[3], "a step moves what is compared"
            assert 0.002 <= tolerance <= (0.0021 if case[1] == "float32" else 0.2)


def start_wrong(rank: int, world_size: int, port: int, folder: Path) -> list[str]:
    """What ranks say of a packed attention that is wrong; the last one only under DeepSpeed."""
    from transformers import AttentionInterface

    from grpo.trainer import policy_trainer, rehearsal
    from tests.trainer.test_proof import ATTENTION, HEALTHY, full_rows, other_scale

    said = []
    for attention, stage, dtype in ((full_rows, 3, "bfloat16"), (other_scale, 1, "float32"), (None, 2, "float32")):
        AttentionInterface._global_mapping[ATTENTION] = attention or HEALTHY
        if attention is None:
            proven = rehearsal.prove_on_rank_0

            def prove_then_break(policy: Any, config: Config, proven: Any = proven) -> Any:
                proof = proven(policy, config)
                AttentionInterface._global_mapping[ATTENTION] = other_scale
                return proof

            policy_trainer.prove_on_rank_0 = prove_then_break
        config = settings(folder, model={"dtype": dtype}, train={"zero_stage": stage})
        try:
            open_trainer(config, rank, world_size, port)
        except ConfigError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_a_wrong_forward_ends_all_ranks_alike(tmp_path: Path) -> None:
    first, second = run_ranks(2, start_wrong, free_port(), tiny_folder(tmp_path / "model"))
    assert first == second and len(first) == 3
    assert "packed rows of LlamaForCausalLM differ in float32 from rows alone by" in first[0]
    assert "packed rows of LlamaForCausalLM differ in float32" in first[1]
    assert "a rank must compute the model under DeepSpeed as it does without" in first[2]


def try_to_save(rank: int, world_size: int, port: int, config: Config, place: Path) -> list[str]:
    from grpo.trainer import saving

    trainer = open_trainer(config, rank, world_size, port)
    trainer.try_saving(place)
    said = [",".join(sorted(path.name for path in (place / "policy").iterdir()))]

    class Unwritable:
        def save_pretrained(self, path: Path) -> None:
            raise ValueError("Fix these issues to save the configuration.")

    saving.load_tokenizer = lambda config: Unwritable()
    for goal in (place / "again", place / "no" / "\0"):
        try:
            trainer.try_saving(goal)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    trainer.close()
    return said


def try_to_save_adapters(rank: int, world_size: int, port: int, configs: list[Config], place: Path) -> list[Any]:
    from peft import LoraConfig

    said: list[Any] = []
    for number, config in enumerate(configs):
        trainer = open_trainer(config, rank, world_size, port)
        trainer.try_saving(place / f"{number}")
        found = (place / f"{number}").rglob("*")
        said.append(sorted(str(path.relative_to(place / f"{number}")) for path in found if path.is_file()))

    def full(self: Any, path: Path) -> None:
        raise OSError(28, "No space left on device")

    LoraConfig.save_pretrained = full
    try:
        trainer.try_saving(place / "full")
    except CheckpointError as error:
        said.append(str(error))
    trainer.close()
    return said


@pytest.mark.slow
def test_a_trial_save_of_an_adapter(tmp_path: Path) -> None:
    """What its checkpoints will hold, and no more."""
    model, lora = tiny_folder(tmp_path / "model"), {"lora": {"rank": 2}}
    configs = [settings(model, train=lora, checkpoint={"merged": merged}) for merged in (True, False)]
    both, alone, refused = run_ranks(1, try_to_save_adapters, free_port(), configs, tmp_path)[0]
    assert alone == ["adapter/adapter_config.json"]
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert both == [*alone, *(f"policy/{name}" for name in names)]
    assert "full/adapter failed" in refused and "No space left" in refused


@pytest.mark.slow
def test_a_trial_save_of_all_ranks(tmp_path: Path) -> None:
    config = settings(tiny_folder(tmp_path / "model"), train={"zero_stage": 3})
    first, second = run_ranks(2, try_to_save, free_port(), config, tmp_path)
    assert first[1:] == second[1:]
    assert first[0] == "config.json,generation_config.json,tokenizer.json,tokenizer_config.json"
    assert (
        first[1].startswith("ConfigError: model.path = ") and "cannot write its tokenizer (ValueError: Fix" in first[1]
    )
