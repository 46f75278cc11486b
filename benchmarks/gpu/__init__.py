"""The same GRPO steps by grpo and by TRL on the same GPUs, one system after the other: `python -m benchmarks.gpu`."""
