"""Where a graph is compared with torch: at every size and every prompt length that it was built for."""

from __future__ import annotations

from typing import Any

import pytest

from sdopt.bundle.records import OutputParity, ParityRecord
from sdopt.convert.decide import open_plan
from sdopt.convert.parity import list_points, parity_key
from sdopt.convert.plan import BuildPlan
from sdopt.model.backend_settings import OnnxRuntimeSettings
from sdopt.model.component import ComponentName
from sdopt.model.recipe import BuildRecipe
from sdopt.model.target import Runtime, Target
from sdopt.trace.compare_outputs import worst_of
from tests.reference_session import TINY_SHAPES

Point = tuple[int, int, int]


def plan_of(**recipe: Any) -> BuildPlan:
    return open_plan(BuildRecipe(source=str(TINY_SHAPES), target=Target(Runtime.ONNXRUNTIME), **recipe))


def points_of(plan: BuildPlan, name: ComponentName) -> list[Point]:
    """(width, height, prompt tokens) of each."""
    axes = ("width", "height", "prompt_tokens")
    found = [(point["width"].opt, point["height"].opt, point["prompt_tokens"].opt) for point in list_points(plan, name)]
    assert all(point[axis].is_static for point in list_points(plan, name) for axis in axes)
    return found


@pytest.mark.parametrize(
    ("recipe", "points"),
    [
        ({}, [(64, 64, 77)]),
        ({"size": "96x64"}, [(96, 64, 77)]),
        ({"size": "64x64,96x64,64x128"}, [(64, 64, 77), (96, 64, 77), (64, 128, 77)]),
        ({"tokens": 231}, [(64, 64, 77), (64, 64, 154), (64, 64, 231)]),
        ({"size": "64x64,96x64", "tokens": 231}, [(64, 64, 77), (96, 64, 154), (64, 64, 231)]),
        # A range twice: at its usual size, and beside it.
        ({"size": "32x32..128x128"}, [(64, 64, 77), (48, 32, 77)]),
        ({"size": "64x64..128x128"}, [(64, 64, 77), (80, 96, 77)]),
        ({"size": "64x64..80x80"}, [(64, 64, 77), (80, 80, 77)]),
        ({"size": "64x64..96x64"}, [(64, 64, 77), (80, 64, 77)]),
        ({"size": "128x128,32x32..64x64"}, [(128, 128, 77), (64, 64, 77), (48, 32, 77)]),
        ({"dynamic": True}, [(64, 64, 77), (80, 96, 77)]),
    ],
)
def test_every_size_and_prompt_length_is_compared_once(recipe: dict[str, Any], points: list[Point]) -> None:
    plan = plan_of(**recipe)
    multiple_px = 16
    assert all(width % multiple_px == height % multiple_px == 0 for width, height, _ in points)
    # The last: on the rows of a drawing without guidance.
    assert points_of(plan, ComponentName.UNET) == [*points, points[0]]
    assert [point["cfg_batch"].opt for point in list_points(plan, ComponentName.UNET)] == [*(2 for _ in points), 1]
    sizes = list(dict.fromkeys((width, height) for width, height, _ in points))
    assert [point[:2] for point in points_of(plan, ComponentName.VAE_DECODER)] == sizes
    assert len(points_of(plan, ComponentName.TEXT_ENCODER)) == 1


def test_a_record_is_of_the_sizes_that_it_was_made_at() -> None:
    def keys(**recipe: Any) -> list[str]:
        plan = plan_of(**recipe)
        return [parity_key(plan, name, "ab" * 32, OnnxRuntimeSettings()) for name in plan.components]

    # The same graphs: the range's is that of both sizes.
    two, span = keys(size="64x64,128x128"), keys(size="64x64..128x128")
    assert two == keys(size="64x64,128x128")
    assert [a == b for a, b in zip(two, span, strict=True)] == [True, False, False, False]


def test_the_worst_of_several_comparisons_counts() -> None:
    def record(passed: bool, *errors: float) -> ParityRecord:
        outputs = tuple(
            OutputParity(name=f"output{place}", max_abs=0, relative_l2=error, cosine_distance=0)
            for place, error in enumerate(errors)
        )
        return ParityRecord(
            passed=passed, runtime="onnxruntime", outputs=outputs, relative_l2_limit=1, cosine_distance_limit=1
        )

    worst = worst_of([record(True, 1e-7, 3e-6), record(False, 2.0, 1e-6), record(True, 1e-8, 2e-6)])
    assert not worst.passed
    assert [output.relative_l2 for output in worst.outputs] == [2.0, 3e-6]
    assert worst.points == 3
    assert worst_of([record(True, 1e-7)]).points == 1
