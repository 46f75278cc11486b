"""Infrastructure: the pods, Ray, KubeRay, Kueue and GPUs under a run. Empty panels: that exporter is not there."""

from charts.generate.boards.kubernetes import GPUS, KUBERNETES, either, gpu
from charts.generate.layout import Board
from charts.generate.panels import limits, lines, number

# Ray names a worker by the actor and the method that it runs; the method comes and goes
ACTORS = """
label_replace(ray_component_uss_bytes{<pod>,Component=~"ray::.+|raylet|gcs"}, "actor", "$1", "Component", "([^.]*).*")
"""
NOW = [
    number(
        "RayJob",
        "What KubeRay says about the RayJobs of these namespaces.",
        "none",
        {"{{deployment_status}}": f"max by (name, deployment_status) ({either('kuberay_job_deployment_status')})"},
        names=True,
        alerts=["GrpoRunFailed", "GrpoPendingTooLong"],
        width=4,
    ),
    number(
        "Engines and ranks",
        "Actors that are ready, by role.",
        "none",
        {"{{role}}": 'max by (run, role) (grpo_workers{<run>,state="ready"})'},
        alerts=["GrpoRolloutWorkerLost", "GrpoTrainerWorkerLost"],
        width=4,
    ),
    number(
        "Targets down",
        "Pods whose Ray does not answer a scrape.",
        "none",
        {"": "sum(up{<pod>} == bool 0)"},
        steps=limits(1, 2),
        alerts=["GrpoControllerDown"],
        width=4,
    ),
    number(
        "Fullest memory",
        "Highest use of a pod's memory.",
        "percentunit",
        {"": "max(ray_node_mem_used{<pod>} / ray_node_mem_total{<pod>})"},
        steps=limits(0.8, 0.92),
        decimals=0,
        alerts=["GrpoMemoryHigh"],
        width=4,
    ),
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
        width=4,
    ),
    number(
        "XID errors",
        "GPUs of these pods whose last XID error is not 0.",
        "none",
        {"": f"count({gpu('DCGM_FI_DEV_XID_ERRORS')} > 0) or vector(0)"},
        steps=limits(1, 1.5),
        alerts=["GrpoGpuXid"],
        width=4,
    ),
]
LOSSES = [
    lines(
        "Workers",
        "Engines and ranks by state; ready should equal expected.",
        "none",
        {"{{role}} {{state}}": "max by (run, role, state) (grpo_workers{<run>})"},
        low=0,
        alerts=["GrpoRolloutWorkerLost", "GrpoTrainerWorkerLost"],
    ),
    lines(
        "Replacements",
        "Lost actors that were replaced in the last hour, by role.",
        "none",
        {"{{role}} {{run}}": "sum by (run, role) (increase(grpo_recoveries_total{<run>}[1h]))"},
        low=0,
        alerts=["GrpoRecoveriesOften"],
    ),
    lines(
        "Last start",
        "Of each role's slowest actor, by what it was at; the driver's is from the command to the first step.",
        "s",
        {"{{role}} {{phase}} {{run}}": "max by (run, role, phase) (grpo_start_seconds{<run>})"},
        low=0,
        alerts=["GrpoRecoveriesOften"],
    ),
    lines(
        "Time of a replacement",
        "Mean time from a loss to its end, over an hour.",
        "s",
        {
            "{{run}}": "sum by (run) (rate(grpo_recovery_seconds_sum{<run>}[1h]))"
            " / (sum by (run) (rate(grpo_recovery_seconds_count{<run>}[1h])) > 0)"
        },
        low=0,
        alerts=["GrpoRecoveriesOften"],
    ),
]
PODS = [
    lines(
        "Memory",
        "Share of each pod's memory in use, page cache left out.",
        "percentunit",
        {"{{pod}}": "max by (pod) (ray_node_mem_used{<pod>} / ray_node_mem_total{<pod>})"},
        low=0,
        high=1,
        alerts=["GrpoMemoryHigh"],
    ),
    lines(
        "CPU",
        "Use of each pod's CPUs, in percent.",
        "percent",
        {"{{pod}}": "max by (pod) (ray_node_cpu_utilization{<pod>})"},
        low=0,
    ),
    lines(
        "Memory by component",
        "Memory that only this component uses: the controller, engines and ranks and Ray's own processes.",
        "bytes",
        {"{{actor}}": f"sum by (actor) ({ACTORS})"},
        stack=True,
        low=0,
        alerts=["GrpoMemoryHigh"],
    ),
    lines(
        "Network",
        "Bytes per second received (above 0) and sent (below 0) by each pod.",
        "Bps",
        {
            "in {{pod}}": "sum by (pod) (ray_node_network_receive_speed{<pod>})",
            "out {{pod}}": "-sum by (pod) (ray_node_network_send_speed{<pod>})",
        },
        alerts=["GrpoWeightSyncSlow"],
    ),
    lines(
        "Free disk",
        "Free bytes on the file system of Ray's temporary folder.",
        "bytes",
        {"{{pod}}": "min by (pod) (ray_node_disk_free{<pod>})"},
        low=0,
    ),
    lines(
        "Ended containers",
        "Containers by the reason for which they last ended (kube-state-metrics), and pods by phase.",
        "none",
        {
            "{{reason}} {{pod}}": "sum by (reason, pod) (kube_pod_container_status_last_terminated_reason"
            '{namespace=~"$namespace",pod=~"$pod"})',
            "pods {{phase}}": 'sum by (phase) (kube_pod_status_phase{namespace=~"$namespace"})',
        },
        low=0,
        alerts=["GrpoPendingTooLong"],
    ),
]
RAY = [
    lines(
        "Object store",
        "Bytes in Ray's object store by place. SPILLED means that it was too small.",
        "bytes",
        {"{{Location}}": "sum by (Location) (ray_object_store_memory{<pod>})"},
        stack=True,
        low=0,
        alerts=["GrpoMemoryHigh"],
    ),
    lines(
        "Actors",
        "Ray's actors by state, as its control service counts them.",
        "none",
        {"{{State}}": 'sum by (State) (ray_actors{<run>,Source="gcs"})'},
        low=0,
        alerts=["GrpoRecoveriesOften"],
    ),
    lines(
        "Placement groups",
        "By state. Empty where the run uses none.",
        "none",
        {"{{State}}": "sum by (State) (ray_placement_groups{<run>})"},
        low=0,
        alerts=["GrpoPendingTooLong"],
    ),
]
BOARD = Board(
    "infrastructure",
    "GRPO infrastructure",
    "Pods, Ray, KubeRay, Kueue and GPUs under the run.",
    {"Now": NOW, "Losses": LOSSES, "Pods": PODS, "Ray": RAY, "Kubernetes": KUBERNETES, "GPUs": GPUS},
    pods=True,
)
