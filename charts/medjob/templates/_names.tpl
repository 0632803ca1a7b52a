{{/* Prefix of every name. A stage's Job adds -<stage>-<8>-a<n>, and its pods -<index>, which leaves 34 of 63 characters. */}}
{{- define "medjob.fullname" -}}
{{- if le (len .Release.Name) 34 -}}{{ .Release.Name }}
{{- else -}}{{ printf "%s-%s" (.Release.Name | trunc 27 | trimSuffix "-" | trimSuffix ".") (.Release.Name | sha256sum | trunc 6) }}
{{- end -}}
{{- end -}}

{{- define "medjob.selector" -}}
app.kubernetes.io/name: medjob
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* Labels of a pod. podLabels cannot change the labels that Services, policies and the orchestrator select.
Takes (dict "root" $ "component" <name>). */}}
{{- define "medjob.podLabels" -}}
{{- $own := set (include "medjob.selector" .root | fromYaml) "app.kubernetes.io/component" .component -}}
{{- mergeOverwrite (deepCopy .root.Values.cluster.podLabels) $own | toYaml -}}
{{- end -}}

{{/* Labels of the objects that Helm creates. */}}
{{- define "medjob.labels" -}}
{{ include "medjob.selector" . }}
app.kubernetes.io/part-of: medjob
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "medjob.serviceAccount" -}}
{{ .Values.cluster.serviceAccount.name | default (include "medjob.fullname" .) | quote }}
{{- end -}}

{{/* Reference of an image. Takes (dict "root" $ "name" "medjob" "digest" <digest or nil>). */}}
{{- define "medjob.image" -}}
{{- $image := .root.Values.cluster.image -}}
{{- $path := ternary (printf "%s/%s" $image.registry .name) .name (ne $image.registry "") -}}
{{- if .digest -}}{{ printf "%s@%s" $path .digest }}
{{- else -}}{{ printf "%s:%s" $path (default .root.Chart.AppVersion $image.tag) }}
{{- end -}}
{{- end -}}

{{/* Checks that the schema cannot express. Every template runs them first. */}}
{{- define "medjob.check" -}}
{{- if eq .Release.Namespace "default" -}}
{{- fail "\nerror: namespace: must not be default\nhint: kubectl create namespace medjob, then helm install -n medjob" -}}
{{- end -}}
{{- if contains "." .Release.Name -}}
{{- fail (printf "\nerror: release: must not contain a dot, because it becomes part of host names (got %q)\nhint: %s" .Release.Name (replace "." "-" .Release.Name)) -}}
{{- end -}}
{{- $store := dig "store" "" .Values.cluster -}}
{{- $uri := kindIs "map" $store | ternary (dig "uri" "" (kindIs "map" $store | ternary $store dict)) $store -}}
{{- if not (or (hasPrefix "s3://" $uri) (hasPrefix "gs://" $uri)) -}}
{{- fail (printf "\nerror: cluster.store: pods cannot share a folder, so it must be s3://BUCKET/PREFIX or gs://BUCKET/PREFIX (got %q)\nhint: --set cluster.store=s3://my-bucket/medjob" $uri) -}}
{{- end -}}
{{- if and (kindIs "map" $store) (dig "singleWriter" false (kindIs "map" $store | ternary $store dict)) -}}
{{- fail "\nerror: cluster.store.singleWriter: must be false on a cluster, where several pods write\nhint: use a store that supports conditional writes" -}}
{{- end -}}
{{- if not (or .Values.cluster.serviceAccount.create .Values.cluster.serviceAccount.name) -}}
{{- fail "\nerror: cluster.serviceAccount.name: is required with create: false\nhint: name a service account that exists in the namespace" -}}
{{- end -}}
{{- range $stage, $resources := .Values.resources -}}
{{- if and (gt (int (default 1 $resources.nodes)) 1) (not (regexMatch "^[a-z]" $.Release.Name)) -}}
{{- fail (printf "\nerror: release: must begin with a letter if a stage has several nodes, because their Service is named after it (got %q)\nhint: run-%s" $.Release.Name $.Release.Name) -}}
{{- end -}}
{{- with $resources.profile -}}
{{- if not (hasKey $.Values.cluster.profiles .) -}}
{{- fail (printf "\nerror: resources.%s.profile: %q is not in cluster.profiles\nhint: add -f jobs/clusters/<cluster>.yaml" $stage .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.pipeline.mode "direct") (not .Values.pipeline.stage) -}}
{{- fail "\nerror: pipeline.stage: is required with pipeline.mode: direct\nhint: --set pipeline.stage=sft" -}}
{{- end -}}
{{- end -}}
