"""What to measure, as a TOML file of `configs/suites`: cases, each a matrix that is expanded into single runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdopt.bench.case.report import Scope


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SuiteMethod(_Frozen):
    """How each case is measured; what `sdopt bench` takes as options of the same names."""

    repeats: int = Field(default=3, ge=1, le=100)
    picture_budget_s: float = Field(default=3.0, gt=0)
    least_pictures: int = Field(default=2, ge=1)
    most_pictures: int = Field(default=10, ge=1)
    time_limit_s: float = Field(default=1800.0, gt=0)


class SuiteCase(_Frozen):
    """`sdopt bench FOLDER --suite` measures FOLDER in each case; `sdopt perf run` builds each case's own bundle.

    `steps` is a matrix axis: a run for each.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")
    source: str = ""
    """`tiny-shapes` (shipped), `random:sd15` or `random:sdxl` (full size, seeded random weights), or a path."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Keys of a build recipe, for `sdopt perf run`."""
    scope: Scope = Scope.PICTURES
    against: tuple[str, ...] | None = None
    """As `--against`; absent takes the usual baselines."""
    steps: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field(default=(20,), min_length=1)
    prompts: tuple[str, ...] = ()
    prompt_file: str = ""
    """Instead of `prompts`: a file of `configs/prompts` by name, or a path."""
    guidance_scale: float | None = Field(default=None, ge=0)
    method: SuiteMethod | None = None
    """Instead of the suite's."""

    @model_validator(mode="after")
    def _said_once(self) -> SuiteCase:
        if self.prompts and self.prompt_file:
            raise ValueError("prompts and prompt_file say the same thing: give one")
        return self


class Suite(_Frozen):
    schema_version: Literal[1] = 1
    name: str
    description: str = ""
    method: SuiteMethod = SuiteMethod()
    cases: tuple[SuiteCase, ...] = Field(min_length=1)
