{{/* Sentences about code, rows, model and cache. */}}
{{- define "grpo.checks.inputs" -}}
{{- include "grpo.checks.oneOf" (list "code" .Values.code (list "files" "configMap" "secret" "imagePath")) -}}
{{- include "grpo.checks.oneOf" (list "data" .Values.data (list "files" "configMap" "claim" "url")) -}}
{{- include "grpo.checks.oneOf" (list "model" .Values.model (list "claim" "url")) -}}
{{- if and .Values.results.claim .Values.results.url -}}
{{- fail "\n\nresults names claim and url, but takes one of them. Leave out the other." -}}
{{- end -}}
{{- $own := get (get .Values.config "run" | default dict) "results" -}}
{{- if and $own (include "grpo.resultsPlace" .) -}}
{{- fail (printf "\n\nconfig.run.results is %s, but `results` says where they go. Leave one of them out." $own) -}}
{{- end -}}
{{- include "grpo.checks.model" . -}}
{{- include "grpo.checks.code" . -}}
{{- include "grpo.checks.rows" . -}}
{{- range $key := list "model" "data" -}}
{{- include "grpo.checks.url" (list (printf "%s.url" $key) (get $.Values $key).url) -}}
{{- end -}}
{{- $shared := and .Values.storage.enabled (or .Values.storage.existingClaim (has "ReadWriteMany" .Values.storage.accessModes)) -}}
{{- if and .Values.model.url (not $shared) (not .Values.cache.existingClaim) -}}
{{- fail "\n\nmodel.url is fetched once into a volume that all pods share, but the volume of runs is none. Name a claim with ReadWriteMany in cache.existingClaim, or use one in storage." -}}
{{- end -}}
{{- if and .Values.job.check (or .Values.model.url .Values.data.url) (not .Values.cache.existingClaim) (not .Values.storage.existingClaim) -}}
{{- fail "\n\njob.check looks before anything is installed, but what a url names would be fetched into the volume that the release makes. Name a claim of yours in cache.existingClaim or storage.existingClaim, or leave job.check out." -}}
{{- end -}}
{{- if and .Values.data.url (not .Values.storage.enabled) (not .Values.cache.existingClaim) -}}
{{- fail "\n\ndata.url is fetched into a volume, but storage.enabled is false. Turn it on, or name a claim in cache.existingClaim." -}}
{{- end -}}
{{- end }}

