"""Tasks and rewards: what is held out stays held out, answers are judged strictly, failures name their row."""

from __future__ import annotations

import json
import sys
import time

import pytest

from stillhouse.r1.errors import UserError
from stillhouse.train import formulas
from stillhouse.train import rewards as module
from stillhouse.train.config import TaskConfig
from stillhouse.train.rewards import REWARDS, Asked, RewardFailed, Rewards, answer_in, find, same_answer
from stillhouse.train.tasks import Item, messages, open_task, read_items

GOOD = "<think>2 and 2 make 4</think><answer>4</answer>"


def asked(*completions, columns=None, prefixes=None, prompts=None, truncated=None, max_tokens=100):
    count = len(completions)
    return Asked(
        prompts or ["what?"] * count,
        completions,
        [list(text.encode()) for text in completions],
        columns or [{"answer": "4"}] * count,
        [f"row {n}" for n in range(count)],
        prefixes or [""] * count,
        truncated or [False] * count,
        max_tokens,
    )


def part(name, *completions, **fields):
    return Rewards({name: 1.0})(asked(*completions, **fields)).parts[name]


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


# Tasks


def test_a_file_is_split_and_nothing_is_on_both_sides(tmp_path):
    rows = [{"prompt": f"what is {n % 40}?", "answer": n % 40} for n in range(60)]
    path = write_rows(tmp_path / "data.jsonl", rows)
    task = open_task(TaskConfig(name=str(path), held_out_size=10))
    train, held_out = ({item.question for item in items} for items in (task.train, task.held_out))
    assert (len(train), len(held_out)) == (30, 10) and not train & held_out
    again = open_task(TaskConfig(name=str(path), held_out_size=10))
    assert [item.question for item in again.held_out] == [item.question for item in task.held_out]
    other = open_task(TaskConfig(name=str(path), held_out_size=10, seed=2))
    assert {item.question for item in other.held_out} != held_out


def test_a_parquet_file_is_read_like_lines_of_json(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow: pip install pyarrow")
    import pyarrow

    rows = [{"prompt": f"what is {n}?", "answer": n, "lang": "en"} for n in range(20)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    write_rows(tmp_path / "data.jsonl", rows)
    one, other = (
        open_task(TaskConfig(name=str(tmp_path / f"data.{kind}"), held_out_size=5)) for kind in ("parquet", "jsonl")
    )
    assert [(item.prompt, item.columns) for item in one.train] == [(item.prompt, item.columns) for item in other.train]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read"):
        open_task(TaskConfig(name=str(tmp_path / "bad.parquet")))


def test_a_question_of_the_held_out_file_is_not_trained_on(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", [{"prompt": "1?", "answer": 1}, {"prompt": "2?", "answer": 2}])
    test = write_rows(tmp_path / "b.jsonl", [{"question": "2?", "solution": 2}])
    task = open_task(TaskConfig(name=str(train), held_out=str(test)))
    assert [item.question for item in task.train] == ["1?"] and task.overlap == 1
    assert task.held_out[0].columns["answer"] == 2


def test_a_generators_seeds_are_disjoint_even_where_its_questions_are_few():
    pytest.importorskip("reasoning_gym", reason="pip install 'stillhouse[train]'")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = open_task(TaskConfig(options=options, size=1000, held_out_size=50))
    train, held_out = ([item.question for item in items] for items in (task.train, task.held_out))
    assert len(held_out) == 50 and len(train) > 50
    assert len({*train, *held_out}) == len(train) + len(held_out)


def test_a_task_without_anything_to_learn_from_is_refused(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "1?", "answer": 1}])
    with pytest.raises(UserError, match="all of them are held out"):
        open_task(TaskConfig(name=str(path)))


def test_the_instruction_stands_behind_the_question_and_conversations_stay_as_they_are(tmp_path):
    talk = [{"role": "user", "content": "hello"}]
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "1?"}, {"prompt": talk}])
    plain, conversation = read_items(path)
    config = TaskConfig(instruction="Be brief.", system="You add.")
    assert [(m.role, m.content) for m in messages(plain, config)] == [
        ("system", "You add."),
        ("user", "1?\n\nBe brief."),
    ]
    assert messages(conversation, TaskConfig())[0].content == "hello"


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"prompt": "a"}\nnonsense', "row 2 is not JSON"),
        ('{"prompt": "a"}\n\n{"answer": 1}', "row 3 has no prompt"),
        ("[1]", "row 1 is not an object"),
        ('{"prompt": [1]}', "row 1: `prompt` is a list"),
        ("\n", "is empty"),
    ],
)
def test_a_bad_row_is_told_by_its_number(tmp_path, text, words):
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_items(path)


