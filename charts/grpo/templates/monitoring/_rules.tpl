{{/* A text of files/alerts.yaml with every ${name} replaced by values.name. Takes a dict of text and values. */}}
{{- define "grpo.rules.fill" -}}
{{- $text := .text -}}
{{- range $name, $value := .values -}}
{{- $text = $text | replace (printf "${%s}" $name) (toString $value) -}}
{{- end -}}
{{- if contains "${" $text -}}
{{- fail (printf "monitoring.rules.thresholds lacks a key that this text needs: %s" $text) -}}
{{- end -}}
{{- $text | trim -}}
{{- end -}}

{{/* What stands in ${...} in files/alerts.yaml, as YAML; its head explains the names. */}}
{{- define "grpo.rules.values" -}}
{{- $namespace := .Release.Namespace -}}
{{- $job := include "grpo.jobName" . -}}
{{- $pods := printf "%s-.+" $job -}}
{{- $backoffLimit := int .Values.job.backoffLimit -}}
{{- $thresholds := .Values.monitoring.rules.thresholds -}}
{{- $own := dict
  "run" (printf "namespace=%q,run=%q" $namespace (include "grpo.runName" .))
  "pods" (printf "namespace=%q,pod=~%q" $namespace $pods)
  "heads" (printf "namespace=%q,pod=~%q" $namespace (printf "%s-.+-head-.+" $job))
  "exportedPods" (printf "exported_namespace=%q,exported_pod=~%q" $namespace $pods)
  "job" (printf "namespace=%q,name=%q" $namespace $job)
  "exportedJob" (printf "exported_namespace=%q,name=%q" $namespace $job)
  "volume" (printf "namespace=%q,persistentvolumeclaim=%q" $namespace (include "grpo.claimName" .))
  "podCount" (add 1 .Values.rollout.replicas .Values.trainer.replicas)
  "retryLimit" (max 1 (sub $backoffLimit (int $thresholds.retriesLeft)))
-}}
{{- merge $own (omit $thresholds "retriesLeft") | toYaml -}}
{{- end -}}

{{/* "true" if objects of monitoring.coreos.com are wanted. */}}
{{- define "grpo.monitoringEnabled" -}}
{{- $known := .Capabilities.APIVersions.Has "monitoring.coreos.com/v1" -}}
{{- eq (toString .Values.monitoring.enabled) "auto" | ternary $known .Values.monitoring.enabled -}}
{{- end -}}
