"""Metrics of others that alerts and dashboards use, each with its source, its kind and the labels that we select by.

Everything else in an expression has to be in grpo/observe/metrics.py; tests/charts/test_dashboards.py compares.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Foreign:
    source: str
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    kind: Literal["plain", "histogram"] = "plain"


PROMETHEUS, RAY, VLLM = (
    "Prometheus",
    "Ray 2.60, port 8080 of every pod",
    "vLLM 0.32 through Ray, relabelled from ray_vllm_*",
)
KUBERAY, KUEUE = "KubeRay operator 1.6", "Kueue 0.19"
OWN = (PROMETHEUS, RAY, VLLM)  # scraped by the chart's own PodMonitors

THIRD_PARTY: tuple[Foreign, ...] = (
    Foreign(PROMETHEUS, ("up",), ("endpoint",)),
    Foreign(PROMETHEUS, ("ALERTS",), ("alertname", "alertstate", "severity")),
    Foreign(
        RAY,
        (
            "ray_node_cpu_utilization",
            "ray_node_mem_used",
            "ray_node_mem_total",
            "ray_node_disk_free",
            "ray_node_network_receive_speed",
            "ray_node_network_send_speed",
        ),
    ),
    Foreign(RAY, ("ray_component_uss_bytes",), ("Component",)),
    Foreign(RAY, ("ray_object_store_memory",), ("Location",)),
    Foreign(RAY, ("ray_actors",), ("State", "Source")),
    Foreign(RAY, ("ray_placement_groups",), ("State",)),
    Foreign(
        VLLM,
        (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:num_preemptions_total",
            "vllm:prefix_cache_queries_total",
            "vllm:prefix_cache_hits_total",
            "vllm:prompt_tokens_total",
            "vllm:generation_tokens_total",
        ),
    ),
    Foreign(VLLM, ("vllm:request_success_total",), ("finished_reason",)),
    Foreign(
        VLLM,
        (
            "vllm:time_to_first_token_seconds",
            "vllm:inter_token_latency_seconds",
            "vllm:e2e_request_latency_seconds",
            "vllm:request_queue_time_seconds",
            "vllm:request_generation_tokens",
            "vllm:iteration_tokens_total",
        ),
        kind="histogram",
    ),
    Foreign(KUBERAY, ("kuberay_job_deployment_status",), ("name", "deployment_status")),
    Foreign(KUBERAY, ("kuberay_job_execution_duration_seconds",), ("name", "job_deployment_status", "retry_count")),
    Foreign(KUBERAY, ("kuberay_cluster_provisioned_duration_seconds",), ("name",)),
    Foreign(KUEUE, ("kueue_pending_workloads",), ("cluster_queue", "status")),
    Foreign(KUEUE, ("kueue_evicted_workloads_total",), ("cluster_queue", "reason")),
    Foreign(KUEUE, ("kueue_admission_wait_time_seconds",), ("cluster_queue",), kind="histogram"),
    Foreign("kube-state-metrics", ("kube_pod_status_phase",), ("phase",)),
    Foreign("kube-state-metrics", ("kube_pod_container_status_last_terminated_reason",), ("reason",)),
    Foreign(
        "kubelet",
        ("kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"),
        ("persistentvolumeclaim",),
    ),
    Foreign(
        "NVIDIA DCGM exporter",
        (
            "DCGM_FI_DEV_GPU_UTIL",
            "DCGM_FI_DEV_FB_USED",
            "DCGM_FI_DEV_FB_FREE",
            "DCGM_FI_DEV_GPU_TEMP",
            "DCGM_FI_DEV_POWER_USAGE",
            "DCGM_FI_DEV_XID_ERRORS",
        ),
        ("Hostname", "gpu"),
    ),
)
# Labels that the scrape adds to every series; exported_* are those in conflict, where it does not honor labels
SCRAPED = ("namespace", "pod", "run", "job", "exported_namespace", "exported_pod")
