"""The chart's PodMonitors: when they are made, whom they find, and what a real Prometheus makes of a scrape."""

import http.server
import json
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm import Object, container, job, one, pods, template
from tests.ranks import free_port

SECONDS = 60
API = ("--api-versions", "monitoring.coreos.com/v1")
RAY = """\
ray_vllm_num_requests_running{WorkerId="a",engine="0",otel_scope_name="ray",otel_scope_version=""} 3
ray_vllm_num_requests_running{WorkerId="b",engine="0",otel_scope_name="ray",otel_scope_version=""} 4
ray_vllm_generation_tokens_total{WorkerId="a",engine="0"} 5
ray_vllm_time_to_first_token_seconds_bucket{WorkerId="a",engine="0",le="0.5"} 6
ray_actors{State="ALIVE"} 2
"""
OWN = 'grpo_workers{role="trainer",run="mine",state="ready"} 1\n'


def monitors(values: Object | None = None, *more: str) -> list[Object]:
    return [item for item in template(values, *more) if item["kind"] == "PodMonitor"]


@pytest.mark.parametrize(
    ("enabled", "more", "count"),
    [("auto", API, 2), ("auto", (), 0), (True, (), 2), (True, API, 2), (False, API, 0)],
)
def test_they_are_made_where_the_cluster_knows_them(enabled: object, more: tuple[str, ...], count: int) -> None:
    assert len(monitors({"monitoring": {"enabled": enabled}}, *more)) == count


def test_labels_and_interval_come_from_the_values() -> None:
    for monitor in monitors({"monitoring": {"podMonitor": {"labels": {"release": "kps"}, "interval": "7s"}}}, *API):
        assert monitor["metadata"]["labels"]["release"] == "kps"
        assert monitor["metadata"]["labels"]["app.kubernetes.io/instance"] == "grpo"
        assert [endpoint["interval"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["7s"]


def test_a_timeout_and_more_relabelings_come_behind_the_charts_own() -> None:
    target = {"targetLabel": "cluster", "replacement": "blue"}
    drop = {"sourceLabels": ["__name__"], "regex": "ray_gcs_.+", "action": "drop"}
    values = {"scrapeTimeout": "7s", "relabelings": [target], "metricRelabelings": [drop]}
    plain, changed = monitors({}, *API), monitors({"monitoring": {"podMonitor": values}}, *API)
    for before, after in zip(plain, changed, strict=True):
        (first,), (second,) = before["spec"]["podMetricsEndpoints"], after["spec"]["podMetricsEndpoints"]
        assert "scrapeTimeout" not in first and second["scrapeTimeout"] == "7s"
        assert second["relabelings"] == [*first["relabelings"], target]
        assert second["metricRelabelings"] == [*first.get("metricRelabelings", []), drop]


@pytest.mark.parametrize(
    ("name", "port", "number", "roles"),
    [("grpo", "grpo-metrics", 9400, {"head"}), ("grpo-ray", "metrics", 8080, {"head", "rollout", "trainer"})],
)
def test_each_finds_the_pods_that_have_its_port(name: str, port: str, number: int, roles: set[str]) -> None:
    monitor = one([item for item in monitors({}, *API) if item["metadata"]["name"] == name], "PodMonitor")
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == [port]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    found = {role: pod for role, pod in pods(job()).items() if wanted <= pod["metadata"]["labels"].items()}
    assert set(found) == roles
    for pod in found.values():
        assert {entry["name"]: entry["containerPort"] for entry in container(pod)["ports"]}[port] == number


def test_every_label_that_is_taken_over_is_on_the_pods() -> None:
    given = {"ray_io_cluster", "ray_io_group"}  # by KubeRay
    for monitor in monitors({}, *API):
        for rule in monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]:
            taken = rule["sourceLabels"][0].removeprefix("__meta_kubernetes_pod_label_")
            for pod in pods(job()).values():
                labels = {name.replace(".", "_").replace("/", "_") for name in pod["metadata"]["labels"]}
                assert taken in labels | given


def as_prometheus_reads_it(rules: list[Object]) -> list[Object]:
    """The Prometheus operator writes the same keys in another case."""
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    return [{names.get(key, key): value for key, value in rule.items()} for rule in rules]


@contextmanager
def page(text: str) -> Iterator[int]:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


@contextmanager
def prometheus(folder: Path, jobs: list[Object]) -> Iterator[int]:
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield port
        finally:
            process.terminate()


def answers(port: int, query: str) -> list[tuple[dict[str, str], float]]:
    """The series of a query once there are any."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found: list[Any] = json.load(answer)["data"]["result"]
        except OSError:  # it is not up yet
            found = []
        if found:
            return [(series["metric"], float(series["value"][1])) for series in found]
        time.sleep(0.2)
    raise AssertionError(f"no series for {query}")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian package) is not installed")
def test_a_real_prometheus_shows_vllms_own_names_and_where_they_are_from(tmp_path: Path) -> None:
    prefix = "__meta_kubernetes_pod_label_"
    pod = {"ray_io_cluster": "c", "ray_io_group": "rollout", "grpo_dev_run": "mine"}
    pod |= {"app_kubernetes_io_component": "rollout"}
    with page(RAY) as ray, page(OWN) as own:
        jobs = []
        for monitor, port in zip(monitors({}, *API), (own, ray), strict=True):
            endpoint = monitor["spec"]["podMetricsEndpoints"][0]
            target = {"targets": [f"127.0.0.1:{port}"], "labels": {prefix + key: value for key, value in pod.items()}}
            jobs.append(
                {
                    "job_name": monitor["metadata"]["name"],
                    "static_configs": [target],
                    "relabel_configs": as_prometheus_reads_it(endpoint["relabelings"]),
                    "metric_relabel_configs": as_prometheus_reads_it(endpoint.get("metricRelabelings", [])),
                }
            )
        with prometheus(tmp_path, jobs) as port:
            running = answers(port, "vllm:num_requests_running")
            assert sorted((labels["WorkerId"], value) for labels, value in running) == [("a", 3), ("b", 4)]
            where = {
                "job": "grpo-ray",
                "instance": f"127.0.0.1:{ray}",
                "ray_io_cluster": "c",
                "ray_io_group": "rollout",
            }
            where |= {"run": "mine", "role": "rollout"}
            (tokens,) = answers(port, "vllm:generation_tokens_total")
            assert tokens[0] == where | {"__name__": "vllm:generation_tokens_total", "engine": "0", "WorkerId": "a"}
            assert answers(port, "vllm:time_to_first_token_seconds_bucket")[0][0]["le"] == "0.5"
            assert answers(port, "ray_actors")[0][0]["role"] == "rollout"
            (workers,) = answers(port, "grpo_workers")
            assert (workers[0]["role"], workers[0]["run"], workers[0]["state"]) == ("trainer", "mine", "ready")
            assert workers[0]["ray_io_cluster"] == "c" and "ray_io_group" not in workers[0]
            assert answers(port, 'count({__name__=~"ray_vllm.*"}) or vector(0)') == [({}, 0.0)]
