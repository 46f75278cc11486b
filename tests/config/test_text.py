import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from grpo.config.text import STEERING, clean
from tests.runs import HOSTILE


@given(st.text() | st.just(HOSTILE))
def test_clean_leaves_nothing_that_steers_a_terminal(text):
    assert not any(unicodedata.category(char) in STEERING for char in clean(text))


@given(st.text(st.characters(codec="utf-8", exclude_categories=sorted(STEERING))))
def test_clean_leaves_readable_text_alone(text):
    assert clean(text) == text
