{{/* Pod of the small image, for the orchestrator and for `helm test`.
Takes (dict "root" $ "args" <list> "component" <name> "restart" <policy>). */}}
{{- define "medjob.corePod" -}}
{{- $root := .root -}}
{{- $cluster := .root.Values.cluster -}}
{{- $extra := include "medjob.coreVolumes" $root | fromJson -}}
metadata:
  labels:
    {{- include "medjob.podLabels" (dict "root" $root "component" .component) | nindent 4 }}
  annotations: # the pod can move at any time, and must not prevent its node from scaling down
    {{- include "medjob.json" (mergeOverwrite (dict "cluster-autoscaler.kubernetes.io/safe-to-evict" "true") (deepCopy $cluster.podAnnotations)) | nindent 4 }}
spec:
  restartPolicy: {{ .restart }}
  serviceAccountName: {{ include "medjob.serviceAccount" $root }}
  automountServiceAccountToken: false # the volume `api` below contains a token that expires after an hour
  enableServiceLinks: false
  terminationGracePeriodSeconds: 10
  securityContext:
    {{- include "medjob.podSecurity" $root | nindent 4 }}
  {{- include "medjob.pullSecrets" $root | nindent 2 }}
  nodeSelector:
    {{- include "medjob.nodeSelector" $cluster.orchestrator | nindent 4 }}
  {{- with $cluster.orchestrator.affinity }}
  affinity: {{ include "medjob.json" . }}
  {{- end }}
  {{- with $cluster.orchestrator.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  tolerations: # leave a lost node after 30 s; the Lease prevents two orchestrators from acting at once
    - {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 30}
    - {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 30}
    {{- range $cluster.orchestrator.tolerations }}
    - {{ include "medjob.json" . }}
    {{- end }}
  containers:
    - name: medjob
      image: {{ include "medjob.image" (dict "root" $root "name" "medjob-core" "digest" $cluster.image.coreDigest) }}
      imagePullPolicy: {{ $cluster.image.pullPolicy }}
      args: {{ toJson .args }}
      {{- if eq .component "orchestrator" }}
      ports: [{name: metrics, containerPort: 9464}]
      {{- end }}
      terminationMessagePolicy: FallbackToLogsOnError
      securityContext:
        {{- include "medjob.containerSecurity" $root | nindent 8 }}
      env:
        - {name: MEDJOB_RELEASE, value: {{ include "medjob.fullname" $root | quote }}}
        - {name: MEDJOB_INSTANCE, value: {{ include "medjob.release" $root | quote }}}
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        - name: JOB_NAME
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/job-name']"}}
        - name: JOB_UID
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/controller-uid']"}}
        {{- range $cluster.extraEnv }}
        - {{ include "medjob.json" . }}
        {{- end }}
      resources:
        requests: {cpu: 100m, memory: 256Mi, ephemeral-storage: 100Mi}
        limits: {cpu: 1, memory: 512Mi, ephemeral-storage: 1Gi}
      volumeMounts:
        - {name: api, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
        {{- include "medjob.mounts" (dict "root" $root "extra" $extra.mounts) | nindent 8 }}
  volumes:
    - name: api
      projected:
        sources:
          - serviceAccountToken: {path: token, expirationSeconds: 3600}
          - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
          - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
    {{- include "medjob.volumes" (dict "root" $root "work" "1Gi" "optional" true "extra" $extra.volumes) | nindent 4 }}
{{- end -}}

{{/* Volumes and mounts of cluster.orchestrator, and those of the stages that hold files which the run names: the
orchestrator needs their digests. It mounts no others, because a disk that it holds on its node may be missing on another. */}}
{{- define "medjob.coreVolumes" -}}
{{- $cluster := .Values.cluster -}}
{{- $run := toJson .Values.run -}}
{{- $mounts := $cluster.orchestrator.extraVolumeMounts -}}
{{- $volumes := $cluster.orchestrator.extraVolumes -}}
{{- $paths := list -}}
{{- range $mounts -}}{{- $paths = append $paths .mountPath -}}{{- end -}}
{{- $names := list -}}
{{- range $volumes -}}{{- $names = append $names .name -}}{{- end -}}
{{- $needed := list -}}
{{- range $cluster.extraVolumeMounts -}}
{{- $path := .mountPath | trimSuffix "/" | toJson -}}
{{- $named := or (contains $path $run) (contains (printf "%s/" (trimSuffix "\"" $path)) $run) -}}
{{- if and $named (not (has .mountPath $paths)) -}}
{{- $mounts = append $mounts . -}}
{{- $needed = append $needed .name -}}
{{- end -}}
{{- end -}}
{{- range $cluster.extraVolumes -}}
{{- if and (has .name $needed) (not (has .name $names)) -}}{{- $volumes = append $volumes . -}}{{- end -}}
{{- end -}}
{{- toJson (dict "mounts" $mounts "volumes" $volumes) -}}
{{- end -}}

{{/* Whether a request comes from the orchestrator or the preflight of this release, as an expression of an admission policy.
A token without a pod's name counts as theirs. */}}
{{- define "medjob.isOrchestrator" -}}
{{- $user := printf "system:serviceaccount:%s:%s" .Release.Namespace (include "medjob.serviceAccount" . | trimAll "\"") -}}
{{- $pods := printf "^%s-(orchestrator-[0-9a-f]{8}|preflight)-" (include "medjob.fullname" .) -}}
{{- $key := "authentication.kubernetes.io/pod-name" | toJson -}}
request.userInfo.username == {{ toJson $user }} && (!has(request.userInfo.extra) || !({{ $key }} in request.userInfo.extra)
|| request.userInfo.extra[{{ $key }}].exists(pod, pod.matches({{ toJson $pods }})))
{{- end -}}

{{/* Not empty if the API has admission policies. `helm template` knows no kinds, and then the version of the group decides. */}}
{{- define "medjob.hasAdmissionPolicies" -}}
{{- $versions := .Capabilities.APIVersions -}}
{{- $api := "admissionregistration.k8s.io/v1" -}}
{{- $offline := and (not ($versions.Has "batch/v1/Job")) ($versions.Has $api) -}}
{{- if or $offline ($versions.Has (printf "%s/ValidatingAdmissionPolicy" $api)) -}}true{{- end -}}
{{- end -}}
