"""What engines that come and go are worth: a run replayed through the model of `grpo plan` along a curve of prices.

    python -m benchmarks.elastic [RUN.yaml] [KEY=VALUE ...] --prices PRICES.csv --on-demand 4

Nothing is run, and no price is real unless you bring it: PRICES.csv has the columns hour and price of a spot GPU, in
any money, and begins again where the run outlasts it; without it the curve is SIMULATED, as shares of the price on
demand. Ranks and the first `min` engines are on demand, engines beyond that on spot GPUs: always, or by the price. An
engine that joins is paid for from the start of its GPU and samples `--start-seconds` later; what one that goes was
sampling counts as done. Steps teach the same whoever samples (docs/kubernetes.md), so steps by GPU-hour and by money
compare reward; `--gain`, what all the steps gain in a run that you made, turns them into it.
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.gpu.work import SHAPES
from grpo.config import Config
from grpo.config.load import load_config
from grpo.errors import ConfigError
from grpo.plan.forecast import Question, check_numbers
from grpo.plan.gpus import gpu_named
from grpo.plan.placement import with_engines
from grpo.plan.speed import Step, work_of
from grpo.plan.splits import predicted

SIMULATED = tuple(share / 100 for share in (
    28, 26, 25, 25, 26, 30, 38, 52, 68, 80, 88, 92, 95, 93, 90, 88, 120, 84, 72, 60, 48, 40, 34, 30,
))  # fmt: skip
"""A day: cheap at night, near the price on demand in office hours, above it for one. Invented."""
HOUR = 3600.0
MOST_HOURS = 100_000
EXAMPLE = {
    "run": {"steps": 20_000},
    "rollout": {
        **{"engines": {"min": 1, "max": 6}, "prompts_per_step": 128, "samples_per_prompt": 8, "max_tokens": 2048},
        **{"max_staleness": 2, "update": "in_flight"},
    },
    "train": {"ranks": 4, "zero_stage": 1, "minibatches": 4, "tokens_per_micro_batch": 16384},
    "cluster": {"device": "cuda"},
}
"""What is replayed without a RUN.yaml, with Qwen2-1.5B's sizes and completions of 1,024 tokens on average."""


@dataclass(frozen=True)
class Prices:
    """Of a GPU for an hour: on spot, hour by hour and then again from the first, and on demand."""

    spot: Sequence[float]
    on_demand: float

    def at(self, hour: int) -> float:
        return self.spot[hour % len(self.spot)]


@dataclass(frozen=True)
class Pool:
    """How many engines there are at a spot price; with `spot` those beyond `min` pay that price."""

    name: str
    engines: Callable[[float], int]
    spot: bool = True


@dataclass
class Bill:
    """What a run took: time, GPUs and money; GPU-hours in which trainer and engines had nothing to do."""

    hours: float = 0.0
    rank_hours: float = 0.0
    engine_hours: float = 0.0
    money: float = 0.0
    trainer_idle: float = 0.0
    engines_idle: float = 0.0
    joins: int = 0

    @property
    def gpu_hours(self) -> float:
        return self.rank_hours + self.engine_hours


def replay(
    pool: Pool, steps: float, prices: Prices, step_with: Mapping[int, Step], fewest: int, start_seconds: float
) -> Bill:
    """The run with this pool, from the curve's first hour to its last step. Raises ConfigError if that is too far."""
    bill, left, serving = Bill(), steps, fewest
    gpus = step_with[fewest].tensor_parallel
    for hour in range(MOST_HOURS):
        price = prices.at(hour)
        wanted = min(max(pool.engines(price), fewest), max(step_with))
        starting = min(start_seconds, HOUR) if wanted > serving and hour else 0.0  # the run begins with all there are
        bill.joins += max(0, wanted - serving) if hour else 0
        for seconds, engines in ((starting, min(serving, wanted)), (HOUR - starting, wanted)):
            step = step_with[engines]
            spent = min(seconds, left * step.seconds)
            left -= spent / step.seconds
            share = spent / HOUR
            paid = fewest * prices.on_demand + (wanted - fewest) * (price if pool.spot else prices.on_demand)
            bill.hours += share
            bill.rank_hours += share * step.ranks
            bill.engine_hours += share * wanted * gpus
            bill.money += share * (step.ranks * prices.on_demand + gpus * paid)
            bill.trainer_idle += share * step.ranks * step.trainer_idle
            bill.engines_idle += share * gpus * (engines * step.rollout_idle + wanted - engines)
        serving = wanted
        if left <= 1e-9 * steps:
            return bill
    raise ConfigError(f"run.steps = {steps:g}: not done after {MOST_HOURS} hours; replay fewer steps")


