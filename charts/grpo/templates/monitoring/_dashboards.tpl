{{/* "true" unless another release of this namespace has the ConfigMap already. (dict "root" $ "name" NAME) */}}
{{- define "grpo.dashboards.own" -}}
{{- $there := lookup "v1" "ConfigMap" .root.Release.Namespace .name | default dict -}}
{{- $owner := dig "metadata" "annotations" "meta.helm.sh/release-name" "" $there -}}
{{- or (empty $there) (eq $owner .root.Release.Name) -}}
{{- end -}}

{{/*
The text of a dashboard for this namespace: uid and title of its own, as Grafana takes both once, its runs chosen at
first, and links to the runbooks where those are published. (dict "root" $ "text" TEXT)
*/}}
{{- define "grpo.dashboards.json" -}}
{{- $namespace := .root.Release.Namespace -}}
{{- $url := .root.Values.monitoring.runbookUrl -}}
{{- $text := .text -}}
{{- with $url }}{{ $text = regexReplaceAllLiteral `"url": "docs/runbooks\.md` $text (printf `"url": "%s` .) }}{{ end -}}
{{- $board := $text | fromJson -}}
{{- $_ := set $board "uid" (printf "%s-%s" $board.uid (sha256sum $namespace | trunc 8)) -}}
{{- $_ := set $board "title" (printf "%s: %s" $board.title $namespace) -}}
{{- range $variable := $board.templating.list -}}
{{- if eq $variable.name "namespace" }}{{ $_ := set $variable "current" (dict "text" (list $namespace) "value" (list $namespace)) }}{{ end -}}
{{- end -}}
{{- if not $url -}}
{{- $_ := set $board "links" (list (index $board.links 0)) -}}
{{- range $panel := $board.panels -}}
{{- range $each := concat (list $panel) ($panel.panels | default list) }}{{ $_ := unset $each "links" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- toPrettyJson $board -}}
{{- end -}}
