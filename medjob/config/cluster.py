"""`cluster`: where a run executes. On a single machine, only a few of its fields matter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from medjob.config.base import Count, Kubernetes, Name
from medjob.config.store import StoreRef

QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"
Quantity = Annotated[str, StringConstraints(pattern=QUANTITY_PATTERN)]
Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]
KubernetesObject = dict[str, Any]
"""Part of a pod spec, copied unchanged. The API server validates it before any stage starts."""


class Profile(Kubernetes):
    """A node type, and the resources that one pod requests on it."""

    accelerator: str | None = None
    """GPU model: T4, L4, A10G, L40S, A100-40, A100-80, H100, H200 or B200. `medjob plan` uses
    it."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """Price per hour of one GPU and its share of the node, in `cluster.currency`."""
    cpu: Quantity = "4"
    """CPU request and limit of one pod. They are equal because one throttled rank slows down all
    ranks."""
    memory: Quantity = "16Gi"
    """Memory request and limit of one pod."""
    ephemeral_storage: Quantity = "50Gi"
    """Disk request and limit of one pod. It holds models, inputs and unfinished checkpoints."""
    shm: Quantity = "2Gi"
    """Size of /dev/shm, which NCCL and data loaders use. It counts towards `memory`."""
    gpu_resource: str = "nvidia.com/gpu"
    """Kubernetes resource name of the GPUs."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have. `kubernetes.io/arch: amd64` is added unless you set that label,
    because the images are built for amd64."""
    tolerations: list[KubernetesObject] = Field(default_factory=list)
    """Tolerations added to the pods. The toleration for the GPU taint (`nvidia.com/gpu`) is always
    added."""
    affinity: KubernetesObject = Field(default_factory=dict)
    """Affinity of the pods, as in a pod spec."""
    topology_spread_constraints: list[KubernetesObject] = Field(default_factory=list)
    """How the pods of one stage are spread over nodes and zones, as in a pod spec."""
    spot: Literal["none", "gke", "eks", "karpenter"] = "none"
    """Use spot nodes: adds the node selector and toleration of this cloud or autoscaler."""
    network: Literal["plain", "gke-rdma", "eks-efa"] = "plain"
    """Fast network between nodes: adds its annotations, resources and libfabric settings to the
    pods. The image must contain the matching NCCL plugin; see docs/guides."""
    efa_interfaces: Count = 1
    """EFA interfaces per node, used with `network: eks-efa`: 4 on p4d, 32 on p5."""
    priority_class_name: str | None = None
    """PriorityClass of the pods."""
    runtime_class_name: str | None = None
    """RuntimeClass of the pods."""


class Image(Kubernetes):
    """The container images `medjob-core` (without torch) and `medjob`, built from
    images/Dockerfile."""

    registry: str = ""
    """Registry that `make push REGISTRY=...` pushed to. Empty: the images are already on the
    nodes."""
    tag: str = ""
    """Tag of both images. Default: the chart's version."""
    core_digest: Digest | None = None
    """Digest of `medjob-core`. Takes precedence over `tag`."""
    full_digest: Digest | None = None
    """Digest of `medjob`. Takes precedence over `tag`."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "Always"
    """When a node contacts the registry. `Always` notices that a tag has moved, and costs little if
    the node already has the image."""
    pull_secrets: list[str] = Field(default_factory=list)
    """Names of Secrets of type kubernetes.io/dockerconfigjson, for private registries."""


class ServiceAccount(Kubernetes):
    """Identity of the pods towards the Kubernetes API and the cloud."""

    create: bool = True
    """Create the ServiceAccount. If false, `name` must name an existing one."""
    name: str | None = None
    """Name of the ServiceAccount. Default: the release's name."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations, such as eks.amazonaws.com/role-arn (IRSA) or iam.gke.io/gcp-service-account
    (workload identity)."""


class NetworkPolicy(Kubernetes):
    """Which network connections the pods may open and accept."""

    enabled: bool = True
    """Create a NetworkPolicy. Pods of the run can reach each other, DNS and whatever `egress`
    allows; other pods cannot reach them."""
    egress: list[KubernetesObject] = Field(default=[{}])
    """Egress rules, as in a NetworkPolicy. Default: all destinations, because buckets have no fixed
    addresses. Narrower rules must allow the bucket, the model hub (for `fetch` and `prepare`), the
    cloud's identity service, and the API server at its endpoint's address and port (`kubectl get
    endpoints kubernetes`): most network plugins apply rules after translating the service
    address."""


class Orchestrator(Kubernetes):
    """Scheduling of the orchestrator pod and the `helm test` pod. Each requests 0.1 CPU and 256
    MiB."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that the node must have. Choose a node that is always on: the pod lives as long as the
    run, and would keep another node from being scaled down."""
    tolerations: list[KubernetesObject] = Field(default_factory=list)
    """Tolerations added to the pod."""
    affinity: KubernetesObject = Field(default_factory=dict)
    """Affinity of the pod, as in a pod spec."""
    priority_class_name: str | None = None
    """PriorityClass of the pod."""


class PodMonitor(Kubernetes):
    """Scraping of the orchestrator by the Prometheus operator. docs/guides/cluster.md lists the
    metrics."""

    enabled: bool = False
    """Create a PodMonitor. Requires the operator's CRDs (monitoring.coreos.com/v1). The pod has the
    port `metrics` either way."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels by which your Prometheus selects PodMonitors, such as `release:
    kube-prometheus-stack`."""
    from_namespace: str = "monitoring"
    """Namespace of your Prometheus. The NetworkPolicy lets it connect to the port."""


class Cluster(Kubernetes):
    """Where the run executes and where its artifacts are stored."""

    store: StoreRef = StoreRef()
    """Directory or bucket prefix that holds the artifacts."""
    work_dir: str = ".medjob"
    """Scratch directory for running stages and converted models. It can be deleted while nothing
    runs."""
    profiles: dict[Name, Profile] = Field(default_factory=dict)
    """Node types, by the names that `resources` refers to."""
    currency: str = "USD"
    """Currency of the prices in `profiles`."""
    report_to: list[Literal["wandb", "mlflow", "tensorboard"]] = Field(default_factory=list)
    """Experiment trackers that training stages report to. Default: none, nothing is sent
    anywhere."""
    grace_seconds: Annotated[float, Field(gt=2)] = 30
    """Seconds between the request to stop and the kill. A training saves and uploads its state in
    this time, or skips the save if the time is too short. Kubernetes' default is 30; a GKE Spot
    node leaves about 13."""
    checkpoints_to_keep: Count = 2
    """Number of newest checkpoints of a training stage kept in the store, in addition to the best
    one."""
    context: str | None = None
    """kubeconfig context for `medjob submit` and the other cluster commands. Default: the current
    context."""
    namespace: str | None = None
    """Namespace of the run. Default: the context's namespace. The namespace `default` is
    refused."""
    image: Image = Image()
    """Container images."""
    service_account: ServiceAccount = ServiceAccount()
    """Identity of the pods."""
    existing_secret: str | None = None
    """Name of a Secret whose keys are mounted as files in /run/secrets/medjob, such as
    aws-credentials, gcs.json or hf-token. images/README.md lists them."""
    queue: str | None = None
    """Name of the Kueue LocalQueue that admits the stages. Default: no queue."""
    network_policy: NetworkPolicy = NetworkPolicy()
    """Which network connections the pods may open and accept."""
    orchestrator: Orchestrator = Orchestrator()
    """Scheduling of the orchestrator pod."""
    pod_monitor: PodMonitor = PodMonitor()
    """Metrics for Prometheus."""
    extra_env: list[KubernetesObject] = Field(default_factory=list)
    """Environment variables added to every container, as in a container's `env`."""
    extra_volumes: list[KubernetesObject] = Field(default_factory=list)
    """Volumes added to every pod."""
    extra_volume_mounts: list[KubernetesObject] = Field(default_factory=list)
    """Volume mounts added to every container."""
    pod_labels: dict[str, str] = Field(default_factory=dict)
    """Labels added to every pod."""
    pod_annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations added to every pod."""
