{{/* The profile of a stage: its fields merged over the defaults from medjob/config.
Takes (dict "root" $ "stage" <name>). */}}
{{- define "medjob.profile" -}}
{{- $contract := .root.Files.Get "files/contract.yaml" | fromYaml -}}
{{- $resources := index .root.Values.resources .stage -}}
{{- $own := dict -}}
{{- with $resources.profile -}}{{- $own = index $.root.Values.cluster.profiles . | default dict -}}{{- end -}}
{{- mergeOverwrite (deepCopy $contract.profile) (deepCopy $own) | toJson -}}
{{- end -}}

{{/* Quoted reference of a stage's image: medjob-vllm if its engine is vLLM. Takes (dict "root" $ "stage" <name>). */}}
{{- define "medjob.stageImage" -}}
{{- $image := .root.Values.cluster.image -}}
{{- $resources := index .root.Values.resources .stage -}}
{{- $generates := has .stage (list "candidates" "judge" "evaluate") -}}
{{- $engine := ternary (default "auto" $resources.engine) "" $generates -}}
{{- if or (eq $engine "vllm") (and (eq $engine "auto") $image.vllm (gt (int $resources.gpus) 0)) -}}
{{- include "medjob.image" (dict "root" .root "name" "medjob-vllm" "digest" $image.vllmDigest) -}}
{{- else -}}
{{- include "medjob.image" (dict "root" .root "name" "medjob" "digest" $image.fullDigest) -}}
{{- end -}}
{{- end -}}

