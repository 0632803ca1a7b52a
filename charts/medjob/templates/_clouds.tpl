{{/* Selects nodes that the cloud can reclaim. Takes the name of the cloud. */}}
{{- define "medjob.spot" -}}
{{- if eq . "gke" -}}
nodeSelector: {cloud.google.com/gke-spot: "true"}
tolerations: [{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}]
{{- else if eq . "eks" -}}
nodeSelector: {eks.amazonaws.com/capacityType: SPOT}
{{- else if eq . "karpenter" -}}
nodeSelector: {karpenter.sh/capacity-type: spot}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{/* Pod settings for a fast network between nodes. The image must contain NCCL's plugin for it.
Takes (dict "profile" <profile> "gpus" <per node>). */}}
{{- define "medjob.network" -}}
{{- if eq .profile.network "gke-rdma" -}}
{{- $interfaces := list (dict "interfaceName" "eth0" "network" "default") -}}
{{- range $i := until (int .gpus) -}}
{{- $interfaces = append $interfaces (dict "interfaceName" (printf "eth%d" (add $i 2)) "network" (printf "rdma-%d" $i)) -}}
{{- end -}}
annotations:
  networking.gke.io/default-interface: eth0
  networking.gke.io/interfaces: {{ toJson $interfaces | quote }}
{{- else if eq .profile.network "eks-efa" -}}
resources:
  vpc.amazonaws.com/efa: {{ .profile.efaInterfaces | toString | quote }}
  hugepages-2Mi: 5120Mi
env:
  - {name: FI_PROVIDER, value: efa}
  - {name: FI_EFA_USE_HUGE_PAGE, value: "1"}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{/* Not empty if the pods get their identity from the metadata server: workload identity of GKE, for gs://. */}}
{{- define "medjob.usesMetadataServer" -}}
{{- $annotations := keys .Values.cluster.serviceAccount.annotations | join " " -}}
{{- if or (contains "gs://" (toJson (list .Values.run .Values.cluster.store))) (contains "iam.gke.io/" $annotations) -}}
true
{{- end -}}
{{- end -}}