def test_an_unknown_generator_and_an_unknown_option_are_told():
    pytest.importorskip("reasoning_gym", reason="pip install 'stillhouse[train]'")
    with pytest.raises(UserError, match="no task 'chain_som'"):
        open_task(TaskConfig(name="chain_som"))
    with pytest.raises(UserError, match="chain_sum refuses its options"):
        open_task(TaskConfig(options={"terms": 3}))


# Answers


@pytest.mark.parametrize(
    "text, answer",
    {
        "tagged": (GOOD, "4"),
        "the last one counts": ("<answer>1</answer><answer> 2 </answer>", "2"),
        "not from the thoughts": ("<think><answer>1</answer></think>so", "so"),
        "all that follows the thoughts": ("<think>1 + 1</think>\n\n2 ", "2"),
        "boxed": ("</think>It is \\boxed{x^{2}}!", "x^{2}"),
        "a box that never ends": ("\\boxed{1", None),
        "nothing": ("4", None),
        "empty": ("", None),
    }.values(),
)
def test_the_answer_is_what_the_reply_commits_itself_to(text, answer):
    assert answer_in(text) == answer


@pytest.mark.parametrize(
    "given, wanted, same",
    [
        ("4", "4", True),
        ("4.0", "4", True),
        ("1,000", "1000", True),
        ("14", "4", False),
        ("4 or 5", "4", False),
        ("four", "4", False),
        ("", "4", False),
    ],
)
def test_numbers_are_the_same_as_numbers_and_nothing_is_half_right(given, wanted, same):
    assert same_answer(given, wanted) == same


@pytest.fixture
def algebra():
    """math-verify, in a process that ends with the test."""
    pytest.importorskip("math_verify", reason="pip install 'stillhouse[train]'")
    yield formulas
    formulas.close()


@pytest.mark.usefixtures("algebra")
def test_math_verify_sees_equal_formulas():
    assert same_answer("\\frac{1}{2}", "1/2")
    assert not same_answer("\\frac{1}{3}", "1/2")
    assert not same_answer("\\frac{", "1/2")


def test_comparing_formulas_says_nothing_in_a_runs_output(algebra, capfd, caplog):
    """math-verify warns that it has no time limit, once a process, wherever there is one it may not use."""
    assert part("accuracy", "<answer>(1/2)</answer>", columns=[{"answer": "2/4"}]) == [1.0]
    said = capfd.readouterr()
    assert (said.out, said.err, caplog.records) == ("", "", [])


def test_an_algebra_that_does_not_start_is_told_and_not_taken_for_a_wrong_answer(algebra, monkeypatch):
    algebra.close()
    monkeypatch.setattr(algebra, "__file__", "nowhere.py")
    with pytest.raises(RewardFailed, match="math-verify does not start in a process of its own"):
        part("accuracy", "<answer>(1/2)</answer>", columns=[{"answer": "2/4"}])


def test_an_answer_that_an_algebra_never_ends_with_is_not_right_and_stops_nothing(algebra, monkeypatch):
    same_answer("(1)", "1/1")  # started
    monkeypatch.setattr(algebra, "TIME_LIMIT_S", 0.3)
    assert not same_answer("9^{9^{9^{9^{9}}}}", "(1)")
    monkeypatch.undo()
    assert same_answer("\\frac{1}{2}", "2/4")


def test_an_answer_that_contains_the_right_one_gets_nothing():
    """reasoning-gym's default scorer gives part of a point for it."""
    pytest.importorskip("reasoning_gym", reason="pip install 'stillhouse[train]'")
    item = open_task(TaskConfig(size=1, held_out_size=1)).train[0]
    right, hack = f"<answer>{item.columns['answer']}</answer>", f"<answer>{item.columns['answer']} or 7</answer>"
    assert part("accuracy", right, hack, columns=[item.columns] * 2) == [1.0, 0.0]


