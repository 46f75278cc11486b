{{/* What the cluster has, asked at install and upgrade. `helm template` is told nothing, and then nothing is refused. */}}

{{/* Whether a cluster answers: `helm template` and a dry run of the client ask none. Every namespace has this ConfigMap. */}}
{{- define "grpo.answers" -}}
{{- lookup "v1" "ConfigMap" .Release.Namespace "kube-root-ca.crt" | empty | not -}}
{{- end }}

{{/* Objects of the user's that the pods need, as JSON: where they are named, kind, name and keys. */}}
{{- define "grpo.references" -}}
{{- $found := list -}}
{{- range $key, $secret := .Values.secrets -}}
{{- if $secret.name }}{{ $found = append $found (dict "where" (printf "secrets.%s" $key) "kind" "Secret" "name" $secret.name "keys" (list $secret.key)) }}{{ end -}}
{{- end -}}
{{- range .Values.image.pullSecrets }}{{ $found = append $found (dict "where" "image.pullSecrets" "kind" "Secret" "name" .name "keys" list) }}{{ end -}}
{{- range $role := list "all" "head" "rollout" "trainer" -}}
{{- $group := get $.Values $role -}}
{{- range $container := concat (list $group) $group.initContainers $group.sidecarContainers -}}
{{- range $container.env -}}
{{- $from := .valueFrom | default dict -}}
{{- range $kind, $ref := dict "Secret" $from.secretKeyRef "ConfigMap" $from.configMapKeyRef -}}
{{- if and $ref (not $ref.optional) }}{{ $found = append $found (dict "where" (printf "%s.env" $role) "kind" $kind "name" $ref.name "keys" (list $ref.key)) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- range $container.envFrom -}}
{{- range $kind, $ref := dict "Secret" .secretRef "ConfigMap" .configMapRef -}}
{{- if and $ref (not $ref.optional) }}{{ $found = append $found (dict "where" (printf "%s.envFrom" $role) "kind" $kind "name" $ref.name "keys" list) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $volume := $group.volumes -}}
{{- range $source := concat (list $volume) (dig "projected" "sources" list $volume) -}}
{{- range $kind, $ref := dict "Secret" $source.secret "ConfigMap" $source.configMap -}}
{{- if and $ref (not $ref.optional) -}}
{{- $keys := list }}{{ range $ref.items }}{{ $keys = append $keys .key }}{{ end -}}
{{- $found = append $found (dict "where" (printf "%s.volumes" $role) "kind" $kind "name" ($ref.secretName | default $ref.name) "keys" $keys) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with $volume.persistentVolumeClaim }}{{ $found = append $found (dict "where" (printf "%s.volumes" $role) "kind" "PersistentVolumeClaim" "name" .claimName "keys" list) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $claims := dict "model.claim" .Values.model.claim "data.claim" .Values.data.claim "results.claim" .Values.results.claim "cache.existingClaim" .Values.cache.existingClaim -}}
{{- if .Values.storage.enabled }}{{ $_ := set $claims "storage.existingClaim" .Values.storage.existingClaim }}{{ end -}}
{{- range $where, $name := $claims -}}
{{- if $name }}{{ $found = append $found (dict "where" $where "kind" "PersistentVolumeClaim" "name" $name "keys" list) }}{{ end -}}
{{- end -}}
{{- range $key := list "code" "data" -}}
{{- $section := get $.Values $key -}}
{{- with $section.configMap }}{{ $found = append $found (dict "where" (printf "%s.configMap" $key) "kind" "ConfigMap" "name" . "keys" list) }}{{ end -}}
{{- with get $section "secret" }}{{ $found = append $found (dict "where" (printf "%s.secret" $key) "kind" "Secret" "name" . "keys" list) }}{{ end -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- $found = append $found (dict "where" "serviceAccount.name" "kind" "ServiceAccount" "name" .Values.serviceAccount.name "keys" list) -}}
{{- end -}}
{{- $found | toJson -}}
{{- end }}

