{{/* Stem of every name. A stage's Job adds -<stage>-<8>-a<n>, and its pods -<index>: 34 characters are left within 63. */}}
{{- define "medjob.fullname" -}}
{{- if le (len .Release.Name) 34 -}}{{ .Release.Name }}
{{- else -}}{{ printf "%s-%s" (.Release.Name | trunc 27 | trimSuffix "-" | trimSuffix ".") (.Release.Name | sha256sum | trunc 6) }}
{{- end -}}
{{- end -}}

{{- define "medjob.selector" -}}
app.kubernetes.io/name: medjob
app.kubernetes.io/instance: {{ .Release.Name }}
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
{{ .Values.cluster.serviceAccount.name | default (include "medjob.fullname" .) }}
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
{{- $store := dig "store" "" .Values.cluster -}}
{{- $uri := kindIs "map" $store | ternary (dig "uri" "" (kindIs "map" $store | ternary $store dict)) $store -}}
{{- if not (or (hasPrefix "s3://" $uri) (hasPrefix "gs://" $uri)) -}}
{{- fail (printf "\nerror: cluster.store: pods share no folder, so it must be s3://BUCKET/PREFIX or gs://BUCKET/PREFIX (got %q)\nhint: --set cluster.store=s3://my-bucket/medjob" $uri) -}}
{{- end -}}
{{- range $stage, $resources := .Values.resources -}}
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