def cheapest(price: float, prices: Prices, step_with: Mapping[int, Step], fewest: int) -> int:
    """The number of engines with which a step costs least at this price."""

    def cost(engines: int) -> float:
        step = step_with[engines]
        gpus = step.ranks + fewest * step.tensor_parallel
        return step.seconds * (gpus * prices.on_demand + (engines - fewest) * step.tensor_parallel * price)

    return min(step_with, key=cost)


def pools(prices: Prices, step_with: Mapping[int, Step], fewest: int, limits: Sequence[float]) -> list[Pool]:
    """Fixed ones, on demand and on spot GPUs that are kept at any price, and elastic ones.

    Of the fixed ones the smallest, that with the fewest GPU-hours a step, and the largest.
    """
    most = max(step_with)
    best = min(step_with, key=lambda engines: gpu_seconds(step_with[engines]))

    def always(engines: int) -> Callable[[float], int]:
        return lambda price: engines

    def below(limit: float) -> Callable[[float], int]:
        return lambda price: most if price <= limit else fewest

    fixed = [Pool(f"fixed {engines}, on demand", always(engines), False) for engines in sorted({fewest, best, most})]
    fixed += [Pool(f"fixed {engines}, spot at any price", always(engines)) for engines in sorted({best, most})]
    elastic = [Pool(f"{fewest} to {most}, spot up to {limit:g}", below(limit)) for limit in limits]
    by_price = partial(cheapest, prices=prices, step_with=step_with, fewest=fewest)
    return [*fixed, *elastic, Pool(f"{fewest} to {most}, as many as make a step cheapest", by_price)]


def gpu_seconds(step: Step) -> float:
    """GPU-seconds of a step."""
    return step.seconds * (step.ranks + step.engines * step.tensor_parallel)


def table(bills: Mapping[str, Bill], steps: float, gain: float | None) -> str:
    """Markdown."""
    heads = ["engines", "hours", "GPU-hours", "cost", "steps by GPU-hour", "steps by money"]
    heads += ["gain by 100 GPU-hours", "gain by 100 of money"] if gain is not None else []
    heads += ["trainer idle", "engines idle", "joins"]
    lines = [f"| {' | '.join(heads)} |", f"|---{'|---' * (len(heads) - 1)}|"]
    for name, bill in bills.items():
        cells = [name, f"{bill.hours:.1f}", f"{bill.gpu_hours:.0f}", f"{bill.money:.0f}"]
        cells += [f"{steps / bill.gpu_hours:.1f}", f"{steps / bill.money:.1f}"]
        if gain is not None:
            cells += [f"{100 * gain / bill.gpu_hours:.2f}", f"{100 * gain / bill.money:.2f}"]
        idle = bill.trainer_idle / bill.rank_hours, bill.engines_idle / bill.engine_hours
        lines.append(f"| {' | '.join([*cells, *(f'{share:.0%}' for share in idle), str(bill.joins)])} |")
    return "\n".join(lines)


