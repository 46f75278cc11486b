"""Infrastructure: the pods, Ray, KubeRay, Kueue and GPUs under a run.

Rows that need somebody else's exporter are closed at first.
"""

from charts.generate.boards.kubernetes import CLUSTER, GPUS, KUBERAY, KUEUE
from charts.generate.layout import Board
from charts.generate.panels import limits, lines, number

# Ray names a worker by the actor and the method that it runs; the method comes and goes
ACTORS = """
label_replace(ray_component_uss_bytes{<pod>,Component=~"ray::.+|raylet|gcs"}, "actor", "$1", "Component", "([^.]*).*")
"""
NOW = [
    number(
        "Engines and ranks",
        "Actors that are ready, by role.",
        "suffix:workers",
        {"{{role}}": 'max by (run, role) (grpo_workers{<run>,state="ready"})'},
        alerts=["GrpoRolloutWorkerLost", "GrpoTrainerWorkerLost"],
        width=4,
    ),
    number(
        "Targets down",
        "Pods whose Ray does not answer a scrape.",
        "suffix:targets",
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
        "Emptiest disk",
        "Least free space on a file system of Ray's temporary folder.",
        "bytes",
        {"": "min(ray_node_disk_free{<pod>})"},
        width=4,
    ),
    number(
        "Replaced",
        "Engines and ranks that were lost and replaced since this start.",
        "suffix:workers",
        {"{{role}}": "sum by (role) (grpo_recoveries_total{<run>})"},
        alerts=["GrpoRecoveriesOften"],
        width=4,
    ),
    number(
        "Object store spilled",
        "Bytes that Ray's object store had to write to disk.",
        "bytes",
        {"": 'sum(ray_object_store_memory{<pod>,Location="SPILLED"}) or 0 * sum(ray_node_mem_used{<pod>})'},
        alerts=["GrpoMemoryHigh"],
        width=4,
    ),
]
LOSSES = [
    lines(
        "Workers",
        "Engines and ranks by state; ready should equal expected.",
        "suffix:workers",
        {"{{role}} {{state}}": "max by (run, role, state) (grpo_workers{<run>})"},
        low=0,
        alerts=["GrpoRolloutWorkerLost", "GrpoTrainerWorkerLost"],
    ),
    lines(
        "Replacements",
        "Lost actors that were replaced in the last hour, by role.",
        "suffix:replacements",
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
        "suffix:actors",
        {"{{State}}": 'sum by (State) (ray_actors{<run>,Source="gcs"})'},
        low=0,
        alerts=["GrpoRecoveriesOften"],
    ),
    lines(
        "Placement groups",
        "By state. Empty where the run uses none.",
        "suffix:groups",
        {"{{State}}": "sum by (State) (ray_placement_groups{<run>})"},
        low=0,
        alerts=["GrpoPendingTooLong"],
    ),
]
OTHERS = {
    "KubeRay (metrics of its operator)": KUBERAY,
    "Pods and volumes (kube-state-metrics, kubelet)": CLUSTER,
    "Kueue (its controller's metrics)": KUEUE,
    "GPUs (NVIDIA's DCGM exporter)": GPUS,
}
BOARD = Board(
    "infrastructure",
    "GRPO infrastructure",
    "Pods, Ray, KubeRay, Kueue and GPUs under the run.",
    {"Now": NOW, "Losses": LOSSES, "Pods": PODS, "Ray": RAY} | OTHERS,
    pods=True,
    folded=list(OTHERS),
)
