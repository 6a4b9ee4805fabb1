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


@pytest.mark.parametrize("name", ["alice", "team.alice", "a-b_c", "-"])
def test_a_made_key_opens_the_door(tmp_path: Path, name: str) -> None:
    made = subprocess.run([sys.executable, "-m", "server.auth", name], capture_output=True, text=True, check=True)
    key = made.stderr.split()[-1]
    assert key not in made.stdout
    path = tmp_path / "keys.toml"
    path.write_text(made.stdout)
    assert Keys(path).identify(f"Bearer {key}").name == name
    assert KeyFile.model_validate(tomllib.loads(made.stdout)).keys[name].admin is False


@pytest.mark.parametrize("name", ["a b", 'a"b', "", "a]\n", "x" * 65])
def test_a_name_that_no_file_may_hold_gets_no_key(name: str) -> None:
    made = subprocess.run([sys.executable, "-m", "server.auth", name], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith(f"server.auth: {name!r} cannot name a key")
    assert len(made.stderr.splitlines()) == 1


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


def test_a_request_in_flight_charges_the_key_that_was_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.a]\nsha256 = "{hash_key("a")}"\nkv_token_seconds_per_minute = 6000\n')
    keys = Keys(path)
    in_flight = keys.identify("Bearer a")
    path.write_text(f'[keys.a]\nsha256 = "{hash_key("b")}"\nkv_token_seconds_per_minute = 60\n')
    keys.reload()
    in_flight.charge(1e6)
    with pytest.raises(ApiError) as caught:
        keys.identify("Bearer b").check_quota()
    assert caught.value.retry_after_s == pytest.approx(1e6 - 60, abs=5)  # a second gives one back


def test_a_reload_keeps_what_has_come_back_since_the_last_request(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.a]\nsha256 = "{hash_key("a")}"\nkv_token_seconds_per_minute = 6000\n')
    keys = Keys(path)
    caller = keys.identify("Bearer a")
    caller.charge(7000)
    caller.updated_at -= 30  # 3000 come back
    keys.reload()
    keys.identify("Bearer a").check_quota()


def test_a_quota_that_is_new_begins_full(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    entry = f'[keys.a]\nsha256 = "{hash_key("a")}"\n'
    path.write_text(entry)
    keys = Keys(path)
    caller = keys.identify("Bearer a")
    caller.charge(1e6)
    path.write_text(entry + "kv_token_seconds_per_minute = 60\n")
    keys.reload()
    caller.charge(59)
    caller.check_quota()
    caller.charge(5)
    with pytest.raises(ApiError, match="quota"):
        caller.check_quota()
