"""Claims about URLs as text: joined, named, and shown without what must stay secret."""

from __future__ import annotations

import json
import string
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_mlpl import urls

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "_configured", frozenset())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/a/b?c=d", "/a/b?c=d"),
        ("a:b@c", "a:b@c"),
        ("file:///a@b", "file:///a@b"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/name/a", "s3://arn:aws:s3:eu-west-1:1:accesspoint/name/a"),
        ("s3://id:secret@bucket/a", "s3://***@bucket/a"),
        ("s3://id:sec/ret@bucket/a", "s3://***"),
        ("abfs://container@account.net/a", "abfs://container@account.net/a"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://host:8080/a", "https://host:8080/a"),
        ("https://[::1]:80/a", "https://[::1]:80/a"),
        ("https://user:pw@host/a", "https://***@host/a"),
        ("https://token@host:8080/a", "https://***@host:8080/a"),
        ("https://user:p@w@host/a", "https://***@host/a"),
        ("https://user:p/w@host/a", "https://***"),
        ("https://user:p?w@host/a", "https://***"),
        ("https://user:p#w@host/a", "https://***"),
        ("https://host/a?X-Amz-Date=1&X-Amz-Signature=abc", "https://host/a?X-Amz-Date=***&X-Amz-Signature=***"),
        ("https://host/a?sv=1&sig=a%2Fb%3D=", "https://host/a?sv=***&sig=***"),
        ("https://host/a?abc", "https://host/a?***"),
        ("https://host/a#access_token=abc", "https://host/a"),
    ],
)
def test_a_url_is_shown_without_user_password_and_query_values(url: str, shown: str) -> None:
    assert urls.shown(url) == shown
    assert urls.shown(shown) == shown
    assert not urls.is_remote(url) or urls.scrubbed(f"no way to {url}, sorry", url) == f"no way to {shown}, sorry"


def test_a_query_stays_behind_what_is_joined_and_out_of_names() -> None:
    assert urls.join("https://host/a/?sig=x/y", "b", "c.tar") == "https://host/a/b/c.tar?sig=x/y"
    assert urls.name("https://host/a/b.tar?sig=x/y") == "b.tar"
    assert urls.join("s3://bucket/why?", "b") == "s3://bucket/why?/b"  # a key like others
    assert urls.name("s3://bucket/why?.txt") == "why?.txt"


ANY_TEXT = st.text(string.printable, min_size=12, max_size=40)


@settings(max_examples=200, deadline=None)
@given(secret=ANY_TEXT, before=st.text(max_size=20), after=st.text(max_size=20))
def test_no_spelling_of_a_configured_secret_is_left(secret: str, before: str, after: str) -> None:
    urls.hide_secrets_of({"anon": False, "client_kwargs": {"aws_secret_access_key": secret}})
    spellings = (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret), quote(secret, safe=""))
    for spelling in spellings:
        assert spelling not in urls.scrubbed(f"{before} {spelling} {after}")


@settings(max_examples=100, deadline=None)
@given(text=st.text(string.ascii_letters + " /:.,-_", max_size=80))
def test_a_text_without_secrets_stays_as_it_is(text: str) -> None:
    urls.hide_secrets_of({"key": "a", "secret": "bcd", "token": None, "client_kwargs": {"verify": False}})
    assert urls.scrubbed(text) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"connection_string": "AccountName=me;AccountKey=SECRET1234==;Suffix=net"}, "key SECRET1234=="),
        ({"sas_token": "?sv=2026&sig=SECRET1234"}, "sig SECRET1234"),
        ({"headers": {"Authorization": "Bearer SECRET1234"}}, "token SECRET1234"),
        ({"token": {"private_key": "SECRET1234", "type": "service_account"}}, "SECRET1234"),
        ({"auth": ["me", "SECRET1234"]}, "SECRET1234"),
        ({"endpoint_url": "http://me:SECRET1234@proxy:80"}, "SECRET1234 at proxy"),
        ({"s3": {"secret": b"SECRET1234"}}, "SECRET1234"),
    ],
)
def test_secrets_are_found_wherever_options_hold_them(options: dict[str, object], text: str) -> None:
    urls.hide_secrets_of(options)
    assert "SECRET1234" not in urls.scrubbed(f"it says {text}")
    urls.hide_secrets_of({})
    assert urls.scrubbed(text) == text


def test_secrets_of_the_environment_are_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "FwoGZXIvYXdzEA/x+y")
    assert urls.scrubbed("token FwoGZXIvYXdzEA/x+y has expired") == "token *** has expired"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://h/c/set/manifest.json?sv=1&sig=a/b", "https://h/c/set?sv=1&sig=a/b"),
        ("s3://b/set/what?/manifest.json", "s3://b/set/what?"),
        ("/data/set/manifest.json", "/data/set"),
    ],
)
def test_the_parent_of_a_url_keeps_its_query(url: str, expected: str) -> None:
    assert urls.parent(url) == expected
    assert urls.join(expected, urls.name(url)) == url