def test_what_follows_the_thoughts_is_an_answer_where_the_tasks_own_scorer_takes_it_for_one():
    """reasoning-gym reads <answer> alone; TRL's reasoning_accuracy_reward takes what follows the thoughts."""
    pytest.importorskip("reasoning_gym", reason="pip install 'stillhouse[train]'")
    item = open_task(TaskConfig(size=1, held_out_size=1)).train[0]
    number = item.columns["answer"]
    replies = [f"<think>a</think> {it}" for it in (number, f"<answer>{number}</answer>", f"It is {number}.")]
    generated, of_a_file = [item.columns] * 3, [{"answer": number}] * 3
    assert part("accuracy", *replies, columns=generated) == [0.0, 1.0, 0.0]
    assert part("accuracy", *replies, columns=of_a_file) == [1.0, 1.0, 0.0]
    plain = Rewards({"accuracy": 1.0, "thoughts": 0.2})(asked(*replies, columns=generated))
    assert plain.parts["accuracy"] == [1.0, 1.0, 0.0]


# Rewards


@pytest.mark.parametrize(
    "prefix, text, good",
    {
        "whole": ("", GOOD, 1.0),
        "opened by the template": ("<think>\n", "2 and 2 make 4</think>\n<answer>4</answer>", 1.0),
        "opened twice": ("<think>\n", GOOD, 0.0),
        "never opened": ("", "2 and 2</think><answer>4</answer>", 0.0),
        "never closed": ("", "<think>2 and 2<answer>4</answer>", 0.0),
        "no thoughts": ("", "<think> </think><answer>4</answer>", 0.0),
        "two answers": ("", GOOD + "<answer>5</answer>", 0.0),
        "words behind": ("", GOOD + " that's it", 0.0),
        "words before": ("", "Well. " + GOOD, 0.0),
        "answer among the thoughts": ("", "<think>x<answer>4</answer></think>", 0.0),
    }.values(),
)
def test_the_format_counts_what_the_template_opened(prefix, text, good):
    """TRL's and open-r1's format rewards are always 0 for templates that open the thoughts themselves."""
    assert part("format", text, prefixes=[prefix]) == [good]


@pytest.mark.parametrize(
    "prefix, text, good",
    [
        ("", "<think>1 + 1</think>\n\n2", 1.0),
        ("<think>\n", "1 + 1</think>2", 1.0),
        ("", "2", 0.0),
        ("", "<think>1 + 1</think>", 0.0),
        ("", "<think> </think>2", 0.0),
        ("", "<think>1 + 1</think><answer>2</answer>", 0.0),
        ("", "<think>1</think>2</think>", 0.0),
    ],
)
def test_thoughts_are_rewarded_where_a_plain_answer_follows(prefix, text, good):
    assert part("thoughts", text, prefixes=[prefix]) == [good]


def test_the_language_is_a_share_of_words():
    english = "<think>one two three four five six</think>"
    mixed = "<think>one two three four 五六 `code is not counted` $x$</think>"
    got = part("language", english, mixed, "<think>one</think>")
    assert got == [1.0, pytest.approx(4 / 6), None]
    chinese = [{"answer": "4", "lang": "zh"}]
    assert part("language", "<think>一二三四五六</think>", columns=chinese) == [1.0]


def test_structure_overlong_and_repetition():
    steps = "<think>I have to add the two numbers.\nFirst I add 2.\nThen I add 2.\nTherefore it is 4.</think>"
    assert part("structure", steps, "<think>4</think>") == [1.0, 0.0]
    texts = ["x" * n for n in (80, 90, 100)]
    assert part("overlong", *texts) == [0.0, -0.5, -1.0]
    assert part("repetition", "a b c d e", "a b a b a b a b") == [0.0, pytest.approx(-4 / 6)]


def test_the_random_control_knows_nothing_and_can_be_repeated():
    texts = [f"reply {n}" for n in range(200)]
    first, second = part("random", *texts), part("random", *texts)
    assert first == second and 60 < sum(first) < 140


def test_weights_add_up_and_a_gate_shuts():
    both = Rewards({"accuracy": 1.0, "format": 0.5}, {"accuracy": "format"})
    scored = both(asked(GOOD, "<answer>4</answer>", "<think>x</think><answer>5</answer>"))
    assert scored.total == [1.5, 0.0, 0.5]
    assert scored.parts["accuracy"] == [1.0, 1.0, 0.0]


