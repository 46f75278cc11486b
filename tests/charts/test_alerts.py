"""The alerts of the chart: promtool runs every case of tests/alerts/ on the rules that Helm renders."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.config import Config
from grpo.observe.metrics import CATALOGUE
from tests.rules import CHART, ROOT, alerts, kind, metric_labels, promtool, render

CASES: dict[str, dict[str, list[dict[str, Any]]]] = yaml.safe_load((ROOT / "tests/alerts/cases.yaml").read_text())
RUNBOOKS = ROOT / "docs/runbooks.md"
NAMESPACE, RELEASE, CLAIM = "team-a", "math", "shared-runs"
SETTINGS = ("job.backoffLimit=3", f"storage.existingClaim={CLAIM}")


def documents(release: str = RELEASE, namespace: str = NAMESPACE, *more: str) -> list[dict[str, Any]]:
    return render(*SETTINGS, *more, release=release, namespace=namespace)


def series_labels(found: list[dict[str, Any]], namespace: str) -> dict[str, str]:
    """What the names in capitals of the cases stand for."""
    job = kind("RayJob", found)[0]["metadata"]["name"]
    run = next(iter(alerts(found).values()))["labels"]["run"]
    pod = f"{job}-x7k2p-rollout-worker-8dhq4"
    return {
        "RUN": f'namespace="{namespace}",run="{run}"',
        "EXPORTED_JOB": f'namespace="kuberay-system",exported_namespace="{namespace}",name="{job}"',
        "EXPORTED_PODS": f'namespace="gpu-operator",exported_namespace="{namespace}",exported_pod="{pod}"',
        "JOB": f'namespace="{namespace}",name="{job}"',
        "PODS": f'namespace="{namespace}",pod="{pod}"',
        "HEAD": f'namespace="{namespace}",pod="{job}-x7k2p-head-5hw2n"',
        "VOLUME": f'namespace="{namespace}",persistentvolumeclaim="{CLAIM}"',
        "POD": pod,
    }


def filled(text: str, labels: dict[str, str]) -> str:
    return re.sub(r"\b[A-Z][A-Z_]+\b", lambda match: labels.get(match.group(), match.group()), text)


def unit_test(
    name: str, case: dict[str, Any], labels: dict[str, str], expected: list[dict[str, Any]]
) -> dict[str, Any]:
    """One case in promtool's form; https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules/"""
    return {
        "name": f"{name}: {case['why']}",
        "interval": "1m",
        "input_series": [
            {"series": filled(series, labels), "values": str(values)} for series, values in case["series"].items()
        ],
        "alert_rule_test": [{"eval_time": case["at"], "alertname": name, "exp_alerts": expected}],
    }


def expectation(rule: dict[str, Any], case: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    own = {key: filled(value, labels) for key, value in case.get("labels", {}).items()}
    said = {key: filled(case[key], labels) for key in ("summary", "description") if key in case}
    return {"exp_labels": rule["labels"] | own, "exp_annotations": rule["annotations"] | said}


def check_rules(folder: Path, found: list[dict[str, Any]], tests: dict[str, list[dict[str, Any]]], every: str) -> None:
    """Runs the tests of each alert against that alert alone, which is quicker than against all."""
    for name, own in tests.items():
        rules = {"groups": [{"name": "group", "rules": [alerts(found)[name]]}]}
        (folder / f"{name}.rules.yaml").write_text(yaml.safe_dump(rules))
        wanted = {"rule_files": [f"{name}.rules.yaml"], "evaluation_interval": every, "tests": own}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(wanted))
    files = [folder / f"{name}.yaml" for name in tests]
    done = subprocess.run([promtool(), "test", "rules", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_valid(tmp_path: Path) -> None:
    (rule,) = kind("PrometheusRule", documents())
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]))
    done = subprocess.run([promtool(), "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(CASES)} rules found" in done.stdout


def test_alerts_fire_with_what_they_say_and_stay_silent(tmp_path: Path) -> None:
    found = documents()
    labels = series_labels(found, NAMESPACE)
    tests = {
        name: [unit_test(name, case, labels, [expectation(alerts(found)[name], case, labels)]) for case in own["fires"]]
        + [unit_test(name, case, labels, []) for case in own["silent"]]
        for name, own in CASES.items()
    }
    check_rules(tmp_path, found, tests, "1m")


@pytest.mark.parametrize(("release", "namespace"), [(f"{RELEASE}-2", NAMESPACE), (RELEASE, "team-b")])
def test_alerts_ignore_another_release(tmp_path: Path, release: str, namespace: str) -> None:
    """What makes the alerts of one release fire is nothing to another in the same namespace or of the same name."""
    labels = series_labels(documents(release, namespace), namespace)
    if namespace == NAMESPACE:
        labels["VOLUME"] = f'namespace="{namespace}",persistentvolumeclaim="another"'
    tests = {name: [unit_test(name, case, labels, []) for case in own["fires"]] for name, own in CASES.items()}
    check_rules(tmp_path, documents(), tests, "1m")


def test_every_selector_is_of_this_release() -> None:
    for name, alert in alerts(documents()).items():
        for metric, labels in metric_labels(alert["expr"]):
            assert {"namespace", "exported_namespace"} & set(labels), f"{name}: {metric}"
            assert {"run", "pod", "exported_pod", "name", "persistentvolumeclaim"} & set(labels), f"{name}: {metric}"


def test_a_stalled_loop_is_seen_in_seconds_where_asked_for(tmp_path: Path) -> None:
    """As in the test on a real cluster: steps of 2 s, a limit of 20 s, rules evaluated every 5 s."""
    found = documents(RELEASE, NAMESPACE, "monitoring.rules.thresholds.stepStalledSeconds=20")
    run = series_labels(found, NAMESPACE)["RUN"]
    series = {
        f"grpo_progress_timestamp_seconds{{{run}}}": "0+5x12 60x12 125+5x12",
        f"grpo_step_duration_seconds_sum{{{run}}}": "0+5x12 60x12 65+5x12",
        f"grpo_step_duration_seconds_count{{{run}}}": "0+2.5x12 30x12 32.5+2.5x12",
    }
    firing = 'count(ALERTS{alertname="GrpoStepStalled",alertstate="firing"}) or vector(0)'
    test = {
        "interval": "5s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": firing, "eval_time": at, "exp_samples": [{"labels": "{}", "value": count}]}
            for at, count in (("60s", 0), ("85s", 0), ("100s", 1), ("120s", 1), ("130s", 0))
        ],
    }
    check_rules(tmp_path, found, {"GrpoStepStalled": [test]}, "5s")


