"""One tree of errors, each class with the exit code of the process. Messages say rule, what was found, the way out.

GrpoError
├── ConfigError           2   a key, a value or a combination that the configuration does not allow
├── DataError             3   a data set or one of its rows
├── NoLearningSignal      4   every group of the run has the same reward throughout
├── NonFiniteError        5   loss, gradient or logprobs that are not finite
├── RewardError           6   reward code that fails too often
├── OutOfMemory           7   an engine, a rank or its machine has too little memory for this configuration
├── DiskError             8   a disk that is full, or a file that may not be written or read
├── ClusterError         10   an actor or the Ray cluster died; a retry may help
│   ├── DeadlineExceeded 10   a wait that took longer than `deadlines.*` allows
│   ├── EngineLost       10   a rollout engine died or froze, or leaves a node that drains
│   ├── TrainerLost      10   a trainer rank died or froze, or leaves a node that drains
│   ├── NoNode           10   an actor found no node within `deadlines.start`
│   ├── StoreLost        10   a bucket does not answer
│   └── ServiceLost      10   a reward service does not answer
├── Interrupted          11   SIGTERM, SIGHUP or Ctrl-C; every finished step is in a checkpoint
│   └── InterruptedEarly 16   the same, but steps after the last checkpoint are lost; that checkpoint is whole
├── Fenced               13   another start holds the run's folder
├── CheckpointError      14   a run folder or checkpoint that cannot be read or written
├── WeightSyncError      15   an engine does not hold the trainer's weights
│   └── MemoryNotShared  15   engines cannot read the trainer's GPU memory
├── AuditError           17   a run's folder contradicts itself
├── ResultsError         19   a run that is done, but its results could not be copied to run.results
├── NotProved            18   a run's folder does not, but it does not hold all that a proof needs
└── BugError              1   an error of ours or of a library's that nobody has foreseen

`fatal` classes end alike when the same run is tried again, so they leave FATAL.json; the others are worth a retry. In a
run that goes on, only what is below ClusterError is: death, freeze and lost connections.
"""


class GrpoError(Exception):
    """Base of all errors that are shown to a user as one line, without a traceback."""

    exit_code = 1
    fatal = False
    traceback = ""
    """Of what a library raised in an actor. It goes into a file of the run's folder, not onto the screen."""
    traceback_file = ""


class ConfigError(GrpoError):
    exit_code = 2
    fatal = True


class DataError(GrpoError):
    exit_code = 3
    fatal = True


class NoLearningSignal(GrpoError):
    exit_code = 4
    fatal = True


class NonFiniteError(GrpoError):
    exit_code = 5
    fatal = True


class RewardError(GrpoError):
    exit_code = 6
    fatal = True


class OutOfMemory(GrpoError):
    exit_code = 7
    fatal = True


class DiskError(GrpoError):
    exit_code = 8
    fatal = True


class BugError(GrpoError):
    fatal = True


class ClusterError(GrpoError):
    """`counts` says whether run.max_recoveries counts it: not where a node was taken away and nothing failed."""

    exit_code = 10

    def __init__(self, message: str = "", counts: bool = True) -> None:
        super().__init__(message)
        self.counts = counts


class DeadlineExceeded(ClusterError):
    exit_code = 10


class EngineLost(ClusterError):
    pass


class TrainerLost(ClusterError):
    pass


class NoNode(ClusterError):
    pass


class StoreLost(ClusterError):
    pass


class ServiceLost(ClusterError):
    pass


class Interrupted(GrpoError):
    exit_code = 11


class InterruptedEarly(Interrupted):
    exit_code = 16


class Fenced(GrpoError):
    exit_code = 13


class CheckpointError(GrpoError):
    exit_code = 14
    fatal = True


class WeightSyncError(GrpoError):
    exit_code = 15
    fatal = True


class MemoryNotShared(WeightSyncError):
    pass


class AuditError(GrpoError):
    exit_code = 17


class ResultsError(GrpoError):
    exit_code = 19


class NotProved(GrpoError):
    exit_code = 18
