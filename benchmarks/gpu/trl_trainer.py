"""TRL's half: GRPOTrainer or AsyncGRPOTrainer against a server that runs, or the former with engines of its own, with
a clock around their phases.

python -m benchmarks.gpu.trl_trainer WORK.json   (peers.py writes it; several ranks by torch.distributed.run)

Imports stand inside functions: the asynchronous trainer's own child process loads this module again.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ANSWER = {
    "defaults": {"role": "assistant"},
    "start_anchor": "",
    "fields": {"content": {"close_pattern": r"$", "content": "text"}},
}
"""Where the asynchronous trainer finds the parts of an answer whose template it does not know: all is content."""


class Clock:
    """Seconds of the phases of the step under way, and a row for each step that is over."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self.steps: list[Json] = []
        self.last = 0.0

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts for that phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

        return call

    def step(self, **known: Any) -> None:
        """A step is over."""
        now = time.time()
        self.steps.append({"time": now, "seconds": now - self.last, **known})
        self.last, self.seconds, self.tokens = now, {}, 0
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({"steps": self.steps}, indent=1))
        partial.rename(self.file)


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    clock = Clock(Path(work["result"]))
    trainer = {"trl": synchronous, "trl-turns": synchronous, "trl-async": asynchronous}[work["kind"]](work, clock)
    trainer.train()


def rows_of(work: Json) -> Any:
    """The prompts as messages."""
    from datasets import Dataset

    rows = [json.loads(line) for line in Path(work["prompts"]).read_text().splitlines()]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows])


def shared_settings(work: Json) -> Json:
    """As grpo's run has them; else TRL's defaults, but for recomputed activations, which are slower."""
    return {
        "output_dir": str(Path(work["result"]).with_suffix(".out")),
        "per_device_train_batch_size": work["micro_batch"],
        "gradient_accumulation_steps": work["accumulation"],
        "num_generations": work["samples"],
        "max_completion_length": work["max_tokens"],
        "max_steps": work["steps"],
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 0,
        "bf16": True,
        "vllm_server_base_url": work["server"],
        "vllm_server_timeout": 300,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def synchronous(work: Json, clock: Clock) -> Any:
    """GRPOTrainer: weights, then completions, then logprobs of the old weights, then the update."""
    import trl

    from benchmarks.rewards import shares_of_e

    ways: dict[str, Json] = {
        "trl": {"vllm_mode": "server", "vllm_group_port": work["group_port"]},
        # The GPU has room for both, so that nothing need sleep.
        "trl-turns": {"vllm_mode": "colocate", "vllm_max_model_length": work["longest"]},
    }
    settings = {
        **shared_settings(work),
        "use_vllm": True,
        **ways[work["kind"]],
        "model_init_kwargs": {"dtype": "bfloat16"},
        "beta": 0.0,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "shuffle_dataset": False,
    }
    trainer = trl.GRPOTrainer(
        model=work["model"],
        args=trl.GRPOConfig(**settings | work["settings"]),
        reward_funcs=shares_of_e,
        train_dataset=rows_of(work),
    )
    server: Any = trainer.vllm_generation
    generate = server.generate

    def generate_and_count(*args: Any, **kwargs: Any) -> Any:
        made = generate(*args, **kwargs)
        clock.tokens += sum(map(len, made[1]))
        return made

    server.generate = clock.timed("generation", generate_and_count)
    server.sync_weights = clock.timed("sync", server.sync_weights)
    inner: Any = trainer
    inner._generate_and_score_completions = clock.timed("rollout", inner._generate_and_score_completions)

    def ended(_: Json) -> Json:
        spent = clock.seconds
        sampled = spent["generation"] + spent["sync"]
        return {
            "generation": spent["generation"],
            "sync": spent["sync"],
            "scoring": spent["rollout"] - sampled,
            "update": time.time() - clock.last - spent["rollout"],
            "completion_tokens": trainer.accelerator.num_processes * clock.tokens,
        }

    trainer.add_callback(noting(clock, ended, "on_step_end"))
    return trainer


def asynchronous(work: Json, clock: Clock) -> Any:
    """experimental.async_grpo. The hub's FlashAttention 3, which it asks for, is torch's own FlashAttention here."""
    from transformers import AutoTokenizer
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, packing

    from benchmarks.gpu.trl_attention import Attention
    from benchmarks.rewards import shares_of_e

    packing._flash_attn = Attention
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    tokenizer.response_template = ANSWER
    # Micro-batches of a fixed number of rows, so that a step is exactly the batch.
    settings = {**shared_settings(work), "dtype": "bfloat16", "token_budget": 0}
    trainer = AsyncGRPOTrainer(
        model=work["model"],
        args=AsyncGRPOConfig(**settings | work["settings"]),
        processing_class=tokenizer,
        reward_funcs=shares_of_e,
        train_dataset=rows_of(work),
    )

    def logged(logs: Json) -> Json | None:
        if "perf/fwd_bwd_s" not in logs:  # the summary at the end
            return None
        return {
            "generation": None,
            "sync": logs["perf/weight_sync_s"],
            "scoring": None,
            "update": logs["perf/fwd_bwd_s"] + logs["perf/optimizer_s"],
            "completion_tokens": logs["batch/trained_tokens_per_step"],
            "logs": {key: value for key, value in logs.items() if isinstance(value, int | float)},
        }

    trainer.add_callback(noting(clock, logged, "on_log"))
    return trainer


def noting(clock: Clock, known: Callable[[Json], Json | None], event: str) -> Any:
    """A callback of the trainer: the clock's step is over at that event."""
    from transformers import TrainerCallback

    class Noting(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.last = time.time()

    def note(_self: Any, _args: Any, state: Any, _control: Any, logs: Json | None = None, **_: Any) -> None:
        if state.is_world_process_zero and (found := known(logs or {})) is not None:
            clock.step(**found)

    setattr(Noting, event, note)
    return Noting()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
