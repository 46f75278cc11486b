"""What a start takes from the run that it resumes, before anything heavy begins."""

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo.cluster.job import began, check_prompts, leave_fatal
from grpo.data.prompts import load_data, prompt_stream
from grpo.data.rendering import Rendering
from grpo.errors import CheckpointError, ClusterError, DataError, Fenced
from grpo.run.fatal import FATAL
from grpo.run.lease import Lease
from tests.data_helpers import CHAT, configure, make_tokenizer, write_lines

DATED = "{{ strftime_now('%d %b %Y') }} " + CHAT


def commit(prompts: dict[str, Any]) -> Any:
    return SimpleNamespace(state={"progress": {"prompts": json.loads(json.dumps(prompts))}})


def started(template: str, now: datetime | None) -> Any:
    """The stream of prompts of a start at that time, as the job makes it."""
    config = configure({"source": "rows.jsonl"}, {"prompts": 0})
    rendering = Rendering(config, make_tokenizer(template), now)
    seen = rendering.now.isoformat() if rendering.sees_the_time else ""
    return prompt_stream(config, load_data(config, rendering)[0].prompts, seen)


def test_a_run_that_is_resumed_tomorrow_sees_its_own_date(in_tmp: Path) -> None:
    write_lines(in_tmp / "rows.jsonl", {"question": "1+1?", "answer": "2"})
    first = started(DATED, datetime(2026, 2, 3, 4, 5))
    newest = commit(first.state())
    assert began(newest) == datetime(2026, 2, 3, 4, 5) and began(None) is None
    again = started(DATED, began(newest))
    check_prompts(newest, again)
    assert again.prompts == first.prompts
    with pytest.raises(DataError, match="the template writes what changes"):
        check_prompts(newest, started(DATED, datetime(2026, 2, 4)))


def test_a_template_without_the_time_keeps_none(in_tmp: Path) -> None:
    write_lines(in_tmp / "rows.jsonl", {"question": "1+1?", "answer": "2"})
    newest = commit(started(CHAT, datetime(2026, 2, 3)).state())
    assert began(newest) is None
    check_prompts(newest, started(CHAT, None))


def test_looking_changes_no_place_in_the_stream(in_tmp: Path) -> None:
    write_lines(in_tmp / "rows.jsonl", *[{"question": f"{n}+1?", "answer": "2"} for n in range(5)])
    first = started(CHAT, None)
    first.take(3)
    fresh = started(CHAT, None)
    before = fresh.state()
    check_prompts(commit(first.state()), fresh)
    assert fresh.state() == before


def test_what_a_start_met_that_was_overtaken_stops_nobody(tmp_path: Path) -> None:
    config = configure({"source": "rows.jsonl"}, {"prompts": 0})
    error = CheckpointError("its checkpoint is gone; the newer start has removed it")
    with Lease(tmp_path, 60) as lease:
        (tmp_path / "attempts" / "000002.json").write_text("{}")
        with pytest.raises(Fenced, match="attempt 2 has taken over"):
            leave_fatal(tmp_path, error, config, lease)
        leave_fatal(tmp_path, ClusterError("this one would not come again"), config, lease)
        assert not (tmp_path / FATAL).exists()
    with Lease(tmp_path / "other", 60) as lease:
        leave_fatal(tmp_path / "other", error, config, lease)
        assert (tmp_path / "other" / FATAL).exists()
