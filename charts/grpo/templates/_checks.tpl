{{/* What KubeRay, Kueue or the API server would refuse late, or never say: refused here, with a sentence. */}}
{{- define "grpo.checks" -}}
{{- include "grpo.checks.needed" . -}}
{{- include "grpo.checks.cluster" . -}}
{{- include "grpo.checks.lookup" . -}}
{{- include "grpo.checks.job" . -}}
{{- include "grpo.checks.inputs" . -}}
{{- include "grpo.checks.deletion" . -}}
{{- include "grpo.checks.security" . -}}
{{- include "grpo.checks.config" . -}}
{{- include "grpo.checks.elastic" . -}}
{{- include "grpo.checks.storage" . -}}
{{- include "grpo.checks.monitoring" . -}}
{{- range $role := list "head" "rollout" "trainer" }}{{ include "grpo.checks.group" (dict "root" $ "role" $role) }}{{ end -}}
{{- if eq (include "grpo.together" .) "true" }}{{ include "grpo.checks.together" . }}{{ else -}}
{{- range $role := list "rollout" "trainer" }}{{ include "grpo.checks.placement" (dict "root" $ "role" $role) }}{{ end -}}
{{- end -}}
{{- end }}

{{/* What has no default. */}}
{{- define "grpo.checks.needed" -}}
{{- $missing := list -}}
{{- if not .Values.image.registry }}{{ $missing = append $missing "image.registry is empty: where you pushed the images that `make images` builds, for example registry.example.com/team, or localhost for images loaded into the nodes" }}{{ end -}}
{{- if not (or .Values.model.url .Values.model.claim (include "grpo.config.get" (list . "model" "path" ""))) }}{{ $missing = append $missing "No model is named. Set config.model.path (a folder in the images, or an id of the hub with config.model.revision), model.url or model.claim" }}{{ end -}}
{{- if $missing -}}
{{- fail (printf "\n\n%s.\n\nA whole example that needs neither GPU nor download is charts/grpo/ci/cpu-smoke-values.yaml:\n\n  helm install grpo charts/grpo -f charts/grpo/ci/cpu-smoke-values.yaml --set image.registry=REGISTRY\n" (join ".\n" $missing)) -}}
{{- end -}}
{{- end }}

