"""Stop texts in real vLLM: the sampler ends with the token that completes one, and ids, logprobs and text agree."""

import json
from pathlib import Path

import pytest

from grpo.config import Config
from grpo.types import Sampling
from tests.engines import EOS, EngineProcess, make_model, token_logprobs
from tests.stack import PARITY, PROMPT, make_config, mean_difference, prompt

STOPS = ("0", "1", "2.", "<unk>", "4", "5", "6")
"""The second ends inside of a token, the third is a special token."""


@pytest.mark.slow
def test_stop_texts_end_samples_and_everything_stays_aligned(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama", seed=0)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["2.x"] = vocabulary.pop("2")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = {token: word for word, token in vocabulary.items()}
    rollout = make_config(str(tmp_path)).model_dump() | {}
    rollout["rollout"] |= {"stop": STOPS}
    engine = EngineProcess(Config.model_validate(rollout))
    try:
        engine.call("commit_weights", 0)
        [group] = engine.call("generate", [(prompt(0), 7)], Sampling(48, 24, 1.0, 1.0))
    finally:
        engine.close()
    stopped = 0
    for sample in group.samples:
        parts = [words.get(token, "") for token in sample.output_ids]
        complete = [place for place, part in enumerate(parts) if any(stop in part for stop in STOPS)]
        assert complete in ([], [len(parts) - 1])  # nothing is sampled behind the token that completes a stop text
        ended = bool(complete) or sample.output_ids[-1] == EOS
        assert sample.finish_reason == ("stop" if ended else "length") and (ended or len(parts) == 24)
        assert sample.text == "".join(part for part, token in zip(parts, sample.output_ids, strict=True) if token > 1)
        assert len(sample.logprobs) == len(sample.output_ids)
        expected = token_logprobs(model, PROMPT + sample.output_ids)[-len(sample.output_ids) :]
        assert mean_difference(expected, list(sample.logprobs)) < PARITY
        stopped += bool(complete)
    assert stopped >= 10
