"""Files on a volume or in a bucket, as checkpoints need them: flushed, whole or absent, named by failures."""

import re

from grpo.errors import ConfigError
from grpo.store.base import MOST_READ, Store, clean_name, record_of

__all__ = ["MOST_READ", "Store", "clean_name", "open_store", "record_of"]


def open_store(url: str) -> Store:
    """The store at a path or at s3://bucket/prefix; nothing is connected or created yet. Raises ConfigError."""
    if url.startswith("s3://"):
        from grpo.store.bucket import Bucket

        return Bucket(url)
    if re.match("[^/]*:/", url):
        raise ConfigError(
            "checkpoint.dir: must be a folder or s3://bucket/prefix, but is a URL of another kind; give a folder "
            "that all nodes share, or an S3-compatible bucket"
        )
    from grpo.store.volume import Volume

    return Volume(url)
