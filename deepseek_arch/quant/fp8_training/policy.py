"""Policy for FP8 training, as data: an ordered list of rules over names, each with a precision for the three GEMMs.

A rule names weights: the module's name for a linear layer ("model.layers.0.self_attn.o_proj"), the parameter's for
stacked experts ("model.layers.1.mlp.experts.down_proj"). The first rule that matches decides; a weight that no rule
matches stays in high precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from ...config.argument_types import check_types, shown

__all__ = ["FP8", "HIGH", "V3_RECIPE", "FP8Policy", "FP8Precision", "FP8Rule"]


@check_types
@dataclass(frozen=True, kw_only=True)
class FP8Precision:
    """Precision of the three GEMMs of one weight.

    Attributes:
        fprop, dgrad, wgrad: "fp8" or "high", for the output, the input's gradient and the weight's gradient.
        input_scale, grad_scale, weight_scale: None for float32 scales, "ue8m0" for powers of two; of the input, of the
            output's gradient, of the weight.
        swiglu_cache: of experts' `down_proj` only, whose input is a SwiGLU: keep the SwiGLU's input for the backward
            pass as it is ("high") or in FP8 ("fp8"). Its output is recomputed in either case.

    Raises:
        ValueError: an unknown value.
    """

    fprop: str = "fp8"
    dgrad: str = "fp8"
    wgrad: str = "fp8"
    input_scale: str | None = None
    grad_scale: str | None = None
    weight_scale: str | None = None
    swiglu_cache: str = "high"

    def __post_init__(self) -> None:
        for name in ("fprop", "dgrad", "wgrad", "swiglu_cache"):
            if getattr(self, name) not in ("fp8", "high"):
                raise ValueError(f"expected {name} 'fp8' or 'high', got {getattr(self, name)!r}")
        for name in ("input_scale", "grad_scale", "weight_scale"):
            if getattr(self, name) not in (None, "ue8m0"):
                raise ValueError(f"expected {name} None or 'ue8m0', got {getattr(self, name)!r}")

    @property
    def is_high(self) -> bool:
        """True if no GEMM is in FP8."""
        return "fp8" not in (self.fprop, self.dgrad, self.wgrad)

    @property
    def needs_weight_codes(self) -> bool:
        """True if a GEMM reads the weight in FP8: the one of the weight's own gradient does not."""
        return "fp8" in (self.fprop, self.dgrad)


FP8 = FP8Precision()
HIGH = FP8Precision(fprop="high", dgrad="high", wgrad="high")


@check_types
@dataclass(frozen=True)
class FP8Rule:
    """The precision of every weight whose name matches.

    Attributes:
        pattern: as in `fnmatch`, where "*" also crosses dots; compared with the whole name and with each of its
            endings that start after a dot: "o_proj" means all of them, "layers.0.*" the first layer.
        required: whether matching nothing is an error. Off in recipes for models of several kinds.
        exact: whether `pattern` is a whole name instead, character by character.
    """

    pattern: str
    precision: FP8Precision
    required: bool = True
    exact: bool = False

    def matches(self, name: str) -> bool:
        if self.exact:
            return name == self.pattern
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[start:]), self.pattern) for start in range(len(parts)))


@check_types
@dataclass(frozen=True)
class FP8Policy:
    """An ordered list of rules; the first that matches decides."""

    rules: tuple[FP8Rule, ...]

    def __post_init__(self) -> None:
        for rule in self.rules:
            if not isinstance(rule, FP8Rule):
                raise ValueError(f"expected rules to be FP8Rules, got {shown(rule)}")

    @check_types
    def assign(self, names: Iterable[str]) -> dict[str, FP8Rule | None]:
        """The rule of every name, None where none matches.

        Raises:
            ValueError: a required rule, or every rule that asks for FP8, matches none of the names.
        """
        names = list(_weight_names(names))
        matched = {rule: [name for name in names if rule.matches(name)] for rule in self.rules}
        some = f"{len(names)} linear and expert weights, such as {names[:3]}"
        for rule, hits in matched.items():
            if rule.required and not hits:
                raise ValueError(f"expected rule {rule.pattern!r} to match something, got no match among {some}")
        wanted = [rule for rule in self.rules if not rule.precision.is_high]
        if wanted and not any(matched[rule] for rule in wanted):
            raise ValueError(f"expected {[rule.pattern for rule in wanted]} to match something, got none among {some}")
        return {name: next((rule for rule in self.rules if name in matched[rule]), None) for name in names}

    def keeping_high(self, names: Iterable[str]) -> FP8Policy:
        """Returns the same policy, but weights of these exact names stay in high precision."""
        return FP8Policy((*(FP8Rule(name, HIGH, exact=True) for name in names), *self.rules))

    def to_dict(self) -> dict[str, Any]:
        """Returns the rules as plain values, fit for JSON."""
        return {"rules": [asdict(rule) for rule in self.rules]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FP8Policy:
        """Reads the result of `to_dict`. A precision may leave out values that are as in `FP8`.

        Raises:
            ValueError: unknown or missing keys, or unknown values.
        """
        _check_keys("a policy", data, required={"rules"}, allowed={"rules"})
        return cls(tuple(_rule(entry) for entry in data["rules"]))


def _weight_names(names: Iterable[object]) -> Iterator[str]:
    """Yields the names; stops at the first that is none, however many follow."""
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"expected names of weights, got {shown(name)} among {shown(names)}")
        yield name


def _rule(data: Mapping[str, Any]) -> FP8Rule:
    _check_keys(
        "a rule", data, required={"pattern", "precision"}, allowed={"pattern", "precision", "required", "exact"}
    )
    known = {field.name for field in fields(FP8Precision)}
    _check_keys("a precision", data["precision"], required=set(), allowed=known)
    return FP8Rule(
        data["pattern"], FP8Precision(**data["precision"]), data.get("required", True), data.get("exact", False)
    )


def _check_keys(what: str, data: Any, *, required: set[str], allowed: set[str]) -> None:
    if not isinstance(data, Mapping) or not required <= set(data) <= allowed:
        got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"expected {what} with keys {sorted(allowed)}, got {got}")


def _recipe(precision: FP8Precision, *patterns: str) -> tuple[FP8Rule, ...]:
    return tuple(FP8Rule(pattern, precision, required=False) for pattern in patterns)


# V3 report, section 3.3. Scales are powers of two where 3.3.3 says so: the input of the linear layer after attention,
# what is dispatched to the experts, and the gradient that is dispatched to them on the way back. Two things differ from
# the paper. It caches o_proj's input in a 12-bit format (E5M6) that no hardware has: here that cache is e4m3 like the
# others. And it rounds cached codes again for the weight's gradient where we quantize the high-precision value (TRAPS
# E9). Embedding, norms, routers and attention itself have no weight that a rule could name.
V3_RECIPE = FP8Policy(
    (
        *_recipe(HIGH, "lm_head", "eh_proj"),
        *_recipe(FP8Precision(input_scale="ue8m0"), "o_proj", "experts.gate_up_proj"),
        *_recipe(FP8Precision(grad_scale="ue8m0", swiglu_cache="fp8"), "experts.down_proj"),
        *_recipe(FP8, "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        *_recipe(FP8, "gate_proj", "up_proj", "down_proj"),
    )
)
