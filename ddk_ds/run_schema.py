"""The form of what a run writes: lines of its ledger and of its events, and its summary, with the type of each key."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, Required

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

Kind = Literal["ledger", "event", "summary"]
_FORM = ConfigDict(strict=True, extra="allow")  # no text is read as a number; other versions write further keys
_ByDomain = dict[str, float]


class _Step(TypedDict):
    __pydantic_config__ = _FORM  # type: ignore[misc]
    kind: Literal["step"]
    step: int
    interval: int
    loss: float | None
    ce: float | None
    kl: float | None
    grad_norm: float | None
    learning_rate: float
    router_aux_loss: NotRequired[float | None]
    domain_tokens: list[int]
    clock: dict[str, float | dict[str, float] | None]


class _Measurement(TypedDict):
    __pydantic_config__ = _FORM  # type: ignore[misc]
    kind: Literal["interval", "end"]
    interval: int
    step: int
    student_ppl: _ByDomain
    teacher_ppl: _ByDomain | None
    ratio: _ByDomain | None
    smoothed_ppl: _ByDomain | None
    proportions: _ByDomain | None
    log_proportions: NotRequired[dict[str, float | None] | None]
    controller_memory: NotRequired[dict[str, Any]]
    training_loss: NotRequired[dict[str, float | None]]
    training_kl: NotRequired[dict[str, float | None]]
    owed: NotRequired[_ByDomain | None]
    loss_weights: NotRequired[_ByDomain]
    asked: dict[str, int] | None
    counts: dict[str, int] | None
    domain_tokens: dict[str, int]
    alarms: list[str]
    clock: dict[str, float]


class _Samples(TypedDict):
    __pydantic_config__ = _FORM  # type: ignore[misc]
    kind: Literal["samples"]
    step: int
    samples: list[dict[str, str | None]]


class _Mixture(TypedDict):
    train_tokens: dict[str, int]
    schedule: Any


class _Event(TypedDict, total=False):
    __pydantic_config__ = _FORM  # type: ignore[misc]
    event: Required[str]
    time_s: Required[float]
    step: int
    world_size: int
    mixture: _Mixture
    versions: dict[str, str]
    changed_versions: dict[str, str]
    path: str
    reason: str
    signal: str
    text: str
    pause_s: float
    seconds: float


class _DomainSummary(TypedDict):
    __pydantic_config__ = _FORM  # type: ignore[misc]
    name: str
    teacher_ppl: float | None
    student_ppl_before: float
    student_ppl_after: float
    ratio_before: float | None
    ratio_after: float | None
    tokens: int
    token_share: float


class _Summary(TypedDict):
    __pydantic_config__ = _FORM  # type: ignore[misc]
    run: str
    controller: NotRequired[str]
    domains: Annotated[list[_DomainSummary], Field(min_length=1)]
    mean_ratio_before: float | None
    mean_ratio_after: float | None
    steps: int
    tokens: int
    wall_s: float
    reason: str


_FORMS: dict[Kind, TypeAdapter[Any]] = {
    "ledger": TypeAdapter(Annotated[_Step | _Measurement | _Samples, Field(discriminator="kind")]),
    "event": TypeAdapter(_Event),
    "summary": TypeAdapter(_Summary),
}


def parsed(kind: Kind, text: bytes) -> dict[str, Any]:
    """Return the object that a JSON text holds. Raises ValueError that says in a phrase what is wrong with it first."""
    try:
        content: dict[str, Any] = _FORMS[kind].validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = "no JSON" if first["type"] == "json_invalid" else f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise ValueError(f"{key}: {reason}" if key else reason) from None
    return content
