"""One tree of errors. Each class carries the process's exit code; messages say rule, what was found, the way out.

GrpoError
├── ConfigError           2   a key, a value or a combination that the configuration does not allow
├── DataError             3   a data set or one of its rows
├── NoLearningSignal      4   every group of the run has the same reward throughout
├── NonFiniteError        5   loss, gradient or logprobs that are not finite
├── RewardError           6   a reward function that raised or returned something else than a finite number
├── ClusterError         10   an actor or the Ray cluster died; a retry may help
│   └── DeadlineExceeded 10   a wait that took longer than `deadlines.*` allows
├── Interrupted          11   SIGTERM or Ctrl-C; what was committed is whole
├── CheckpointError      14   a run folder or checkpoint that cannot be read or written
└── WeightSyncError      15   an engine does not hold the trainer's weights
"""


class GrpoError(Exception):
    """Base of all errors that are shown to a user as one line, without a traceback."""

    exit_code = 1


class ConfigError(GrpoError):
    exit_code = 2


class DataError(GrpoError):
    exit_code = 3


class NoLearningSignal(GrpoError):
    exit_code = 4


class NonFiniteError(GrpoError):
    exit_code = 5


class RewardError(GrpoError):
    exit_code = 6


class ClusterError(GrpoError):
    exit_code = 10


class DeadlineExceeded(ClusterError):
    exit_code = 10


class Interrupted(GrpoError):
    exit_code = 11


class CheckpointError(GrpoError):
    exit_code = 14


class WeightSyncError(GrpoError):
    exit_code = 15
