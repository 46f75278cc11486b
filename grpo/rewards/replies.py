"""What reward services have answered, kept in the run's folder: nothing is asked and paid for twice."""

import json
import os
from contextlib import suppress
from pathlib import Path

from grpo.config.text import first_line
from grpo.errors import CheckpointError
from grpo.run.layout import REWARD_CACHE
from grpo.store.files import open_append, open_regular


class ReplyCache:
    """Rewards by digest of the request, and the number of requests: a file of JSON lines that only grows.

    Without a folder it lives as long as the process. The half line of a killed run is left out.
    """

    def __init__(self, folder: Path | None) -> None:
        """Raises CheckpointError for a file that cannot be read."""
        self.file = folder / REWARD_CACHE if folder else None
        self.rewards: dict[str, float] = {}
        self.requests = 0
        try:
            self._read()
        except FileNotFoundError:
            pass  # the first start
        except OSError as error:
            raise self._unusable(error) from None
        self._kept = self.requests

    def _read(self) -> None:
        if not self.file:
            return
        with open_regular(self.file) as lines:
            for line in lines:
                with suppress(ValueError, TypeError, AttributeError, RecursionError):
                    row = json.loads(line)
                    self.rewards |= {str(key): float(value) for key, value in row.get("rewards", {}).items()}
                    self.requests = max(self.requests, int(row.get("requests", 0)))

    def keep(self, rewards: dict[str, float]) -> None:
        """Adds what was learned since. Raises CheckpointError for a folder that cannot be written."""
        self.rewards |= rewards
        if not self.file or self.requests == self._kept:
            return
        self._kept = self.requests
        try:
            with os.fdopen(open_append(self.file), "w", encoding="utf-8") as file:
                # a line begins where the half line of a killed run may have ended
                file.write("\n" + json.dumps({"requests": self.requests, "rewards": rewards}))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"replies of reward services are kept in {self.file}, but: {first_line(error)}; mend it or free space"
        )
