"""What is kept of a rank's trainer: its weights for engines, the policy as a folder, its whole state."""

from collections.abc import Iterable
from pathlib import Path

import torch

from grpo.algorithm.kl_control import KlController
from grpo.config import Config
from grpo.run.faults import fault_point
from grpo.trainer import rng
from grpo.trainer.deepspeed import Engine
from grpo.trainer.drift import Drift
from grpo.trainer.finite import check_finite
from grpo.trainer.model import Policy
from grpo.trainer.published import PublishedVersions
from grpo.trainer.snapshot import StateSnapshot
from grpo.trainer.state import StateFolder, drift_file, rng_file
from grpo.trainer.token_budget import kept_tokens, tokens_before
from grpo.trainer.validation import SkipBudget
from grpo.trainer.weights import LiveWeights
from grpo.types import TensorRecord


class Kept:
    """Verbs of a `PolicyTrainer` that read or replace its state; all but `write` are called on all ranks together."""

    config: Config
    rank: int
    device: torch.device
    policy: Policy
    token_budget: int
    """Tokens of a micro-batch."""
    weights: LiveWeights
    frozen: str
    """Digest of the weights below an adapter."""
    engine: Engine
    budget: SkipBudget
    control: KlController
    published: PublishedVersions
    kept: StateSnapshot
    drift: Drift
    stepped: bool
    """Whether a step was made."""

    def weight_records(self) -> tuple[TensorRecord, ...]:
        """Names, shapes and dtypes of the weights, without digests, in the order of `iter_weights`."""
        return self.weights.records()

    def iter_weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Whole tensors on the training device; a collective at ZeRO stage 3. Use each before asking for the next.

        A list holds the live ones.
        """
        return self.weights.published()

    def make_room(self) -> None:
        """Gives GPU memory back that is not used now, for engines on the same GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def publish(self, version: int, oldest: int) -> int:
        """Rank 0 keeps a copy of the weights as `version`, none below `oldest`; bytes of all its copies."""
        if self.rank == 0:
            size = sum(record.nbytes for record in self.weight_records())
            return self.published.publish(version, oldest, self.iter_weights(), size, self.stepped)
        for _ in self.iter_weights():
            pass
        return 0

    def perturb(self, scale: float, seed: int) -> None:
        """Adds noise of `scale` times each tensor's root mean square to the live weights, until `restore`."""
        self.weights.perturb(scale, seed)

    def restore(self) -> None:
        """Undoes `perturb`, bit for bit."""
        self.weights.restore()

    def save(self, path: Path) -> None:
        """Writes the policy as a Hugging Face folder (config, safetensors, tokenizer).

        Raises on all ranks alike: NonFiniteError if the model is not finite, CheckpointError if it cannot be written.
        """
        check_finite(self.weights.params, self.engine.shards)
        self.weights.save(Path(path), self.config)

    def try_saving(self, folder: Path) -> None:
        """Writes the folders that `save_state` writes for others, without weights.

        Raises on all ranks alike ConfigError or CheckpointError.
        """
        self.weights.try_saving(Path(folder), self.config)
        if self.config.checkpoint.background:
            self.kept.prepare()

    def save_state(self, folder: Path, step: int = 0) -> None:
        """Writes the whole state into a folder that exists; see `state.py`. Raises what `save` raises."""
        check_finite(self.weights.params, self.engine.shards)
        lora = self.config.train.lora
        if not lora or self.config.checkpoint.merged:
            self.weights.save(Path(folder) / "policy", self.config)
        if lora:
            self.weights.save_adapter(Path(folder) / "adapter", self.config)
        self._state_folder(folder).write(self._header(step), self._texts())
        fault_point("save.files", step, self.rank)

    def _header(self, step: int) -> dict[str, object]:
        counters = {"skipped_in_row": self.budget.in_row, "kl_coef": self.control.coef}
        return {
            "step": step,
            "zero_stage": self.config.train.zero_stage,
            "dtype": self.config.model.dtype,
            "compiled": self.policy.compiled,
            "frozen": self.frozen,
            "tokens_per_micro_batch": self.token_budget,
            "counters": counters,
        }

    def _texts(self) -> dict[str, str]:
        """This rank's own files that are no tensors."""
        texts = {rng_file(self.rank): rng.capture(self.device)}
        return texts | ({drift_file(self.rank): self.drift.dump()} if self.drift.kept else {})

    def snapshot(self, step: int) -> None:
        """Copies the whole state to the host, for `write`. Raises NonFiniteError on all ranks alike."""
        self.kept.take(step, self._header(step), self._texts())

    def write(self, folder: Path, step: int) -> None:
        """Writes this rank's share of the copy, beside the training; see `snapshot.py`."""
        self.kept.write(Path(folder), step, self.config)
        fault_point("save.files", step, self.rank)

    def load_state(self, folder: Path, step: int = 0) -> tuple[str, ...]:
        """Takes over what `save_state` wrote, bit for bit, whatever the number of ranks and the ZeRO stage were.

        Returns what a person should know of it.

        Raises CheckpointError on all ranks alike, naming the file and the tensor; the trainer is then of no use.
        """
        header = self._state_folder(folder).read(self.device, self.drift)
        self.budget.in_row = int(header["counters"].get("skipped_in_row", 0))
        if self.control.target is not None:  # else it is the configuration's
            self.control.coef = float(header["counters"].get("kl_coef", self.control.coef))
        fault_point("resume.loaded", step, self.rank)
        return self._go_on(bool(header.get("compiled")), tokens_before(self.config, header))

    def _go_on(self, compiled: bool, tokens: object) -> tuple[str, ...]:
        """As the steps before were made, as far as it goes; lines that say how far it does not."""
        notes: tuple[str, ...] = ()
        if compiled != self.policy.compiled:
            before, now = ("compiled", "uncompiled") if compiled else ("uncompiled", "compiled")
            notes += (f"note: layers were {before} before and are {now} now: equal up to rounding",)
        chosen = self.token_budget
        self.token_budget = kept_tokens(self.config, chosen, tokens)
        if self.config.train.tokens_per_micro_batch == "auto" and tokens is not None and tokens != chosen:
            notes += (f"note: micro-batches had {tokens} tokens, here {chosen} fit: {self.token_budget} are taken",)
        return notes

    def _state_folder(self, folder: Path) -> StateFolder:
        trained = self.weights.params, self.weights.param_records()
        return StateFolder(Path(folder), *trained, self.engine.shards, self.frozen)
