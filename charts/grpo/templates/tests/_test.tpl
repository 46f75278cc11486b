{{/* A pod of `helm test`, under the same fences as the run's: (dict "root" $ "name" "run" "run" true "script" "…") */}}
{{- define "grpo.test" -}}
apiVersion: v1
kind: Pod
metadata:
  name: {{ include "grpo.fullname" .root }}-test-{{ .name }}
  labels:
    {{- if .run }}
    {{- include "grpo.commonLabels" .root | nindent 4 }}
    {{- else }}
    app.kubernetes.io/part-of: grpo
    {{- with .root.Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
    app.kubernetes.io/component: test
  annotations:
    helm.sh/hook: test
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
spec:
  serviceAccountName: {{ .run | ternary (include "grpo.serviceAccountName" .root) (printf "%s-test" (include "grpo.fullname" .root)) }}
  automountServiceAccountToken: {{ not .run }}
  restartPolicy: Never
  securityContext:
    {{- include "grpo.podSecurityContext" .root | nindent 4 }}
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $head := include "grpo.role" (dict "root" .root "role" "head") | fromJson }}
  {{- range $key := list "nodeSelector" "tolerations" "dnsConfig" }}
  {{- with get $head $key }}
  {{ $key }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  containers:
    - name: test
      image: {{ include "grpo.image" (dict "root" .root "image" .root.Values.image.controller) | quote }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      securityContext:
        {{- include "grpo.containerSecurityContext" . | nindent 8 }}
      resources:
        requests:
          cpu: 50m
          memory: 64Mi
        limits:
          memory: 256Mi
      command:
        - python
        - -c
        - |
          {{- regexReplaceAllLiteral "(?m)[ \t]+$" (.script | nindent 10) "" }}
      {{- if and .run .root.Values.storage.enabled }}
      volumeMounts:
        - name: runs
          mountPath: /runs
      {{- end }}
  {{- if and .run .root.Values.storage.enabled }}
  volumes:
    - name: runs
      persistentVolumeClaim:
        claimName: {{ include "grpo.claimName" .root }}
  {{- end }}
{{- end }}
