"""What the environment sets."""

from pathlib import Path

import pytest

from hasten.base.errors import ConfigError
from hasten.base.settings import CACHE_LIMIT, cache_directory, cache_limit


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({"HASTEN_CACHE": "/else/where", "XDG_CACHE_HOME": "/xdg"}, "linux", "/else/where"),
        ({"XDG_CACHE_HOME": "/xdg"}, "linux", "/xdg/hasten"),
        ({"XDG_CACHE_HOME": "relative"}, "linux", "~/.cache/hasten"),
        ({"HASTEN_CACHE": ""}, "linux", "~/.cache/hasten"),
        ({"XDG_CACHE_HOME": "/xdg"}, "darwin", "~/Library/Caches/hasten"),
        ({"LOCALAPPDATA": "/local"}, "win32", "/local/hasten/Cache"),
    ],
)
def test_where_files_are_kept(environment, platform, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/nest/of/someone")
    assert cache_directory(environment, platform) == Path(expected).expanduser()


def test_a_user_without_a_home_keeps_nothing(monkeypatch):
    def homeless():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_directory({}, "linux") is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", CACHE_LIMIT), ("0", 0), ("123", 123), ("20GB", 20 * 10**9), ("1.5 gib", 3 << 29), (" 512MiB ", 512 << 20), ("2kb", 2000)],
)
def test_how_much_is_kept(given, expected):
    assert cache_limit({"HASTEN_CACHE_SIZE": given}) == expected


@pytest.mark.parametrize("given", ["much", "-1", "20 XB", "1e9", "٣", "9" * 40, "1.GB"])
def test_what_is_no_size(given):
    with pytest.raises(ConfigError, match="HASTEN_CACHE_SIZE"):
        cache_limit({"HASTEN_CACHE_SIZE": given})