{{- define "grpo.checks.lookup" -}}
{{- if .Values.lookup -}}
{{- include "grpo.checks.class" . -}}
{{- if eq (include "grpo.answers" .) "true" -}}
{{- include "grpo.checks.references" . -}}
{{- include "grpo.checks.claim" . -}}
{{- include "grpo.checks.queue" . -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.references" -}}
{{- $own := list -}}
{{- range .Values.extraObjects }}{{ with tpl (toYaml .) $ | fromYaml }}{{ $own = append $own (printf "%v/%v" .kind (dig "metadata" "name" "" .)) }}{{ end }}{{ end -}}
{{- $missing := list -}}
{{- range include "grpo.references" . | fromJsonArray -}}
{{- if not (has (printf "%s/%s" .kind .name) $own) -}}
{{- $object := lookup "v1" .kind $.Release.Namespace .name -}}
{{- if not $object -}}
{{- $missing = append $missing (printf "%s names the %s %s, which is not in the namespace %s" .where .kind .name $.Release.Namespace) -}}
{{- else -}}
{{- $held := keys ($object.data | default dict) ($object.binaryData | default dict) -}}
{{- $where := .where -}}{{- $kind := .kind -}}{{- $name := .name -}}
{{- range .keys -}}
{{- if not (has . $held) }}{{ $missing = append $missing (printf "%s names the key %s of the %s %s, which holds %s" $where . $kind $name (join ", " (sortAlpha $held) | default "none")) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $missing -}}
{{- fail (printf "\n\n%s.\n\nWithout it the pods would wait in ContainerCreating for as long as job.preRunningDeadlineSeconds. Make it first, for example: kubectl -n %s create secret generic NAME --from-file=KEY=FILE. (lookup: false installs all the same.)" (join ".\n" (uniq $missing)) .Release.Namespace) -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.class" -}}
{{- $storage := .Values.storage -}}
{{- if and $storage.enabled (not $storage.existingClaim) $storage.storageClassName -}}
{{- $names := list -}}
{{- range (lookup "storage.k8s.io/v1" "StorageClass" "" "").items }}{{ $names = append $names .metadata.name }}{{ end -}}
{{- if and $names (not (has $storage.storageClassName $names)) -}}
{{- fail (printf "\n\nstorage.storageClassName is %s, but this cluster has %s. The claim would wait for ever, and a claim cannot change its class." $storage.storageClassName (join ", " (sortAlpha $names))) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A claim that was kept is taken up again as it is: Kubernetes changes neither its class nor its modes. */}}
{{- define "grpo.checks.claim" -}}
{{- $storage := .Values.storage -}}
{{- $name := include "grpo.claimName" . -}}
{{- $claim := and $storage.enabled (not $storage.existingClaim) | ternary (lookup "v1" "PersistentVolumeClaim" .Release.Namespace $name) dict -}}
{{- if $claim -}}
{{- $way := printf "Set storage as it is, or use another release name, or, if none of its runs is needed: kubectl -n %s delete pvc %s" .Release.Namespace $name -}}
{{- if eq (dig "status" "phase" "" $claim) "Pending" -}}
{{- $way = printf "It holds nothing, as it is still Pending (kubectl -n %s describe pvc %s says why), so delete it and try again: kubectl -n %s delete pvc %s" .Release.Namespace $name .Release.Namespace $name -}}
{{- end -}}
{{- if $claim.metadata.deletionTimestamp -}}
{{- fail (printf "\n\nThe claim %s is being deleted, which waits for its last pod. Wait until it is gone, then try again." $name) -}}
{{- end -}}
{{- $class := $claim.spec.storageClassName | default "" -}}
{{- if and $storage.storageClassName (ne $storage.storageClassName $class) -}}
{{- fail (printf "\n\nThe claim %s is there from before with the storage class %s, but storage.storageClassName is %s, and a claim cannot change its class. %s" $name ($class | default "(none)") $storage.storageClassName $way) -}}
{{- end -}}
{{- $modes := join ", " (sortAlpha $claim.spec.accessModes) -}}
{{- if ne $modes (join ", " (sortAlpha $storage.accessModes)) -}}
{{- fail (printf "\n\nThe claim %s is there from before with the access modes %s, but storage.accessModes is %s, and a claim cannot change them. %s" $name $modes (join ", " $storage.accessModes) $way) -}}
{{- end -}}
{{- $size := $claim.spec.resources.requests.storage -}}
{{- if lt (include "grpo.bytes" $storage.size | int64) (include "grpo.bytes" $size | int64) -}}
{{- fail (printf "\n\nThe claim %s is there from before with %v, but storage.size is %v, and a claim cannot shrink. %s" $name $size $storage.size $way) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "grpo.checks.queue" -}}
{{- $version := .Capabilities.APIVersions.Has "kueue.x-k8s.io/v1beta1" | ternary "kueue.x-k8s.io/v1beta1" "kueue.x-k8s.io/v1beta2" -}}
{{- with .Values.queue.name -}}
{{- if not (lookup $version "LocalQueue" $.Release.Namespace .) -}}
{{- fail (printf "\n\nqueue.name is %s, but the namespace %s has no such LocalQueue: Kueue would hold the job back for ever. Make it, or correct the name (kubectl -n %s get localqueues)." . $.Release.Namespace $.Release.Namespace) -}}
{{- end -}}
{{- end -}}
{{- end }}
