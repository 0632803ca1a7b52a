{{/* Settings that all pods of the run share. They pass the `restricted` Pod Security level. */}}
{{- define "medjob.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "medjob.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Takes a dict with the key nodeSelector. The images are for Linux on x86-64; on other nodes they do not start. */}}
{{- define "medjob.nodeSelector" -}}
{{- $own := dict "kubernetes.io/arch" "amd64" "kubernetes.io/os" "linux" -}}
{{- include "medjob.json" (mergeOverwrite $own (deepCopy .nodeSelector)) -}}
{{- end -}}

{{- define "medjob.pullSecrets" -}}
{{- with .Values.cluster.image.pullSecrets }}
imagePullSecrets:
  {{- range uniq . }}
  - {name: {{ . | quote }}}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Takes (dict "root" $ "config" [files of the ConfigMap to mount, all if empty] "work" <size> "shm" <size or nil>
"optional" <bool> "extra" <volumes>).
With "optional" the pod starts without the Secret, so that it can report why the stage pods do not start. */}}
{{- define "medjob.volumes" -}}
{{- $cluster := .root.Values.cluster -}}
- name: config
  configMap:
    name: {{ include "medjob.fullname" .root }}-pipeline
    {{- with .config }}
    items:
      {{- range . }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
    {{- end }}
- name: work
  emptyDir: {sizeLimit: {{ .work | quote }}}
- name: tmp
  emptyDir: {sizeLimit: 5Gi}
{{- with .shm }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ . | quote }}}
{{- end }}
{{- with $cluster.existingSecret }}
- name: secrets
  secret: {secretName: {{ . | quote }}, defaultMode: 0440, optional: {{ $.optional | default false }}}
{{- end }}
{{- range .extra }}
- {{ include "medjob.json" . }}
{{- end }}
{{- end -}}

{{/* Takes (dict "root" $ "shm" <size or nil> "extra" <volume mounts>). */}}
{{- define "medjob.mounts" -}}
{{- $cluster := .root.Values.cluster -}}
- {name: config, mountPath: /etc/medjob, readOnly: true}
- {name: work, mountPath: /work}
- {name: tmp, mountPath: /tmp}
{{- if .shm }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- if $cluster.existingSecret }}
- {name: secrets, mountPath: /run/secrets/medjob, readOnly: true}
{{- end }}
{{- range .extra }}
- {{ include "medjob.json" . }}
{{- end }}
{{- end -}}
