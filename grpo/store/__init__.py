"""Files on a volume or in a bucket, as checkpoints need them: flushed, whole or absent, named by failures."""

from grpo.store.base import Store, clean_name, record_of

__all__ = ["Store", "clean_name", "record_of"]
