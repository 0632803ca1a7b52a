"""`cluster`: where a run executes. On a single machine, only a few of its fields matter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, field_validator

from medjob.config.base import Count, Kubernetes, Name
from medjob.config.endpoints import Endpoint
from medjob.config.store import StoreRef

QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"
REGISTRY_PATTERN = (
    r"^$|^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9][A-Za-z0-9._-]*)(:[0-9]{1,5})?"
    r"(/[A-Za-z0-9][A-Za-z0-9._-]*)*/*$"
)
TAG_PATTERN = r"^$|^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"
RESOURCE_PATTERN = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$"
_SUBDOMAIN_PATTERN = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
_LABEL_PATTERN = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
_VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_.-]*$"
# Names of environment variables that the chart, Kubernetes or the launcher sets. The orchestrator
# finds its own Job by JOB_NAME, and the ranks of a training find each other by the others.
RESERVED_VARIABLES = (
    "JOB_COMPLETION_INDEX",
    "JOB_NAME",
    "JOB_UID",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "POD_NAME",
    "RANK",
    "WORLD_SIZE",
)
RESERVED_PREFIXES = ("MEDJOB_", "KUBERNETES_")
RESERVED_VOLUMES = ("api", "config", "secrets", "shm", "tmp", "work")
RESERVED_PATHS = (
    "/dev/shm",
    "/etc/medjob",
    "/tmp",
    "/var/run/secrets/kubernetes.io/serviceaccount",
    "/work",
)
Quantity = Annotated[str, StringConstraints(pattern=QUANTITY_PATTERN)]
Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]
Registry = Annotated[str, StringConstraints(pattern=REGISTRY_PATTERN)]
Tag = Annotated[str, StringConstraints(pattern=TAG_PATTERN)]
ResourceName = Annotated[str, StringConstraints(pattern=RESOURCE_PATTERN, max_length=317)]
ObjectName = Annotated[str, StringConstraints(pattern=_SUBDOMAIN_PATTERN, max_length=253)]
QueueName = Annotated[str, StringConstraints(pattern=_SUBDOMAIN_PATTERN, max_length=63)]
Namespace = Annotated[str, StringConstraints(pattern=_LABEL_PATTERN, max_length=63)]
VariableName = Annotated[str, StringConstraints(pattern=_VARIABLE_PATTERN)]
KubernetesObject = dict[str, Any]
"""Part of a pod spec, copied unchanged. The API server validates it before any stage starts."""


def _volume_is_free(volume: KubernetesObject) -> KubernetesObject:
    if volume.get("name") in RESERVED_VOLUMES:
        raise ValueError(f"{volume['name']} is a volume of the chart; choose another name")
    return volume


def _path_is_free(mount: KubernetesObject) -> KubernetesObject:
    if str(mount.get("mountPath")).rstrip("/") in RESERVED_PATHS:
        raise ValueError(f"{mount['mountPath']} is mounted by the chart; choose another mountPath")
    return mount


Volume = Annotated[KubernetesObject, AfterValidator(_volume_is_free)]
VolumeMount = Annotated[KubernetesObject, AfterValidator(_path_is_free)]


class Profile(Kubernetes):
    """A node type, and the resources that one pod requests on it."""

    accelerator: str | None = None
    """GPU model: T4, L4, A10G, L40S, A100-40, A100-80, H100, H200 or B200, or a Mac by its memory
    in GB, such as Mac-16. `medjob plan` uses it."""
    price_per_gpu_hour: Annotated[float, Field(ge=0, le=1e9)] | None = None
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
    gpu_resource: ResourceName = "nvidia.com/gpu"
    """Kubernetes resource name of the GPUs, such as `nvidia.com/mig-1g.10gb` for a MIG slice."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have. `kubernetes.io/arch: amd64` and `kubernetes.io/os: linux` are
    added unless you set these labels, because the images are built for them."""
    tolerations: list[KubernetesObject] = Field(default_factory=list)
    """Tolerations added to the pods. Pods with GPUs always tolerate the taints `nvidia.com/gpu`,
    the vendor's (`amd.com/gpu` for `amd.com/...`), and `gpuResource`."""
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
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass of the pods."""


class Image(Kubernetes):
    """The container images `medjob-core` (without torch), `medjob` and `medjob-vllm` (`medjob` with
    vLLM), built from images/Dockerfile."""

    registry: Registry = ""
    """Registry that `make push REGISTRY=...` pushed to, without `https://`. Empty: the images are
    already on the nodes."""
    tag: Tag = ""
    """Tag of the images. Default: the chart's version."""
    core_digest: Digest | None = None
    """Digest of `medjob-core`. Takes precedence over `tag`."""
    full_digest: Digest | None = None
    """Digest of `medjob`. Takes precedence over `tag`."""
    vllm: bool = False
    """The registry has `medjob-vllm`, so stages with GPUs and `engine: auto` use it. Stages with
    `engine: vllm` use it in any case, all others use `medjob`."""
    vllm_digest: Digest | None = None
    """Digest of `medjob-vllm`. Takes precedence over `tag`."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "Always"
    """When a node contacts the registry. `Always` notices that a tag has moved, and costs little if
    the node already has the image."""
    pull_secrets: list[ObjectName] = Field(default_factory=list)
    """Names of Secrets of type kubernetes.io/dockerconfigjson, for private registries."""

    @field_validator("registry", mode="before")
    @classmethod
    def _registry_has_no_scheme(cls, value: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            raise ValueError(f"must not have a scheme such as https:// (got {value!r})")
        return value


class ServiceAccount(Kubernetes):
    """Identity of the pods towards the Kubernetes API and the cloud."""

    create: bool = True
    """Create the ServiceAccount. If false, `name` must name an existing one."""
    name: ObjectName | None = None
    """Name of the ServiceAccount. Default: the release's name."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations, such as eks.amazonaws.com/role-arn (IRSA) or iam.gke.io/gcp-service-account
    (workload identity)."""


class NetworkPolicy(Kubernetes):
    """Which network connections the pods may open and accept."""

    enabled: bool = True
    """Create a NetworkPolicy. Pods of the run can reach each other, DNS and whatever `egress`
    allows; other pods cannot reach them."""
    egress: list[KubernetesObject] | None = None
    """Egress rules, as in a NetworkPolicy. Default: all destinations, because buckets have no fixed
    addresses, except the cloud's metadata server (169.254.169.254). That one is reachable only if
    the run uses gs:// or the service account has an annotation of GKE, because workload identity
    needs it. `[{}]` allows everything; pods that use the identity of their EC2 node need it.
    Narrower rules must allow the bucket, the model hub (for `fetch` and `prepare`), the cloud's
    identity service, and the API server at its endpoint's address and port (`kubectl get endpoints
    kubernetes`): most network plugins apply rules after translating the service address."""


class AdmissionPolicy(Kubernetes):
    """Limits for the orchestrator that the API server enforces."""

    enabled: bool = False
    """Create a ValidatingAdmissionPolicy. With it, the orchestrator can create, change and delete
    only Jobs of this release, with its image, service account, volumes and Secrets, and no other
    pods. It is an object of the whole cluster, so the user who installs the release needs the
    right to create it. Without the API (admissionregistration.k8s.io/v1) nothing is created."""


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
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pod."""
    queue: QueueName | None = None
    """Name of the Kueue LocalQueue for these two Jobs, for clusters that suspend every Job without
    a queue. They hold their small quota as long as the run lasts. Default: no queue."""
    extra_volumes: list[Volume] = Field(default_factory=list)
    """Volumes added to these pods, such as credentials or certificates for the bucket. Not a
    ReadWriteOnce claim that stages use: the pod would hold its disk on another node."""
    extra_volume_mounts: list[VolumeMount] = Field(default_factory=list)
    """Volume mounts added to the containers of these pods."""


class PodMonitor(Kubernetes):
    """Scraping of the orchestrator by the Prometheus operator. docs/guides/cluster.md lists the
    metrics."""

    enabled: bool = False
    """Create a PodMonitor. Requires the operator's CRDs (monitoring.coreos.com/v1). The pod has the
    port `metrics` either way."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels by which your Prometheus selects PodMonitors, such as `release:
    kube-prometheus-stack`."""
    from_namespace: Namespace = "monitoring"
    """Namespace of your Prometheus. The NetworkPolicy lets it connect to the port."""


class EnvironmentVariable(Kubernetes):
    """An environment variable, as in a container's `env`."""

    name: VariableName
    """Name of the variable."""
    value: str | None = None
    """Value of the variable."""
    value_from: KubernetesObject | None = None
    """Where the value comes from, such as a key of a Secret."""

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in RESERVED_VARIABLES or name.startswith(RESERVED_PREFIXES):
            raise ValueError(f"{name} is set by the chart, so it cannot be replaced")
        return name


class Cluster(Kubernetes):
    """Where the run executes and where its artifacts are stored."""

    store: StoreRef = StoreRef()
    """Directory or bucket prefix that holds the artifacts."""
    work_dir: str = ".medjob"
    """Scratch directory for running stages and converted models. It can be deleted while nothing
    runs."""
    profiles: dict[Name, Profile] = Field(default_factory=dict)
    """Node types, by the names that `resources` refers to."""
    endpoints: dict[Name, Endpoint] = Field(default_factory=dict)
    """OpenAI-compatible servers, by the names that `endpoint:NAME/MODEL` refers to."""
    currency: str = "USD"
    """Currency of the prices in `profiles` and `endpoints`."""
    report_to: list[Literal["wandb", "mlflow", "tensorboard"]] = Field(default_factory=list)
    """Experiment trackers that training stages report to. Default: none, nothing is sent
    anywhere."""
    grace_seconds: Annotated[float, Field(gt=2, le=1e7)] = 30
    """Seconds between the request to stop and the kill. A training saves and uploads its state in
    this time, or skips the save if the time is too short. Kubernetes' default is 30; a GKE Spot
    node leaves about 13."""
    checkpoints_to_keep: Count = 2
    """Number of newest checkpoints of a training stage kept in the store, in addition to the best
    one."""
    context: str | None = None
    """kubeconfig context for `medjob submit` and the other cluster commands. Default: the current
    context."""
    namespace: Namespace | None = None
    """Namespace of the run. Default: the context's namespace. The namespace `default` is
    refused."""
    image: Image = Image()
    """Container images."""
    service_account: ServiceAccount = ServiceAccount()
    """Identity of the pods."""
    existing_secret: ObjectName | None = None
    """Name of a Secret whose keys are mounted as files in /run/secrets/medjob, such as
    aws-credentials, gcs.json or hf-token. images/README.md lists them."""
    queue: QueueName | None = None
    """Name of the Kueue LocalQueue that admits the stages. Default: no queue."""
    network_policy: NetworkPolicy = NetworkPolicy()
    """Which network connections the pods may open and accept."""
    admission_policy: AdmissionPolicy = AdmissionPolicy()
    """Limits for the orchestrator that the API server enforces."""
    orchestrator: Orchestrator = Orchestrator()
    """Scheduling of the orchestrator pod."""
    pod_monitor: PodMonitor = PodMonitor()
    """Metrics for Prometheus."""
    extra_env: list[EnvironmentVariable] = Field(default_factory=list)
    """Environment variables added to every container, as in a container's `env`. Each name once,
    and none that the chart sets (JOB_NAME, POD_NAME, MEDJOB_... and the variables of the
    launcher)."""
    extra_volumes: list[Volume] = Field(default_factory=list)
    """Volumes added to the pods of all stages. If the run names files in it, the orchestrator
    mounts the volume as well, so a claim must be ReadOnlyMany or ReadWriteMany. Other volumes of
    the orchestrator are `orchestrator.extraVolumes`."""
    extra_volume_mounts: list[VolumeMount] = Field(default_factory=list)
    """Volume mounts added to the containers of all stages."""
    pod_labels: dict[str, str] = Field(default_factory=dict)
    """Labels added to every pod."""
    pod_annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations added to every pod."""

    @field_validator("extra_env")
    @classmethod
    def _names_are_unique(cls, variables: list[EnvironmentVariable]) -> list[EnvironmentVariable]:
        names = [variable.name for variable in variables]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"lists {twice[0]} twice")
        return variables
