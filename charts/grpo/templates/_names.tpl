{{/* Names and labels. */}}

{{- define "grpo.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/* At most 38 characters, as "-" and 8 hex digits follow; DNS-1035, as KubeRay asks for. A cut name ends with a hash of the whole. */}}
{{- define "grpo.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- end -}}
{{- $name = $name | replace "." "-" -}}
{{- if not (regexMatch "^[a-z]" $name) }}{{ $name = printf "r%s" $name }}{{ end -}}
{{- if gt (len $name) 38 }}{{ $name = printf "%s-%s" ($name | trunc 29 | trimSuffix "-") (sha256sum $name | trunc 8) }}{{ end -}}
{{- $name -}}
{{- end }}

{{/* What a run is called that has no name: with what it computes, other code, rows or model it is another run. */}}
{{- define "grpo.defaultName" -}}
{{- printf "%s-%s" (include "grpo.fullname" .) (include "grpo.identity" . | sha256sum | trunc 8) -}}
{{- end }}

{{/* The name of the run's ConfigMap, which changes with every key. */}}
{{- define "grpo.configName" -}}
{{- $all := printf "%s\n%s" (.Values.config | toJson) (include "grpo.identity" .) -}}
{{- printf "%s-%s" (include "grpo.fullname" .) (sha256sum $all | trunc 8) -}}
{{- end }}

{{/* Changes with everything that makes the job, so that a change starts a new one: KubeRay takes none of a job that is there. */}}
{{- define "grpo.jobName" -}}
{{- $all := printf "%s\n%s" (include "grpo.jobMetadata" .) (include "grpo.jobSpec" .) -}}
{{- with include "grpo.resultsPlace" . }}{{ $all = printf "%s\n%s" $all . }}{{ end -}}
{{- printf "%s-%s" (include "grpo.fullname" .) (sha256sum $all | trunc 8) -}}
{{- end }}

{{- define "grpo.claimName" -}}
{{- .Values.storage.existingClaim | default (printf "%s-runs" (include "grpo.fullname" .)) -}}
{{- end }}

{{- define "grpo.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "grpo.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end }}

{{/* All pods of the release, its tests included. */}}
{{- define "grpo.selectorLabels" -}}
app.kubernetes.io/name: {{ include "grpo.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Of every object and pod. */}}
{{- define "grpo.commonLabels" -}}
{{ include "grpo.selectorLabels" . }}
app.kubernetes.io/part-of: grpo
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "grpo.labels" -}}
{{ include "grpo.commonLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Image of a role. (dict "root" $ "image" .Values.image.worker) */}}
{{- define "grpo.image" -}}
{{- $name := printf "%s/%s" .root.Values.image.registry .image.repository -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end }}

{{/* A quantity in bytes. */}}
{{- define "grpo.bytes" -}}
{{- $text := kindIs "string" . | ternary . (. | int64 | toString) -}}
{{- $number := regexFind "^[0-9.]+" $text -}}
{{- $factors := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "P" 1000000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 -}}
{{- mulf (float64 $number) (get $factors (trimPrefix $number $text)) | int64 -}}
{{- end }}
