{{/* What a run reads beside its configuration (code, rows, model): where it lies, who mounts it, what stands for its content. */}}

{{/* Digest of a ConfigMap or Secret of the user's; empty where no cluster is asked. (list $ "ConfigMap" name) */}}
{{- define "grpo.foreignDigest" -}}
{{- with lookup "v1" (index . 1) (index . 0).Release.Namespace (index . 2) -}}
sha256:{{ list .data .binaryData | toJson | sha256sum }}
{{- end -}}
{{- end }}

{{/* What stands for the content of the reward code; empty where there is none or nothing is known of it. */}}
{{- define "grpo.codeRevision" -}}
{{- $code := .Values.code -}}
{{- if $code.revision -}}
{{- $code.revision -}}
{{- else if $code.files -}}
sha256:{{ $code.files | toJson | sha256sum }}
{{- else if $code.configMap -}}
{{- include "grpo.foreignDigest" (list . "ConfigMap" $code.configMap) -}}
{{- else if $code.secret -}}
{{- include "grpo.foreignDigest" (list . "Secret" $code.secret) -}}
{{- else if $code.imagePath -}}
{{- include "grpo.image" (dict "root" . "image" .Values.image.controller) -}}
{{- end -}}
{{- end }}

{{- define "grpo.dataRevision" -}}
{{- $data := .Values.data -}}
{{- if $data.revision -}}
{{- $data.revision -}}
{{- else if $data.configMap -}}
{{- include "grpo.foreignDigest" (list . "ConfigMap" $data.configMap) -}}
{{- end -}}
{{- end }}

{{/*
The configuration without what may change between two starts of a run, as grpo/config/diff.py has it: where and how it is
run, not what it computes. Other folders stay in, as nothing of the run is there to go on with.
*/}}
{{- define "grpo.computes" -}}
{{- $free := dict "run" (list "results" "restart" "allow_drift" "lease_seconds" "grace_seconds" "max_recoveries") "rollout" (list "engines") "reward_code" (list "workers" "isolation") -}}
{{- $kept := dict -}}
{{- range $name, $section := omit .Values.config "metrics" "deadlines" "cluster" "sft" -}}
{{- if kindIs "map" $section -}}
{{- $rest := dict -}}
{{- range $key, $value := $section -}}
{{- if not (or (has $key (get $free $name | default list)) (and (eq $name "checkpoint") (ne $key "dir"))) }}{{ $_ := set $rest $key $value }}{{ end -}}
{{- end -}}
{{- if $rest }}{{ $_ := set $kept $name $rest }}{{ end -}}
{{- else }}{{ $_ := set $kept $name $section }}{{ end -}}
{{- end -}}
{{- $kept | toJson -}}
{{- end }}

{{/* All that makes a run the run it is: what it computes, and code, rows and model where values name them. */}}
{{- define "grpo.identity" -}}
{{- include "grpo.computes" . -}}
{{- range $key := list "code" "data" "model" -}}
{{- $section := get $.Values $key -}}
{{- $named := dict -}}
{{- range $name, $value := $section }}{{ if $value }}{{ $_ := set $named $name $value }}{{ end }}{{ end -}}
{{- if $named }}{{ printf "\n%s %s" $key ($named | toJson) }}{{ end -}}
{{- end -}}
{{- with include "grpo.codeRevision" . }}{{ printf "\n%s" . }}{{ end -}}
{{- with include "grpo.dataRevision" . }}{{ printf "\n%s" . }}{{ end -}}
{{- end }}

{{/* Names of the ConfigMaps of inline files: (list $ "code") */}}
{{- define "grpo.filesName" -}}
{{- $root := index . 0 -}}
{{- $key := index . 1 -}}
{{- printf "%s-%s-%s" (include "grpo.fullname" $root) $key ((get $root.Values $key).files | toJson | sha256sum | trunc 8) -}}
{{- end }}

