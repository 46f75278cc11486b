"""The plan's numbers against transformers' own models and against figures worked out by hand."""

from pathlib import Path
from typing import Any

import pytest

from grpo.config import Config
from grpo.errors import ConfigError
from grpo.plan.memory import (
    GIB,
    GRAIN,
    HEAD_CHUNK,
    LOGITS,
    MOST_TOKENS,
    QUEUE,
    RESTING,
    ROOM,
    SPARE,
    activation_bytes,
    cannot_fit,
    make_plan,
    need_of_ranks_gpu,
)
from grpo.plan.model_size import read_shape
from tests.plan.planned import QWEN_1_5B, SMOLLM2, config

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied
QWEN_0_5B: dict[str, Any] = dict(zip("hiLHKVt", (896, 4864, 24, 14, 2, 151936, True), strict=True), model_type="qwen2")

QWEN_7B: dict[str, Any] = dict(zip("hiLHKVt", (3584, 18944, 28, 28, 4, 152064, False), strict=True), model_type="qwen2")


SHARED: dict[str, Any] = {
    "rollout": {"gpus_per_engine": 0.5, "memory_utilization": 0.4},
    "train": {"gpus_per_rank": 0.5, "tokens_per_micro_batch": 8192},
}


@pytest.mark.parametrize(
    ("model", "parameters", "kv_bytes"),
    [
        (QWEN_0_5B, 494_032_768, 12_288),
        (QWEN_1_5B, 1_543_714_304, 28_672),
        (QWEN_7B, 7_615_616_512, 57_344),
        (SMOLLM2, 134_515_008, 23_040),
    ],
)
def test_known_models(tmp_path: Path, model: dict[str, Any], parameters: int, kv_bytes: int) -> None:
    made = make_plan(config(tmp_path, model))
    assert (made.parameters, made.kv_per_token, made.sync_bytes) == (parameters, kv_bytes, 2 * parameters)


def test_the_room_that_a_copy_needs_is_what_the_engine_asks_for() -> None:
    from grpo.rollout import shadow

    assert SPARE == shadow.SPARE


@pytest.mark.parametrize(
    ("gpu_gib", "sections", "on_gpu"),
    [
        (80, {}, True),
        (60, {}, True),  # a tenth is free: 6 GiB, twice the weights are 5.75
        (56, {}, False),
        (80, {"rollout": {"memory_utilization": 0.98}}, False),
        (80, {"rollout": {"tensor_parallel": 2}}, True),
        (80, SHARED, False),  # beside a rank of 35 GiB
        (160, SHARED, True),
        (80, {"cluster": {"device": "cpu"}}, False),
    ],
)
def test_weights_that_engines_take_ahead_lie_beside_those_they_sample_from(
    tmp_path: Path, gpu_gib: float, sections: dict[str, Any], on_gpu: bool
) -> None:
    """On the GPU where it has room for two, else in the memory of the pod; each worker has a copy of all weights."""
    sections = {"cluster": {"device": "cuda"}} | sections
    none = make_plan(config(tmp_path, QWEN_1_5B, **sections), gpu_gib)
    rollout = sections.get("rollout", {}) | {"max_staleness": 1}
    made = make_plan(config(tmp_path, QWEN_1_5B, **sections | {"rollout": rollout}), gpu_gib)
    assert (none.shadow, made.shadow, made.shadow_on_gpu) == (0, made.sync_bytes, on_gpu)
    grown = made.pods["rollout"].memory - none.pods["rollout"].memory
    assert grown == (0 if on_gpu else made.sync_bytes)
    assert made.warnings == none.warnings


def test_each_worker_of_an_engine_has_a_copy(tmp_path: Path) -> None:
    split = {"tensor_parallel": 2, "memory_utilization": 0.98}
    plans = [
        make_plan(config(tmp_path, QWEN_1_5B, cluster={"device": "cuda"}, rollout=split | {"max_staleness": s}))
        for s in (0, 2)
    ]
    assert plans[1].pods["rollout"].memory - plans[0].pods["rollout"].memory == 2 * plans[0].sync_bytes