def test_a_reward_written_for_trl_runs_unchanged(tmp_path):
    """A keyword it names, a column of the row, conversations for prompts, `None` for what does not apply."""
    (tmp_path / "mine.py").write_text(
        "def by_level(prompts, completions, level, **kwargs):\n"
        "    return [None if it is None else float(it) * len(c[0]['content']) for c, it in zip(completions, level)]\n"
        "def short(completions):\n"
        "    return [-float(len(c)) for c in completions]\n",
        encoding="utf-8",
    )
    conversation = [{"role": "user", "content": "hi"}]
    scored = Rewards({f"{tmp_path}/mine.py:by_level": 1.0})(
        asked("abc", "ab", prompts=[conversation] * 2, columns=[{"level": 2}, {"level": 3}])
    )
    assert scored.total == [6.0, 6.0]
    assert Rewards({f"{tmp_path}/mine.py:short": 2.0})(asked("abc")).total == [-6.0]
    assert find("json.dumps") is json.dumps
    with pytest.raises(UserError, match="no reward 'acuracy'"):
        find("acuracy")
    with pytest.raises(UserError, match="cannot be loaded"):
        find(f"{tmp_path}/mine.py:long")


@pytest.mark.parametrize(
    "function, words",
    {
        "raises": (lambda completions, **_: 1 / 0, r"failed in test_train_rewards\.py, line \d+: ZeroDivisionError"),
        "leaves": (lambda completions, **_: sys.exit("bye"), r"failed in .*: SystemExit: bye"),
        "gives nothing": (lambda completions, **_: None, "gave None in place of a list"),
        "gives words": (lambda completions, **_: ["good"], "gave 'good' for item row 0"),
        "NaN": (lambda completions, **_: [float("nan")], "gave nan for item row 0"),
        "too few": (lambda completions, **_: [], "gave 0 values for 1 replies"),
        "hangs": (lambda completions, **_: time.sleep(60), "did not end within"),
        "a column that is not there": (lambda completions, tests, **_: [0.0], "needs `tests`, and item row 0 has none"),
    }.values(),
)
def test_a_reward_that_fails_is_told_by_its_name(monkeypatch, function, words):
    monkeypatch.setitem(REWARDS, "bad", function)
    monkeypatch.setattr(module, "TIME_LIMIT_S", 0.05)
    with pytest.raises(RewardFailed, match=words) as told:
        Rewards({"bad": 1.0})(asked("x"))
    assert "\n" not in told.value.message and "--resume" in told.value.hint


def test_a_row_without_what_a_reward_needs_is_told_before_anything_is_asked():
    items = [Item("q0", "a", {"answer": 1}), Item("q1", "b", {"tests": [], "answer": None})]
    with pytest.raises(RewardFailed, match="mine: item q1 has no `answer`, which the reward accuracy needs"):
        Rewards({"accuracy": 1.0, "format": 0.2}).check(items, "mine")
    with pytest.raises(RewardFailed, match="item q0 has no `tests`, which the reward code needs"):
        Rewards({"code": 1.0}).check(items, "mine")
    Rewards({"format": 0.2, "language": 1.0, "overlong": 1.0, "random": 1.0}).check(items, "mine")


def test_a_row_without_an_answer_is_told():
    with pytest.raises(RewardFailed, match="needs `answer`, and item row 1 has none"):
        Rewards({"accuracy": 1.0})(asked("x", "y", columns=[{"answer": 1}, {}]))


# A learned reward


@pytest.mark.parametrize("template", ["", "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"])
def test_a_sequence_classifier_rewards_each_reply_as_if_it_were_alone(tmp_path, template):
    """Texts of different lengths go through it together; its first logit counts."""
    torch = pytest.importorskip("torch", reason="a reward model needs torch: pip install 'stillhouse[train]'")
    transformers = pytest.importorskip("transformers", reason="a reward model needs transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "what", "is", "it", "user", "assistant", "good", "bad", "very"]
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>")
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(tmp_path / "judge")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(words), num_labels=2, pad_token_id=0, **sizes)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "judge")
    replies = [" good", " very very very bad", " it"]
    told = part(f"model:{tmp_path / 'judge'}", *replies, prompts=["what is it"] * 3)
    for reply, reward in zip(replies, told, strict=True):
        text = f"user what is it assistant{reply}" if template else f"what is it{reply}"
        ids = torch.tensor([[words.index(word) for word in text.split()]])
        with torch.no_grad():
            assert reward == pytest.approx(float(model(ids).logits[0, 0]), abs=1e-5)
    assert len(set(told)) == 3


def test_a_reward_model_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="no reward model"):
        find(f"model:{tmp_path}")
