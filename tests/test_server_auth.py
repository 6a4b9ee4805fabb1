"""Keys: read from their file, compared in constant time, never shown."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from ard_serve.errors import UsageError
from server.auth import KeyFile, Keys, hash_key, read_key_file
from server.errors import ApiError


def write_keys(path: Path, **keys: str) -> Path:
    path.write_text("".join(f'[keys.{name}]\nsha256 = "{hash_key(key)}"\n' for name, key in keys.items()))
    return path


def test_a_made_key_opens_the_door(tmp_path: Path) -> None:
    made = subprocess.run([sys.executable, "-m", "server.auth", "alice"], capture_output=True, text=True, check=True)
    key = made.stderr.split()[-1]
    assert key not in made.stdout
    path = tmp_path / "keys.toml"
    path.write_text(made.stdout)
    assert Keys(path).identify(f"Bearer {key}").name == "alice"
    assert KeyFile.model_validate(tomllib.loads(made.stdout)).keys["alice"].admin is False


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer x", "Basic secret", "secret", "Bearer secret x", "Bearer Secret"]
)
def test_everything_else_does_not(tmp_path: Path, header: str | None) -> None:
    keys = Keys(write_keys(tmp_path / "keys.toml", alice="secret"))
    with pytest.raises(ApiError) as caught:
        keys.identify(header)
    assert caught.value.status == 401


@pytest.mark.timing
@pytest.mark.fault("S15")
def test_a_near_right_key_takes_as_long_as_a_wrong_one(tmp_path: Path) -> None:
    """Medians of many interleaved tries; the hash alone already hides how near a key is."""
    keys = Keys(write_keys(tmp_path / "keys.toml", **{f"k{index}": f"{index}-{'k' * 60}" for index in range(200)}))
    tries = {"near": "Bearer 0-" + "k" * 59 + "j", "far": "Bearer " + "z" * 62}
    spent_s: dict[str, list[float]] = {name: [] for name in tries}
    for _ in range(300):
        for name, header in tries.items():
            started = time.perf_counter()
            with pytest.raises(ApiError):
                keys.identify(header)
            spent_s[name].append(time.perf_counter() - started)
    near, far = (sorted(times)[len(times) // 2] for times in spent_s.values())
    assert abs(near - far) < 0.2 * max(near, far)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[keys.a]\nsha256 = 'short'", "keys.a.sha256"),
        ("[keys.a]\nsha265 = 'x'", "sha256"),
        ("[keys.'a b']\nsha256 = 'x'", "keys"),
        ("keys", "TOML"),
        ("", "keys"),
    ],
)
def test_a_broken_key_file_is_a_usage_error_that_names_the_place(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=named):
        read_key_file(path)


@pytest.mark.timing
def test_quotas_refill_and_survive_a_reload(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.a]\nsha256 = "{hash_key("a")}"\nkv_token_seconds_per_minute = 6000\n')
    keys = Keys(path)
    caller = keys.identify("Bearer a")
    caller.check_quota()
    caller.charge(6020)
    with pytest.raises(ApiError, match="quota"):
        caller.check_quota()
    keys.reload()
    with pytest.raises(ApiError) as caught:
        keys.identify("Bearer a").check_quota()
    assert 1 <= (caught.value.retry_after_s or 0) < 2
    time.sleep(0.25)  # 100 a second come back
    keys.identify("Bearer a").check_quota()