def test_every_alert_has_both_cases_and_every_case_an_alert() -> None:
    assert sorted(CASES) == sorted(alerts(documents()))
    assert all(CASES[name]["fires"] and CASES[name]["silent"] for name in CASES)


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    _, *parts = re.split(r"^## (?=Grpo)", RUNBOOKS.read_text(), flags=re.MULTILINE)
    sections = dict(part.split("\n", 1) for part in parts)
    assert list(sections) == list(alerts(documents()))
    for name, text in sections.items():
        for heading in ("**Means.**", "**Look at.**", "**Causes.**", "**Do.**"):
            assert heading in text, f"the runbook of {name} lacks {heading}"


def test_runbooks_name_keys_and_metrics_that_exist() -> None:
    text = RUNBOOKS.read_text()
    for section, key in re.findall(r"`(?:config\.)?([a-z_]+)\.([a-z_]+)[`:]", text):
        keys = (
            getattr(Config.model_fields[section].annotation, "model_fields", ())
            if section in Config.model_fields
            else ()
        )
        assert not keys or key in {*keys, "jsonl"} or (section, key) == ("rollout", "replicas"), f"{section}.{key}"
    names = {metric.name for metric in CATALOGUE}
    assert set(re.findall(r"\bgrpo_[a-z_]+", text)) - names == set()
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= {name.lower() for name in CASES}


def test_every_alert_is_complete() -> None:
    url = "https://wiki.example.com/runbooks"
    for name, alert in alerts(documents(RELEASE, NAMESPACE, f"monitoring.runbookUrl={url}")).items():
        assert re.fullmatch(r"\d+[smh]", alert["for"]), name
        assert alert["labels"]["severity"] in {"page", "ticket"}, name
        assert alert["labels"]["namespace"] == NAMESPACE and alert["labels"]["run"].startswith("math-"), name
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert alert["annotations"]["runbook_url"] == f"{url}#{name.lower()}"


def test_without_a_url_an_alert_names_the_section_and_has_no_link() -> None:
    for name, alert in alerts(documents()).items():
        assert "runbook_url" not in alert["annotations"]
        assert alert["annotations"]["runbook"] == f"docs/runbooks.md, section {name}"


GROUPS = yaml.safe_load((CHART / "values.yaml").read_text())["monitoring"]["rules"]["groups"]


def test_a_group_can_be_left_out() -> None:
    def made(*off: str) -> list[str]:
        (rule,) = kind("PrometheusRule", render(*(f"monitoring.rules.groups.{name}=false" for name in off)))
        return [group["name"] for group in rule["spec"]["groups"]]

    assert made() == [f"grpo-{name}" for name in GROUPS]
    assert made("life", "overlap") == ["grpo-learning", "grpo-weights", "grpo-machines"]


def test_every_threshold_changes_an_alert() -> None:
    thresholds = yaml.safe_load((CHART / "values.yaml").read_text())["monitoring"]["rules"]["thresholds"]
    others = {key: 1 if isinstance(value, float) else value + 1 for key, value in thresholds.items()}
    settings = [f"monitoring.rules.thresholds.{key}={value}" for key, value in others.items()]
    before, after = alerts(documents()), alerts(documents(RELEASE, NAMESPACE, *settings))
    source = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    texts = {rule["alert"]: rule["expr"] + rule["for"] for group in source["groups"] for rule in group["rules"]}
    for key in thresholds:
        users = [
            name for name, text in texts.items() if f"${{{'retryLimit' if key == 'retriesLeft' else key}}}" in text
        ]
        assert users, f"monitoring.rules.thresholds.{key} is used by no alert"
        assert all(before[name] != after[name] for name in users), key
    assert before["GrpoRetryBudgetLow"]["expr"].count(">= 2\n") == 2  # of three, one is left
    assert after["GrpoRetryBudgetLow"]["expr"].count(">= 1\n") == 2


def test_rules_are_made_where_they_are_wanted() -> None:
    def made(*settings: str, operator: bool) -> bool:
        return bool(kind("PrometheusRule", render(*settings, operator=operator)))

    assert made(operator=True) and not made(operator=False)
    assert made("monitoring.enabled=true", operator=False)
    assert not made("monitoring.enabled=false", operator=True)
    assert not made("monitoring.rules.enabled=false", operator=True)


def test_a_missing_threshold_is_named() -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        documents(RELEASE, NAMESPACE, "monitoring.rules.thresholds.kvCacheRatio=null")
    assert "kvCacheRatio" in error.value.stderr
