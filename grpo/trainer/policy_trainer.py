"""One rank of the policy's training: clipped policy updates over packed micro-batches.

All ranks get the whole batch and compute the same plan, so they run in lockstep without talking about it. Rows whose
advantage is exactly 0 have no gradient when there is no KL term: they are not forwarded, but stay in the normaliser,
so the gradient is the same. A minibatch of such rows only makes no optimizer step: without a signal stale momentum
must not move the policy.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import distributed

from grpo.batching import Minibatch, PackedBatch, Rows, extent, pack, plan
from grpo.config import Config, Train
from grpo.errors import NonFiniteError
from grpo.loss import LossOutput, Normaliser, policy_loss
from grpo.policy import Policy, load_policy
from grpo.trainer.engine import Engine, start_process_group
from grpo.trainer.memory import keep_freed_memory
from grpo.trainer.weights import LiveWeights
from grpo.types import Sample, Stats, TensorRecord


class PolicyTrainer:
    """What one rank's actor holds. Every verb is called on all ranks; the results are the same on all of them."""

    def __init__(
        self,
        config: Config,
        rank: int,
        world_size: int,
        local_rank: int,
        device: str,
        master_addr: str,
        master_port: int,
        total_steps: int,
        threads: int | None = None,
    ) -> None:
        """`device` is "cpu" or "cuda". `threads` are the CPU threads of this rank; None leaves torch's choice."""
        self.config, self.rank, self.world_size, self.total_steps = config, rank, world_size, total_steps
        self.device = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        if device == "cpu":
            keep_freed_memory()
        start_process_group(self.device, rank, world_size, local_rank, master_addr, master_port)
        policy = self._load(config.train.gradient_checkpointing).to(self.device)
        self.engine = Engine(policy, config.train, world_size)
        self.weights = LiveWeights(policy.causal_lm)
        self.policy = policy
        self.clock: dict[str, float] = defaultdict(float)
        self.reference: Policy | None = None
        if config.algorithm.kl_coef > 0:
            self.reference = self._load(checkpointing=False).to(self.device).requires_grad_(False)

    def _load(self, checkpointing: bool) -> Policy:
        model = self.config.model
        dtype = getattr(torch, model.dtype)
        return load_policy(model.path, model.revision, dtype, self.config.rollout.temperature, checkpointing)

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        """`train.epochs` passes over the batch, one update per minibatch; returns the mean statistics of the updates.

        What no forward pass measured (every advantage was 0) is left out. Raises NonFiniteError on all ranks alike.
        """
        self.clock.clear()
        rate = learning_rate(self.config.train, step, self.total_steps)
        references: dict[int, torch.Tensor] = {}
        updates = [
            self._update(batch, minibatch, rate, references)
            for minibatch in self._minibatches(batch, step)
            if minibatch.micro_batches[0]
        ]
        stats = _mean(updates) if updates else {"loss": 0.0, "grad_norm": 0.0, "learning_rate": rate}
        if updates:
            stats["ratio_max"] = max(update["ratio_max"] for update in updates)
            stats["rollout_kl"], stats["rollout_abs_diff"] = updates[0]["approx_kl"], updates[0]["abs_diff"]
        stats["tokens"] = sum(update["forwarded"] for update in updates)
        stats["updates"] = float(len(updates))
        stats |= {f"seconds_{name}": seconds for name, seconds in self.clock.items()}
        return {f"train/{name}": value for name, value in stats.items() if name not in ("abs_diff", "forwarded")}

    def _minibatches(self, batch: Sequence[Sample], step: int) -> Iterator[Minibatch]:
        train = self.config.train
        skip = [] if self.reference else [row for row, sample in enumerate(batch) if sample.advantage == 0.0]
        for epoch in range(train.epochs):
            yield from plan(
                [extent(sample) for sample in batch],
                ranks=self.world_size,
                minibatches=train.minibatches,
                token_budget=train.tokens_per_micro_batch,
                seed=f"{self.config.run.seed}/step {step}/epoch {epoch}",
                skip=skip,
            )

    def _update(
        self, batch: Sequence[Sample], minibatch: Minibatch, rate: float, references: dict[int, torch.Tensor]
    ) -> Stats:
        """Accumulates the gradient of one minibatch and steps the optimizer."""
        started = time.perf_counter()
        normaliser = Normaliser(sum(len(batch[row].output_ids) for row in minibatch.rows), len(minibatch.rows))
        mine = minibatch.micro_batches[self.rank]
        outputs = []
        forwarded = 0
        for number, rows in enumerate(mine):
            packed = pack([batch[row] for row in rows]).to(self.device)
            logprobs_C, entropy_C = self.engine(packed)
            loss = logprobs_C.sum() * 0.0  # a filler: zero gradient, but ZeRO's collectives run
            if rows:
                reference_C = self._reference_logprobs(batch, rows, references)
                outputs.append(self._loss(packed, normaliser, logprobs_C, entropy_C, reference_C))
                loss = outputs[-1].loss
                forwarded += len(packed.expand_E)
            self.engine.backward(loss, last=number == len(mine) - 1)
        stats = self._reduce(outputs, forwarded)
        self.clock["forward_backward"] += time.perf_counter() - started
        if not math.isfinite(stats["loss"]):
            raise NonFiniteError(
                f"the loss must be finite: it is {stats['loss']}; lower train.learning_rate or use model.dtype float32"
            )
        started = time.perf_counter()
        stats["grad_norm"], stats["learning_rate"] = self.engine.step(rate)
        self.clock["optimizer"] += time.perf_counter() - started
        return stats

    def _loss(
        self,
        packed: PackedBatch,
        normaliser: Normaliser,
        logprobs_C: torch.Tensor,
        entropy_C: torch.Tensor,
        reference_C: torch.Tensor | None,
    ) -> LossOutput:
        algorithm = self.config.algorithm
        return policy_loss(
            algorithm.loss,
            logprobs_C,
            packed.rollout_logprobs_C,
            packed.advantages_C,
            packed.completion_lengths_R[packed.rows_C].float(),
            normaliser,
            entropy_C=entropy_C,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            kl_coef=algorithm.kl_coef,
            reference_logprobs_C=reference_C,
        )

    @torch.no_grad()
    def _reference_logprobs(
        self, batch: Sequence[Sample], rows: Rows, known: dict[int, torch.Tensor]
    ) -> torch.Tensor | None:
        """The frozen model's logprobs of the rows' completions, each computed once a step."""
        if self.reference is None:
            return None
        missing = [row for row in rows if row not in known]
        if missing:
            packed = pack([batch[row] for row in missing]).to(self.device)
            logprobs_C, _ = self.reference(packed)
            lengths = [len(batch[row].output_ids) for row in missing]
            known |= zip(missing, logprobs_C.split(lengths), strict=True)
        return torch.cat([known[row] for row in rows])

    def _reduce(self, outputs: Sequence[LossOutput], forwarded: int) -> Stats:
        """Adds the outputs of all micro-batches and ranks up to means over the minibatch's forwarded tokens."""
        names = ["tokens", "clip_low", "clip_high", "approx_kl", "abs_diff", "entropy"]
        names += ["kl_reference"] if self.reference else []
        totals = torch.zeros(len(names) + 2, dtype=torch.float64, device=self.device)
        peak = torch.zeros(1, dtype=torch.float64, device=self.device)
        for output in outputs:
            totals[:-1] += torch.stack([output.loss.detach().double(), *(output.sums[name].double() for name in names)])
            peak = torch.maximum(peak, output.maxima["ratio_max"].double())
        totals[-1] = forwarded
        distributed.all_reduce(totals)
        distributed.all_reduce(peak, op=distributed.ReduceOp.MAX)
        loss, tokens, *sums, total_forwarded = totals.tolist()
        means = {name: total / max(tokens, 1.0) for name, total in zip(names[1:], sums, strict=True)}
        return means | {"loss": loss, "ratio_max": peak.item(), "forwarded": total_forwarded}

    def weight_records(self) -> tuple[TensorRecord, ...]:
        """Names, shapes and dtypes of the weights, without digests, in the order of `iter_weights`."""
        return self.weights.records()

    def iter_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors on the training device; a collective at ZeRO stage 3. Use each before asking for the next."""
        return self.weights.iterate()

    def perturb(self, scale: float, seed: int) -> None:
        """Adds noise of `scale` times each tensor's root mean square to the live weights, until `restore`."""
        self.weights.perturb(scale, seed)

    def restore(self) -> None:
        """Undoes `perturb`, bit for bit."""
        self.weights.restore()

    @torch.no_grad()
    def logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """Logprobs of tokens 1..T-1 given those before them, at temperature 1, under the live weights."""
        prompt, outputs = tuple(input_ids[:1]), tuple(input_ids[1:])
        sample = Sample("", 0, prompt, outputs, (0.0,) * len(outputs), 0, "stop", "", advantage=0.0)
        values: list[float] = self.policy(pack([sample]).to(self.device), temperature=1.0)[0].tolist()
        return values

    def save(self, path: Path) -> None:
        """Commits the policy as a Hugging Face folder (config, safetensors, tokenizer). Raises CheckpointError."""
        self.weights.save(Path(path), self.config.model.path, self.config.model.revision)

    def close(self) -> None:
        """Leaves the process group; the object is of no use afterwards."""
        self.engine.close()


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """Rate of a step (the first is 1): rises over the warm-up, then stays or falls to reach 0 after the last step."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = (step - 1 - train.warmup_steps) / max(total_steps - train.warmup_steps, 1)
    factors = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    return train.learning_rate * factors[train.schedule]


def _mean(updates: Sequence[Stats]) -> Stats:
    return {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