{{/* The key that a file has in a ConfigMap, which takes no slash. */}}
{{- define "grpo.fileKey" -}}
{{- . | replace "/" "__" -}}
{{- end }}

{{/* What such a ConfigMap holds: (list $ "code") */}}
{{- define "grpo.filesData" -}}
{{- range $path, $text := (get (index . 0).Values (index . 1)).files }}
{{ include "grpo.fileKey" $path | quote }}: {{ $text | toJson }}
{{- end }}
{{- end }}

{{/* Where code is; empty: nowhere. */}}
{{- define "grpo.codeFolder" -}}
{{- $code := .Values.code -}}
{{- if $code.imagePath }}{{ $code.imagePath }}{{ else if or $code.files $code.configMap $code.secret }}/etc/grpo/code{{ end -}}
{{- end }}

{{/* The volume that all pods share: the claim of the cache, or the one of the runs. */}}
{{- define "grpo.cacheFolder" -}}
{{- .Values.cache.existingClaim | empty | ternary "/runs/.cache" "/cache" -}}
{{- end }}

{{/* Where something that is fetched comes to lie: (list $ "model") */}}
{{- define "grpo.fetched" -}}
{{- $root := index . 0 -}}
{{- $key := index . 1 -}}
{{- $section := get $root.Values $key -}}
{{- $what := list $section.url $section.revision $section.include | toJson | sha256sum | trunc 16 -}}
{{- printf "%s/%s-%s" (include "grpo.cacheFolder" $root) $key $what -}}
{{- end }}

{{/* A place below a folder: (list folder path) */}}
{{- define "grpo.below" -}}
{{- $path := index . 1 | trimPrefix "/" -}}
{{- $path | empty | ternary (index . 0) (printf "%s/%s" (index . 0) $path) -}}
{{- end }}

{{/* model.path of the run. */}}
{{- define "grpo.modelPath" -}}
{{- $model := .Values.model -}}
{{- if $model.url -}}
{{- include "grpo.below" (list (include "grpo.fetched" (list . "model")) $model.path) -}}
{{- else if $model.claim -}}
{{- include "grpo.below" (list "/mnt/model" $model.path) -}}
{{- else -}}
{{- include "grpo.config.get" (list . "model" "path" "") -}}
{{- end -}}
{{- end }}

{{/* data.source that follows from `data`; empty where there is none. */}}
{{- define "grpo.dataSource" -}}
{{- $data := .Values.data -}}
{{- $path := $data.path -}}
{{- if or $data.files $data.configMap -}}
{{- if not $path -}}
{{- $first := $data.files | empty | ternary ".jsonl" (keys $data.files | sortAlpha | first | default "") -}}
{{- $path = printf "{split}%s" (regexFind "(\\.[a-z]+)?\\.[A-Za-z0-9]+$" $first | default ".jsonl") -}}
{{- end -}}
{{- printf "/etc/grpo/data/%s" $path -}}
{{- else if $data.claim -}}
{{- include "grpo.below" (list "/mnt/data" $path) -}}
{{- else if $data.url -}}
{{- include "grpo.below" (list (include "grpo.fetched" (list . "data")) $path) -}}
{{- end -}}
{{- end }}

{{/* run.results that follows from `results`; empty: nowhere. */}}
{{- define "grpo.resultsPlace" -}}
{{- $results := .Values.results -}}
{{- if $results.claim }}{{ include "grpo.below" (list "/mnt/results" $results.path) }}{{ else }}{{ $results.url }}{{ end -}}
{{- end }}

{{/* The claim with the results, or with the run that they can be made of; empty: there is none. */}}
{{- define "grpo.resultsClaim" -}}
{{- if .Values.results.claim -}}
{{- .Values.results.claim -}}
{{- else if and .Values.storage.enabled (not .Values.results.url) (ne (include "grpo.inBucket" .) "true") (hasPrefix "/runs/" (include "grpo.runDir" .)) -}}
{{- include "grpo.claimName" . -}}
{{- end -}}
{{- end }}

