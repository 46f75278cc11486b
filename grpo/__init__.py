"""GRPO fine-tuning of a language model: vLLM samples, DeepSpeed trains, Ray joins them."""

__version__ = "0.1.0"
