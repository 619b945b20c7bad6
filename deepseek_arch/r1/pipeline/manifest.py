"""Manifests: what a stage's results were made from, so that they are made once and never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST", "STARTED", "Manifest", "differences", "read_manifest"]

MANIFEST, STARTED = "manifest.json", "started.json"


@dataclass(frozen=True)
class Manifest:
    """Everything that determines the results of a stage.

    Attributes:
        stage: its name.
        seed: its seed.
        fields: all that its file says, changes included.
        inputs: digests of the manifests of the stages that it reads, by name; of other folders their paths.
        version: of this package.
    """

    stage: str
    seed: int
    fields: Mapping[str, Any]
    inputs: Mapping[str, str]
    version: str

    def to_dict(self) -> dict[str, Any]:
        """Returns everything with the digest."""
        return {**json.loads(json.dumps(asdict(self))), "digest": self.digest}

    @property
    def digest(self) -> str:
        """SHA-256 of everything, in hexadecimal."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Returns what was written, None where there is nothing.

    Raises:
        ValueError: the file is no manifest.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a manifest in {path}, got {error}") from error
    if not isinstance(found, dict) or "digest" not in found:
        raise ValueError(f"expected a manifest in {path}, got another file")
    return found


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns what differs between two manifests, as `fields.max_steps: 200 there, 50 now`."""
    first, second = _flat(found), _flat(wanted)
    return [
        f"{name}: {first.get(name, 'nothing')!r} there, {second.get(name, 'nothing')!r} now"
        for name in sorted({*first, *second})
        if name != "digest" and first.get(name, "nothing") != second.get(name, "nothing")
    ]


def _flat(value: Any, start: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {start: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= _flat(inner, f"{start}.{key}" if start else str(key))
    return out
