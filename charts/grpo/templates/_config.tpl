{{/* The run's configuration and what the chart reads of it. */}}

{{/* A key of the configuration, or a default where it is missing or null: (list $ "rollout" "engines" 1). */}}
{{- define "grpo.config.get" -}}
{{- $section := get (index . 0).Values.config (index . 1) | default dict -}}
{{- $value := index $section (index . 2) -}}
{{- kindIs "invalid" $value | ternary (index . 3) $value -}}
{{- end }}

{{- define "grpo.runName" -}}
{{- include "grpo.config.get" (list . "run" "name" (include "grpo.defaultName" .)) -}}
{{- end }}

{{- define "grpo.runDir" -}}
{{- include "grpo.config.get" (list . "run" "dir" (printf "/runs/%s" (include "grpo.runName" .))) -}}
{{- end }}

{{- define "grpo.metricsPort" -}}
{{- include "grpo.config.get" (list . "metrics" "port" 9400) | int -}}
{{- end }}

{{- define "grpo.roleLabel" -}}
{{- include "grpo.config.get" (list . "cluster" "role_label" "grpo.dev/role") -}}
{{- end }}

{{/* "true" if checkpoints go to a bucket. */}}
{{- define "grpo.inBucket" -}}
{{- hasPrefix "s3://" (include "grpo.config.get" (list . "checkpoint" "dir" "")) -}}
{{- end }}

