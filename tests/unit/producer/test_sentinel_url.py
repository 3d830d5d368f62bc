"""URLs of a Redis behind Sentinels."""

import pytest

from producer.contract.sentinel_url import SentinelUrl


def test_a_url_names_the_sentinels_the_service_and_the_login_of_the_servers() -> None:
    parsed = SentinelUrl.parse("rediss+sentinel://me:se%40cret@one,two:1234,[::1]:5/mill/2")
    assert parsed is not None
    assert parsed.sentinels == (("one", 26379), ("two", 1234), ("::1", 5)) and parsed.service == "mill"
    assert parsed.options == {"db": 2, "username": "me", "password": "se@cret", "ssl": True}


@pytest.mark.parametrize("url", ["redis://host/0", "rediss://host", "unix:///tmp/redis.sock"])
def test_any_other_url_is_none_of_ours(url: str) -> None:
    assert SentinelUrl.parse(url) is None


@pytest.mark.parametrize("url", ["redis+sentinel://one", "redis+sentinel://one/mill/x", "redis+sentinel://one,/mill"])
def test_a_url_that_is_not_whole_is_refused_with_its_form(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis\+sentinel://.*SERVICE"):
        SentinelUrl.parse(url)
