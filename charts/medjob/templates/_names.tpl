{{/* Name of the release: that of Helm. If a parent chart uses this one under an alias, the alias is added, so that several
can live in one release. `medjob status` takes this name. */}}
{{- define "medjob.release" -}}
{{- if eq .Chart.Name "medjob" -}}{{ .Release.Name }}
{{- else -}}{{ printf "%s-%s" .Release.Name (regexReplaceAll "[^a-z0-9]+" (.Chart.Name | lower) "-" | trimAll "-") }}
{{- end -}}
{{- end -}}

{{/* Prefix of every name. A stage's Job adds -<stage>-<8>-a<n>, and its pods -<index>, which leaves 34 of 63 characters. */}}
{{- define "medjob.fullname" -}}
{{- $release := include "medjob.release" . -}}
{{- if le (len $release) 34 -}}{{ $release }}
{{- else -}}{{ printf "%s-%s" ($release | trunc 27 | trimSuffix "-" | trimSuffix ".") ($release | sha256sum | trunc 6) }}
{{- end -}}
{{- end -}}

{{/* A value as JSON, which every YAML parser reads in the same way. The other formats of Helm leave texts such as = or 12:30
without quotes. */}}
{{- define "medjob.json" -}}{{ include "medjob.printable" (toJson .) }}{{- end -}}

{{/* Escapes the characters of a JSON text that YAML parsers refuse, or take for the end of a line. */}}
{{- define "medjob.printable" -}}
{{- $text := . -}}
{{- range concat (untilStep 127 160 1) (list 65279 65534 65535) -}}
{{- $text = replace (printf "%c" (int .)) (printf "\\u%04x" (int .)) $text -}}
{{- end -}}
{{- $text -}}
{{- end -}}

{{/* The run file: the values without what Helm or a parent chart added. */}}
{{- define "medjob.runFile" -}}
{{- $values := omit .Values "global" -}}
{{- range (.Files.Get "files/contract.yaml" | fromYaml).notOfTheRun -}}{{- $values = omit $values . -}}{{- end -}}
{{- include "medjob.printable" (toPrettyJson $values) -}}
{{- end -}}

{{/* Labels that only this chart uses. Argo CD and others overwrite app.kubernetes.io/instance with names of their own. */}}
{{- define "medjob.selector" -}}
medjob/release: {{ include "medjob.release" . | quote }}
{{- end -}}

{{- define "medjob.names" -}}
app.kubernetes.io/name: medjob
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{ include "medjob.selector" . }}
{{- end -}}

{{/* Takes the name of a stage, `orchestrator` or `preflight`. */}}
{{- define "medjob.component" -}}
app.kubernetes.io/component: {{ . }}
medjob/component: {{ . }}
{{- end -}}

{{/* Labels of a pod. podLabels cannot change the labels that Services, policies and the orchestrator select.
Takes (dict "root" $ "component" <name>). */}}
{{- define "medjob.podLabels" -}}
{{- $own := merge (include "medjob.names" .root | fromYaml) (include "medjob.component" .component | fromYaml) -}}
{{- include "medjob.json" (mergeOverwrite (deepCopy .root.Values.cluster.podLabels) $own) -}}
{{- end -}}

{{/* Labels of the objects that Helm creates. A label has at most 63 characters and no "+", which Flux adds to versions. */}}
{{- define "medjob.labels" -}}
{{ include "medjob.names" . }}
app.kubernetes.io/part-of: medjob
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
app.kubernetes.io/version: {{ include "medjob.labelValue" .Chart.AppVersion | quote }}
helm.sh/chart: {{ include "medjob.labelValue" (printf "%s-%s" .Chart.Name .Chart.Version) | quote }}
{{- end -}}

{{- define "medjob.labelValue" -}}
{{- regexReplaceAll "[^A-Za-z0-9]+$" (regexReplaceAll "[^A-Za-z0-9_.-]" . "_" | trunc 63) "" -}}
{{- end -}}

{{- define "medjob.serviceAccount" -}}
{{ .Values.cluster.serviceAccount.name | default (include "medjob.fullname" .) | quote }}
{{- end -}}