def read_prices(file: Path) -> list[float]:
    """Prices of the hours 0, 1, 2, ... Raises ConfigError."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
        found = [(float(row["hour"]), float(row["price"])) for row in rows]
    except OSError as error:
        raise ConfigError(f"--prices {file}: {error.strerror}; give a CSV file") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--prices {file}: needs the columns hour and price with a number each, but: {error!r}; correct it"
        ) from None
    wrong = [hour for number, (hour, price) in enumerate(found) if hour != number or not 0 <= price < float("inf")]
    if wrong or not found:
        raise ConfigError(
            f"--prices {file}: hours must be 0, 1, 2, ... and prices finite and not negative, but "
            f"{f'the row of hour {wrong[0]:g} is not' if wrong else 'there are none'}; correct it"
        )
    return [price for _, price in found]


def example(folder: Path) -> Config:
    """EXAMPLE, its model's sizes in this folder."""
    sizes = SHAPES["1.5b"] | {"model_type": "qwen2", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    return Config.model_validate(EXAMPLE | {"model": {"path": str(folder), "dtype": "bfloat16", "max_length": 2560}})


def steps_with(config: Config, question: Question) -> dict[int, Step]:
    """A step with each number of engines that the run may have. Raises ConfigError."""
    apart = config.cluster.model_copy(update={"address": "auto"})  # engines come with nodes of their own
    config = config.model_copy(update={"cluster": apart})
    rollout = config.rollout
    if not rollout.elastic or rollout.sharing > 1:
        raise ConfigError(
            f"rollout.engines = {rollout.engines}: an elastic pool has a range, and GPUs of its own; write "
            "rollout.engines={min: 1, max: 4} and leave engines_per_gpu and gpus_per_engine out"
        )
    check_numbers(question)
    gpu = gpu_named(question.gpu)
    work = work_of(config, question.prompt_tokens, question.completion_tokens)
    found = {}
    for engines in range(rollout.fewest_engines, rollout.most_engines + 1):
        split = predicted(with_engines(config, engines), gpu, question.gpu_gib or gpu.memory_gib, work)
        if split.problem:
            raise ConfigError(f"{split.problem}; see grpo plan")
        found[engines] = split.step
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a configuration whose rollout.engines is {min, max}")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--prices", type=Path, help="CSV with hour and price; else simulated, on demand 1")
    parser.add_argument("--on-demand", type=positive, default=1.0, help="price of a GPU for an hour on demand")
    parser.add_argument("--limits", type=positive, nargs="+", default=[0.4, 0.7], help="as shares of that")
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--prompt-tokens", type=float)
    parser.add_argument("--completion-tokens", type=float, help="means, as for grpo plan")
    parser.add_argument("--start-seconds", type=positive, default=180.0, help="from a GPU that is paid to an engine")
    parser.add_argument("--gain", type=float, help="what the run's steps gain in reward or accuracy, in points")
    chosen = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(chosen.run, chosen.changes) if chosen.run else example(Path(folder))
            lengths = (chosen.prompt_tokens, chosen.completion_tokens or (None if chosen.run else 1024))
            step_with = steps_with(config, Question(chosen.gpu, None, None, *lengths))
        spot = read_prices(chosen.prices) if chosen.prices else [share * chosen.on_demand for share in SIMULATED]
        prices, fewest = Prices(spot, chosen.on_demand), config.rollout.fewest_engines
        limits = [share * chosen.on_demand for share in chosen.limits]
        bills = {
            pool.name: replay(pool, config.run.steps, prices, step_with, fewest, chosen.start_seconds)
            for pool in pools(prices, step_with, fewest, limits)
        }
    except ConfigError as error:
        parser.error(str(error))
    print(f"prices: {chosen.prices or 'simulated'}, {chosen.on_demand:g} on demand; {config.run.steps} steps")
    print(", ".join(f"{engines} engines {step.seconds:.1f} s" for engines, step in step_with.items()), "a step")
    print(table(bills, config.run.steps, chosen.gain))


def positive(text: str) -> float:
    """A number above 0. Raises ValueError, which argparse tells."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError(text)
    return number


if __name__ == "__main__":
    main(sys.argv[1:])
