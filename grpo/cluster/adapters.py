"""The controller's Protocols, fulfilled by actors: who is called, in which order, and how long we wait."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from grpo.cluster.session import Actor, Session
from grpo.config import Config
from grpo.runfolder import policy_folder
from grpo.types import Group, Manifest, Prompt, Sample, Sampling, Stats
from grpo.weights import check_self_test, verify

PERTURBATION = 0.2  # of each tensor's root mean square: far above what precision can explain


class RayRollouts:
    """Engines that share each call's prompts evenly."""

    def __init__(self, session: Session, config: Config, engines: Sequence[Actor]) -> None:
        self.session, self.config, self.engines = session, config, list(engines)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Group]:
        run_seed = self.config.run.seed
        requests = [(prompt, request_seed(run_seed, step, place, prompt.id)) for place, prompt in enumerate(prompts)]
        engines = len(self.engines)
        shares = [requests[index::engines] for index in range(engines)]
        refs = [engine.generate.remote(share, sampling) for engine, share in zip(self.engines, shares, strict=True)]
        results = self.session.get(refs, self.config.deadlines.rollout, "rollout")
        return [results[place % engines][place // engines] for place in range(len(requests))]


class RayTrainer:
    """The ranks of the policy, always called together."""

    def __init__(self, session: Session, config: Config, ranks: Sequence[Actor], run_dir: Path) -> None:
        self.session, self.config, self.ranks, self.run_dir = session, config, list(ranks), run_dir

    def step(self, batch: Sequence[Sample], step: int) -> Stats:
        shared = ray.put(list(batch))
        refs = [rank.step.remote(shared, step) for rank in self.ranks]
        stats: Stats = self.session.get(refs, self.config.deadlines.train, "train")[0]
        return stats

    def save(self, step: int) -> None:
        folder = str(policy_folder(self.run_dir, step))
        refs = [rank.save.remote(folder) for rank in self.ranks]
        self.session.get(refs, self.config.deadlines.save, "save")


class RayWeights:
    """Weights from trainer rank 0 to every engine: sent, received, compared, and only then stamped."""

    def __init__(
        self, session: Session, config: Config, ranks: Sequence[Actor], engines: Sequence[Actor], canary: Sequence[int]
    ) -> None:
        self.session, self.config = session, config
        self.ranks, self.engines, self.canary = list(ranks), list(engines), list(canary)
        self.records = self.get([self.ranks[0].records.remote()])[0]

    def get(self, refs: Sequence[Any]) -> list[Any]:
        return self.session.get(refs, self.config.deadlines.sync, "weight sync")

    def connect(self) -> None:
        """One transfer group: rank 0 is the sender, then the workers of every engine."""
        host, port = self.get([self.ranks[0].address.remote()])[0]
        workers = self.config.rollout.tensor_parallel
        world_size = 1 + workers * len(self.engines)
        refs = [self.ranks[0].open_transfer.remote(host, port, world_size)]
        for index, engine in enumerate(self.engines):
            refs.append(engine.join_transfer.remote(host, port, 1 + index * workers, world_size))
        self.get(refs)

    def sync(self, version: int) -> Stats:
        began = time.perf_counter()
        sends = [rank.send_weights.remote(version) for rank in self.ranks]
        receives = [engine.receive_weights.remote(version, self.records) for engine in self.engines]
        results = self.get(sends + receives)
        sent: Manifest = results[0]
        received: list[Manifest] = [manifest for share in results[len(sends) :] for manifest in share]
        verify(sent, received)
        self.get([engine.commit_weights.remote(version) for engine in self.engines])
        sent_bytes = sum(record.nbytes for record in sent.records)
        return {"sync/seconds": time.perf_counter() - began, "sync/bytes": float(sent_bytes)}

    def self_test(self) -> Stats:
        """Engines must follow the trainer to perturbed weights and back; see `weights/selftest.py`."""
        self.get([rank.perturb.remote(PERTURBATION, self.config.run.seed) for rank in self.ranks])
        perturbed = self.compare()
        self.get([rank.restore.remote() for rank in self.ranks])
        true = self.compare()
        difference = check_self_test(perturbed, true, tolerance=self.config.sync.tolerance)
        return {"sync/self_test_diff": difference}

    def compare(self) -> tuple[list[float], list[list[float]]]:
        """Logprobs of the canary prompt after a sync: the trainer's, and each engine's."""
        self.sync(version=0)
        refs = [rank.logprobs.remote(self.canary) for rank in self.ranks]
        refs += [engine.prompt_logprobs.remote(self.canary) for engine in self.engines]
        results = self.get(refs)
        return results[0], results[len(self.ranks) :]


def request_seed(run_seed: int, step: int, place: int, prompt_id: str) -> int:
    """Seed of a prompt's first sample: the same for the same run, step, place in it and prompt, whoever answers.

    A small data set can bring one prompt twice into a step; its place keeps the samples apart.
    """
    digest = hashlib.sha256(f"{run_seed}/{step}/{place}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % (2**31 - 2**16)
