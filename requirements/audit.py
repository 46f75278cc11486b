"""Checks every pinned version against the known vulnerabilities: `python requirements/audit.py LOCK...`.

It asks pip-audit and judges its answer. What cannot be asked has not passed: pip-audit itself only warns of a package
that the registry does not answer for, and says that nothing was found. Exit code 1 and one line for each problem.
"""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

ALLOWED = Path(__file__).with_name("audit.toml")
LONGEST = timedelta(days=180)


@dataclass(frozen=True)
class Entry:
    """One vulnerability that may stay, for a reason, until a day."""

    id: str
    package: str
    reason: str
    expires: date


class AuditError(Exception):
    """The audit could not be made, so it has failed."""


def read_allowed(text: str) -> list[Entry]:
    """The entries of audit.toml. Raises AuditError for one that is not whole."""
    try:
        entries = tomllib.loads(text).get("allow", [])
        read = [Entry(**entry) for entry in entries]
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise AuditError(f"audit.toml: an entry needs id, package, reason and expires ({error})") from error
    for entry in read:
        texts = (entry.id, entry.package, entry.reason)
        if not (all(isinstance(text, str) and text.strip() for text in texts) and type(entry.expires) is date):
            raise AuditError(f"audit.toml: {entry.id!r} needs a reason, and a date such as 2027-01-31 as `expires`")
    return read


def judge(dependencies: Sequence[dict[str, Any]], allowed: Sequence[Entry], today: date) -> Iterator[str]:
    """One line for each problem in pip-audit's answer ("dependencies" of its JSON) and in the list of what may stay."""
    for entry in allowed:
        if entry.expires <= today:
            yield f"{entry.id} ({entry.package}): allowed until {entry.expires} only; raise the version or look again"
        elif entry.expires > today + LONGEST:
            yield f"{entry.id} ({entry.package}): expires {entry.expires}, more than {LONGEST.days} days ahead"
    if not dependencies:
        yield "no package was looked at"
    found: set[tuple[str, str]] = set()
    for package in dependencies:
        if "vulns" not in package:
            yield f"{package['name']}: not audited ({package.get('skip_reason', 'no answer')})"
        for flaw in package.get("vulns", ()):
            names = {flaw["id"], *flaw.get("aliases", ())}
            found |= {(package["name"], name) for name in names}
            if not any(entry.package == package["name"] and entry.id in names for entry in allowed):
                fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
                yield f"{package['name']} {package['version']}: {', '.join(sorted(names))}; fixed in {fixed}"
    for entry in allowed:
        if (entry.package, entry.id) not in found:
            yield f"{entry.id} ({entry.package}): no pinned version has it; remove the entry"


def ask(lock: Path) -> list[dict[str, Any]]:
    """pip-audit's answer for one lock. Raises AuditError if it has none."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--require-hashes", "--disable-pip"]
    command += ["--aliases", "on", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    try:
        dependencies: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError) as error:
        last = next(iter(done.stderr.strip().splitlines()[::-1]), f"exit code {done.returncode}")
        raise AuditError(f"{lock}: pip-audit gave no answer: {last[:300]}") from error
    return dependencies


def audit(locks: Sequence[Path], allowed: Sequence[Entry], today: date) -> list[str]:
    """All problems. A registry that does not know the first lock's packages is not asked for the others."""
    dependencies: list[dict[str, Any]] = []
    for lock in sorted(locks, key=lambda lock: lock.stat().st_size):
        answer = ask(lock)
        if not any("vulns" in package for package in answer):
            raise AuditError(
                f"{lock}: the package index answers no questions about vulnerabilities, so nothing is known; run the "
                "audit where the public index can be reached"
            )
        dependencies += answer
    return sorted(set(judge(dependencies, allowed, today)))


def main(arguments: Sequence[str]) -> int:
    try:
        problems = audit([Path(name) for name in arguments], read_allowed(ALLOWED.read_text()), date.today())
    except AuditError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    print("audit: FAILED" if problems else "audit: no known vulnerability but those allowed in requirements/audit.toml")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
