{{/* Pod templates of the three roles. */}}

{{- define "grpo.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Containers of the user's, with the restricted security context below what they say themselves. (a list) */}}
{{- define "grpo.restricted" -}}
{{- range . }}
{{- $context := include "grpo.containerSecurityContext" $ | fromYaml }}
- {{ mergeOverwrite (dict "securityContext" $context) (deepCopy .) | toYaml | nindent 2 | trim }}
{{- end }}
{{- end }}

{{/* Gives the volume's top folder to the run's user. Neither reads nor writes what is in it. */}}
{{- define "grpo.fixPermissions" -}}
{{- $user := int64 .Values.runAsUser -}}
- name: fix-permissions
  image: {{ include "grpo.image" (dict "root" . "image" .Values.image.controller) | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [bash, -c, "chown {{ $user }}:{{ kindIs "invalid" .Values.fsGroup | ternary $user .Values.fsGroup | int64 }} /runs && chmod 2770 /runs"]
  securityContext:
    runAsUser: 0
    runAsNonRoot: false
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities:
      drop: [ALL]
      add: [CHOWN, FOWNER]
  resources:
    requests:
      cpu: 50m
      memory: 64Mi
    limits:
      memory: 256Mi
  volumeMounts:
    - name: runs
      mountPath: /runs
{{- end }}

{{- define "grpo.podSecurityContext" -}}
runAsNonRoot: true
{{- if not (kindIs "invalid" .Values.runAsUser) }}
runAsUser: {{ int64 .Values.runAsUser }}
{{- end }}
{{- if not (kindIs "invalid" .Values.fsGroup) }}
fsGroup: {{ int64 .Values.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Healthy while Ray's agent says so, and the driver, if it runs, does not say that the loop stands still. */}}
{{- define "grpo.livenessScript" -}}
status() {
  exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
  printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" >&3
  read -r -t 5 _ code _ <&3
  echo "${code:-none}"
} 2>/dev/null
[ "$(status 52365 /api/healthz)" = 200 ] || exit 1
driver=$(status {{ include "grpo.metricsPort" . }} /healthz) || exit 0
[ "$driver" = 200 ] || { echo "driver: /healthz says $driver"; exit 1; }
{{- end }}

{{/* Which role gets which secret: (dict "root" $ "role" "head") */}}
{{- define "grpo.secretMounts" -}}
{{- $secrets := .root.Values.secrets -}}
{{- $mounts := list -}}
{{- if $secrets.huggingface.name -}}
{{- $mounts = append $mounts (dict "name" "huggingface" "secret" $secrets.huggingface "file" "token" "env" "HF_TOKEN_PATH") -}}
{{- end -}}
{{- if and $secrets.s3.name (ne .role "rollout") -}}
{{- $mounts = append $mounts (dict "name" "s3" "secret" $secrets.s3 "file" "credentials" "env" "AWS_SHARED_CREDENTIALS_FILE") -}}
{{- end -}}
{{- if and $secrets.wandb.name (eq .role "head") -}}
{{- $mounts = append $mounts (dict "name" "wandb" "secret" $secrets.wandb "file" "api-key" "env" "WANDB_API_KEY_FILE") -}}
{{- end -}}
{{- $mounts | toJson -}}
{{- end }}

{{/* The chart's own variables; the group's come after them. */}}
{{- define "grpo.ownEnv" -}}
{{- $values := .root.Values -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: PYTHONUNBUFFERED
  value: "1"
{{- if eq (include "grpo.offline" .root) "true" }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- /* Else every replacement of a pod is told as requests that cannot be met, in colour. */}}
- name: RAY_SCHEDULER_EVENTS
  value: "0"
{{- if eq .role "head" }}
{{- /* Ray kills a driver that is told to stop after 3 s; a commit takes longer. */}}
- name: RAY_JOB_STOP_WAIT_TIME_S
  value: {{ int $values.head.terminationGracePeriodSeconds | quote }}
{{- end }}
{{- range include "grpo.secretMounts" . | fromJsonArray }}
- name: {{ .env }}
  value: /etc/grpo/secrets/{{ .name }}/{{ .file }}
{{- end }}
{{- if and (ne .role "head") $values.rdma.enabled $values.rdma.interface }}
- name: NCCL_SOCKET_IFNAME
  value: {{ $values.rdma.interface | quote }}
- name: GLOO_SOCKET_IFNAME
  value: {{ $values.rdma.interface | quote }}
{{- end }}
{{- end }}

{{- define "grpo.ports" -}}
- name: metrics
  containerPort: 8080
{{- if eq .role "head" }}
- name: grpo-metrics
  containerPort: {{ include "grpo.metricsPort" .root }}
- name: dashboard
  containerPort: 8265
- name: gcs-server
  containerPort: 6379
- name: client
  containerPort: 10001
{{- end }}
{{- end }}

{{- define "grpo.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/grpo
- name: dshm
  mountPath: /dev/shm
{{- if eq (include "grpo.mountsRuns" .) "true" }}
- name: runs
  mountPath: /runs
{{- end }}
{{- if eq .role "head" }}
- name: config
  mountPath: /etc/grpo/run.yaml
  subPath: run.yaml
  readOnly: true
{{- end }}
{{- range include "grpo.secretMounts" . | fromJsonArray }}
- name: {{ .name }}-secret
  mountPath: /etc/grpo/secrets/{{ .name }}
  readOnly: true
{{- end }}
{{- with include "grpo.inputMounts" . | fromJsonArray }}
{{ toYaml . }}
{{- end }}
{{- with .group.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "grpo.volumes" -}}
{{- $storage := .root.Values.storage -}}
{{- $shared := or $storage.existingClaim (has "ReadWriteMany" $storage.accessModes) -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
- name: dshm
  emptyDir:
    medium: Memory
    sizeLimit: {{ toYaml .group.shmSize }}
{{- if eq (include "grpo.mountsRuns" .) "true" }}
- name: runs
  {{- if and $storage.enabled (or $shared (eq .role "head")) }}
  persistentVolumeClaim:
    claimName: {{ include "grpo.claimName" .root }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
{{- if eq .role "head" }}
- name: config
  configMap:
    name: {{ include "grpo.configName" .root }}
{{- end }}
{{- range include "grpo.secretMounts" . | fromJsonArray }}
- name: {{ .name }}-secret
  secret:
    secretName: {{ .secret.name }}
    defaultMode: 0440
    items:
      - key: {{ .secret.key }}
        path: {{ .file }}
{{- end }}
{{- with include "grpo.inputVolumes" . | fromJsonArray }}
{{ toYaml . }}
{{- end }}
{{- with .group.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Requests and limits; extended resources of RDMA come on top, in both. */}}
{{- define "grpo.resources" -}}
{{- $resources := deepCopy .group.resources -}}
{{- if and (ne .role "head") .root.Values.rdma.enabled -}}
{{- range $part := list "requests" "limits" -}}
{{- $_ := set $resources $part (merge (dict) $.root.Values.rdma.resources (get $resources $part | default dict)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}

{{/* (dict "root" $ "role" "head" "group" its values, with those of `all`) */}}
{{- define "grpo.pod" -}}
{{- $values := .root.Values -}}
{{- $rdma := and (ne .role "head") $values.rdma.enabled -}}
{{- $annotations := deepCopy .group.annotations -}}
{{- if and $rdma $values.rdma.networks }}{{ $_ := set $annotations "k8s.v1.cni.cncf.io/networks" $values.rdma.networks }}{{ end -}}
{{- $labels := merge (dict) .group.labels (dict "app.kubernetes.io/component" .role "grpo.dev/run" (include "grpo.runName" .root)) (include "grpo.commonLabels" .root | fromYaml) -}}
metadata:
  labels:
    {{- toYaml $labels | nindent 4 }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "grpo.serviceAccountName" .root }}
  automountServiceAccountToken: {{ and (eq .role "head") $values.rollout.autoscaling.enabled }}
  enableServiceLinks: false
  restartPolicy: Never
  terminationGracePeriodSeconds: {{ int .group.terminationGracePeriodSeconds }}
  securityContext:
    {{- include "grpo.podSecurityContext" .root | nindent 4 }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" "dnsConfig" "resourceClaims" }}
  {{- with get $.group $key }}
  {{ $key }}: {{- kindIs "string" . | ternary (printf " %v" .) (toYaml . | nindent 4) }}
  {{- end }}
  {{- end }}
  {{- $fix := and (eq .role "head") $values.storage.fixPermissions -}}
  {{- if or $fix .group.initContainers }}
  initContainers:
    {{- if $fix }}
    {{- include "grpo.fixPermissions" .root | nindent 4 }}
    {{- end }}
    {{- with .group.initContainers }}
    {{- include "grpo.restricted" . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ eq .role "head" | ternary "ray-head" "ray-worker" }}
      image: {{ include "grpo.image" (dict "root" .root "image" (eq .role "head" | ternary $values.image.controller $values.image.worker)) | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- include "grpo.containerSecurityContext" . | nindent 8 }}
        {{- if and $rdma $values.rdma.ipcLock }}
          add: [IPC_LOCK]
        {{- end }}
      {{- with .group.command }}
      command:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        {{- include "grpo.ports" . | nindent 8 }}
      env:
        {{- include "grpo.ownEnv" . | nindent 8 }}
        {{- with .group.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .group.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- include "grpo.resources" . | nindent 8 }}
      lifecycle:
        preStop:
          exec:
            command: [grpo, drain]
      {{- if eq .role "head" }}
      # KubeRay adds probes only where there are none; its own, of the readiness, stays.
      livenessProbe:
        exec:
          command:
            - bash
            - -c
            - |
              {{- include "grpo.livenessScript" .root | nindent 14 }}
        initialDelaySeconds: 30
        periodSeconds: 10
        timeoutSeconds: 15
        failureThreshold: 12
      {{- end }}
      volumeMounts:
        {{- include "grpo.volumeMounts" . | nindent 8 }}
    {{- with .group.sidecarContainers }}
    {{- include "grpo.restricted" . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "grpo.volumes" . | nindent 4 }}
{{- end }}
