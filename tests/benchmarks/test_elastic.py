"""The replay of a price curve: time, GPUs and money by hand, what pools do, and the table in the docs."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import elastic
from benchmarks.elastic import HOUR, Pool, Prices, cheapest, main, pools, read_prices, replay
from grpo.errors import ConfigError
from grpo.plan.speed import Step


def step(engines: int, seconds: float, trainer_idle: float, rollout_idle: float = 0.0, parallel: int = 1) -> Step:
    return Step(engines, parallel, 2, seconds, 0.0, 0.0, 0.0, rollout_idle, trainer_idle)


ROOT = Path(__file__).parents[2]
STEPS = {1: step(1, 36.0, 0.5), 2: step(2, 18.0, 0.0), 3: step(3, 18.0, 0.0, 1 / 3)}
PRICES = Prices((0.2, 1.0), 1.0)
ELASTIC = Pool("1 to 2", lambda price: 2 if price < 0.5 else 1)


def test_a_fixed_pool_by_hand():
    bill = replay(Pool("fixed 2", lambda _: 2, spot=False), 500, PRICES, STEPS, 1, 180.0)
    assert (bill.hours, bill.rank_hours, bill.engine_hours, bill.gpu_hours) == pytest.approx((2.5, 5.0, 5.0, 10.0))
    assert (bill.money, bill.trainer_idle, bill.engines_idle, bill.joins) == pytest.approx((10.0, 0.0, 0.0, 0))


def test_an_elastic_pool_by_hand():
    """200 steps, then 100 with one engine, then 180 s until the second samples, and 90 with both."""
    bill = replay(ELASTIC, 395, PRICES, STEPS, 1, 180.0)
    rest = 180.0 / HOUR + 90 * 18 / HOUR
    assert bill.hours == pytest.approx(2 + rest)
    assert bill.engine_hours == pytest.approx(2 + 1 + 2 * rest)
    assert bill.money == pytest.approx((2 + 1 + 0.2) + (2 + 1) + rest * (2 + 1 + 0.2))
    assert bill.trainer_idle == pytest.approx(2 * 0.5 * (1 + 180.0 / HOUR))
    assert bill.engines_idle == pytest.approx(180.0 / HOUR)  # the one that starts
    assert bill.joins == 1


def test_spot_beyond_min_costs_its_price_and_the_rest_that_on_demand():
    bill = replay(Pool("fixed 3, spot", lambda _: 3), 400, PRICES, STEPS, 1, 180.0)
    assert bill.money == pytest.approx((3 + 2 * 0.2) + (3 + 2 * 1.0))
    assert bill.engines_idle == pytest.approx(2.0)


def test_gpus_of_engines_with_tensor_parallel_are_all_paid():
    wide = {1: step(1, 36.0, 0.0, parallel=4)}
    bill = replay(Pool("fixed 1", lambda _: 1), 100, PRICES, wide, 1, 180.0)
    assert (bill.engine_hours, bill.rank_hours, bill.money) == pytest.approx((4.0, 2.0, 6.0))


@given(
    st.lists(st.floats(0.01, 3.0), min_size=1, max_size=30),
    st.floats(0.0, 7200.0),
    st.floats(1.0, 5000.0),
    st.floats(0.0, 3.0),
)
def test_an_elastic_pool_is_between_its_ends(spot, start_seconds, steps, limit):
    prices = Prices(spot, 1.0)

    def hours(engines):
        return replay(Pool("", engines), steps, prices, STEPS, 1, start_seconds).hours

    some = hours(lambda price: 2 if price <= limit else 1)
    assert hours(lambda _: 2) - 1e-6 <= some <= hours(lambda _: 1) + 1e-6


@given(st.lists(st.floats(0.0, 3.0), min_size=1, max_size=30), st.floats(1.0, 5000.0))
def test_a_step_of_the_cheapest_pool_costs_what_its_hour_allows(spot, steps):
    prices = Prices(spot, 1.0)
    best = Pool("", lambda price: cheapest(price, prices, STEPS, 1))
    bill = replay(best, steps, prices, STEPS, 1, 0.0)
    each = [min(costs(price).values()) for price in spot]
    assert steps * min(each) - 1e-6 <= bill.money <= steps * max(each) + 1e-6


def costs(price: float) -> dict[int, float]:
    """Of a step, by hand."""
    return {engines: each.seconds / HOUR * (3 + (engines - 1) * price) for engines, each in STEPS.items()}


def test_how_many_engines_are_cheapest_follows_the_price():
    assert [cheapest(price, PRICES, STEPS, 1) for price in (0.0, 0.5, 2.9, 3.1)] == [2, 2, 2, 1]


def test_the_pools_that_are_compared():
    named = {pool.name: pool for pool in pools(PRICES, STEPS, 1, [0.4])}
    assert list(named) == [
        "fixed 1, on demand",
        "fixed 2, on demand",
        "fixed 3, on demand",
        "fixed 2, spot at any price",
        "fixed 3, spot at any price",
        "1 to 3, spot up to 0.4",
        "1 to 3, as many as make a step cheapest",
    ]
    assert [pool.engines(0.4) for pool in named.values()] == [1, 2, 3, 2, 3, 3, 2]
    assert [pool.engines(0.5) for pool in named.values()] == [1, 2, 3, 2, 3, 1, 2]
    assert [pool.spot for pool in named.values()] == [False] * 3 + [True] * 4


@pytest.mark.parametrize(
    "text, problem",
    [
        ("hour,price\n", "there are none"),
        ("hour,price\n0,1\n2,1\n", "the row of hour 2"),
        ("hour,price\n0,-1\n", "the row of hour 0"),
        ("hour,price\n0,nan\n", "the row of hour 0"),
        ("hour,price\n0,inf\n", "the row of hour 0"),
        ("hour,price\n0,cheap\n", "could not convert"),
        ("hour,price\n0\n", "TypeError"),
        ("time,price\n0,1\n", "KeyError"),
    ],
)
def test_a_price_curve_that_is_none_is_refused(tmp_path, text, problem):
    (tmp_path / "prices.csv").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        read_prices(tmp_path / "prices.csv")


def test_a_price_curve_as_tables_save_it(tmp_path):
    (tmp_path / "prices.csv").write_bytes(b"\xef\xbb\xbfhour,price,zone\r\n0,1.5,a\r\n1,2,b\r\n")
    assert read_prices(tmp_path / "prices.csv") == [1.5, 2.0]
    with pytest.raises(ConfigError, match="No such file"):
        read_prices(tmp_path / "none.csv")


def test_a_run_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(elastic, "MOST_HOURS", 3)
    with pytest.raises(ConfigError, match="not done after 3 hours"):
        replay(ELASTIC, 1e6, PRICES, STEPS, 1, 180.0)


def test_a_fixed_number_of_engines_is_refused(capsys):
    with pytest.raises(SystemExit):
        main([str(ROOT / "examples" / "quickstart.yaml")])
    assert "rollout.engines = 1: an elastic pool has a range" in capsys.readouterr().err


def test_prices_in_money_change_money_alone(tmp_path: Path, capsys):
    main([])
    plain = capsys.readouterr().out.splitlines()
    (tmp_path / "prices.csv").write_text(
        "hour,price\n" + "".join(f"{hour},{4 * share}\n" for hour, share in enumerate(elastic.SIMULATED))
    )
    main(["--prices", str(tmp_path / "prices.csv"), "--on-demand", "4", "--gain", "10"])
    priced = capsys.readouterr().out.splitlines()
    for row, dear in zip(plain[4:], priced[4:], strict=True):
        cells, more = (line.strip("| ").split(" | ") for line in (row, dear))
        assert more[1:3] == cells[1:3] and more[-3:] == cells[-3:]
        assert float(more[3]) == pytest.approx(4 * float(cells[3]), abs=2)
        assert float(more[6]) == pytest.approx(1000 / float(cells[2]), abs=0.01)


def test_the_docs_have_the_table_of_the_example(capsys):
    main([])
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert "\n".join(capsys.readouterr().out.splitlines()[2:]) in text
