"""Verbs about the configuration: schema, show."""

import json

from grpo.cli.arguments import Overrides, RunFile
from grpo.config.load import config_schema, dump_config, load_config


def schema() -> None:
    """Print the JSON schema: every key and its meaning."""
    print(json.dumps(config_schema(), indent=2))


def show(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print a configuration with every key filled in."""
    print(dump_config(load_config(run_file, overrides or [])), end="")
