"""What a start takes from the run that it resumes, before anything heavy begins."""

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo.cluster.job import began, check_prompts
from grpo.data.prompts import load_data, prompt_stream
from grpo.data.rendering import Rendering
from grpo.errors import DataError
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