{{/* A pod that writes the results as a tar, once it is told to. */}}
{{- define "grpo.resultsPod" -}}
{{- $run := include "grpo.runDir" . -}}
{{- $script := printf "read; grpo export %s /tmp/out/policy >&2 && cp -r %s/report.html %s/metrics.jsonl /tmp/out && exec tar c -C /tmp/out ." $run $run $run -}}
{{- if .Values.results.claim }}{{ $script = printf "read; exec tar c -C %s/%s ." (include "grpo.resultsPlace" .) (include "grpo.runName" .) }}{{ end -}}
{{- $claim := dict "name" "results" "persistentVolumeClaim" (dict "claimName" (include "grpo.resultsClaim" .)) -}}
{{- $mounts := list (dict "name" "results" "mountPath" (.Values.results.claim | empty | ternary "/runs" "/mnt/results") "readOnly" true) (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- $container := dict "name" "results" "image" (include "grpo.image" (dict "root" . "image" .Values.image.controller)) "stdin" true "stdinOnce" true "command" (list "bash" "-c" $script) "securityContext" (include "grpo.containerSecurityContext" . | fromYaml) "volumeMounts" $mounts -}}
{{- dict "spec" (dict "automountServiceAccountToken" false "securityContext" (include "grpo.podSecurityContext" . | fromYaml) "imagePullSecrets" .Values.image.pullSecrets "containers" (list $container) "volumes" (list $claim (dict "name" "tmp" "emptyDir" dict))) | toJson -}}
{{- end }}

{{/* Writes into the run's configuration what the values say elsewhere: (dict "root" $ "config" a copy) */}}
{{- define "grpo.inputs" -}}
{{- $root := .root -}}
{{- if or $root.Values.model.url $root.Values.model.claim -}}
{{- $model := get .config "model" | default dict -}}
{{- $_ := set $model "path" (include "grpo.modelPath" $root) -}}
{{- $_ := set .config "model" $model -}}
{{- end -}}
{{- $source := include "grpo.dataSource" $root -}}
{{- $data := get .config "data" | default dict -}}
{{- if and $source (not (get $data "source")) (not (get $data "sources")) -}}
{{- $_ := set $data "source" $source -}}
{{- $_ := set .config "data" $data -}}
{{- end -}}
{{- with include "grpo.resultsPlace" $root -}}
{{- $run := get $.config "run" | default dict -}}
{{- $_ := set $run "results" . -}}
{{- $_ := set $.config "run" $run -}}
{{- end -}}
{{- $folder := include "grpo.codeFolder" $root -}}
{{- if $folder -}}
{{- $code := get .config "reward_code" | default dict -}}
{{- $_ := set $code "folder" $folder -}}
{{- $_ := set $code "readable" (concat (list $folder) (get $code "readable" | default list) | uniq) -}}
{{- with include "grpo.codeRevision" $root }}{{ $_ := set $code "revision" . }}{{ end -}}
{{- $_ := set .config "reward_code" $code -}}
{{- end -}}
{{- end }}

{{/* What `grpo fetch` brings, as a JSON list. */}}
{{- define "grpo.fetchList" -}}
{{- $list := list -}}
{{- range $key := list "model" "data" -}}
{{- $section := get $.Values $key -}}
{{- if $section.url -}}
{{- $list = append $list (dict "url" $section.url "folder" (include "grpo.fetched" (list $ $key)) "include" $section.include) -}}
{{- end -}}
{{- end -}}
{{- $list | toJson -}}
{{- end }}

{{- define "grpo.fetches" -}}
{{- or .Values.model.url .Values.data.url | empty | not -}}
{{- end }}

{{/* "true" if nothing is left that a pod would load from the hub by itself. */}}
{{- define "grpo.offline" -}}
{{- and (eq (include "grpo.fetches" .) "true") (not (include "grpo.usesHub" .)) -}}
{{- end }}

{{/* "true" if the role mounts the volume of runs: rollout only for a model that lies there. (dict "root" $ "role" "rollout") */}}
{{- define "grpo.mountsRuns" -}}
{{- or (ne .role "rollout") (hasPrefix "/runs/" (include "grpo.modelPath" .root)) -}}
{{- end }}

{{/* (dict "root" $ "role" "head") */}}
{{- define "grpo.inputMounts" -}}
{{- $values := .root.Values -}}
{{- $mounts := list -}}
{{- if eq .role "head" -}}
{{- if or $values.code.files $values.code.configMap $values.code.secret -}}
{{- $mounts = append $mounts (dict "name" "code" "mountPath" "/etc/grpo/code" "readOnly" true) -}}
{{- end -}}
{{- if or $values.data.files $values.data.configMap -}}
{{- $mounts = append $mounts (dict "name" "data" "mountPath" "/etc/grpo/data" "readOnly" true) -}}
{{- end -}}
{{- if $values.data.claim -}}
{{- $mounts = append $mounts (dict "name" "data" "mountPath" "/mnt/data" "readOnly" true) -}}
{{- end -}}
{{- if $values.results.claim -}}
{{- $mounts = append $mounts (dict "name" "results" "mountPath" "/mnt/results") -}}
{{- end -}}
{{- if eq (include "grpo.fetches" .root) "true" -}}
{{- $mounts = append $mounts (dict "name" "config" "mountPath" "/etc/grpo/fetch.yaml" "subPath" "fetch.yaml" "readOnly" true) -}}
{{- end -}}
{{- end -}}
{{- if $values.model.claim -}}
{{- $mounts = append $mounts (dict "name" "model" "mountPath" "/mnt/model" "readOnly" true) -}}
{{- end -}}
{{- if $values.cache.existingClaim -}}
{{- $mounts = append $mounts (dict "name" "cache" "mountPath" "/cache") -}}
{{- end -}}
{{- $mounts | toJson -}}
{{- end }}

{{- define "grpo.inputVolumes" -}}
{{- $values := .root.Values -}}
{{- $volumes := list -}}
{{- if eq .role "head" -}}
{{- range $key := list "code" "data" -}}
{{- $section := get $values $key -}}
{{- if $section.files -}}
{{- $items := list -}}
{{- range $path, $_ := $section.files }}{{ $items = append $items (dict "key" (include "grpo.fileKey" $path) "path" $path) }}{{ end -}}
{{- $volumes = append $volumes (dict "name" $key "configMap" (dict "name" (include "grpo.filesName" (list $.root $key)) "items" $items)) -}}
{{- else if $section.configMap -}}
{{- $volumes = append $volumes (dict "name" $key "configMap" (dict "name" $section.configMap)) -}}
{{- else if get $section "secret" -}}
{{- $volumes = append $volumes (dict "name" $key "secret" (dict "secretName" $section.secret "defaultMode" 0440)) -}}
{{- end -}}
{{- end -}}
{{- if $values.results.claim -}}
{{- $volumes = append $volumes (dict "name" "results" "persistentVolumeClaim" (dict "claimName" $values.results.claim)) -}}
{{- end -}}
{{- if $values.data.claim -}}
{{- $volumes = append $volumes (dict "name" "data" "persistentVolumeClaim" (dict "claimName" $values.data.claim "readOnly" true)) -}}
{{- end -}}
{{- end -}}
{{- if $values.model.claim -}}
{{- $volumes = append $volumes (dict "name" "model" "persistentVolumeClaim" (dict "claimName" $values.model.claim "readOnly" true)) -}}
{{- end -}}
{{- if $values.cache.existingClaim -}}
{{- $volumes = append $volumes (dict "name" "cache" "persistentVolumeClaim" (dict "claimName" $values.cache.existingClaim)) -}}
{{- end -}}
{{- $volumes | toJson -}}
{{- end }}
