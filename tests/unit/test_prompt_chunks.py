"""Which token is in which chunk, by hand: 75 to a chunk, phrases kept whole where a comma is near, and limits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sdopt.pipeline.prompt_chunks import Unit, fill_chunks

COMMA = 267


def fill(*sections: list[int], most: int = 9) -> tuple[list[list[int]], list[int]]:
    filled = fill_chunks([[([(id_,) for id_ in section], 1.0)] for section in sections], most=most, comma=COMMA)
    return [chunk.ids for chunk in filled.chunks], list(filled.rest)


def row(count: int, *, first: int = 1000, commas: tuple[int, ...] = ()) -> list[int]:
    return [COMMA if place in commas else first + place for place in range(count)]


def test_chunks_are_75_tokens() -> None:
    assert fill([]) == ([[]], [])
    ids = row(160)
    assert fill(ids[:75]) == ([ids[:75]], [])
    assert fill(ids[:76]) == ([ids[:75], ids[75:76]], [])
    assert fill(ids) == ([ids[:75], ids[75:150], ids[150:]], [])


def test_what_follows_a_near_comma_moves_on_with_its_phrase() -> None:
    # The comma is the 56th token: 19 follow it in the chunk, and the next is not a comma.
    ids = row(80, commas=(55,))
    assert fill(ids) == ([ids[:56], ids[56:]], [])
    # One token further away is too far.
    ids = row(80, commas=(54,))
    assert fill(ids) == ([ids[:75], ids[75:]], [])
    # Nothing has to move where the 76th token is a comma, or where there is no 76th.
    ids = row(80, commas=(60, 75))
    assert fill(ids) == ([ids[:75], ids[75:]], [])
    ids = row(75, commas=(60,))
    assert fill(ids) == ([ids], [])
    # The last of several commas counts, and each chunk has its own.
    ids = row(160, commas=(57, 70, 71, 140))
    assert fill(ids) == ([ids[:72], ids[72:141], ids[141:]], [])
    ids = row(150, commas=(74,))
    assert fill(ids) == ([ids[:75], ids[75:]], [])


def test_a_section_begins_a_chunk() -> None:
    one, two = row(3), row(4, first=2000)
    assert fill(one, two) == ([one, two], [])
    assert fill(one, []) == ([one], [])
    assert fill([], one) == ([[], one], [])
    assert fill(one, [], two) == ([one, [], two], [])
    # A comma before a BREAK is no comma of the chunk behind it.
    assert fill(row(70, commas=(69,)), row(80)) == ([row(70, commas=(69,)), row(75), row(80)[75:]], [])


def test_the_last_chunk_is_full_and_what_is_left_is_told() -> None:
    ids = row(160, commas=(60, 140))
    assert fill(ids, most=1) == ([ids[:75]], ids[75:])
    assert fill(ids, most=2) == ([ids[:61], ids[61:136]], ids[136:])
    assert fill(row(3), row(4), row(5), most=2) == ([row(3), row(4)], row(5))
    assert fill(row(3), [], [], most=1) == ([row(3)], [])


def test_ids_of_one_word_stay_together_and_weigh_alike() -> None:
    word: Unit = tuple(range(49408, 49413))
    plain = [(id_,) for id_ in row(72)]
    filled = fill_chunks([[(plain, 1.0), ([word, (7,)], 1.3)]], most=2, comma=COMMA)
    assert [chunk.ids for chunk in filled.chunks] == [row(72), [*word, 7]]
    assert [chunk.weights for chunk in filled.chunks] == [[1.0] * 72, [1.3] * 6]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(260, 270), max_size=200), min_size=1, max_size=4), st.integers(1, 6))
def test_no_token_is_lost_or_moved(sections: list[list[int]], most: int) -> None:
    chunks, rest = fill(*sections, most=most)
    assert 1 <= len(chunks) <= most
    assert all(len(ids) <= 75 for ids in chunks)
    assert [*(id_ for ids in chunks for id_ in ids), *rest] == [id_ for section in sections for id_ in section]
