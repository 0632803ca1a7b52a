"""`cluster`: where a run lives. Spelled as in Kubernetes; a machine of one's own needs the store and nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from medjob.config.base import Count, Kubernetes, Name
from medjob.config.store import StoreRef

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
KubernetesObject = dict[str, Any]
"""A part of a pod as Kubernetes has it: handed on as it is, and checked by the API server before anything starts."""


class Profile(Kubernetes):
    """A kind of node, and how much of it one pod takes."""

    accelerator: str | None = None
    """The GPU, as `medjob plan` and NVIDIA name it: T4, L4, A10G, L40S, A100-40, A100-80, H100, H200, B200."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """What a GPU and its share of the node cost in an hour, in `cluster.currency`."""
    cpu: Quantity = "4"
    """CPUs of one pod: request and limit, since a training that is throttled at times is slow at all ranks."""
    memory: Quantity = "16Gi"
    """Memory of one pod: request and limit."""
    ephemeral_storage: Quantity = "50Gi"
    """Disk of one pod: models, inputs, checkpoints under way."""
    shm: Quantity = "2Gi"
    """Size of /dev/shm, which counts as memory: NCCL and data loaders use it."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource name of the GPUs."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes. `kubernetes.io/arch: amd64`, which the images are for, is added unless you say otherwise."""
    tolerations: list[KubernetesObject] = Field(default_factory=list)
    """Taints of the nodes that are no hindrance. GPU nodes' own (`nvidia.com/gpu`) is always among them."""
    affinity: KubernetesObject = Field(default_factory=dict)
    """Finer rules about nodes and neighbours."""
    topology_spread_constraints: list[KubernetesObject] = Field(default_factory=list)
    """How the pods of one stage spread over nodes and zones."""
    spot: Literal["none", "gke", "eks", "karpenter"] = "none"
    """Take nodes that the cloud may reclaim: adds this cloud's selector and toleration."""
    network: Literal["plain", "gke-rdma", "eks-efa"] = "plain"
    """Fast network between nodes: what it asks of a pod (annotations, resources, libfabric's settings). NCCL's plugin for it has to be
    in the image: docs/guides."""
    efa_interfaces: Count = 1
    """eks-efa: interfaces of one node (p4d 4, p5 32)."""
    priority_class_name: str | None = None
    """PriorityClass of the pods."""
    runtime_class_name: str | None = None
    """RuntimeClass of the pods."""


class Image(Kubernetes):
    """The two images of images/Dockerfile: `medjob-core` (no torch) and `medjob`."""

    registry: str = ""
    """Where they were pushed: `make push REGISTRY=...`. Empty: images that the nodes have already."""
    tag: str = ""
    """Their tag. Default: the chart's version."""
    core_digest: Digest | None = None
    """Digest of `medjob-core`; wins over the tag."""
    full_digest: Digest | None = None
    """Digest of `medjob`; wins over the tag."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "Always"
    """When the node asks the registry; `Always` is cheap for an image that it has, and finds a tag that has moved."""
    pull_secrets: list[str] = Field(default_factory=list)
    """Secrets of type kubernetes.io/dockerconfigjson."""


class ServiceAccount(Kubernetes):
    """Who the pods are, to the API and through it to the cloud."""

    create: bool = True
    """Make one; else `name` exists already."""
    name: str | None = None
    """Default: the release's name."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Such as eks.amazonaws.com/role-arn (IRSA) or iam.gke.io/gcp-service-account (workload identity)."""


class NetworkPolicy(Kubernetes):
    """What the pods may talk to."""

    enabled: bool = True
    """Make one: pods of the run reach one another, DNS and what `egress` allows; nobody else reaches them."""
    egress: list[KubernetesObject] = Field(default=[{}])
    """Rules as in a NetworkPolicy. Default: anywhere, since buckets have no fixed addresses. Narrower ones have to let through the
    bucket, the model hub (`fetch`, `prepare`), what gives the pods their identity in the cloud, and the API server at the address and
    port of its endpoint (`kubectl get endpoints kubernetes`), since most networks look at the packet behind the service address."""


class Orchestrator(Kubernetes):
    """Where the small pod runs that walks the line, and the one of `helm test`. It asks for 0.1 CPU and 256 MiB, as long as the run lasts."""

    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of its node: better one that is there anyway than one that would be kept from scaling down."""
    tolerations: list[KubernetesObject] = Field(default_factory=list)
    """Taints of the node that are no hindrance."""
    affinity: KubernetesObject = Field(default_factory=dict)
    """Finer rules about nodes and neighbours."""
    priority_class_name: str | None = None
    """PriorityClass of the pod."""


class PodMonitor(Kubernetes):
    """Has the Prometheus operator scrape the orchestrator: docs/guides/cluster.md lists what it tells."""

    enabled: bool = False
    """Make a PodMonitor. Needs the operator's CRDs (monitoring.coreos.com/v1). The port `metrics` is there without it too."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels by which your Prometheus selects PodMonitors, such as release: kube-prometheus-stack."""
    from_namespace: str = "monitoring"
    """Namespace of your Prometheus, which the NetworkPolicy lets in to the port."""


class Cluster(Kubernetes):
    """Where a run lives."""

    store: StoreRef = StoreRef()
    """Where artifacts are kept."""
    work_dir: str = ".medjob"
    """Scratch folder of running stages and converted models; safe to delete while nothing runs."""
    profiles: dict[Name, Profile] = Field(default_factory=dict)
    """Kinds of nodes, by the names that `resources` uses."""
    currency: str = "USD"
    """Of the prices in `profiles`."""
    report_to: list[Literal["wandb", "mlflow", "tensorboard"]] = Field(default_factory=list)
    """Experiment trackers of the training stages. Default: nothing is sent anywhere."""
    grace_seconds: Annotated[float, Field(gt=2)] = 30
    """Seconds between the signal to stop and the end: a training saves and stores its state within them, or does not begin to.
    Kubernetes gives 30 unless told otherwise; a GKE Spot node leaves about 13."""
    checkpoints_to_keep: Count = 2
    """Newest checkpoints of a training stage that stay in the store; the best one stays besides."""
    context: str | None = None
    """kubeconfig context of `medjob submit` and the verbs beside it. Default: the current one."""
    namespace: str | None = None
    """Namespace of the run. Default: the context's; the one called `default` is refused."""
    image: Image = Image()
    """Container images."""
    service_account: ServiceAccount = ServiceAccount()
    """Identity of the pods."""
    existing_secret: str | None = None
    """A Secret whose keys become files in /run/secrets/medjob: aws-credentials, gcs.json, hf-token, ... (images/README.md)."""
    queue: str | None = None
    """Kueue's LocalQueue that admits the stages."""
    network_policy: NetworkPolicy = NetworkPolicy()
    """What the pods may talk to."""
    orchestrator: Orchestrator = Orchestrator()
    """The pod that walks the line."""
    pod_monitor: PodMonitor = PodMonitor()
    """Metrics for Prometheus."""
    extra_env: list[KubernetesObject] = Field(default_factory=list)
    """More environment variables, as in a container's `env`."""
    extra_volumes: list[KubernetesObject] = Field(default_factory=list)
    """More volumes of every pod."""
    extra_volume_mounts: list[KubernetesObject] = Field(default_factory=list)
    """Where the containers see them."""
    pod_labels: dict[str, str] = Field(default_factory=dict)
    """More labels of every pod."""
    pod_annotations: dict[str, str] = Field(default_factory=dict)
    """More annotations of every pod."""
