"""What every class of a request's fields has in common: strict types, and lists that end at their first mistake."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is refused at its first wrong item: to look at millions of them would keep everybody waiting."""

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Fields(BaseModel):
    """A JSON object of a request; what it does not list is ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


def at_most(most: int) -> BeforeValidator:
    """An object with no more than so many fields, counted before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"at most {most} fields; these are {len(value)}")
        return value

    return BeforeValidator(check)
