import errno
import json
import os

import pytest

from grpo import errors
from grpo.config import Config, Model, Run
from grpo.config.diff import config_hash
from grpo.errors import GrpoError
from grpo.run.fatal import FATAL, check_fatal, write_fatal
from grpo.store.volume import Volume

CONFIG = Config(model=Model(path="/model"))
OTHER = Config(model=Model(path="/model"), run=Run(steps=7))
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GrpoError)]
HELD = ["NoLearningSignal", "NonFiniteError", "RewardError", "CheckpointError", "WeightSyncError", "MemoryNotShared"]
HELD += ["OutOfMemory", "DiskError", "BugError"]


def leave(run_dir, kind, text="the reward must differ, but does not; look at samples.jsonl"):
    write_fatal(run_dir, kind(text), config_hash(CONFIG))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_only_what_would_end_alike_stops_the_next_start(tmp_path, kind):
    leave(tmp_path, kind)
    assert (tmp_path / FATAL).exists() == kind.fatal
    if kind.__name__ not in HELD:
        check_fatal(tmp_path, CONFIG)
        assert not (tmp_path / FATAL).exists()
        return
    with pytest.raises(kind) as caught:
        check_fatal(tmp_path, CONFIG)
    assert type(caught.value) is kind
    assert "the reward must differ" in str(caught.value)
    assert str(caught.value).endswith(f"delete {tmp_path / FATAL}")


def test_what_the_file_says(tmp_path):
    leave(tmp_path, errors.NoLearningSignal)
    content = json.loads((tmp_path / FATAL).read_text())
    assert content.pop("time").endswith("Z")
    assert content == {
        "class": "NoLearningSignal",
        "exit_code": 4,
        "message": "the reward must differ, but does not; look at samples.jsonl",
        "late": False,
        "next": "look at samples.jsonl",
        "config_hash": config_hash(CONFIG),
        "version": "0.1.0",
    }


def test_a_model_that_an_actor_refused_after_minutes_is_not_tried_again(tmp_path):
    error = errors.ConfigError("start: engine 0: model.path = '/model' must be a model that can be loaded")
    error.traceback = "Traceback"
    write_fatal(tmp_path, error, config_hash(CONFIG))
    with pytest.raises(errors.ConfigError, match="must be a model that can be loaded"):
        check_fatal(tmp_path, CONFIG)


def test_memory_that_others_held_is_worth_another_start(tmp_path):
    error = errors.OutOfMemory("start: engine 0 is out of memory")
    error.fatal = False
    write_fatal(tmp_path, error, config_hash(CONFIG))
    assert list(tmp_path.iterdir()) == []


def test_another_configuration_starts_and_the_file_goes(tmp_path):
    leave(tmp_path, errors.RewardError)
    check_fatal(tmp_path, OTHER)
    check_fatal(tmp_path, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_another_restart_starts_again(tmp_path):
    leave(tmp_path, errors.RewardError)
    with pytest.raises(errors.RewardError, match="set run.restart to another text \\(now none;"):
        check_fatal(tmp_path, CONFIG)
    check_fatal(tmp_path, CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"restart": "2"})}))
    assert list(tmp_path.iterdir()) == []


def test_deleting_the_file_starts_again(tmp_path):
    leave(tmp_path, errors.RewardError)
    (tmp_path / FATAL).unlink()
    check_fatal(tmp_path, CONFIG)


def test_the_first_word_stays_when_the_error_comes_back(tmp_path):
    leave(tmp_path, errors.RewardError)
    before = (tmp_path / FATAL).read_text()
    for _ in range(3):
        with pytest.raises(errors.RewardError) as caught:
            check_fatal(tmp_path, CONFIG)
        write_fatal(tmp_path, caught.value, config_hash(CONFIG))
    assert (tmp_path / FATAL).read_text() == before


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff", '{"class": "os"}', '{"class": "GrpoError"}', "[" * 99999])
def test_a_damaged_file_stops_nothing(tmp_path, content):
    (tmp_path / FATAL).write_text(content, encoding="latin-1")
    check_fatal(tmp_path, CONFIG)
    assert not (tmp_path / FATAL).exists()


@pytest.mark.parametrize("name", ["json", "Exception", "__name__", "ConfigError.__init__"])
def test_only_our_own_classes_are_raised(tmp_path, name):
    (tmp_path / FATAL).write_text(json.dumps({"class": name, "config_hash": config_hash(CONFIG)}))
    check_fatal(tmp_path, CONFIG)


def test_a_full_disk_does_not_hide_the_error(tmp_path, monkeypatch):
    def full(self, name, data):
        with self.typed("write"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Volume, "write_new", full)
    leave(tmp_path, errors.RewardError)
    assert not (tmp_path / FATAL).exists()


def test_the_hash_sees_every_key():
    assert config_hash(CONFIG) == config_hash(Config(model=Model(path="/model")))
    assert config_hash(CONFIG) != config_hash(OTHER)
