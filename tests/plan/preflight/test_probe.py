"""What a probe does on its node."""

from pathlib import Path

from grpo.plan.preflight import links
from grpo.plan.preflight.probe import Probe
from tests.plan.preflight.sites import closed_port


def test_a_connection_is_tried_for_real() -> None:
    probe = Probe("a")
    open_port, closed = probe.listen(), closed_port()
    try:
        well, refused = probe.connect([("127.0.0.1", open_port), ("127.0.0.1", closed)])
    finally:
        probe.close()
    assert (well, "refused" in refused) == ("", True)
    check = links.connections({("a", "b"): refused}, 2)
    assert check.status == "failed" and check.text.startswith("a: no connection to b: ")


def test_probes_see_each_others_files_only_in_one_folder(tmp_path: Path) -> None:
    a, b = Probe("a"), Probe("b")
    assert [a.write(str(tmp_path / "x"), "t"), b.write(str(tmp_path / "y"), "t")] == ["", ""]
    assert b.read(str(tmp_path / "x"), "t", ["a", "b"]) == ["b"]
    (tmp_path / "x" / "t" / "a").write_text("of another start")
    assert b.read(str(tmp_path / "x"), "t", ["a"]) == ["a"]
    (tmp_path / "file").write_text("")
    assert "must write t/a" in a.write(str(tmp_path / "file"), "t")
