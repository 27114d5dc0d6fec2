"""What KubeRay's operator accepts, as far as our manifests go: its custom resources' schemas, cut down to the fields that we write.

Called as a program it makes ``kuberay.json`` anew from the operator's own files (ray-operator/config/crd/bases in its repository):

    python -m tests.cluster.manifests.schema FOLDER VERSION
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from cluster.manifests import KINDS, Site, render
from pipeline.commands.manifests import EXAMPLES

FACTS = Path(__file__).with_name("kuberay.json")
KEPT = ("type", "enum", "required", "pattern", "minimum", "maximum", "minLength", "maxLength", "maxItems", "format")
AMOUNT = {"anyOf": [{"type": "integer"}, {"type": "string"}]}  # a quantity or a port: x-kubernetes-int-or-string


def custom_resources() -> Iterator[dict[str, Any]]:
    """Yield every document of KubeRay's that is committed as an example, and those of the runs that the tests write."""
    from tests.cluster.manifests.test_manifests import RUN, SERVER

    texts = [path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.rglob("*.yaml"))]
    for kind in KINDS:
        run = SERVER if kind == "rayservice" else RUN
        if kind.startswith("ray"):
            texts += [text for name, text in render(kind, run, Site()).items() if name.endswith(".yaml")]
    for text in texts:
        for document in yaml.safe_load_all(text):
            if document.get("apiVersion") == "ray.io/v1":
                yield document


def check(document: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of ``document``; raises jsonschema.ValidationError for what the operator's schema refuses or does not know."""
    schemas = json.loads(FACTS.read_text(encoding="utf-8"))["schemas"]
    jsonschema.Draft202012Validator(schemas[document["kind"]]).validate(document["spec"])
    spec: dict[str, Any] = document["spec"]
    return spec


def cut_down(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """Return ``schema``, one of a CustomResourceDefinition, with those fields alone that ``values`` have; any other is an error.

    Raises KeyError for a field of theirs that it does not have.
    """
    if schema.get("x-kubernetes-int-or-string"):
        return AMOUNT
    kept = {key: schema[key] for key in KEPT if key in schema}
    if "properties" in schema:
        names = sorted({name for value in values for name in value} | set(schema.get("required", ())))
        kept["properties"] = {
            name: cut_down(schema["properties"][name], [value[name] for value in values if name in value])
            for name in names
        }
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        inner = [item for value in values for item in value.values()]
        kept["additionalProperties"] = cut_down(schema["additionalProperties"], inner)
    if "items" in schema:
        kept["items"] = cut_down(schema["items"], [item for value in values for item in value])
    return kept


def main(folder: str, version: str) -> None:
    """Write :data:`FACTS` from the operator's files in ``folder``; ``version``: of KubeRay."""
    specs: dict[str, list[Any]] = {}
    for document in custom_resources():
        specs.setdefault(document["kind"], []).append(document["spec"])
    schemas = {}
    for path in sorted(Path(folder).glob("ray.io_*.yaml")):
        definition = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]
        (v1,) = (v for v in definition["versions"] if v["name"] == "v1")
        if values := specs.get(definition["names"]["kind"]):
            spec = v1["schema"]["openAPIV3Schema"]["properties"]["spec"]
            schemas[definition["names"]["kind"]] = cut_down(spec, values)
    if missing := specs.keys() - schemas.keys():
        raise SystemExit(f"{folder} has no schema of {', '.join(sorted(missing))}")
    # A line for each resource: small, and a change of one is seen.
    lines = ",\n".join(f'"{kind}": {json.dumps(schema, sort_keys=True)}' for kind, schema in sorted(schemas.items()))
    FACTS.write_text('{"kuberay": "' + version + '", "schemas": {\n' + lines + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
