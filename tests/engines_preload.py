"""Imported once by the fork server of `engines.py`; its children find vLLM loaded, in the environment of an engine.

Nothing is computed here: torch's OpenMP threads do not survive a fork, and an import starts none.
"""

import gc
import os
import shutil

from grpo.config import Config
from grpo.rollout import environment

environment.prepare_environment(Config.model_validate({"model": {"path": "of another process"}}), "cpu")
for of_one_engine in (environment.PARENT, environment.SOCKETS):
    value = os.environ.pop(of_one_engine)
    if os.path.isdir(value):
        shutil.rmtree(value)
gc.disable()

import vllm.model_executor.models.llama  # noqa: E402
import vllm.model_executor.models.qwen2  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import grpo.rollout.build  # noqa: E402, F401

gc.freeze()
gc.enable()
