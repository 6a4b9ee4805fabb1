"""A queue of commands for several GPUs: each once, on the card it is for, best first, and nothing new after its time."""

from pathlib import Path

from scripts import gpu_queue


def run(tmp_path: Path, *lines: str, minutes: str = "1") -> tuple[dict[str, str], str]:
    commands, logs = tmp_path / "list", tmp_path / "logs"
    commands.write_text("\n".join(lines) + "\n")
    words = [str(commands), "--logs", str(logs), "--gpus", "2", "5", "--each", "2", "--minutes", minutes]
    assert gpu_queue.main(words) == 0
    told = (logs / "queue.log").read_text() if (logs / "queue.log").exists() else ""
    return {path.stem: path.read_text() for path in logs.glob("*.log") if path.stem != "queue"}, told


def test_every_command_runs_once_and_sees_its_card_alone(tmp_path: Path) -> None:
    lines = [f"job-{number} echo card $CUDA_VISIBLE_DEVICES" for number in range(5)]
    written, told = run(tmp_path, "5!mine echo card $CUDA_VISIBLE_DEVICES", "", "no-command", *lines, "broken exit 3")
    assert written["mine"] == "card 5\n"
    assert all(written[f"job-{number}"] in ("card 2\n", "card 5\n") for number in range(5))
    assert "broken ended with 3" in told
    again, more = run(tmp_path, *lines, "late echo new")
    assert again["job-0"].count("card") == 1, "what ran once does not run again"
    assert "late ended with 0" in more


def test_what_stands_first_begins_first_and_the_list_may_grow(tmp_path: Path) -> None:
    grow = f"echo 'grown echo yes' >> {tmp_path / 'list'}"
    written, told = run(tmp_path, f"first {grow}", "second sleep 0.1")
    assert told.index("first begins") < told.index("second begins")
    assert written["grown"] == "yes\n"


def test_nothing_begins_when_the_time_is_over(tmp_path: Path) -> None:
    assert run(tmp_path, "job echo", minutes="0") == ({}, "")
