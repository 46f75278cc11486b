"""TRL's half of the benchmark: runs in TRL's own environment, reads the work from a JSON file, writes seconds per step.

python benchmarks/trl_side.py work.json result.json
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the comparison is of CPUs, also on a machine that has a GPU

import torch
import transformers
import trl
from datasets import Dataset
from rewards import share_of_e
from transformers import TrainerCallback

# (weights, autocast to bf16). bfloat16 is what TRL does by itself with a bf16 checkpoint; mixed keeps fp32 weights
# under bf16 autocast, which is nearest to the arithmetic of DeepSpeed's bf16 mode, and slower.
DTYPES = {"float32": ("float32", False), "bfloat16": ("bfloat16", True), "mixed": ("float32", True)}


class TimedTrainer(trl.GRPOTrainer):
    """GRPOTrainer with a clock around its phases; nothing else is changed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        super().__init__(*args, **kwargs)

    def timed(self, phase: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
        return result

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        result = self.timed("generation", super()._generate_single_turn, prompt_ids, *args, **kwargs)
        lengths = [len(ids) for ids in result[0]]
        self.tokens = {"prompt": sum(map(len, prompt_ids)), "completion": sum(lengths), "shortest": min(lengths)}
        return result

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        return self.timed("rollout", super()._generate_and_score_completions, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return self.timed("forward", super().compute_loss, *args, **kwargs)


class StepClock(TrainerCallback):
    """One record per step: from the end of the step before to the end of this one, everything included."""

    def __init__(self) -> None:
        self.trainer: TimedTrainer | None = None
        self.steps: list[dict[str, Any]] = []
        self.optimizer_start = 0.0
        self.last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer_start = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.seconds["optimizer"] = time.perf_counter() - self.optimizer_start

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        now = time.perf_counter()
        spent = self.trainer.seconds
        total = now - self.last
        self.steps.append(
            {
                "total": total,
                "generation": spent["generation"],
                "update": total - spent["rollout"],
                "other": spent["rollout"] - spent["generation"],
                "forward": spent["forward"],
                "optimizer": spent["optimizer"],
                "tokens": self.trainer.tokens,
            }
        )
        self.trainer.seconds = {}
        self.last = now


def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    return [share_of_e("", completion[0]["content"], "") for completion in completions]


def train(work: dict[str, Any], folder: Path) -> StepClock:
    weights, autocast = DTYPES[work["dtype"]]
    rows_per_step = work["prompts"] * work["samples"]
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=autocast,
        model_init_kwargs={"dtype": weights},
        per_device_train_batch_size=work["micro_batch"],
        gradient_accumulation_steps=rows_per_step // work["micro_batch"],
        num_generations=work["samples"],
        max_completion_length=work["max_tokens"],
        max_steps=work["steps"],
        learning_rate=work["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        beta=0.0,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        scale_rewards="group",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        shuffle_dataset=False,
        seed=work["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in Path(work["data"]).read_text().splitlines()]
    clock = StepClock()
    trainer = TimedTrainer(
        model=work["model"],
        args=arguments,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows]),
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.train()
    return clock


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(work["threads"])
    start = time.perf_counter()
    clock = train(work, Path(sys.argv[2]).parent / "trl")
    result = {
        "system": f"TRL {trl.__version__}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "wall": time.perf_counter() - start,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "steps": clock.steps,
    }
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