{{/* The Job of a stage. Takes (dict "root" $ "stage" <name> "trains" <bool>).
The orchestrator adds key and attempt to its name, and an owner.

One Job is one attempt: when a pod ends, the Job ends. The orchestrator then decides on a retry from the attempt's record
in the store, which contains progress and cause. If the stage has shards, the orchestrator creates this Job once per shard,
so that each can be retried alone. Direct mode has no orchestrator, so there Kubernetes restarts pods, and shards are the
indices of one Job. */}}
{{- define "medjob.stageJob" -}}
{{- $root := .root -}}
{{- $cluster := .root.Values.cluster -}}
{{- $pipeline := .root.Values.pipeline -}}
{{- $contract := .root.Files.Get "files/contract.yaml" | fromYaml -}}
{{- $resources := index .root.Values.resources .stage -}}
{{- $profile := include "medjob.profile" . | fromYaml -}}
{{- $network := include "medjob.network" (dict "profile" $profile "gpus" $resources.gpus) | fromYaml -}}
{{- $spot := include "medjob.spot" $profile.spot | fromYaml -}}
{{- $nodes := ternary (int (default 1 $resources.nodes)) 1 .trains -}}
{{- $direct := eq $pipeline.mode "direct" -}}
{{- $restarts := and $direct (eq $nodes 1) -}}
{{- $shards := ternary (int (default 1 $resources.shards)) 1 $direct -}}
{{- $pods := mul $nodes $shards -}}
{{- $finalCodes := $contract.finalCodes -}}
{{- $ignoredCodes := list $contract.preemptedCode -}}
{{- if gt $shards 1 -}}{{/* two shards that end at once may both join the set, and one of them is superseded */}}
{{- $finalCodes = without $finalCodes $contract.supersededCode -}}
{{- $ignoredCodes = append $ignoredCodes $contract.supersededCode -}}
{{- end -}}
{{- $fullname := include "medjob.fullname" .root -}}
{{- $tolerations := concat $profile.tolerations ($spot.tolerations | default list) -}}
{{- if gt (int $resources.gpus) 0 -}}
{{- range list "nvidia.com/gpu" (printf "%s/gpu" (splitList "/" $profile.gpuResource | first)) $profile.gpuResource | uniq -}}
{{- $tolerations = append $tolerations (dict "key" . "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- end -}}
{{- $uploads := and (eq .stage "export") (dig "export" "hub_model_id" "" .root.Values.run) -}}
{{- $defaults := $network.env | default list -}}
{{- if not (or (has .stage (list "fetch" "prepare" "judge")) $uploads) -}}
{{- $defaults = append $defaults (dict "name" "HF_HUB_OFFLINE" "value" "1") -}}{{/* no GPU waits for a download: fetch mirrors the models */}}
{{- end -}}
{{- $taken := list -}}
{{- range $cluster.extraEnv -}}{{- $taken = append $taken .name -}}{{- end -}}
{{- $annotations := dict "cluster-autoscaler.kubernetes.io/safe-to-evict" "false" "karpenter.sh/do-not-disrupt" "true" -}}
{{- range $key, $value := $network.annotations }}{{- $_ := set $annotations $key $value }}{{- end -}}
{{- range $key, $value := $cluster.podAnnotations }}{{- $_ := set $annotations $key $value }}{{- end -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ $fullname }}-{{ .stage }}
  namespace: {{ $root.Release.Namespace | quote }}
  labels:
    {{- include "medjob.names" $root | nindent 4 }}
    {{- include "medjob.component" .stage | nindent 4 }}
    app.kubernetes.io/part-of: medjob
    app.kubernetes.io/managed-by: medjob
    {{- with $cluster.queue }}
    kueue.x-k8s.io/queue-name: {{ . | quote }}
    {{- end }}
spec:
  {{- if gt $pods 1 }}
  completionMode: Indexed
  {{- end }}
  completions: {{ $pods }}
  parallelism: {{ $pods }}
  {{ ternary "backoffLimitPerIndex" "backoffLimit" (gt $shards 1) }}: {{ ternary (int $pipeline.retries) 0 $restarts }}
  {{- with $resources.activeDeadlineSeconds }}
  activeDeadlineSeconds: {{ int . }}
  {{- end }}
  ttlSecondsAfterFinished: {{ int $pipeline.ttlSecondsAfterFinished }}
  podReplacementPolicy: Failed # a second pod beside one that still saves would only supersede it
  podFailurePolicy: # the first rule that matches wins: a final code stays final in a pod that is evicted
    rules:
      - action: FailJob
        onExitCodes: {containerName: medjob, operator: In, values: {{ toJson $finalCodes }}}
      - action: {{ ternary "Ignore" "FailJob" $restarts }}
        onPodConditions: [{type: DisruptionTarget, status: "True"}]
      - action: {{ ternary "Ignore" "FailJob" $restarts }}
        onExitCodes: {containerName: medjob, operator: In, values: {{ toJson $ignoredCodes }}}
  template:
    metadata:
      labels:
        {{- include "medjob.podLabels" (dict "root" $root "component" .stage) | nindent 8 }}
      annotations:
        {{- include "medjob.json" $annotations | nindent 8 }}
    spec:
      restartPolicy: Never
      serviceAccountName: {{ include "medjob.serviceAccount" $root }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      {{- if gt $nodes 1 }}
      subdomain: {{ $fullname }}-{{ .stage }}
      {{- end }}
      terminationGracePeriodSeconds: {{ ceil $cluster.graceSeconds | int }}
      securityContext:
        {{- include "medjob.podSecurity" $root | nindent 8 }}
      {{- include "medjob.pullSecrets" $root | nindent 6 }}
      nodeSelector:
        {{- include "medjob.nodeSelector" (dict "nodeSelector" (merge dict $profile.nodeSelector ($spot.nodeSelector | default dict))) | nindent 8 }}
      {{- with $tolerations }}
      tolerations: {{ include "medjob.json" . }}
      {{- end }}
      {{- with $profile.affinity }}
      affinity: {{ include "medjob.json" . }}
      {{- end }}
      {{- with $profile.topologySpreadConstraints }}
      topologySpreadConstraints: {{ include "medjob.json" . }}
      {{- end }}
      {{- with $profile.priorityClassName }}
      priorityClassName: {{ . | quote }}
      {{- end }}
      {{- with $profile.runtimeClassName }}
      runtimeClassName: {{ . | quote }}
      {{- end }}
      containers:
        - name: medjob
          image: {{ include "medjob.stageImage" (dict "root" $root "stage" .stage) }}
          imagePullPolicy: {{ $cluster.image.pullPolicy }}
          args: [{{ .stage }}, -f, /etc/medjob/job.yaml]
          terminationMessagePolicy: FallbackToLogsOnError # the reason shows in `kubectl describe` when the logs are gone
          securityContext:
            {{- include "medjob.containerSecurity" $root | nindent 12 }}
          env:
            {{- if gt $nodes 1 }}
            - name: JOB_NAME
              valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/job-name']"}}
            - name: MEDJOB_PEER_TOKEN # shared by the pods of this Job; other pods cannot read it
              valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/controller-uid']"}}
            - {name: MASTER_ADDR, value: $(JOB_NAME)-0.{{ $fullname }}-{{ .stage }}}
            {{- end }}
            {{- if gt $shards 1 }}
            - name: MEDJOB_SHARD
              valueFrom: {fieldRef: {fieldPath: "metadata.labels['batch.kubernetes.io/job-completion-index']"}}
            {{- end }}
            {{- range $defaults }}
            {{- if not (has .name $taken) }}
            - {{ include "medjob.json" . }}
            {{- end }}
            {{- end }}
            {{- range $cluster.extraEnv }}
            - {{ include "medjob.json" . }}
            {{- end }}
          {{- $size := dict "cpu" $profile.cpu "memory" $profile.memory "ephemeral-storage" $profile.ephemeralStorage }}
          {{- if gt (int $resources.gpus) 0 }}
          {{- $size = set $size $profile.gpuResource (toString $resources.gpus) }}
          {{- end }}
          {{- $size = merge $size ($network.resources | default dict) }}
          resources:
            requests: {{ include "medjob.json" $size }}
            limits: {{ include "medjob.json" $size }}
          volumeMounts:
            {{- include "medjob.mounts" (dict "root" $root "shm" $profile.shm "extra" $cluster.extraVolumeMounts) | nindent 12 }}
      volumes:
        {{- include "medjob.volumes" (dict "root" $root "config" (list "job.yaml") "work" $profile.ephemeralStorage "shm" $profile.shm "extra" $cluster.extraVolumes) | nindent 8 }}
{{- end -}}

{{/* The same Job as JSON. Takes what medjob.stageJob takes. */}}
{{- define "medjob.stageManifest" -}}
{{- $job := include "medjob.stageJob" . | fromYaml -}}
{{- with $job.Error -}}{{- fail (printf "the Job of %s is not valid YAML: %s" $.stage .) -}}{{- end -}}
{{- include "medjob.printable" (toPrettyJson $job) -}}
{{- end -}}