{{/* run.yaml: the user's keys, and those that only the chart knows. */}}
{{- define "grpo.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- include "grpo.inputs" (dict "root" . "config" $config) -}}
{{- $run := merge (dict) (get $config "run" | default dict) -}}
{{- $grace := max 1 (sub (int .Values.head.terminationGracePeriodSeconds) 10) -}}
{{- $defaults := dict "name" (include "grpo.runName" .) "dir" (include "grpo.runDir" .) "grace_seconds" $grace -}}
{{- with .Values.job.restart }}{{ $_ := set $defaults "restart" . }}{{ end -}}
{{- range $key, $value := $defaults }}{{ if kindIs "invalid" (index $run $key) }}{{ $_ := set $run $key $value }}{{ end }}{{ end -}}
{{- $metrics := get $config "metrics" | default dict -}}
{{- $_ := set $metrics "port" (include "grpo.metricsPort" . | int) -}}
{{- $cluster := get $config "cluster" | default dict -}}
{{- $_ := set $cluster "address" "auto" -}}
{{- $_ := set $config "run" $run -}}
{{- $_ := set $config "metrics" $metrics -}}
{{- $_ := set $config "cluster" $cluster -}}
{{- toYaml $config -}}
{{- end }}

{{/* What the run's ConfigMap holds. */}}
{{- define "grpo.configData" -}}
run.yaml: |
  {{- include "grpo.config" . | nindent 2 }}
{{- if eq (include "grpo.fetches" .) "true" }}
fetch.yaml: |
  fetch:
    {{- include "grpo.fetchList" . | fromJsonArray | toYaml | nindent 4 }}
{{- end }}
{{- end }}

{{/* "true" if engines live in the trainer's pods: rollout.replicas is 0. */}}
{{- define "grpo.together" -}}
{{- eq (int .Values.rollout.replicas) 0 -}}
{{- end }}

{{/* Actors of each pod of a role; each reserves one CPU of Ray. (dict "root" $ "role" "rollout") */}}
{{- define "grpo.actorsPerPod" -}}
{{- $actors := include "grpo.actors" . | int -}}
{{- $replicas := include "grpo.mostReplicas" . | int -}}
{{- if eq (include "grpo.together" .root) "true" -}}
{{- /* Ray may put more of one role into a pod: its GPUs are the limit. */ -}}
{{- add $actors (include "grpo.actors" (dict "root" .root "role" "rollout") | int) -}}
{{- else -}}
{{- div (add $actors (sub $replicas 1)) $replicas -}}
{{- end -}}
{{- end }}

{{/* Pods that a role may have. (dict "root" $ "role" "rollout") */}}
{{- define "grpo.mostReplicas" -}}
{{- $group := get .root.Values .role -}}
{{- $group.maxReplicas | default $group.replicas | int -}}
{{- end }}

{{/* "true" if the number of rollout pods may change while the job runs, by whoever patches the RayCluster. */}}
{{- define "grpo.scalable" -}}
{{- and .Values.rollout.maxReplicas (not .Values.queue.name) (eq .Values.scheduler.name "none") | empty | not -}}
{{- end }}

{{/* Pods below which a role's number is not brought: where engines come and go, those of the fewest. */}}
{{- define "grpo.fewestReplicas" -}}
{{- $group := get .root.Values .role -}}
{{- if $group.maxReplicas -}}
{{- $each := include "grpo.actorsPerPod" . | int -}}
{{- div (add (include "grpo.engines" (dict "root" .root "bound" "min") | int) (sub $each 1)) $each -}}
{{- else }}{{ int $group.replicas }}{{ end -}}
{{- end }}

{{/* The fewest or the most engines: (dict "root" $ "bound" "min"). */}}
{{- define "grpo.engines" -}}
{{- $engines := get (get .root.Values.config "rollout" | default dict) "engines" | default 1 -}}
{{- if kindIs "map" $engines -}}{{ get $engines .bound | default 1 | int }}{{ else }}{{ int $engines }}{{ end -}}
{{- end }}

{{/* Actors that a role may have. */}}
{{- define "grpo.actors" -}}
{{- if eq .role "rollout" -}}
{{- include "grpo.engines" (dict "root" .root "bound" "max") -}}
{{- else -}}
{{- include "grpo.config.get" (list .root "train" "ranks" 1) | int -}}
{{- end -}}
{{- end }}

{{/* GPUs that each actor of a role reserves. */}}
{{- define "grpo.gpusPerActor" -}}
{{- if eq (include "grpo.config.get" (list .root "cluster" "colocate" false)) "true" -}}
{{- divf (div 10000 (add1 (include "grpo.config.get" (list .root "rollout" "engines_per_gpu" 1) | int))) 10000 -}}
{{- else if eq .role "rollout" -}}
{{- $parallel := include "grpo.config.get" (list .root "rollout" "tensor_parallel" 1) -}}
{{- $several := include "grpo.config.get" (list .root "rollout" "engines_per_gpu" 1) | int -}}
{{- $each := ternary (divf (div 10000 $several) 10000 | toString) $parallel (gt $several 1) -}}
{{- include "grpo.config.get" (list .root "rollout" "gpus_per_engine" $each) -}}
{{- else -}}
{{- include "grpo.config.get" (list .root "train" "gpus_per_rank" 1) -}}
{{- end -}}
{{- end }}

{{/* GPUs of a pod: what the values say, else by the names that KubeRay takes for GPUs. (a group of the values) */}}
{{- define "grpo.gpusPerPod" -}}
{{- $gpus := .gpus | default 0 | int -}}
{{- range $name, $count := (.resources.limits | default dict) -}}
{{- if regexMatch "(gpu|nvidia\\.com/mig-\\d+g\\.\\d+gb)$" $name }}{{ $gpus = add $gpus (int $count) }}{{ end -}}
{{- end -}}
{{- $gpus -}}
{{- end }}

{{/* What the configuration fetches from the hub: a name without a leading slash that is no file; empty: nothing. */}}
{{- define "grpo.usesHub" -}}
{{- $named := include "grpo.dataSource" . | default "openai/gsm8k" -}}
{{- $source := include "grpo.config.get" (list . "data" "source" $named) -}}
{{- range $place := list (include "grpo.modelPath" .) $source -}}
{{- if not (or (eq $place "arithmetic") (regexMatch "^[/.]|\\.(jsonl|json|parquet)$" $place)) }}the hub{{ break }}{{ end -}}
{{- end -}}
{{- end }}
