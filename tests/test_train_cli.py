"""`stillhouse train`: from the command line to an adapter that is served, and what is told when it cannot be."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from train_fixtures import no_room_beyond

from stillhouse.__main__ import main
from stillhouse.r1.errors import UserError
from stillhouse.train.config import load_config
from stillhouse.train.distill import Teacher, distill
from stillhouse.train.evaluate import Evaluation, Judged, bootstrap, chance_of_one, difference, wilson
from stillhouse.train.reflect import reflections
from stillhouse.train.tasks import Item


def judged(item: str, right: str, answers: str = "") -> Judged:
    """`right`: a letter a reply, + or -."""
    flags = tuple(letter == "+" for letter in right)
    return Judged(
        item, flags, tuple(answers or right), flags, (False,) * len(flags), (3,) * len(flags), ("",) * len(flags)
    )


# Statistics


def test_pass_at_k_is_the_chance_over_all_draws():
    """Compared with counting: of all pairs of 6 replies, those with a right one, 2 being right."""
    pairs = [(a, b) for a in range(6) for b in range(a)]
    assert chance_of_one(6, 2, 2) == pytest.approx(sum(a < 2 or b < 2 for a, b in pairs) / len(pairs))
    assert (chance_of_one(4, 0, 4), chance_of_one(4, 1, 4), chance_of_one(4, 1, 1)) == (0.0, 1.0, 0.25)


def test_intervals_are_those_of_the_books():
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    low, high = bootstrap([0.0, 1.0] * 200)[1:]
    assert (low, high) == (pytest.approx(0.5 - 1.96 / 40, abs=0.01), pytest.approx(0.5 + 1.96 / 40, abs=0.01))
    assert bootstrap([0.3] * 9) == pytest.approx((0.3, 0.3, 0.3))


def test_the_majority_is_of_answers_and_not_of_right_replies():
    evaluation = Evaluation((judged("a", "+--", "4 5 6".replace(" ", "")), judged("b", "++-", "778")))
    assert evaluation.majority.value == 1.0  # a: three answers once each, the first one counts
    assert evaluation.pass_1.value == pytest.approx(0.5)
    assert evaluation.pass_k(3).value == 1.0 and evaluation.useful == 1.0


def test_two_models_are_compared_item_by_item():
    """Every item a little better: each interval alone is wide, that of the difference is narrow."""
    before = Evaluation(tuple(judged(str(n), "----" if n % 2 else "+++-") for n in range(12)))
    after = Evaluation(tuple(judged(str(n), "+---" if n % 2 else "++++") for n in range(12)))
    gain = difference(before, after)
    assert gain == pytest.approx((0.25, 0.25, 0.25))
    assert before.pass_1.high > after.pass_1.low


def test_second_thoughts_are_counted_by_list():
    texts = ["Wait, no.", "however it is", "I check again", "4"]
    assert reflections(texts) == {"r1": 0.75, "oat": 0.25}


# Distillation


@pytest.fixture
def teacher():
    """A server that answers with thoughts apart: right, wrong, cut off, badly formed, by the seed."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send({"data": [{"id": "big"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers = ["<answer>4</answer>", "<answer>5</answer>", "<answer>4", "4"]
            choice = {"finish_reason": "stop", "message": {"content": answers[asked["seed"]]}}
            choice["message"]["reasoning_content"] = "two and two\n"
            if asked["seed"] == 2:
                choice["finish_reason"] = "length"
            self._send({"choices": [choice]})

        def _send(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_a_teachers_right_replies_are_kept_and_none_is_asked_twice(teacher, tmp_path):
    items = [Item(f"{n}", f"2 + 2, {n}", {"answer": 4}) for n in range(2)]
    output = tmp_path / "data.jsonl"
    for expected in ((1, 4, 1), (1, 4, 1), (0, 0, 0)):
        count = 1 if output.exists() is False else 2
        got = distill(Teacher(teacher), items[:count], load_config(), 4, output, lambda _: None)
        assert got == expected
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["2 + 2, 0", "2 + 2, 1"]
    assert rows[0]["response"] == "<think>\ntwo and two\n</think>\n\n<answer>4</answer>"


def test_a_collection_that_was_stopped_goes_on_to_the_same_file(teacher, tmp_path):
    """Killed after one row of an item, in the middle of the next: what a prompt got nothing for is not asked again."""
    items = [Item(f"{n}", f"2 + 2, {n}", {"answer": answer}) for n, answer in enumerate((4, 9, 4))]
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"

    def collect(count: int, output: Path) -> tuple[int, ...]:
        return distill(Teacher(teacher), items[:count], load_config(), 4, output, lambda _: None)

    assert collect(3, whole) == (3, 12, 2)
    with no_room_beyond(20), pytest.raises(UserError, match=r"stopped\.jsonl cannot be written: File too large"):
        collect(2, stopped)
    assert collect(2, stopped) == (2, 8, 1)
    with stopped.open("a", encoding="utf-8") as file:
        file.write('{"id": "2", "prompt": "2 + 2, 2", "response": "x"}\n{"id": "2", "pro')
    assert collect(3, stopped) == (1, 4, 1)
    assert stopped.read_bytes() == whole.read_bytes()
    stopped.unlink()  # thrown away, and the list of what was asked left there
    assert collect(2, stopped) == (2, 8, 1)


def test_a_file_of_something_else_is_not_collected_into(teacher, tmp_path):
    output = tmp_path / "data.jsonl"
    output.write_text('{"prompt": "mine"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="row 1 has no id"):
        distill(Teacher(teacher), [], load_config(), 4, output, lambda _: None)
    assert output.read_text(encoding="utf-8") == '{"prompt": "mine"}\n'


def test_a_teacher_that_is_not_there_or_is_something_else_is_told(teacher, monkeypatch):
    with pytest.raises(UserError, match="cannot be asked"):
        Teacher("http://127.0.0.1:9/v1")
    for answer in ({}, {"choices": []}, [], None):
        monkeypatch.setattr(Teacher, "_call", lambda *_, answer=answer: answer)
        with pytest.raises(UserError, match="does not answer as OpenAI's servers do"):
            Teacher(teacher, "big").reply([], 1, 1.0, 0)


# The command


@pytest.mark.parametrize(
    "argv, words",
    [
        (["grpo", "--set", "grpo.steps"], "has no value"),
        (["grpo", "--set", "grpo.step=3"], "did you mean `grpo.steps`"),
        (["sft", "--data", "x.jsonl", "--set", "sft.epochs=0"], "`sft.epochs` is 0"),
        (["eval", "--model", "demo+nowhere"], "no trained adapter in nowhere"),
        (["export", "nowhere", "--to", "mlx"], "no adapter in nowhere"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(argv, words, capsys, tmp_path, monkeypatch):
    if argv[0] != "eval":
        pytest.importorskip("torch", reason="pip install 'stillhouse[train]'")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *argv]) == 2
    assert words in capsys.readouterr().err


def test_help_loads_no_torch():
    words = "import sys, stillhouse.__main__ as m\ntry: m.main(['train', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", words + "print(*sorted(sys.modules))"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "llama_cpp"} & {*done.stdout.splitlines()[-1].split()}


def test_from_probe_to_served_adapter_by_commands_alone(random_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch", reason="pip install 'stillhouse[train]'")
    pytest.importorskip("transformers", reason="pip install 'stillhouse[train]'")
    monkeypatch.chdir(tmp_path)
    random_model.write_model(Path("toy.gguf"), kv_heads=1, norm=0.5)
    rows = [{"id": f"q{n}", "prompt": f"say {n}", "answer": "1"} for n in range(12)]
    Path("task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    examples = [
        {"prompt": f"say {n}", "response": f"<think>\nit is {n % 2}</think><answer>1</answer>"} for n in range(40)
    ]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, examples)), encoding="utf-8")
    Path("run.toml").write_text(
        'model = { name = "toy.gguf" }\nlora = { rank = 4, alpha = 8 }\n'
        'task = { name = "task.jsonl", held_out_size = 4, instruction = "" }\n'
        "grpo = { steps = 2, prompts = 2, group = 4, max_tokens = 48 }\n"
        "sft = { epochs = 25, batch = 8 }\noptimizer = { lr = 1e-2, warmup = 0 }\n"
        'rollout = { weights = "f16", threads = 1, prompt_tokens = 64 }\nevaluation = { every = 0, items = 4 }\n',
        encoding="utf-8",
    )

    def train(*argv: str) -> str:
        code = main(["train", *argv])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out

    assert main(["train", "probe", "--config", "run.toml"]) == 1  # nothing is ever right: hopeless
    assert "verdict" in capsys.readouterr().out
    train("sft", "--config", "run.toml", "--data", "data.jsonl", "--out", "cold")
    slow = ("--set", "optimizer.lr=1e-4")
    train("grpo", "--config", "run.toml", "--start", "cold", "--out", "run1", "--anyway", *slow)
    told = train(
        "eval",
        "--config",
        "run.toml",
        "--model",
        "toy.gguf+run1",
        "--samples",
        "2",
        "--json",
        "--by",
        "answer",
        "--replies",
        "replies.jsonl",
    )
    found = json.loads(told)
    assert sum(part["items"] for part in found["run1"]["by"].values()) == found["run1"]["items"] == 4
    rows = [json.loads(line) for line in Path("replies.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["model"] for row in rows] == ["base"] * 8 + ["run1"] * 8 and rows[0]["prompt"] and rows[0]["answer"]
    assert found["run1"]["format"] > found["base"]["format"] == 0.0 and math.isfinite(found["gain"][0])
    random_model.write_model(Path("other.gguf"), kv_heads=1, norm=0.5, seed=3)
    assert main(["train", "eval", "--config", "run.toml", "--model", "other.gguf+run1"]) == 2
    assert "trained on toy.gguf, and other.gguf has other weights" in capsys.readouterr().err
    told = train("eval", "--config", "run.toml", "--model", "toy.gguf+run1", "--against", "cold", "--json")
    assert set(json.loads(told)) == {"cold", "run1", "gain"}
    for kind, name in {"gguf-lora": "adapter.gguf", "mlx": "mlx", "merged": "merged.gguf"}.items():
        assert train("export", "run1", "--to", kind).strip() == str(Path("run1") / name)
        assert Path("run1", name).exists()
    assert Path(train("report", "run1").strip()).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert train("grpo", "--config", "run.toml", "--out", "run1", "--steps", "3", "--resume") == ""
    steps = [json.loads(line)["step"] for line in Path("run1/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps[-2:] == [3, 3]


def test_a_run_is_served_by_its_folder(random_model, tmp_path, open_llama):
    random_model.write_model(tmp_path / "toy.gguf")
    (tmp_path / "run1").mkdir()
    random_model.write_adapter(tmp_path / "run1" / "adapter.gguf")
    backend = open_llama(tmp_path / "toy.gguf", loras=((tmp_path / "run1", 1.0),))
    assert backend.context_length == 1024