def test_the_head_is_planned_for_the_chunk_that_the_policy_uses() -> None:
    from grpo.trainer import head

    assert HEAD_CHUNK == head.CHUNK


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2.0, 4.0, 12.0), (1, 2.0, 4.0, 3.0), (2, 2.0, 1.0, 3.0), (3, 0.5, 1.0, 3.0)],
)
def test_zero_stages_divide_the_states_among_four_ranks(
    tmp_path: Path, stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    made = make_plan(config(tmp_path, SMOLLM2, train={"ranks": 4, "zero_stage": stage}))
    per_parameter = [size / made.parameters for size in (made.weights, made.gradients, made.optimizer)]
    assert per_parameter == pytest.approx([weights, gradients, optimizer], rel=1e-6)


def test_fp32_without_zero_has_no_second_copy(tmp_path: Path) -> None:
    made = make_plan(config(tmp_path, SMOLLM2, model={"dtype": "float32"}, train={"zero_stage": 0}))
    assert [size // made.parameters for size in (made.weights, made.gradients, made.optimizer)] == [4, 4, 8]
    assert made.kv_per_token == 2 * 23_040


def test_activations_and_head(tmp_path: Path) -> None:
    made = make_plan(config(tmp_path, QWEN_1_5B, train={"tokens_per_micro_batch": 8192}))
    assert made.activations == 8192 * 2 * 28 * (8 * 1536 + 2 * 256 + 4 * 8960)  # 2.72 MB a token
    assert made.head == 2 * 1024 * 151936 * 4 + 151936 * 1536 * 4
    saved = make_plan(
        config(tmp_path, QWEN_1_5B, train={"tokens_per_micro_batch": 8192, "gradient_checkpointing": True})
    )
    assert saved.activations == 8192 * 2 * (28 * 1536 + 48640)


@pytest.mark.parametrize(
    ("gpu_gib", "sections", "tokens"),
    [
        (141, {}, 34 * 1024),  # 0.9 - 1/16 of it without 25.9 GiB of states and 2 of the head, by 2.72 MB a token
        (80, {}, 15 * 1024),
        (80, {"rollout": {"max_staleness": 1}}, 12 * 1024),  # two copies of the weights travel
        (80, {"model": {"fp32_head": True}}, 14 * 1024),  # the head once more in fp32, 0.87 GiB
        (80, {"train": {"gpus_per_rank": 0.5}}, 2048),  # model.max_length, at least
        (24, {}, 2048),
        (141, {"train": {"gradient_checkpointing": True}}, 65536),
        (141, {"cluster": {"device": "cpu"}}, 8192),
        (24, {"cluster": {"device": "cpu"}, "model": {"max_length": 10000}}, 10000),
        (141, {"train": {"tokens_per_micro_batch": 4096}}, 4096),
    ],
)
def test_auto_is_what_a_gpu_has_room_for(tmp_path: Path, gpu_gib: float, sections: Any, tokens: int) -> None:
    made = make_plan(config(tmp_path, QWEN_1_5B, **{"cluster": {"device": "cuda"}} | sections), gpu_gib)
    assert made.micro_batch == tokens
    assert made.activations == activation_bytes(
        read_shape(config(tmp_path, QWEN_1_5B)), tokens, 2, "gradient_checkpointing" in sections.get("train", {})
    )


def test_the_room_of_a_micro_batch_is_the_one_that_a_rank_leaves() -> None:
    from grpo.trainer import fused_head, published, token_budget

    assert (ROOM, LOGITS) == (published.ROOM, fused_head.KEPT_SHARE)
    assert (GRAIN, MOST_TOKENS) == (token_budget.GRAIN, token_budget.MOST)


def test_the_reference_model_counts_only_with_a_kl_term(tmp_path: Path) -> None:
    assert make_plan(config(tmp_path, SMOLLM2)).reference == 0
    assert make_plan(config(tmp_path, SMOLLM2, algorithm={"kl_coef": 0.01})).reference == 2 * 134_515_008


def test_engine_and_step(tmp_path: Path) -> None:
    rollout = {"tensor_parallel": 2, "memory_utilization": 0.5, "kv_cache_gib": 2.0, "prompts_per_step": 64}
    train = {"epochs": 2, "minibatches": 4, "tokens_per_micro_batch": 8192}
    made = make_plan(config(tmp_path, QWEN_1_5B, rollout=rollout, train=train), gpu_gib=24)
    assert made.engine_weights == 1_543_714_304
    assert made.kv_tokens_cpu == 2 * GIB // 28_672
    assert made.kv_tokens_gpu == (24 * GIB - 2 * 1_543_714_304) // 28_672
    assert (made.rows, made.tokens, made.updates) == (512, 512 * 2048, 8)
    assert ["48.69 GiB of a GPU's 24 GiB" in warning for warning in made.warnings] == [True]
    assert make_plan(config(tmp_path, QWEN_1_5B), gpu_gib=80).warnings == ()


def test_what_does_not_fit_is_said_with_the_way_out(tmp_path: Path) -> None:
    def warned(device: str) -> list[str]:
        small = config(tmp_path, QWEN_7B, rollout={"kv_cache_gib": 0.01}, cluster={"device": device})
        return [warning.split(":")[1] for warning in make_plan(small, gpu_gib=12).warnings]

    rank, engine = " raise train.zero_stage or train.ranks, lower", " raise rollout.tensor_parallel"
    assert [text.startswith(start) for text, start in zip(warned("cuda"), (rank, engine), strict=True)] == [True, True]
    assert warned("cpu") == [" raise it"]
    several = {"rollout": {"engines": 4, "engines_per_gpu": 4}, "cluster": {"device": "cuda"}}
    (warning,) = make_plan(config(tmp_path, QWEN_1_5B, **several), gpu_gib=12).warnings[-1:]
    assert warning.endswith("cannot hold one row beside the weights: lower rollout.engines_per_gpu")


def in_turns(folder: Path, memory: float = 0.6, engines: int = 1, **train: Any) -> Config:
    rollout = {"memory_utilization": memory, "engines": engines, "engines_per_gpu": engines}
    cluster = {"device": "cuda", "colocate": True}
    return config(folder, QWEN_1_5B, rollout=rollout, cluster=cluster, train={"tokens_per_micro_batch": 8192} | train)


def test_in_turns_a_rank_and_engines_need_the_larger_of_two_sums(tmp_path: Path) -> None:
    wanted = in_turns(tmp_path, engines=2)
    made = make_plan(wanted, gpu_gib=80)
    resident = made.weights + made.gradients + made.optimizer
    assert (made.resident_bytes, made.warnings) == (resident, ())
    assert need_of_ranks_gpu(made, wanted) == max(made.rank_bytes + 2 * RESTING, resident + 2 * made.engine_gpu)
    (small,) = make_plan(wanted, gpu_gib=50).warnings
    assert small.startswith("while engines rest a rank needs") and "each of them about 2.00 GiB of a GPU's 50" in small
    (greedy,) = make_plan(in_turns(tmp_path, memory=0.9), gpu_gib=80).warnings
    share = int(100 * (1 - resident / (80 * GIB))) / 100
    assert greedy.endswith(f"of 80 GiB: lower rollout.memory_utilization to {share:g}")
    assert make_plan(in_turns(tmp_path, memory=share), gpu_gib=80).warnings == ()


def test_auto_leaves_engines_what_they_keep_while_they_rest(tmp_path: Path) -> None:
    def chosen(gpu_gib: float, **cluster: Any) -> int:
        sections = {"rollout": {"memory_utilization": 0.3}, "cluster": {"device": "cuda"} | cluster}
        return make_plan(config(tmp_path, QWEN_1_5B, **sections), gpu_gib).micro_batch

    assert 2048 < chosen(50, colocate=True) < chosen(50)


@pytest.mark.parametrize(
    ("device", "gpu_gib", "refused"), [("cuda", 24, True), ("cuda", 80, False), ("auto", 24, False)]
)
def test_only_a_named_device_makes_it_an_error(tmp_path: Path, device: str, gpu_gib: float, refused: bool) -> None:
    made = make_plan(config(tmp_path, QWEN_1_5B, cluster={"device": device}), gpu_gib)
    assert (cannot_fit(made), bool(made.warnings)) == (refused, gpu_gib == 24)


def test_a_checkpoint_holds_the_weights_and_three_fp32_copies_and_the_volume_two_more_than_are_kept(
    tmp_path: Path,
) -> None:
    made = make_plan(config(tmp_path, QWEN_1_5B, checkpoint={"keep": 3}))
    assert made.checkpoint == (2 + 3 * 4) * 1_543_714_304
    assert made.volume == 5 * made.checkpoint


def test_a_pod_needs_room_for_weights_cache_and_queues(tmp_path: Path) -> None:
    cpu = make_plan(config(tmp_path, QWEN_1_5B, cluster={"device": "cpu"}, rollout={"kv_cache_gib": 2}))
    assert cpu.pods["rollout"].memory == 1.5 * GIB + cpu.sync_bytes + 2 * GIB
    assert cpu.pods["trainer"].memory == 1.25 * GIB + cpu.rank_bytes + cpu.checkpoint  # of which it keeps a copy
    assert {role: pod.shm for role, pod in cpu.pods.items()} == dict.fromkeys(cpu.pods, cpu.object_store)
    gpu = make_plan(config(tmp_path, QWEN_1_5B, cluster={"device": "cuda"}, rollout={"tensor_parallel": 2}))
    assert gpu.pods["rollout"].shm == gpu.object_store + 3 * QUEUE + GIB // 4
    assert gpu.pods["trainer"].memory == (1.25 + 4) * GIB + gpu.checkpoint


@pytest.mark.parametrize(
    ("sections", "copies"),
    [
        ({}, 2 + 12),
        ({"train": {"ranks": 4, "zero_stage": 2}}, 2 + 3),
        ({"rollout": {"max_staleness": 2}}, 2 + 12 + 3 * 2),
        ({"rollout": {"max_staleness": 1}, "train": {"ranks": 4}}, 2 + 3 + 2 * 2),
    ],
    ids=str,
)
def test_the_first_rank_keeps_a_copy_of_its_share_and_of_versions_on_their_way(
    tmp_path: Path, sections: dict[str, Any], copies: int
) -> None:
    """Bytes a parameter on the host, in bfloat16."""
    made = make_plan(config(tmp_path, QWEN_1_5B, cluster={"device": "cuda"}, **sections))
    assert made.pods["trainer"].memory == (1.25 + 4) * GIB + copies * made.parameters


def test_a_rank_that_waits_for_the_disk_copies_less(tmp_path: Path) -> None:
    made = make_plan(config(tmp_path, QWEN_1_5B, cluster={"device": "cuda"}, checkpoint={"background": False}))
    assert made.pods["trainer"].memory == (1.25 + 4 + 2) * GIB


def test_an_adapter(tmp_path):
    """Counted by hand: rank 16 of 28 layers, of the sums of inputs and outputs."""
    plain = make_plan(config(tmp_path, QWEN_1_5B, algorithm={"kl_coef": 0.1}))
    asked = {"algorithm": {"kl_coef": 0.1}, "train": {"lora": {}}}
    made = make_plan(config(tmp_path, QWEN_1_5B, **asked))
    ends = 2 * 1536 + 2 * (1536 + 256) + 2 * 1536 + 3 * (1536 + 8960)
    assert made.trained == 16 * 28 * ends == 18_464_768
    assert made.optimizer == 12 * made.trained and made.gradients == 4 * made.trained
    assert made.weights == plain.weights + 2 * made.trained and (plain.reference, made.reference) == (plain.weights, 0)
    assert made.sync_bytes == plain.sync_bytes
    assert made.checkpoint == plain.weights + 14 * made.trained
    small = make_plan(config(tmp_path, QWEN_1_5B, checkpoint={"merged": False}, **asked))
    assert small.checkpoint == 14 * made.trained
    some = make_plan(config(tmp_path, QWEN_1_5B, train={"lora": {"targets": ["q_proj"], "rank": 8}}))
    assert some.trained == 8 * 28 * 2 * 1536
    one = make_plan(config(tmp_path, QWEN_1_5B, train={"lora": {"targets": ["layers.3.self_attn.q_proj"], "rank": 8}}))
    assert one.trained == 8 * 2 * 1536
    tenth = make_plan(config(tmp_path, QWEN_1_5B, train={"lora": {"targets": ["1.mlp.up_proj", "v_proj"], "rank": 8}}))
    assert tenth.trained == 8 * ((1536 + 8960) + 28 * (1536 + 256)), "1 is the second layer and not the 12th"
    single = make_plan(
        config(tmp_path, QWEN_1_5B | {"L": 1}, train={"lora": {"targets": ["model.layers.0.mlp.up_proj"]}})
    )
    assert single.trained == 16 * (1536 + 8960)
    with pytest.raises(ConfigError, match="of layers.0 to layers.27, but not layers.28.mlp.up_proj"):
        make_plan(config(tmp_path, QWEN_1_5B, train={"lora": {"targets": ["layers.28.mlp.up_proj"]}}))
    with pytest.raises(ConfigError, match="train.lora.targets: plan knows .* not lm_head"):
        make_plan(config(tmp_path, QWEN_1_5B, train={"lora": {"targets": ["lm_head"]}}))


@pytest.mark.parametrize(
    ("sections", "matrices"),
    [
        ({}, 1),
        ({"model": {"fp32_head": True}}, 2),
        ({"model": {"fp32_head": True, "dtype": "float32"}}, 1),
        ({"train": {"lora": {"rank": 8}}}, 0),
        ({"train": {"lora": {"rank": 8}}, "model": {"fp32_head": True}}, 1),
    ],
)
def test_a_head_in_fp32_has_its_weights_once_more(tmp_path: Path, sections: Any, matrices: int) -> None:
    """Beside its gradient, which a frozen one has not; weights that are fp32 already are not copied."""
    made = make_plan(config(tmp_path, QWEN_1_5B, **sections))
    assert made.head == 2 * 1024 * 151936 * 4 + matrices * 151936 * 1536 * 4


@pytest.mark.parametrize("sections", [{}, {"model": {"fp32_head": True}}, {"train": {"lora": {"rank": 8}}}])
def test_auto_leaves_room_for_the_head_as_it_is(tmp_path: Path, sections: Any) -> None:
    """All that a rank needs fits, and another grain of tokens would not."""
    made = make_plan(config(tmp_path, QWEN_1_5B, cluster={"device": "cuda"}, **sections), 80)
    left = ROOM * 80 * GIB - 80 * GIB / LOGITS - made.rank_bytes
    assert 0 <= left < GRAIN * made.activations / made.micro_batch
