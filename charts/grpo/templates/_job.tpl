{{/* The RayJob's metadata (without name) and spec. */}}

{{- define "grpo.submissionMode" -}}
{{- $safe := eq .Values.podSecurity "restricted" | ternary "HTTPMode" "SidecarMode" -}}
{{- eq .Values.job.submissionMode "auto" | ternary $safe .Values.job.submissionMode -}}
{{- end }}

{{- define "grpo.jobMetadata" -}}
{{- $labels := deepCopy .Values.job.labels -}}
{{- with .Values.queue.name }}{{ $_ := set $labels "kueue.x-k8s.io/queue-name" . }}{{ end -}}
{{- with .Values.queue.priorityClass }}{{ $_ := set $labels "kueue.x-k8s.io/priority-class" . }}{{ end -}}
{{- with .Values.scheduler -}}
{{- if eq .name "kai" }}{{ $_ := set $labels "kai.scheduler/queue" .queue }}{{ end -}}
{{- if eq .name "volcano" }}{{ $_ := set $labels "volcano.sh/queue-name" .queue }}{{ end -}}
{{- with .priorityClassName }}{{ $_ := set $labels "ray.io/priority-class-name" . }}{{ end -}}
{{- with .networkTopologyMode }}{{ $_ := set $labels "volcano.sh/network-topology-mode" . }}{{ end -}}
{{- end -}}
labels:
  {{- merge $labels (dict "grpo.dev/run" (include "grpo.runName" .)) (include "grpo.commonLabels" . | fromYaml) | toYaml | nindent 2 }}
{{- $annotations := deepCopy .Values.job.annotations -}}
{{- with .Values.job.restart }}{{ $_ := set $annotations "grpo.dev/restart" . }}{{ end -}}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "grpo.group" -}}
groupName: {{ .role }}
replicas: {{ int .group.replicas }}
minReplicas: {{ include "grpo.fewestReplicas" . }}
maxReplicas: {{ include "grpo.mostReplicas" . }}
numOfHosts: 1
{{- if ne (include "grpo.together" .root) "true" }}
labels:
  {{ include "grpo.roleLabel" .root }}: {{ .role }}
{{- end }}
rayStartParams:
  num-cpus: {{ include "grpo.actorsPerPod" . | quote }}
  {{- with .group.gpus }}
  num-gpus: {{ include "grpo.gpusPerPod" $.group | quote }}
  {{- end }}
  metrics-export-port: "8080"
  object-store-memory: {{ include "grpo.bytes" .group.objectStoreMemory | quote }}
template:
  {{- include "grpo.pod" . | nindent 2 }}
{{- end }}

{{- define "grpo.jobSpec" -}}
{{- $job := .Values.job -}}
{{- $mode := include "grpo.submissionMode" . -}}
submissionMode: {{ $mode }}
entrypoint: {{ if $job.debug }}sleep infinity{{ else }}grpo job /etc/grpo/run.yaml{{ if eq (include "grpo.fetches" .) "true" }} --fetch /etc/grpo/fetch.yaml{{ end }}{{ if not $job.preflight }} --no-preflight{{ end }}{{ if $job.deletionStrategy }} --no-stop{{ end }}{{ end }}
backoffLimit: {{ int $job.backoffLimit }}
{{- with $job.activeDeadlineSeconds }}
activeDeadlineSeconds: {{ int . }}
{{- end }}
{{- with $job.preRunningDeadlineSeconds }}
preRunningDeadlineSeconds: {{ int . }}
{{- end }}
{{- with $job.deletionStrategy }}
deletionStrategy:
  {{- toYaml . | nindent 2 }}
{{- else }}
shutdownAfterJobFinishes: true
ttlSecondsAfterFinished: {{ int $job.ttlSecondsAfterFinished }}
{{- end }}
{{- if eq $mode "K8sJobMode" }}
submitterPodTemplate:
  {{- include "grpo.submitter" . | nindent 2 }}
{{- end }}
rayClusterSpec:
  rayVersion: {{ $job.rayVersion | quote }}
  authOptions:
    mode: token
  {{- if .Values.rollout.autoscaling.enabled }}
  enableInTreeAutoscaling: true
  autoscalerOptions:
    version: v2
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    idleTimeoutSeconds: {{ int .Values.rollout.autoscaling.idleTimeoutSeconds }}
    securityContext:
      {{- include "grpo.containerSecurityContext" . | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
  {{- end }}
  headGroupSpec:
    rayStartParams:
      num-cpus: "0"
      num-gpus: "0"
      dashboard-host: 0.0.0.0
      metrics-export-port: "8080"
      object-store-memory: {{ include "grpo.bytes" .Values.head.objectStoreMemory | quote }}
    template:
      {{- include "grpo.pod" (dict "root" $ "role" "head" "group" (include "grpo.role" (dict "root" . "role" "head") | fromJson)) | nindent 6 }}
  workerGroupSpecs:
    {{- range $role := eq (include "grpo.together" .) "true" | ternary (list "trainer") (list "rollout" "trainer") }}
    - {{ include "grpo.group" (dict "root" $ "role" $role "group" (include "grpo.role" (dict "root" $ "role" $role) | fromJson)) | nindent 6 | trim }}
    {{- end }}
{{- end }}

{{/* K8sJobMode's own pod, on the head's nodes; KubeRay adds the command and the token. */}}
{{- define "grpo.submitter" -}}
metadata:
  labels:
    {{- include "grpo.commonLabels" . | nindent 4 }}
    app.kubernetes.io/component: submitter
spec:
  serviceAccountName: {{ include "grpo.serviceAccountName" . }}
  automountServiceAccountToken: false
  restartPolicy: Never
  securityContext:
    {{- include "grpo.podSecurityContext" . | nindent 4 }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $head := include "grpo.role" (dict "root" . "role" "head") | fromJson }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" "dnsConfig" }}
  {{- with get $head $key }}
  {{ $key }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  containers:
    - name: ray-job-submitter
      image: {{ include "grpo.image" (dict "root" . "image" .Values.image.controller) | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      securityContext:
        {{- include "grpo.containerSecurityContext" . | nindent 8 }}
      resources:
        requests:
          cpu: 200m
          memory: 512Mi
        limits:
          memory: 1Gi
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: home
          mountPath: /home/grpo
  volumes:
    - name: tmp
      emptyDir: {}
    - name: home
      emptyDir: {}
{{- end }}
