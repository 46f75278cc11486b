"""One rank of the policy's training: updates over packed micro-batches, of whatever objective.

All ranks get the whole batch and compute the same plan, so they run in lockstep without talking about it. Rows whose
advantage is exactly 0 have no gradient unless the loss says otherwise: they are not forwarded, but stay in the
normaliser, so the gradient is the same; so are rows without a trained token. A minibatch of such rows only makes no
optimizer step: without a signal stale momentum must not move the policy. An update whose loss or gradient is not finite
on any rank is skipped by all of them.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence

import torch

from grpo.algorithm.kl_control import KlController, with_kl_penalty
from grpo.algorithm.mismatch import Mismatch, figures
from grpo.algorithm.objective import Objective, policy_objective
from grpo.algorithm.schedule import learning_rate
from grpo.config import Config
from grpo.config.architecture import check_model_config
from grpo.config.snapshot import check_snapshot
from grpo.data.generation import load_generation_config
from grpo.run.faults import fault_point
from grpo.run.start import Phases
from grpo.trainer import compiling, rng
from grpo.trainer.adapter import add_adapter, without_adapter
from grpo.trainer.deepspeed import Engine, load_deepspeed, start_process_group
from grpo.trainer.drift import Drift
from grpo.trainer.kept import Kept
from grpo.trainer.limits import make_limits
from grpo.trainer.malloc import keep_freed_memory
from grpo.trainer.model import Policy, load_policy
from grpo.trainer.packing import Minibatch, pack, plan_minibatches, row_tokens
from grpo.trainer.published import PublishedVersions
from grpo.trainer.rehearsal import check_adapter, prove_on_rank_0, rehearse_update
from grpo.trainer.row_logprobs import RowLogprobs
from grpo.trainer.saving import prepare_saving
from grpo.trainer.snapshot import StateSnapshot
from grpo.trainer.statistics import reduce_outputs, summarise
from grpo.trainer.token_budget import choose_tokens, most_laid_out
from grpo.trainer.validation import SkipBudget, check_mismatch, check_samples
from grpo.trainer.weights import LiveWeights
from grpo.trainer.window import LossWindow
from grpo.types import Sample, Stats


class PolicyTrainer(Kept):
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
        phases: Phases | None = None,
        objective: Objective | None = None,
    ) -> None:
        """`device` is "cpu" or "cuda". `threads` are the CPU threads of this rank; None leaves torch's choice.

        `phases` are told what the start is at. Without an `objective` it is GRPO's.
        """
        phases = phases or Phases("imports")
        self.config, self.rank, self.world_size, self.total_steps = config, rank, world_size, total_steps
        self.device = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        if device == "cpu":
            keep_freed_memory()
        load_deepspeed(self.device, rank, world_size, local_rank, master_addr, master_port)
        phases.begin("ranks")
        start_process_group(self.device, rank, world_size, master_addr, master_port)
        self.objective = objective or policy_objective(config)
        self.needs = self.objective.needs
        phases.begin("weights")
        policy = self._load(config.train.gradient_checkpointing, adapter=True).to(self.device)
        policy.entropy_gradient = self.needs.entropy_gradient
        prepare_saving(policy.causal_lm)
        if config.train.lora:
            check_adapter(policy, config.model.max_length)
        if compiling.wanted(config, self.device):
            phases.begin("compile")
        notes = compiling.compile_where_wanted(policy, config, self.device)
        self.notes: tuple[str, ...] = notes if rank == 0 else ()
        """Lines for a person about the start."""
        phases.begin("proof")
        proof = prove_on_rank_0(policy, config)
        phases.begin("optimizer")
        self.limits = make_limits(config, device, proof.noise)
        self.engine = Engine(policy, config.train, world_size)
        self.weights = LiveWeights(policy.causal_lm)
        self.frozen = self.weights.frozen_digest()
        self.policy = policy
        self.published = PublishedVersions(self.device)
        shares = rank, world_size, self.device, config.checkpoint.merged
        self.kept = StateSnapshot(self.weights, self.engine.shards, *shares)
        self.stepped = False
        self.budget = SkipBudget(config.train.max_skipped_updates)
        self.control = KlController(config.algorithm)
        self.clock: dict[str, float] = defaultdict(float)
        self.drift = Drift(config, policy, self.device)
        self.drifted: float | None = None
        self.start = RowLogprobs(policy, self.device)
        self.reference: RowLogprobs | None = None
        if self.needs.reference and self.weights.adapted:
            self.reference = RowLogprobs(without_adapter(policy), self.device)
        elif self.needs.reference:
            phases.begin("weights")
            frozen = self._load(checkpointing=False).to(self.device).requires_grad_(False)
            if policy.compiled:
                compiling.compile_layers(frozen)
            self.reference = RowLogprobs(frozen, self.device)
        phases.begin("rehearsal")
        rehearse_update(self.engine, proof, self.device, self.needs.entropy_gradient)
        self.token_budget = choose_tokens(self.engine, policy, self.reference, config, self.device)
        if rank == 0 and self.token_budget != config.fixed_tokens:
            self.notes += (f"train.tokens_per_micro_batch: auto is {self.token_budget} on this GPU",)
        rng.derive(f"run.seed {config.run.seed}", rank)  # else the first steps of two starts would differ

    def _load(self, checkpointing: bool, adapter: bool = False) -> Policy:
        check_model_config(self.config)
        load_generation_config(self.config)
        model = self.config.model
        dtype = getattr(torch, model.dtype)
        temperature = self.config.rollout.temperature
        policy = load_policy(model.path, model.revision, dtype, temperature, checkpointing, model.fp32_head)
        check_snapshot(self.config)
        if adapter and self.config.train.lora:
            add_adapter(policy.causal_lm, self.config.train.lora, self.config.run.seed, checkpointing)
        return policy

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        """`train.epochs` passes over the batch, one update per minibatch; returns the mean statistics of the updates.

        What no update measured (every advantage was 0, all were skipped) is left out. Raises on all ranks alike:
        NonFiniteError after too many skipped updates; WeightSyncError, before any update, if the samples do not fit.
        """
        self.clock.clear()
        unknown = check_samples(batch) if self.objective.sampled else 0
        fault_point("train.forward", step, self.rank)
        batch = self._prepare(batch, step)
        updates: list[Stats] = []
        mismatch = Mismatch.none(self.device)
        tokens, skipped = 0.0, 0
        for epoch in range(self.config.train.epochs):
            for minibatch in self._minibatches(batch, step, epoch):
                if not minibatch.micro_batches[0]:
                    continue
                first = not updates
                update, found = self._update(batch, minibatch, step, first)
                tokens += update.pop("forwarded")
                if self.budget.admits(update, [batch[row] for row in minibatch.rows]):
                    updates.append(update)
                    mismatch += found if first or (self.start.known and not epoch) else Mismatch.none(self.device)
                else:
                    skipped += 1
        self.stepped = True
        fault_point("train.stepped", step, self.rank)
        stats = summarise(updates, learning_rate(self.config.train, step, self.total_steps), skipped)
        stats |= figures(mismatch) | {"tokens": tokens}
        if self.objective.sampled:
            stats["unknown_logprobs"] = float(unknown)
        if self.control.target is not None:
            stats["kl_coef"] = self.control.coef
            if "kl_reference" in stats:
                self.control.update(stats["kl_reference"], len(batch))
        stats |= {f"seconds_{name}": seconds for name, seconds in self.clock.items()}
        return {f"train/{name}": value for name, value in stats.items()}

    def _prepare(self, batch: Sequence[Sample], step: int) -> Sequence[Sample]:
        """What must be known of the weights before the step's first update moves them; the batch that is trained."""
        started = time.perf_counter()
        self.start.forget()
        if self.reference:
            self.reference.forget()
        oldest = min(sample.oldest_version for sample in batch)
        self.drifted = self.drift.since(oldest) if oldest < step - 1 else None
        train = self.config.train
        if self.objective.corrected and train.epochs * train.minibatches > 1:  # else the update's own are those
            self.start.compute_all(batch, self._minibatches(batch, step, epoch=0), self.rank)
        in_reward = self.config.algorithm.kl == "k1"
        if self.reference and (in_reward or self.weights.adapted):
            # Below an adapter it is the policy itself, at stage 3 in parts: no rank may score what others do not.
            self.reference.compute_all(batch, self._minibatches(batch, step, epoch=0), self.rank)
        if self.reference and in_reward:
            kl_B = [self.reference.divergence(sample, row) for row, sample in enumerate(batch)]
            batch = with_kl_penalty(batch, kl_B, self.control.coef, self.config.algorithm)
        self.clock["before_updates"] += time.perf_counter() - started
        return batch

    def _minibatches(
        self, batch: Sequence[Sample], step: int, epoch: int, parts: int | None = None
    ) -> tuple[Minibatch, ...]:
        """One pass over the batch, in `train.minibatches` or so many parts."""
        train = self.config.train
        return plan_minibatches(
            [row_tokens(sample) for sample in batch],
            ranks=self.world_size,
            minibatches=parts or train.minibatches,
            token_budget=self.token_budget,
            seed=f"{self.config.run.seed}/step {step}/epoch {epoch}",
            skip=[row for row, sample in enumerate(batch) if not self._teaches(sample)],
            laid_out=most_laid_out(self.config, self.token_budget, self.device),
        )

    def _teaches(self, sample: Sample) -> bool:
        """Whether a row can have a gradient."""
        return sample.trained_tokens > 0 and (sample.advantage != 0.0 or self.needs.zero_advantage_rows)

    def _update(self, batch: Sequence[Sample], minibatch: Minibatch, step: int, first: bool) -> tuple[Stats, Mismatch]:
        """Accumulates the gradient of one minibatch and steps the optimizer, which skips what is not finite."""
        started = time.perf_counter()
        stats, mismatch = self._accumulate(batch, minibatch, step, first)
        self.clock["forward_backward"] += time.perf_counter() - started
        fault_point("train.optimizer", step, self.rank)
        started = time.perf_counter()
        rate = learning_rate(self.config.train, step, self.total_steps)
        stats["grad_norm"], stats["learning_rate"] = self.engine.step(rate)
        self.clock["optimizer"] += time.perf_counter() - started
        return stats, mismatch

    def _accumulate(
        self, batch: Sequence[Sample], minibatch: Minibatch, step: int, first: bool
    ) -> tuple[Stats, Mismatch]:
        """Forward and backward of all micro-batches; before the step's first update the samples must fit."""
        window = self._window([batch[row] for row in minibatch.rows])
        mine = minibatch.micro_batches[self.rank]
        stats: Stats = {}
        mismatch = Mismatch.none(self.device)
        outputs = []
        forwarded = 0
        for number, rows in enumerate(mine):
            samples = [batch[row] for row in rows]
            packed = pack(samples).to(self.device)
            logprobs_C, entropy_C = self.engine(packed)
            if first and number == 0:
                self.drift.keep(step - 1, samples, logprobs_C)
            loss = logprobs_C.sum() * 0.0  # a filler: zero gradient, but ZeRO's collectives run
            if rows:
                reference_C = self.reference.of(batch, rows) if self.reference else None
                start_C = self.start.of(batch, rows) if self.start.known else None
                inputs = window.inputs(samples, packed, logprobs_C, entropy_C, reference_C, start_C)
                outputs.append(self.objective.loss(inputs))
                loss = outputs[-1].loss
                forwarded += len(packed.expand_E)
            last = number == len(mine) - 1
            if last:  # all is known that the ranks must agree on, and the gradient is not complete yet
                stats, mismatch = reduce_outputs(outputs, forwarded, self.objective.statistics, self.device)
                if first:
                    self._check_mismatch(mismatch, [batch[row] for row in minibatch.rows], step)
                if not math.isfinite(stats["loss"]):
                    loss = loss * math.nan  # whatever the other ranks have: no optimizer applies such a gradient
            self.engine.backward(loss, last)
        return stats, mismatch

    def _check_mismatch(self, mismatch: Mismatch, samples: Sequence[Sample], step: int) -> None:
        if found := figures(mismatch):
            check_mismatch(found, samples, step, self.config, self.limits, self.drifted)

    def _window(self, samples: Sequence[Sample]) -> LossWindow:
        return LossWindow(samples, self.config.rollout.max_tokens, self.control.coef, self.limits.far)

    @torch.no_grad()
    def evaluate(self, batch: Sequence[Sample]) -> Stats:
        """The loss of these rows under the live weights, from which nothing is learned. A collective."""
        minibatch = self._minibatches(batch, 0, 0, parts=1)[0]
        window, outputs = self._window(batch), []
        for rows in minibatch.micro_batches[self.rank]:
            samples = [batch[row] for row in rows]
            packed = pack(samples).to(self.device)
            logprobs_C, entropy_C = self.policy(packed)
            if rows:
                outputs.append(self.objective.loss(window.inputs(samples, packed, logprobs_C, entropy_C)))
        stats, _ = reduce_outputs(outputs, 0, self.objective.statistics, self.device)
        return {"eval/loss": stats["loss"]}

    @property
    def tolerance(self) -> float:
        """Mean difference of logprobs, in nats, that an engine with the same weights may have."""
        return self.limits.tolerance

    @torch.no_grad()
    def logprobs(self, input_ids: Sequence[int]) -> list[float]:
        """Logprobs of tokens 1..T-1 given those before them, at temperature 1, under the live weights."""
        prompt, outputs = tuple(input_ids[:1]), tuple(input_ids[1:])
        sample = Sample("", 0, prompt, outputs, (0.0,) * len(outputs), ((0, 0),), "stop", "", advantage=0.0)
        values: list[float] = self.policy(pack([sample]).to(self.device), temperature=1.0)[0].tolist()
        return values

    def close(self) -> None:
        """Leaves the process group; the object is of no use afterwards."""
        self.engine.close()
