"""Another value for a name, for a while."""

import types

import pytest

from grpo.run.replaced import replaced


def test_the_name_has_its_value_back_also_after_an_error() -> None:
    owner = types.SimpleNamespace(value=1)
    with replaced(owner, "value", 2):
        assert owner.value == 2
    assert owner.value == 1
    with pytest.raises(OSError, match="inside"), replaced(owner, "value", 3):
        raise OSError("inside")
    assert owner.value == 1
