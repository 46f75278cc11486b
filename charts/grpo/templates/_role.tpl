{{/*
Values of a role with those of `all` below them, as JSON: lists one behind the other, where the role's own entry of a
name (a mount: of a path) takes the place of the other. (dict "root" $ "role" "head")
*/}}
{{- define "grpo.role" -}}
{{- $own := deepCopy (get .root.Values .role) -}}
{{- range $key, $value := .root.Values.all -}}
{{- $mine := get $own $key -}}
{{- if kindIs "map" $value -}}
{{- $_ := set $own $key (mergeOverwrite (deepCopy $value) ($mine | default dict)) -}}
{{- else if kindIs "slice" $value -}}
{{- $by := eq $key "volumeMounts" | ternary "mountPath" "name" -}}
{{- $taken := list -}}
{{- range $mine }}{{ with get . $by }}{{ $taken = append $taken . }}{{ end }}{{ end -}}
{{- $kept := list -}}
{{- range $value }}{{ if not (has (get . $by) $taken) }}{{ $kept = append $kept . }}{{ end }}{{ end -}}
{{- $_ := set $own $key (concat $kept ($mine | default list)) -}}
{{- else if and $value (not $mine) -}}
{{- $_ := set $own $key $value -}}
{{- end -}}
{{- end -}}
{{- $own | toJson -}}
{{- end }}
