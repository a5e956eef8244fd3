"""What a LeaderWorkerSet may say, because no package has its definition.

After github.com/kubernetes-sigs/lws, api/leaderworkerset/v1/leaderworkerset_types.go, at commit
024af08. Pods and claims are Kubernetes' own, and validated as such.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Whole = Annotated[int, Field(strict=True, ge=0)]
Share = Whole | Annotated[str, Field(pattern=r"^[0-9]+%$")]
"""A number, or a share of all."""
Template = dict[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class SubGroupPolicy(_Part):
    sub_group_policy_type: Literal["LeaderWorker", "LeaderExcluded"] | None = None
    sub_group_size: Whole | None = None


class LeaderWorkerTemplate(_Part):
    worker_template: Template
    leader_template: Template | None = None
    size: Annotated[int, Field(strict=True, ge=1)] | None = None
    restart_policy: (
        Literal["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None", "Default"] | None
    ) = None
    sub_group_policy: SubGroupPolicy | None = None
    volume_claim_templates: list[Template] | None = None
    persistent_volume_claim_retention_policy: Template | None = None


class RollingUpdate(_Part):
    partition: Whole | None = None
    max_unavailable: Share | None = None
    max_surge: Share | None = None


class RolloutStrategy(_Part):
    type: Literal["RollingUpdate"]
    rolling_update_configuration: RollingUpdate | None = None


class NetworkConfig(_Part):
    subdomain_policy: Literal["Shared", "UniquePerReplica"]


class Spec(_Part):
    leader_worker_template: LeaderWorkerTemplate
    replicas: Whole | None = None
    rollout_strategy: RolloutStrategy | None = None
    startup_policy: Literal["LeaderCreated", "LeaderReady"] | None = None
    network_config: NetworkConfig | None = None


class LeaderWorkerSet(_Part):
    api_version: Literal["leaderworkerset.x-k8s.io/v1"]
    kind: Literal["LeaderWorkerSet"]
    metadata: Template
    spec: Spec
