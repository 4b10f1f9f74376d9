"""Addresses in messages and files have no passwords."""

from __future__ import annotations

import pytest

from inferctl import passwords


@pytest.mark.parametrize(
    ("address", "hidden", "removed"),
    [
        ("postgresql://u:geheim@h/d", "postgresql://u:***@h/d", "postgresql://u@h/d"),
        ("postgresql://u:ge@heim@h/d?host=/a", "postgresql://u:***@h/d?host=/a", "postgresql://u@h/d?host=/a"),
        ("postgresql://u@h/d?password=geheim", "postgresql://u@h/d?password=***", "postgresql://u@h/d"),
        ("postgresql:///d?password=geheim&host=/a", "postgresql:///d?password=***&host=/a", "postgresql:///d?host=/a"),
        ("postgresql://h/d?a=b&sslpassword=geheim", "postgresql://h/d?a=b&sslpassword=***", "postgresql://h/d?a=b"),
        ("valkey://:geheim@h:1", "valkey://:***@h:1", "valkey://@h:1"),
        ("unix:///s?db=1&password=geheim", "unix:///s?db=1&password=***", "unix:///s?db=1"),
        ("nats://geheim@h:4222", "nats://***@h:4222", "nats://h:4222"),
        ("nats://u:geheim@h:4222", "nats://u:***@h:4222", "nats://h:4222"),
        ("sqlite:///a.sqlite", "sqlite:///a.sqlite", "sqlite:///a.sqlite"),
        ("nats://h:4222", "nats://h:4222", "nats://h:4222"),
        ("keys.json", "keys.json", "keys.json"),
    ],
)
def test_passwords_are_hidden_and_removed(address: str, hidden: str, removed: str) -> None:
    assert passwords.hide(address) == hidden
    assert passwords.remove(address) == removed
    assert passwords.remove(removed) == removed, "the name of a key file must not change"