{{/* Quoted reference of an image. Takes (dict "root" $ "name" "medjob" "digest" <digest or nil>). */}}
{{- define "medjob.image" -}}
{{- $image := .root.Values.cluster.image -}}
{{- $registry := regexReplaceAll "/+$" $image.registry "" -}}
{{- $path := ternary (printf "%s/%s" $registry .name) .name (ne $registry "") -}}
{{- if .digest -}}{{ printf "%s@%s" $path .digest | quote }}
{{- else -}}{{ printf "%s:%s" $path (default (replace "+" "_" .root.Chart.AppVersion) $image.tag) | quote }}
{{- end -}}
{{- end -}}

{{/* Checks that the schema cannot express. Every template runs them first. */}}
{{- define "medjob.check" -}}
{{- if eq .Release.Namespace "default" -}}
{{- fail "\nerror: namespace: must not be default\nhint: kubectl create namespace medjob, then helm install -n medjob" -}}
{{- end -}}
{{- if gt (len (include "medjob.release" .)) 53 -}}
{{- fail (printf "\nerror: release: must have at most 53 characters, together with the alias of the chart (got %q)\nhint: use a shorter name" (include "medjob.release" .)) -}}
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
{{- include "medjob.checkVariables" . -}}
{{- include "medjob.checkVolumes" . -}}
{{- if not (or .Values.cluster.serviceAccount.create .Values.cluster.serviceAccount.name) -}}
{{- fail "\nerror: cluster.serviceAccount.name: is required with create: false\nhint: name a service account that exists in the namespace" -}}
{{- end -}}
{{- range $stage, $resources := .Values.resources -}}
{{- if and (gt (int (default 1 $resources.nodes)) 1) (not (regexMatch "^[a-z]" $.Release.Name)) -}}
{{- fail (printf "\nerror: release: must begin with a letter if a stage has several nodes, because their Service is named after it (got %q)\nhint: run-%s" $.Release.Name $.Release.Name) -}}
{{- end -}}
{{- if eq (default "medjob" $resources.launcher) "external" -}}
{{- fail (printf "\nerror: resources.%s.launcher: must be medjob, because the chart's Jobs start no other launcher\nhint: start the stage as a TrainJob instead, as docs/guides/launchers.md shows" $stage) -}}
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

{{/* The names in cluster.extraEnv. A name that is listed twice is refused by Helm 4, and the last one wins elsewhere. */}}
{{- define "medjob.checkVariables" -}}
{{- $contract := .Files.Get "files/contract.yaml" | fromYaml -}}
{{- $seen := list -}}
{{- range .Values.cluster.extraEnv -}}
{{- $name := .name -}}
{{- $reserved := has $name $contract.reservedVariables -}}
{{- range $contract.reservedPrefixes -}}{{- $reserved = or $reserved (hasPrefix . $name) -}}{{- end -}}
{{- if $reserved -}}
{{- fail (printf "\nerror: cluster.extraEnv: %s is set by the chart, so it cannot be replaced\nhint: choose another name" $name) -}}
{{- end -}}
{{- if has $name $seen -}}
{{- fail (printf "\nerror: cluster.extraEnv: lists %s twice\nhint: remove one of them" $name) -}}
{{- end -}}
{{- $seen = append $seen $name -}}
{{- end -}}
{{- end -}}

{{/* Names and paths of the volumes that the values add. */}}
{{- define "medjob.checkVolumes" -}}
{{- $contract := .Files.Get "files/contract.yaml" | fromYaml -}}
{{- range $key, $from := dict "cluster" .Values.cluster "cluster.orchestrator" .Values.cluster.orchestrator -}}
{{- range $from.extraVolumes -}}
{{- if has .name $contract.reservedVolumes -}}
{{- fail (printf "\nerror: %s.extraVolumes: %s is a volume of the chart\nhint: choose another name" $key .name) -}}
{{- end -}}
{{- end -}}
{{- range $from.extraVolumeMounts -}}
{{- if has (toString .mountPath | trimSuffix "/") $contract.reservedPaths -}}
{{- fail (printf "\nerror: %s.extraVolumeMounts: %s is mounted by the chart\nhint: choose another mountPath" $key .mountPath) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
