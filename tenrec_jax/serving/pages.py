"""The server's two pages: the recommender's own, and the API's documentation. Neither loads anything from elsewhere."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tenrec_jax.evaluation.page import document, folded, heading, paragraph, table
from tenrec_jax.serving.guard import NO_CONTENT

PAGE = Path(__file__).with_name("page.html")
INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


class Page(NamedTuple):
    """HTML, and the Content-Security-Policy under which it works."""

    html: str
    policy: str

    @classmethod
    def of(cls, html: str) -> "Page":
        """A page that runs and shows what stands in it, and asks this server alone."""
        hashes: dict[str, list[str]] = {"script": [], "style": []}
        for kind, text in INLINE.findall(html):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            hashes[kind.lower()].append(f"'sha256-{digest}'")
        allowed = [f"{kind}-src {' '.join(found)}" for kind, found in hashes.items() if found]
        return cls(html, "; ".join([NO_CONTENT, *allowed, "connect-src 'self'", "img-src 'self' data:"]))


def documentation(openapi: Mapping[str, Any]) -> Page:
    """The API's documentation from its OpenAPI schema."""
    sections = {
        f"{method.upper()} {path}": _operation(operation, openapi)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    }
    schemas = openapi["components"]["schemas"]
    sections["Schemas"] = "".join(heading(name) + _fields(schema) for name, schema in sorted(schemas.items()))
    info = openapi["info"]
    return Page.of(document(f"{info['title']} {info['version']}", info["description"], sections))


def _operation(operation: Mapping[str, Any], openapi: Mapping[str, Any]) -> str:
    parts = [paragraph(f"{operation['summary']}. {operation.get('description', '')}")]
    if "requestBody" in operation:
        name = _name(operation["requestBody"]["content"]["application/json"]["schema"])
        schema = openapi["components"]["schemas"][name]
        parts.append(_fields(schema))
        parts += [folded("Example", json.dumps(example, indent=2)) for example in schema.get("examples", ())]
    rows = [
        [status, answer["description"], _name(answer.get("content", {}).get("application/json", {}).get("schema", {}))]
        for status, answer in sorted(operation["responses"].items())
    ]
    return "".join(parts) + table("Answers", ["status", "meaning", "schema"], rows)


def _fields(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        [name, _name(field), "required" if name in required else "", field.get("description", "")]
        for name, field in schema.get("properties", {}).items()
    ]
    return paragraph(schema.get("description", "")) + table("Fields", ["field", "type", "", "meaning"], rows)


def _name(schema: Mapping[str, Any]) -> str:
    """A type in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_name(each) for each in schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_name(schema['items'])}"
    return str(schema.get("type", ""))
