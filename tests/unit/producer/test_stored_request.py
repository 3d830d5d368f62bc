"""What lies in RQ's fields: anybody may have written it."""

import json
import zlib

import pytest

from producer.contract.packed_field import unpack
from producer.stored_request import read_fields


@pytest.mark.parametrize("pack", [bytes, zlib.compress])
def test_the_fields_of_a_request_are_read_packed_or_not(pack: type[bytes]) -> None:
    assert read_fields(pack(json.dumps(["label", None, [], {"prompt": "x"}]).encode())) == {"prompt": "x"}


@pytest.mark.parametrize("data", [None, b"", b"[", b"[" * 50_000, b"\xff", b"[1, 2]", zlib.compress(b"x")[:5]])
def test_what_is_no_request_has_no_fields(data: bytes | None) -> None:
    assert read_fields(data) == {}


@pytest.mark.parametrize("pack", [bytes, zlib.compress])
def test_of_what_unpacks_to_more_the_beginning_is_taken(pack: type[bytes]) -> None:
    assert unpack(pack(bytes(range(200))), 100) == bytes(range(100))
