"""A policy as a Hugging Face folder, an adapter as PEFT's: written for each checkpoint, tried before the first step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from grpo.config import Config
from grpo.config.text import first_line
from grpo.data.tokenizer import load_tokenizer
from grpo.errors import CheckpointError, ConfigError
from grpo.trainer.adapter import peft_config


def prepare_saving(causal_lm: Any) -> None:
    """Takes generation settings out of config.json, where transformers reads them and refuses to write them.

    Where a model has no file for them, transformers has read them into its generation config.
    """
    for name in causal_lm.config._get_generation_parameters():  # what save_pretrained asks too
        delattr(causal_lm.config, name)


def write_adapter(path: Path, factors: Mapping[str, torch.Tensor], targets: Sequence[str], config: Config) -> None:
    """Writes the adapter to a new folder, from which `PeftModel.from_pretrained` loads it onto model.path.

    `targets` are the layers' names in PEFT's configuration.
    """
    assert config.train.lora, "only an adapter is written alone"
    path.mkdir(parents=True)
    written = peft_config(config.train.lora, targets)
    written.target_modules = sorted(targets)  # a set's order is another one in each process
    written.base_model_name_or_path, written.revision = config.model.path, config.model.revision
    written.inference_mode = True
    written.save_pretrained(path)
    if factors:
        named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in factors.items()}
        save_file(named, path / "adapter_model.safetensors", {"format": "pt"})


def write_policy(causal_lm: Any, path: Path, tensors: Mapping[str, torch.Tensor], config: Config) -> None:
    """Writes config, weights, generation settings and tokenizer to a new folder.

    The generation settings go out as they came in: transformers reads many that it refuses to write, such as a
    temperature beside `do_sample: false`. Raises CheckpointError where the disk fails, ConfigError where transformers
    cannot write this model.
    """
    if path.exists():
        raise CheckpointError(
            f"saved weights are never overwritten: {path} exists; move it away or choose another run.dir"
        )
    part = "config.json and weights"
    settings = getattr(causal_lm, "generation_config", None)
    try:
        path.mkdir(parents=True)
        if settings is not None:
            causal_lm.generation_config = GenerationConfig()
        causal_lm.save_pretrained(path, state_dict=dict(tensors))
        if settings is not None:
            part = "generation_config.json"
            settings.to_json_file(path / part)
        part = "tokenizer"
        load_tokenizer(config).save_pretrained(path)
    except (OSError, CheckpointError, ConfigError, MemoryError):
        raise
    except Exception as error:  # whatever a model's own code makes of its settings
        raise ConfigError(
            f"model.path = {config.model.path}: a policy must be saved as a Hugging Face folder, but transformers "
            f"cannot write its {part} ({type(error).__name__}: {first_line(error)}); correct the files of the model"
        ) from error
    finally:
        if settings is not None:
            causal_lm.generation_config = settings