{{/* (list "code" values keys) */}}
{{- define "grpo.checks.oneOf" -}}
{{- $section := index . 1 -}}
{{- $named := list -}}
{{- range $key := index . 2 }}{{ if get $section $key }}{{ $named = append $named $key }}{{ end }}{{ end -}}
{{- if gt (len $named) 1 -}}
{{- fail (printf "\n\n%s names %s, but takes one of %s. Leave out the others." (index . 0) (join " and " $named) (join ", " (index . 2))) -}}
{{- end -}}
{{- if and (not $named) (or $section.revision $section.path $section.include) -}}
{{- fail (printf "\n\n%s says something about its content, but not where it is. Set one of %s." (index . 0) (join ", " (index . 2))) -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.model" -}}
{{- $config := get .Values.config "model" | default dict -}}
{{- $elsewhere := or .Values.model.url .Values.model.claim -}}
{{- if and $elsewhere (get $config "path") -}}
{{- fail (printf "\n\nThe model is named twice: config.model.path is %s, and model.%s is set. Leave one out." (get $config "path") (.Values.model.url | empty | ternary "claim" "url")) -}}
{{- end -}}
{{- if and $elsewhere (get $config "revision") -}}
{{- fail "\n\nconfig.model.revision is for a model of the hub that pods load by themselves. Write the commit into model.url: hf://owner/name@commit." -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.code" -}}
{{- $folder := get (get .Values.config "reward_code" | default dict) "folder" -}}
{{- if and (include "grpo.codeFolder" .) $folder -}}
{{- fail (printf "\n\nconfig.reward_code.folder is %s, but `code` says where reward code is. Leave one of them out." $folder) -}}
{{- end -}}
{{- range $key := list "code" "data" -}}
{{- $size := 0 -}}
{{- $keys := dict -}}
{{- range $path, $text := (get $.Values $key).files -}}
{{- $size = add $size (len $text) -}}
{{- $name := include "grpo.fileKey" $path -}}
{{- if hasKey $keys $name }}{{ fail (printf "\n\n%s.files: %s and %s would be one key of a ConfigMap. Rename one." $key $path (get $keys $name)) }}{{ end -}}
{{- $_ := set $keys $name $path -}}
{{- end -}}
{{- if gt $size 500000 -}}
{{- fail (printf "\n\n%s.files has %d bytes, but Kubernetes and Helm keep at most 1 MiB of an object, encoded; 500000 are taken. Use a claim%s." $key $size (eq $key "data" | ternary ", or data.url" ", or an image (code.imagePath)")) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Rows that are named are read, and inline ones have a file for each split that is read. */}}
{{- define "grpo.checks.rows" -}}
{{- $data := get .Values.config "data" | default dict -}}
{{- $source := get $data "source" -}}
{{- $folder := or .Values.data.files .Values.data.configMap | empty | ternary (.Values.data.claim | empty | ternary (include "grpo.fetched" (list . "data")) "/mnt/data") "/etc/grpo/data" -}}
{{- if and $source (include "grpo.dataSource" .) (not (hasPrefix $folder $source)) -}}
{{- fail (printf "\n\nThe rows are named twice: config.data.source is %s, and `data` says where they are. Leave one out, or write a path below %s." $source $folder) -}}
{{- end -}}
{{- if and .Values.data.files (not .Values.data.path) (not (get $data "source")) (not (get $data "sources")) -}}
{{- $source := include "grpo.dataSource" . | trimPrefix "/etc/grpo/data/" -}}
{{- $train := $source | replace "{split}" (include "grpo.config.get" (list . "data" "split" "train")) -}}
{{- if not (hasKey .Values.data.files $train) -}}
{{- fail (printf "\n\ndata.files has no %s to train on, only %s. Name the file so, or set data.path to the name of yours." $train (keys .Values.data.files | sortAlpha | join ", ")) -}}
{{- end -}}
{{- $test := $source | replace "{split}" (include "grpo.config.get" (list . "eval" "split" "test")) -}}
{{- $evaluates := ne (include "grpo.config.get" (list . "eval" "prompts" 128)) "0" -}}
{{- if and $evaluates (not (include "grpo.config.get" (list . "eval" "source" ""))) (not (hasKey .Values.data.files $test)) -}}
{{- fail (printf "\n\ndata.files has no %s for the held-out prompts, only %s. Add it, or set config.eval.prompts to 0." $test (keys .Values.data.files | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* (list "model.url" url) */}}
{{- define "grpo.checks.url" -}}
{{- $key := index . 0 -}}
{{- $url := index . 1 -}}
{{- if $url -}}
{{- if not (regexMatch "^(s3://[a-z0-9][a-z0-9.-]+(/|$)|hf://[^/])" $url) -}}
{{- fail (printf "\n\n%s must be s3://bucket/prefix or hf://%sowner/name@commit, but is %s. Correct it, or use a claim." $key (eq $key "data.url" | ternary "datasets/" "") $url) -}}
{{- end -}}
{{- if and (hasPrefix "hf://" $url) (not (regexMatch "@[0-9a-f]{40}$" $url)) -}}
{{- fail (printf "\n\n%s is %s: a branch or tag of the hub can move under a run. End it with @ and the commit, 40 hex digits (on the hub under Files and versions, History)." $key $url) -}}
{{- end -}}
{{- if and (eq $key "data.url") (hasPrefix "hf://" $url) (not (hasPrefix "hf://datasets/" $url)) -}}
{{- fail (printf "\n\ndata.url is %s, a model of the hub. A data set is hf://datasets/owner/name@commit." $url) -}}
{{- end -}}
{{- if and (eq $key "model.url") (hasPrefix "hf://datasets/" $url) -}}
{{- fail (printf "\n\nmodel.url is %s, a data set of the hub. A model is hf://owner/name@commit." $url) -}}
{{- end -}}
{{- end -}}
{{- end }}
