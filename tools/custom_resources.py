"""Validate custom resources of Kubernetes, which kubernetes-validate has no schemas of.

    python -m tools.custom_resources FILE...

KEDA's models are cloudcoil's, made from its definitions. Nobody packages those of the Gateway API Inference
Extension: InferencePool v1 is written down here from its API. A field that a definition does not know is an error,
as it is for `kubectl apply --validate=strict`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(_Strict):
    """What we give of it."""

    name: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class Port(_Strict):
    """Of a pod or a service."""

    number: Annotated[int, Field(ge=1, le=65535)]


class Selector(_Strict):
    """No expressions: a Service could not have them."""

    matchLabels: Annotated[dict[str, str], Field(min_length=1, max_length=64)]


class EndpointPickerRef(_Strict):
    """The picker's Service, unless `kind` says otherwise."""

    group: str = ""
    kind: str = "Service"
    name: Annotated[str, Field(min_length=1, max_length=253)]
    port: Port | None = None
    failureMode: Literal["FailOpen", "FailClose"] = "FailClose"

    @model_validator(mode="after")
    def _has_its_port(self) -> EndpointPickerRef:
        if self.kind == "Service" and self.port is None:
            raise ValueError("port is required where kind is Service")
        return self


class InferencePoolSpec(_Strict):
    """Which pods, and who picks among them."""

    selector: Selector
    targetPorts: Annotated[list[Port], Field(min_length=1, max_length=8)]
    appProtocol: Literal["http", "kubernetes.io/h2c"] = "http"
    endpointPickerRef: EndpointPickerRef


class InferencePool(_Strict):
    """inference.networking.k8s.io/v1."""

    apiVersion: Literal["inference.networking.k8s.io/v1"]
    kind: Literal["InferencePool"]
    metadata: Metadata
    spec: InferencePoolSpec


MODELS: dict[tuple[str, str], type[BaseModel]] = {
    ("keda.sh/v1alpha1", "ScaledObject"): ScaledObject,
    ("inference.networking.k8s.io/v1", "InferencePool"): InferencePool,
}


def errors(document: dict[str, Any]) -> list[str]:
    """What is wrong with it; empty if nothing is."""
    model = MODELS.get((document["apiVersion"], document["kind"]))
    if model is None:
        return [f"{document['apiVersion']} {document['kind']} has no model here"]
    try:
        known = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
    except ValidationError as error:
        return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return [f"{path}: unknown" for path in _lost(document, known)]


def _lost(given: object, known: object, path: str = "") -> list[str]:
    """Fields that a model has passed over."""
    if isinstance(given, dict) and isinstance(known, dict):
        here = [f"{path}.{name}" for name in given if name not in known]
        return here + [one for name in known for one in _lost(given.get(name), known[name], f"{path}.{name}")]
    if isinstance(given, list) and isinstance(known, list):
        pairs = enumerate(zip(given, known, strict=True))
        return [one for index, (left, right) in pairs for one in _lost(left, right, f"{path}[{index}]")]
    return []


def main(files: list[str]) -> int:
    """-> exit status."""
    found = [
        f"{Path(file).name}: {error}"
        for file in files
        for document in yaml.safe_load_all(Path(file).read_text())
        for error in errors(document)
    ]
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
