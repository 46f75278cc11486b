"""`grpo train` with the small actors: python -m tests.chaos.driver RUN.yaml KEY=VALUE ...; exit codes as the CLI's."""

import os
import sys
from functools import partial

from grpo.cluster.job import Makers, placed_engine, placed_rank, train
from grpo.config.load import load_config
from grpo.errors import GrpoError
from tests.chaos.actors import FakeEngineActor, FakeRankActor
from tests.chaos.reward import SLOW
from tests.chaos.slow import SlowEngineActor, SlowRankActor

SMALL = Makers(partial(placed_engine, actor=FakeEngineActor), partial(placed_rank, actor=FakeRankActor))
LATE = Makers(partial(placed_engine, actor=SlowEngineActor), partial(placed_rank, actor=SlowRankActor))


def main() -> int:
    try:
        train(load_config(sys.argv[1], sys.argv[2:]), LATE if os.environ.get(SLOW) else SMALL)
    except GrpoError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
