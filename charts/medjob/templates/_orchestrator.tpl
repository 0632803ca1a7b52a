{{/* Pod of the small image, for the orchestrator and for `helm test`.
Takes (dict "root" $ "args" <list> "component" <name> "restart" <policy>). */}}
{{- define "medjob.corePod" -}}
{{- $root := .root -}}
{{- $cluster := .root.Values.cluster -}}
metadata:
  labels:
    {{- include "medjob.podLabels" (dict "root" $root "component" .component) | nindent 4 }}
  annotations: # the pod can move at any time, and must not prevent its node from scaling down
    {{- mergeOverwrite (dict "cluster-autoscaler.kubernetes.io/safe-to-evict" "true") (deepCopy $cluster.podAnnotations) | toYaml | nindent 4 }}
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
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $cluster.orchestrator.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  tolerations: # leave a lost node after 30 s; the Lease prevents two orchestrators from acting at once
    - {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 30}
    - {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 30}
    {{- with $cluster.orchestrator.tolerations }}
    {{- toYaml . | nindent 4 }}
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
        - {name: MEDJOB_INSTANCE, value: {{ $root.Release.Name | quote }}}
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        - name: JOB_NAME
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/job-name']"}}
        - name: JOB_UID
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/controller-uid']"}}
        {{- with $cluster.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        requests: {cpu: 100m, memory: 256Mi, ephemeral-storage: 100Mi}
        limits: {cpu: 1, memory: 512Mi, ephemeral-storage: 1Gi}
      volumeMounts:
        - {name: api, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
        {{- include "medjob.mounts" (dict "root" $root) | nindent 8 }}
  volumes:
    - name: api
      projected:
        sources:
          - serviceAccountToken: {path: token, expirationSeconds: 3600}
          - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
          - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
    {{- include "medjob.volumes" (dict "root" $root "work" "1Gi" "optional" true) | nindent 4 }}
{{- end -}}
