"""Read a suite: the file that was named, checked as a whole, and its matrix as single runs."""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from sdopt.bench.case.baselines import parse_against
from sdopt.bench.case.suite import Suite, SuiteCase, SuiteMethod
from sdopt.disk.configs import find_config, read_prompts
from sdopt.errors import ArtifactError, UsageError
from sdopt.model.recipe import parse_recipe
from sdopt.model.suggest import suggest

_SCHEMA_VERSION = 1
_LIMIT_BYTES = 1_000_000


@dataclass(frozen=True)
class SuiteRun:
    """One run of `sdopt bench`: a case with one number of steps. `name` is unique in the suite and safe as a folder."""

    name: str
    case: SuiteCase
    steps: int
    method: SuiteMethod


def load_suite(name: str) -> Suite:
    """The suite `configs/suites/<name>.toml`, or the file at a path. Files of prompts that it names are read into it.

    Raises `UsageError` for a file that is not there, an unknown key (with the nearest), a value that cannot be, an
    empty matrix and two cases of one name; `ArtifactError` for a newer schema.
    """
    path = find_config("suites", name, "toml")
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise UsageError(f"{path} is larger than any suite ({_LIMIT_BYTES // 1_000_000} MB)")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the suite {path}: {error}") from error
    return parse_suite(values, where=str(path))


def parse_suite(values: dict[str, Any], *, where: str) -> Suite:
    """Validate a table into a suite; `where` names it in errors, which are those of `load_suite`."""
    version = values.get("schema_version", _SCHEMA_VERSION)
    if isinstance(version, int) and version > _SCHEMA_VERSION:
        raise ArtifactError(
            f"{where} has schema {version}, and this sdopt reads up to {_SCHEMA_VERSION}",
            hint="pip install --upgrade sdopt",
        )
    try:
        suite = Suite.model_validate(values)
    except ValidationError as error:
        # A misspelt key is also a missing one, and the less helpful of the two.
        found = sorted(map(dict, error.errors()), key=lambda problem: problem["type"] != "extra_forbidden")
        raise _explain(where, found[0]) from error
    cases = tuple(_resolve_case(case, f"{where}: cases.{index}") for index, case in enumerate(suite.cases))
    twice = [name for name, count in Counter(run.name for run in expand(suite)).items() if count > 1]
    if twice:
        raise UsageError(f"{where}: two runs have the name {twice[0]!r}", hint="give every case a name of its own")
    return suite.model_copy(update={"cases": cases})


def expand(suite: Suite) -> tuple[SuiteRun, ...]:
    """One run for each case and number of steps, in the order of the file."""
    return tuple(
        SuiteRun(
            case.name if len(case.steps) == 1 else f"{case.name}-{steps}", case, steps, case.method or suite.method
        )
        for case in suite.cases
        for steps in case.steps
    )


def _resolve_case(case: SuiteCase, where: str) -> SuiteCase:
    """The case with the prompts of its file. Raises `UsageError` for a recipe, baseline or file that cannot be."""
    parse_recipe(case.recipe, where=f"{where}.recipe")
    try:
        parse_against(",".join(case.against or ()))
        prompts = read_prompts(find_config("prompts", case.prompt_file, "txt")) if case.prompt_file else case.prompts
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from error
    return case.model_copy(update={"prompts": prompts, "prompt_file": ""})


def _explain(where: str, problem: dict[str, Any]) -> UsageError:
    *parents, last = problem["loc"] or ("suite",)
    location = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = list(_find_model(parents).model_fields)
        return UsageError(f"{where}: there is no key {location!r}", hint=suggest(str(last), known))
    if problem["type"] == "too_short":
        return UsageError(f"{where}: {location} is empty, so there is nothing to measure", hint="give it one or more")
    message = str(problem["msg"]).removeprefix("Value error, ")
    got = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
    return UsageError(f"{where}: {location}: {message}{got}")


def _find_model(parents: list[str | int]) -> type[BaseModel]:
    if parents and parents[-1] == "method":
        return SuiteMethod
    return SuiteCase if parents else Suite
