"""`make audit`: what is allowed, for how long, and that silence is no pass. Offline, in pip-audit's own form."""

import importlib.util
import json
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest
from packaging.version import Version
from pip_audit._format import JsonFormat
from pip_audit._service import ResolvedDependency, SkippedDependency, VulnerabilityResult

ROOT = Path(__file__).parents[2]
TODAY = date(2026, 11, 24)
_spec = importlib.util.spec_from_file_location("audit", ROOT / "requirements" / "audit.py")
audit = importlib.util.module_from_spec(_spec)
sys.modules["audit"] = audit  # dataclasses look their module up
_spec.loader.exec_module(audit)


def flaw(name, *aliases, fixed="2.11.3"):
    """As pip-audit finds it: PYSEC-2021-66 of Jinja2 is CVE-2020-28493, fixed in 2.11.3."""
    return VulnerabilityResult(
        id=name,
        description="",
        fix_versions=[Version(fixed)],
        aliases=set(aliases),
    )


def answer(*flaws):
    """pip-audit's JSON for Jinja2 2.11.2 with these flaws and for a package without any."""
    found = {ResolvedDependency("jinja2", Version("2.11.2")): list(flaws), ResolvedDependency("uv", Version("1.0")): []}
    return json.loads(JsonFormat(output_desc=False, output_aliases=True).format(found, []))["dependencies"]


JINJA = flaw("PYSEC-2021-66", "CVE-2020-28493")


def entry(name="CVE-2020-28493", package="jinja2", reason="templates are ours", expires=date(2027, 1, 31)):
    return audit.Entry(name, package, reason, expires)


def problems(dependencies, *allowed):
    return list(audit.judge(dependencies, allowed, TODAY))


def test_no_flaw_and_no_entry_is_a_pass():
    assert problems(answer()) == []


def test_a_flaw_is_a_problem_with_its_names_and_the_way_out():
    assert problems(answer(JINJA)) == ["jinja2 2.11.2: CVE-2020-28493, PYSEC-2021-66; fixed in 2.11.3"]


@pytest.mark.parametrize("name", ["CVE-2020-28493", "PYSEC-2021-66"])
def test_an_entry_lets_it_pass_under_any_of_its_names(name):
    assert problems(answer(JINJA), entry(name)) == []


def test_an_entry_is_for_one_package_and_one_flaw():
    assert len(problems(answer(JINJA, flaw("PYSEC-2099-1")), entry())) == 1
    assert len(problems(answer(JINJA), entry(package="uv"))) == 2


@pytest.mark.parametrize("expires", [TODAY, date(2026, 11, 23), date(2020, 1, 1)])
def test_an_expired_entry_fails(expires):
    (problem,) = problems(answer(JINJA), entry(expires=expires))
    assert problem.startswith(f"CVE-2020-28493 (jinja2): allowed until {expires} only")


def test_an_entry_for_ever_fails():
    assert "more than 180 days ahead" in problems(answer(JINJA), entry(expires=date(2028, 1, 1)))[0]


def test_an_entry_that_nothing_needs_fails():
    assert problems(answer(), entry()) == ["CVE-2020-28493 (jinja2): no pinned version has it; remove the entry"]


def test_a_package_without_an_answer_fails():
    skipped = {SkippedDependency("jinja2", "Dependency not found on PyPI and could not be audited"): []}
    dependencies = json.loads(JsonFormat(False, True).format(skipped, []))["dependencies"]
    assert problems(dependencies) == ["jinja2: not audited (Dependency not found on PyPI and could not be audited)"]
    assert problems([]) == ["no package was looked at"]


@pytest.mark.parametrize(
    "text",
    [
        "[[allow]]\nid = 'CVE-1'\npackage = 'x'\nreason = 'y'\n",
        "[[allow]]\nid = 'CVE-1'\npackage = 'x'\nexpires = 2027-01-01\n",
        "[[allow]]\nid = 'CVE-1'\npackage = 'x'\nreason = ' '\nexpires = 2027-01-01\n",
        "[[allow]]\nid = 'CVE-1'\npackage = 'x'\nreason = 'y'\nexpires = '2027-01-01'\n",
        "[[allow]]\nid = 'CVE-1'\npackage = 'x'\nreason = 'y'\nexpires = 2027-01-01\nmore = 1\n",
        "[[allow]\n",
    ],
)
def test_an_entry_that_is_not_whole_is_refused(text):
    with pytest.raises(audit.AuditError, match="audit.toml"):
        audit.read_allowed(text)


def problems_of_the_list(text):
    """What the audit says of a list if every entry's flaw is really there, today."""
    allowed = audit.read_allowed(text)
    found = [
        {"name": entry.package, "version": "1", "vulns": [{"id": entry.id, "fix_versions": []}]} for entry in allowed
    ]
    return list(audit.judge([*found, {"name": "uv", "version": "1", "vulns": []}], allowed, date.today()))


def test_the_list_in_use_is_whole_and_nothing_in_it_has_expired():
    """It may well be empty: that an entry is looked at shows with one more at its end."""
    text = (ROOT / "requirements" / "audit.toml").read_text()
    assert problems_of_the_list(text) == []
    for days, problem in ((30, ""), (0, "allowed until"), (audit.LONGEST.days + 1, "more than 180 days ahead")):
        expires = date.today() + timedelta(days=days)
        more = f"\n[[allow]]\nid = 'CVE-1'\npackage = 'x'\nreason = 'y'\nexpires = {expires}\n"
        found = problems_of_the_list(text + more)
        assert [problem in one for one in found] == [True] * bool(problem)


def test_an_index_that_does_not_answer_fails_the_audit_and_is_asked_no_more(tmp_path, monkeypatch):
    for name, size in (("small.lock", 1), ("large.lock", 100)):
        (tmp_path / name).write_text("x" * size)
    asked = []

    def ask(lock):
        asked.append(lock.name)
        return [{"name": "uv", "skip_reason": "Dependency not found on PyPI"}]

    monkeypatch.setattr(audit, "ask", ask)
    with pytest.raises(audit.AuditError, match="answers no questions about vulnerabilities"):
        audit.audit([tmp_path / "large.lock", tmp_path / "small.lock"], [], TODAY)
    assert asked == ["small.lock"]


def test_the_command_fails_where_nothing_can_be_asked(tmp_path):
    """The real pip-audit with a network that is not there."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "requirements" / "audit.py"), str(ROOT / "requirements" / "uv.lock")],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (1, "audit: FAILED\n")
    assert done.stderr.startswith("audit: ") and done.stderr.count("\n") == 1