{{/* Every API server has apiregistration.k8s.io; `helm template` without a cluster does not, and then nothing is known. */}}
{{- define "grpo.checks.cluster" -}}
{{- $has := .Capabilities.APIVersions -}}
{{- if $has.Has "apiregistration.k8s.io/v1" -}}
{{- if not ($has.Has "ray.io/v1/RayJob") -}}
{{- fail "\n\nThis cluster has no RayJob (ray.io/v1): the KubeRay operator is missing. Install it, then try again:\n\n  helm install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm --version 1.6.2 --namespace kuberay-system --create-namespace\n" -}}
{{- end -}}
{{- if and .Values.queue.name (not (or ($has.Has "kueue.x-k8s.io/v1beta1") ($has.Has "kueue.x-k8s.io/v1beta2"))) -}}
{{- fail (printf "\n\nqueue.name is %s, but this cluster has no Kueue (kueue.x-k8s.io): the job would start without it. Install Kueue or leave queue.name empty." .Values.queue.name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.job" -}}
{{- $mode := include "grpo.submissionMode" . -}}
{{- if and (eq $mode "SidecarMode") (eq .Values.podSecurity "restricted") -}}
{{- fail "\n\njob.submissionMode SidecarMode does not go with podSecurity restricted: KubeRay adds a container without a security context, and the head pod would be refused. Use auto or HTTPMode, or podSecurity baseline in a namespace that allows it." -}}
{{- end -}}
{{- if and (eq $mode "K8sJobMode") (eq .Values.scheduler.name "kai") -}}
{{- fail "\n\njob.submissionMode K8sJobMode does not go with scheduler.name kai: KubeRay refuses it, as the submitter comes after the gang. Use auto, HTTPMode or SidecarMode." -}}
{{- end -}}
{{- if and .Values.queue.name (ne .Values.scheduler.name "none") -}}
{{- fail (printf "\n\nqueue.name (Kueue) and scheduler.name %s would both hold the gang back. Use one of them." .Values.scheduler.name) -}}
{{- end -}}
{{- if and .Values.queue.priorityClass (not .Values.queue.name) -}}
{{- fail "\n\nqueue.priorityClass is set without queue.name. Set queue.name to a LocalQueue of Kueue." -}}
{{- end -}}
{{- if and (ne .Values.scheduler.name "none") (not .Values.scheduler.queue) -}}
{{- fail (printf "\n\nscheduler.name is %s, but scheduler.queue is empty: the pods would wait for ever. Set scheduler.queue." .Values.scheduler.name) -}}
{{- end -}}
{{- if and (ne .Values.scheduler.name "volcano") (or .Values.scheduler.priorityClassName .Values.scheduler.networkTopologyMode) -}}
{{- fail "\n\nscheduler.priorityClassName and scheduler.networkTopologyMode are Volcano's. Set scheduler.name to volcano or leave them empty." -}}
{{- end -}}
{{- if semverCompare "<2.53.0-0" .Values.job.rayVersion -}}
{{- fail (printf "\n\njob.rayVersion %s is too old: token authentication and KubeRay's health probes need Ray 2.53 or newer. It must be the version in the images." .Values.job.rayVersion) -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.deletion" -}}
{{- $rules := .Values.job.deletionStrategy.deletionRules -}}
{{- if and .Values.queue.name $rules -}}
{{- fail "\n\njob.deletionStrategy.deletionRules does not go with queue.name: Kueue takes only jobs that are deleted as a whole. Leave the rules empty; job.ttlSecondsAfterFinished says when." -}}
{{- end -}}
{{- $order := dict "DeleteWorkers" 1 "DeleteCluster" 2 "DeleteSelf" 3 "DeleteNone" 4 -}}
{{- range $i, $rule := $rules -}}
{{- range $j, $other := $rules -}}
{{- $same := eq (omit $rule.condition "ttlSeconds" | toJson) (omit $other.condition "ttlSeconds" | toJson) -}}
{{- if and $same (lt $i $j) (eq $rule.policy $other.policy) -}}
{{- fail (printf "\n\njob.deletionStrategy.deletionRules has %s twice for the same condition. Remove one." $rule.policy) -}}
{{- end -}}
{{- $sooner := lt (int ($other.condition.ttlSeconds | default 0)) (int ($rule.condition.ttlSeconds | default 0)) -}}
{{- if and $same $sooner (lt (get $order $rule.policy) (get $order $other.policy)) (ne $other.policy "DeleteNone") -}}
{{- fail (printf "\n\njob.deletionStrategy.deletionRules: %s must not come before %s of the same condition. Raise its ttlSeconds." $other.policy $rule.policy) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.security" -}}
{{- if and .Values.rdma.enabled .Values.rdma.ipcLock (ne .Values.podSecurity "privileged") -}}
{{- fail (printf "\n\nrdma.ipcLock adds the capability IPC_LOCK, which podSecurity %s does not admit. Set podSecurity to privileged (and use such a namespace), or rdma.ipcLock to false where nodes set no memlock limit." .Values.podSecurity) -}}
{{- end -}}
{{- if and .Values.rdma.enabled (not .Values.rdma.resources) -}}
{{- fail "\n\nrdma.enabled is true, but rdma.resources names none. Set it, for example to rdma/hca: 1 or vpc.amazonaws.com/efa: 4." -}}
{{- end -}}
{{- if ne .Values.podSecurity "privileged" -}}
{{- range $role := list "all" "head" "rollout" "trainer" -}}
{{- range (get $.Values $role).volumes -}}
{{- if .hostPath -}}
{{- fail (printf "\n\n%s.volumes: %s is a hostPath, which podSecurity %s does not admit. Use another volume, or podSecurity privileged." $role .name $.Values.podSecurity) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.config" -}}
{{- $address := include "grpo.config.get" (list . "cluster" "address" "auto") -}}
{{- if ne $address "auto" -}}
{{- fail (printf "\n\nconfig.cluster.address is %s, but the run belongs to the Ray cluster of its own RayJob. Leave it out." $address) -}}
{{- end -}}
{{- $port := include "grpo.metricsPort" . | int -}}
{{- if or (lt $port 1024) (gt $port 9999) (has $port (list 6379 8080 8265)) -}}
{{- fail (printf "\n\nconfig.metrics.port is %d: Prometheus needs a fixed one from 1024 to 9999 that is not Ray's (6379, 8080, 8265). Leave it out for 9400." $port) -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.storage" -}}
{{- $bucket := eq (include "grpo.inBucket" .) "true" -}}
{{- $storage := .Values.storage -}}
{{- if and $storage.fixPermissions (eq .Values.podSecurity "restricted") -}}
{{- fail "\n\nstorage.fixPermissions needs a container that is root, which podSecurity restricted does not admit. Use podSecurity baseline in a namespace that allows it, or a storage class that applies fsGroup." -}}
{{- end -}}
{{- if and $storage.fixPermissions (or (not $storage.enabled) (kindIs "invalid" .Values.runAsUser)) -}}
{{- fail "\n\nstorage.fixPermissions gives the volume to runAsUser. Set runAsUser and storage.enabled, or leave fixPermissions out." -}}
{{- end -}}
{{- if and (not $storage.enabled) (not $bucket) -}}
{{- fail "\n\nstorage.enabled is false, so checkpoints would go with their pods. Turn it on, or set config.checkpoint.dir to s3://bucket/prefix." -}}
{{- end -}}
{{- if and $storage.enabled (not $storage.existingClaim) (not $bucket) (not (has "ReadWriteMany" $storage.accessModes)) -}}
{{- fail (printf "\n\nstorage.accessModes is %s, but head and trainer write checkpoints from different nodes. Use ReadWriteMany, or set config.checkpoint.dir to s3://bucket/prefix." (join ", " $storage.accessModes)) -}}
{{- end -}}
{{- range $key, $dir := dict "config.run.dir" (include "grpo.runDir" .) "config.run.results" (include "grpo.config.get" (list . "run" "results" "/runs/")) "config.checkpoint.dir" (include "grpo.config.get" (list . "checkpoint" "dir" "/runs/")) -}}
{{- $mounted := or (hasPrefix "/runs/" $dir) (hasPrefix "s3://" $dir) -}}
{{- range (include "grpo.role" (dict "root" $ "role" "head") | fromJson).volumeMounts }}{{ if hasPrefix (printf "%s/" (trimSuffix "/" .mountPath)) $dir }}{{ $mounted = true }}{{ end }}{{ end -}}
{{- if not $mounted -}}
{{- fail (printf "\n\n%s is %s, which is on no volume: the root file system is read-only. Use a folder below /runs (or leave it out), or mount a volume there in head and trainer." $key $dir) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.monitoring" -}}
{{- $monitor := .Values.monitoring.podMonitor -}}
{{- if and $monitor.scrapeTimeout (gt (include "grpo.milliseconds" $monitor.scrapeTimeout | int64) (include "grpo.milliseconds" $monitor.interval | int64)) -}}
{{- fail (printf "\n\nmonitoring.podMonitor.scrapeTimeout is %s, longer than monitoring.podMonitor.interval (%s): the Prometheus operator would refuse the monitors. Lower it, or raise the interval." $monitor.scrapeTimeout $monitor.interval) -}}
{{- end -}}
{{- end }}

{{/* A duration of one unit ("15s") in milliseconds. */}}
{{- define "grpo.milliseconds" -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- mul (trimSuffix $unit . | int64) (get (dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000) $unit) -}}
{{- end }}

{{/* (dict "root" $ "role" "head") */}}
{{- define "grpo.checks.group" -}}
{{- $group := include "grpo.role" . | fromJson -}}
{{- $role := .role -}}
{{- $shm := include "grpo.bytes" $group.shmSize | int64 -}}
{{- $store := include "grpo.bytes" $group.objectStoreMemory | int64 -}}
{{- $memory := get ($group.resources.limits | default dict) "memory" -}}
{{- if lt $store 78643200 -}}
{{- fail (printf "\n\n%s.objectStoreMemory is %v; Ray needs at least 75Mi." $role $group.objectStoreMemory) -}}
{{- end -}}
{{- if gt $store $shm -}}
{{- fail (printf "\n\n%s.objectStoreMemory (%v) lives in /dev/shm and must fit %s.shmSize (%v). Raise shmSize." $role $group.objectStoreMemory $role $group.shmSize) -}}
{{- end -}}
{{- if $memory -}}
{{- if ge $shm (include "grpo.bytes" $memory | int64) -}}
{{- fail (printf "\n\n%s.shmSize (%v) counts as memory of the pod and must stay below its limit (%v). Raise %s.resources.limits.memory." $role $group.shmSize $memory $role) -}}
{{- end -}}
{{- end -}}
{{- $own := list -}}
{{- range include "grpo.ownEnv" (dict "root" .root "role" .role) | fromYamlArray }}{{ $own = append $own .name }}{{ end -}}
{{- range $where := list "all" $role -}}
{{- range (get $.root.Values $where).env -}}
{{- if has .name (concat $own (list "RAY_AUTH_TOKEN" "RAY_ADDRESS" "RAY_IP" "FQ_RAY_IP" "RAY_REDIS_ADDRESS" "REDIS_USERNAME" "REDIS_PASSWORD" "RAY_enable_autoscaler_v2")) -}}
{{- fail (printf "\n\n%s.env sets %s, which belongs to KubeRay or to this chart. Remove it." $where .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq $role "head") (ne (include "grpo.gpusPerPod" $group) "0") -}}
{{- fail "\n\nhead.resources asks for a GPU, but the head offers none to Ray. Remove it." -}}
{{- end -}}
{{- end }}

{{/* Engines that come and go, the pods that they need, and who makes these. */}}
{{- define "grpo.checks.elastic" -}}
{{- $group := .Values.rollout -}}
{{- $pods := int $group.replicas -}}
{{- $most := include "grpo.mostReplicas" (dict "root" . "role" "rollout") | int -}}
{{- $fewest := include "grpo.engines" (dict "root" . "bound" "min") | int -}}
{{- $engines := include "grpo.engines" (dict "root" . "bound" "max") | int -}}
{{- if lt $most $pods -}}
{{- fail (printf "\n\nrollout.maxReplicas is %d, below rollout.replicas (%d), with which the run starts. Raise it, or leave it out." $most $pods) -}}
{{- end -}}
{{- if gt $fewest $engines -}}
{{- fail (printf "\n\nconfig.rollout.engines has min %d above max %d. Lower min or raise max." $fewest $engines) -}}
{{- end -}}
{{- if and (gt $most $pods) (eq $fewest $engines) -}}
{{- fail (printf "\n\nrollout.maxReplicas is %d, but config.rollout.engines is %d: the run would use no further pod. Write config.rollout.engines: {min: %d, max: …}, or leave maxReplicas out." $most $engines $engines) -}}
{{- end -}}
{{- if and (lt $fewest $engines) (eq $pods 0) -}}
{{- fail "\n\nrollout.replicas is 0, so engines live in the trainer's pods, and none comes or goes. Write config.rollout.engines as a number, or give engines pods of their own." -}}
{{- end -}}
{{- if gt $pods 0 -}}
{{- $per := include "grpo.actorsPerPod" (dict "root" . "role" "rollout") | int -}}
{{- if gt $fewest (mul $pods $per | int) -}}
{{- fail (printf "\n\nconfig.rollout.engines.min is %d, but the run starts with %d rollout pods of %d engines each (config.rollout.engines.max spread over rollout.maxReplicas) and would wait for ever. Raise rollout.replicas or lower min." $fewest $pods $per) -}}
{{- end -}}
{{- end -}}
{{- if $group.autoscaling.enabled -}}
{{- if eq $most $pods -}}
{{- fail "\n\nrollout.autoscaling.enabled is true, but the number of rollout pods is fixed. Set rollout.maxReplicas, and config.rollout.engines: {min, max}." -}}
{{- end -}}
{{- if or .Values.queue.name (ne .Values.scheduler.name "none") -}}
{{- fail "\n\nrollout.autoscaling does not go with queue.name or scheduler.name, which admit a gang of a fixed size. Use one of them." -}}
{{- end -}}
{{- range $rule := (.Values.job.deletionStrategy | default dict).deletionRules -}}
{{- if eq $rule.policy "DeleteWorkers" -}}
{{- fail "\n\njob.deletionStrategy.deletionRules has DeleteWorkers, which KubeRay refuses with rollout.autoscaling. Use DeleteCluster." -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Whether the actors of the configuration fit the pods of their role. (dict "root" $ "role" "rollout") */}}
{{- define "grpo.checks.placement" -}}
{{- $values := .root.Values -}}
{{- $role := .role -}}
{{- $keys := dict "rollout" (list "config.rollout.engines" "engines" "config.rollout.tensor_parallel, gpus_per_engine, engines_per_gpu") "trainer" (list "config.train.ranks" "ranks" "config.train.gpus_per_rank") -}}
{{- $group := get $values $role -}}
{{- $actors := include "grpo.actors" . | int -}}
{{- $pods := include "grpo.mostReplicas" . | int -}}
{{- $key := empty $group.maxReplicas | ternary "replicas" "maxReplicas" -}}
{{- if gt $pods $actors -}}
{{- fail (printf "\n\n%s.%s is %d, but %s is %d: pods would hold their nodes and do nothing. Lower %s." $role $key $pods (index (get $keys $role) 0) $actors $key) -}}
{{- end -}}
{{- $device := include "grpo.config.get" (list .root "cluster" "device" "auto") -}}
{{- $any := add (include "grpo.gpusPerPod" $values.rollout | int) (include "grpo.gpusPerPod" $values.trainer | int) -}}
{{- if or (eq $device "cuda") (and (eq $device "auto") (gt $any 0)) -}}
{{- if eq (include "grpo.config.get" (list .root "cluster" "colocate" false)) "true" -}}
{{- fail "\n\nconfig.cluster.colocate puts engines and ranks on the same GPUs, so they need the same pods: set rollout.replicas to 0, which starts engines in the trainer's." -}}
{{- end -}}
{{- $each := include "grpo.gpusPerActor" . | float64 -}}
{{- $per := include "grpo.actorsPerPod" . | int -}}
{{- $has := include "grpo.gpusPerPod" $group | int -}}
{{- $together := ternary (floor (divf 1.0001 $each)) 1.0 (and (eq $role "rollout") (lt $each 1.0)) -}}
{{- $taken := ceil (divf $actors $together) | int -}}
{{- if gt $pods $taken -}}
{{- fail (printf "\n\n%s.%s is %d, but the %d %s share %d GPUs (%s): pods would hold their nodes and do nothing. Lower %s or raise %s." $role $key $pods $actors (index (get $keys $role) 1) $taken (index (get $keys $role) 2) $key (index (get $keys $role) 0)) -}}
{{- end -}}
{{- if gt (mulf $each $per) (float64 $has) -}}
{{- fail (printf "\n\n%d of the %d %s share a pod and need %v GPUs each (%s), but a pod of %s has %d. Raise %s.resources.limits or %s.replicas, or set config.cluster.device to cpu." $per $actors (index (get $keys $role) 1) $each (index (get $keys $role) 2) $role $has $role $role) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Whether engines and ranks fit the trainer's pods, in which both live. */}}
{{- define "grpo.checks.together" -}}
{{- $group := .Values.trainer -}}
{{- $engines := include "grpo.actors" (dict "root" . "role" "rollout") | int -}}
{{- $ranks := include "grpo.actors" (dict "root" . "role" "trainer") | int -}}
{{- if gt (int $group.replicas) (add $engines $ranks | int) -}}
{{- fail (printf "\n\ntrainer.replicas is %d, but there are %d engines and ranks for these pods (rollout.replicas is 0). Lower replicas." (int $group.replicas) (add $engines $ranks)) -}}
{{- end -}}
{{- $device := include "grpo.config.get" (list . "cluster" "device" "auto") -}}
{{- $has := include "grpo.gpusPerPod" $group | int -}}
{{- if or (eq $device "cuda") (and (eq $device "auto") (gt $has 0)) -}}
{{- $engine := include "grpo.gpusPerActor" (dict "root" . "role" "rollout") | float64 -}}
{{- $rank := include "grpo.gpusPerActor" (dict "root" . "role" "trainer") | float64 -}}
{{- $wanted := addf (mulf $engine $engines) (mulf $rank $ranks) -}}
{{- if gt $wanted (addf 0.01 (mul $has (int $group.replicas))) -}}
{{- fail (printf "\n\nrollout.replicas is 0, so %d engines of %v GPUs and %d ranks of %v share the trainer's pods, but %d of %d GPUs are too few. Raise trainer.resources.limits or trainer.replicas." $engines $engine $ranks $rank (int $group.replicas) $has) -}}
{{- end -}}
{{- if and (gt $engine 1.0) (gt (int $group.replicas) 1) -}}
{{- fail (printf "\n\nrollout.replicas is 0, so ranks may leave a part of each of the %d pods, and an engine of %v GPUs (config.rollout.tensor_parallel) must find them in one. Give engines pods of their own (rollout.replicas), or use one pod." (int $group.replicas) $engine) -}}
{{- end -}}
{{- end -}}
{{- end }}
