"""The measured roof: what is counted, by which size, and what torch cannot do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sdopt.bench.measure import roofline
from sdopt.bench.measure.roofline import measure_copy, measure_product, measure_roof
from sdopt.model.precision import Precision


def plant_machine(monkeypatch: pytest.MonkeyPatch, flops_per_s: float) -> list[int]:
    """Products take the time that a machine of this speed needs, and none is computed. Returns the sides asked for."""
    sides: list[int] = []

    def make(device: str, precision: Precision, side: int) -> Callable[[], int]:
        sides.append(side)
        return lambda: round(2 * side**3 / flops_per_s * 1e9)

    monkeypatch.setattr(roofline, "_make_product", make)
    monkeypatch.setattr(roofline, "_time", lambda run, device: run())
    return sides


@pytest.mark.parametrize(("flops_per_s", "largest"), [(1e10, 1024), (1e12, 4096), (1e18, 16384)])
def test_products_grow_until_they_take_long_enough(
    monkeypatch: pytest.MonkeyPatch, flops_per_s: float, largest: int
) -> None:
    sides = plant_machine(monkeypatch, flops_per_s)
    assert measure_product("cpu", Precision.FP32) == pytest.approx(flops_per_s, rel=1e-3)
    assert sides[0] == 256
    assert sides[-1] == largest


def test_the_best_of_several_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([200_000_000, 100_000_000, 400_000_000])
    monkeypatch.setattr(roofline, "_time", lambda run, device: next(times))
    assert measure_product("cpu", Precision.FP32) == pytest.approx(2 * 256**3 / 0.1)


def test_a_product_that_torch_has_not_has_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_machine(monkeypatch, 1e11)
    planted = roofline._make_product

    def make(device: str, precision: Precision, side: int) -> Callable[[], object]:
        if precision is Precision.INT8:
            raise RuntimeError("_int_mm is not implemented")
        return planted(device, precision, side)

    monkeypatch.setattr(roofline, "_make_product", make)
    monkeypatch.setattr(roofline, "measure_copy", lambda device: 1e10)
    records = measure_roof("cpu")
    assert [record.precision for record in records] == [Precision.FP32, Precision.BF16]
    assert {record.copy_bytes_per_s for record in records} == {1e10}
    monkeypatch.setattr(roofline, "_make_product", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_product("cpu", Precision.FP32)


@pytest.mark.parametrize("precision", roofline._ON_CPU)
def test_real_products_and_copies_have_a_rate(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    monkeypatch.setattr(roofline, "_MOST_SIDE", 256)
    monkeypatch.setattr(roofline, "_COPY_BYTES", 1 << 20)
    reached = measure_product("cpu", precision)
    # A million operations per second would be a product of a minute, and no processor of today has 10^15.
    assert reached is not None
    assert 1e6 < reached < 1e15
    assert 1e6 < measure_copy("cpu") < 1e14
