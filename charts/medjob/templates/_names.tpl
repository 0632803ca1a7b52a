{{/* Stem of every name. A stage's Job adds -<stage>-<8>-a<n>, and its pods -<index>: 34 characters are left within 63. */}}
{{- define "medjob.fullname" -}}
{{- if le (len .Release.Name) 34 -}}{{ .Release.Name }}
{{- else -}}{{ printf "%s-%s" (.Release.Name | trunc 27 | trimSuffix "-" | trimSuffix ".") (.Release.Name | sha256sum | trunc 6) }}
{{- end -}}
{{- end -}}

{{- define "medjob.selector" -}}
app.kubernetes.io/name: medjob
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{/* Labels of a pod. Those that Services, policies and the orchestrator select by are not for podLabels to change. Takes (dict "root" $ "component" <name>). */}}
{{- define "medjob.podLabels" -}}
{{- $own := set (include "medjob.selector" .root | fromYaml) "app.kubernetes.io/component" .component -}}
{{- mergeOverwrite (deepCopy .root.Values.cluster.podLabels) $own | toYaml -}}
{{- end -}}

{{/* Labels of what Helm itself makes. */}}
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

{{/* An image's reference. Takes (dict "root" $ "name" "medjob" "digest" <digest or nil>). */}}
{{- define "medjob.image" -}}
{{- $image := .root.Values.cluster.image -}}
{{- $path := ternary (printf "%s/%s" $image.registry .name) .name (ne $image.registry "") -}}
{{- if .digest -}}{{ printf "%s@%s" $path .digest }}
{{- else -}}{{ printf "%s:%s" $path (default .root.Chart.AppVersion $image.tag) }}
{{- end -}}
{{- end -}}

{{/* What must hold before anything is rendered; the schema cannot say it. */}}
{{- define "medjob.check" -}}
{{- if eq .Release.Namespace "default" -}}
{{- fail "\nerror: namespace: must not be default\nhint: kubectl create namespace medjob, then helm install -n medjob" -}}
{{- end -}}
{{- if contains "." .Release.Name -}}
{{- fail (printf "\nerror: release: must have no dot, since it is part of host names (got %q)\nhint: %s" .Release.Name (replace "." "-" .Release.Name)) -}}
{{- end -}}
{{- $store := dig "store" "" .Values.cluster -}}
{{- $uri := kindIs "map" $store | ternary (dig "uri" "" (kindIs "map" $store | ternary $store dict)) $store -}}
{{- if not (or (hasPrefix "s3://" $uri) (hasPrefix "gs://" $uri)) -}}
{{- fail (printf "\nerror: cluster.store: pods share no folder, so it must be s3://BUCKET/PREFIX or gs://BUCKET/PREFIX (got %q)\nhint: --set cluster.store=s3://my-bucket/medjob" $uri) -}}
{{- end -}}
{{- if and (kindIs "map" $store) (dig "singleWriter" false (kindIs "map" $store | ternary $store dict)) -}}
{{- fail "\nerror: cluster.store.singleWriter: several pods write on a cluster\nhint: use a store that keeps conditional writes, and leave it false" -}}
{{- end -}}
{{- if not (or .Values.cluster.serviceAccount.create .Values.cluster.serviceAccount.name) -}}
{{- fail "\nerror: cluster.serviceAccount.name: is required with create: false\nhint: name one that exists in the namespace" -}}
{{- end -}}
{{- range $stage, $resources := .Values.resources -}}
{{- if and (gt (int (default 1 $resources.nodes)) 1) (not (regexMatch "^[a-z]" $.Release.Name)) -}}
{{- fail (printf "\nerror: release: must begin with a letter where a stage has several nodes, since their Service is named by it (got %q)\nhint: run-%s" $.Release.Name $.Release.Name) -}}
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
