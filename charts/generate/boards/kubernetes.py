"""The rows of the infrastructure dashboard about what is below Ray: KubeRay, pods, Kueue and GPUs."""

from charts.generate.panels import limits, lines, number, states


def either(metric: str, more: str = "") -> str:
    """A metric that names the run's namespace itself: under that name, or as exported_namespace without honorLabels."""
    pair = (f'{metric}{{{label}=~"$namespace"{more}}}' for label in ("namespace", "exported_namespace"))
    return f"({' or '.join(pair)})"


def gpu(metric: str) -> str:
    """A metric of the DCGM exporter for the pods of the run."""
    own, exported = 'namespace=~"$namespace",pod=~"$pod"', 'exported_namespace=~"$namespace",exported_pod=~"$pod"'
    return f"({metric}{{{own}}} or {metric}{{{exported}}})"


KUBERAY = [
    number(
        "RayJob",
        "What KubeRay says about the RayJobs of these namespaces.",
        "string",
        {"{{deployment_status}}": f"max by (name, deployment_status) ({either('kuberay_job_deployment_status')})"},
        names=True,
        alerts=["GrpoRunFailed", "GrpoPendingTooLong"],
        width=4,
    ),
    states(
        "RayJob over time",
        "State of each RayJob of these namespaces, as KubeRay's operator says.",
        {
            "{{name}} {{deployment_status}}": "max by (name, deployment_status)"
            f" ({either('kuberay_job_deployment_status')})"
        },
        width=10,
        height=8,
        alerts=["GrpoRunFailed", "GrpoPendingTooLong"],
    ),
    lines(
        "Ray clusters and attempts",
        "Time until all pods of a Ray cluster were ready, and duration of each attempt that has ended.",
        "s",
        {
            "ready {{name}}": f"max by (name) ({either('kuberay_cluster_provisioned_duration_seconds')})",
            "attempt {{retry_count}} {{job_deployment_status}}": "max by (name, retry_count, job_deployment_status)"
            f" ({either('kuberay_job_execution_duration_seconds')})",
        },
        low=0,
        width=10,
        alerts=["GrpoRetryBudgetLow", "GrpoPendingTooLong"],
    ),
]
CLUSTER = [
    number(
        "Free on the volume",
        "Least free share of a volume of these namespaces.",
        "percentunit",
        {
            "": 'min(kubelet_volume_stats_available_bytes{namespace=~"$namespace"}'
            ' / kubelet_volume_stats_capacity_bytes{namespace=~"$namespace"})'
        },
        steps=limits(0.2, 0.1),
        decimals=0,
        alerts=["GrpoVolumeFilling"],
        width=8,
    ),
    lines(
        "Ended containers",
        "Containers by the reason for which they last ended (kube-state-metrics), and pods by phase.",
        "suffix:pods",
        {
            "{{reason}} {{pod}}": "sum by (reason, pod) (kube_pod_container_status_last_terminated_reason"
            '{namespace=~"$namespace",pod=~"$pod"})',
            "pods {{phase}}": 'sum by (phase) (kube_pod_status_phase{namespace=~"$namespace"})',
        },
        low=0,
        width=16,
        alerts=["GrpoPendingTooLong"],
    ),
]
KUEUE = [
    lines(
        "Kueue: waiting",
        "Workloads that wait in each cluster queue of the whole cluster.",
        "suffix:workloads",
        {"{{cluster_queue}} {{status}}": "sum by (cluster_queue, status) (kueue_pending_workloads)"},
        low=0,
        alerts=["GrpoPendingTooLong"],
    ),
    lines(
        "Kueue: evicted",
        "Workloads per hour that had to give up their quota, by reason.",
        "suffix:workloads/h",
        {
            "{{cluster_queue}} {{reason}}": "sum by (cluster_queue, reason)"
            " (rate(kueue_evicted_workloads_total[$__rate_interval])) * 3600"
        },
        low=0,
        alerts=["GrpoRetryBudgetLow"],
    ),
    lines(
        "Kueue: time to admission",
        "Median time from being queued to being admitted.",
        "s",
        {
            "{{cluster_queue}}": "histogram_quantile(0.5, sum by (cluster_queue, le)"
            " (rate(kueue_admission_wait_time_seconds_bucket[1h])))"
        },
        low=0,
        alerts=["GrpoPendingTooLong"],
    ),
]
GPUS = [
    number(
        "XID errors",
        "GPUs of these pods whose last XID error is not 0.",
        "suffix:GPUs",
        {"": f"sum({gpu('DCGM_FI_DEV_XID_ERRORS')} > bool 0)"},
        steps=limits(1, 1.5),
        alerts=["GrpoGpuXid"],
        width=8,
    ),
    lines(
        "GPU in use",
        "Share of the time in which a kernel ran, by GPU, in percent. It does not say how well it was used.",
        "percent",
        {"{{Hostname}} {{gpu}}": f"max by (Hostname, gpu) ({gpu('DCGM_FI_DEV_GPU_UTIL')})"},
        low=0,
        high=100,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "GPU memory",
        "Share of the frame buffer in use.",
        "percentunit",
        {
            "{{Hostname}} {{gpu}}": f"max by (Hostname, gpu) ({gpu('DCGM_FI_DEV_FB_USED')}) / (max by (Hostname, gpu)"
            f" ({gpu('DCGM_FI_DEV_FB_USED')}) + max by (Hostname, gpu) ({gpu('DCGM_FI_DEV_FB_FREE')}))"
        },
        low=0,
        high=1,
        alerts=["GrpoKVCacheSaturated"],
    ),
    lines(
        "GPU power",
        "Watts by GPU: low power at high use means waiting for memory or for others.",
        "watt",
        {"{{Hostname}} {{gpu}}": f"max by (Hostname, gpu) ({gpu('DCGM_FI_DEV_POWER_USAGE')})"},
        low=0,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "GPU temperature",
        "Degrees Celsius by GPU. Near 85 they throttle.",
        "celsius",
        {"{{Hostname}} {{gpu}}": f"max by (Hostname, gpu) ({gpu('DCGM_FI_DEV_GPU_TEMP')})"},
        low=0,
        alerts=["GrpoThroughputDrop"],
    ),
    lines(
        "XID",
        "Code of the last XID error by GPU; 0 is none.",
        "prefix:XID ",
        {"{{Hostname}} {{gpu}}": f"max by (Hostname, gpu) ({gpu('DCGM_FI_DEV_XID_ERRORS')})"},
        low=0,
        alerts=["GrpoGpuXid"],
    ),
]
