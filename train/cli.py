"""`stillhouse train …`: probe, sft, grpo, eval, export, report, recipe, distill. Arguments in, text out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..r1.errors import UserError
from ..r1.flags import flags_of
from ..r1.gguf import read_header
from .config import PRESETS, RunConfig, load_config

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .tasks import Item

_DESCRIPTION = """A small model gets better at what can be checked. In this order:

  stillhouse train probe --task chain_sum --option min_terms=2       can it be learned from here?
  stillhouse train sft --data traces.jsonl --out cold                a cold start in R1's format
  stillhouse train grpo --start cold --task chain_sum --out run1     reinforcement learning; --resume goes on
  stillhouse train eval --model demo+run1 --task chain_sum           how good, before and after, how sure
  stillhouse train report run1                                       one page: curves, samples, lengths
  stillhouse train export run1 --to gguf-lora                        or peft, mlx, merged
  stillhouse serve --lora run1                                       and it answers

distill: right answers of another model, from any OpenAI-compatible server, as data for sft.
recipe: several stages as one file, as R1 was made. compare-ppo: what a value model would cost."""


def run(command: str, argv: list[str]) -> int:
    """Run one sub-command; the exit code."""
    parser = flags_of(command, _DESCRIPTION)
    commands = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    functions: dict[str, Callable[[argparse.Namespace], int]] = {}

    def add(name: str, words: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        functions[name] = function
        return commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")

    one = add("probe", "tell whether a task can be learned, and what a step costs", _probe)
    _run_flags(one)
    one = add("sft", "learn to write given replies", _sft)
    _run_flags(one)
    one.add_argument("--data", required=True, metavar="FILE", help=".jsonl or .parquet with prompt and response")
    one.add_argument("--resume", action="store_true", help="go on with the run in --out")
    one = add("grpo", "learn from rewards", _grpo)
    _run_flags(one)
    one.add_argument("--resume", action="store_true", help="go on with the run in --out")
    one.add_argument("--anyway", action="store_true", help="also where the probe sees no hope")
    one = add("eval", "measure on held-out items", _eval)
    _run_flags(one)
    one.add_argument("--items", type=int, default=200, help="held-out items (default 200)")
    one.add_argument("--samples", type=int, default=1, help="replies an item (default 1); more give pass@k and maj@k")
    one.add_argument("--against", metavar="RUN", help="compare with this run in place of the base model")
    one.add_argument("--by", metavar="COLUMN", help="also for each value of this column of the items: --by family")
    one.add_argument("--replies", metavar="FILE", help="write every reply there, one JSON object a line")
    one.add_argument("--json", action="store_true", help="print JSON")
    one = add("export", "write an adapter in another format", _export)
    one.add_argument("run", help="folder of a run")
    one.add_argument("--to", required=True, choices=("gguf-lora", "peft", "mlx", "merged"))
    one.add_argument("--output", metavar="PATH", help="default: in the run's folder")
    one.add_argument("--half", action="store_true", help="gguf-lora in 16 bits: half the size")
    one.add_argument("--model", help="for merged: the base model (default: the run's)")
    one = add("report", "write one HTML page about a run", _report)
    one.add_argument("run", help="folder of a run")
    one.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder")
    one = add("compare-ppo", "train by GRPO and by PPO on one task and print what each takes", _compare_ppo)
    _run_flags(one)
    one.add_argument("--arm", choices=("grpo", "ppo"), help=argparse.SUPPRESS)  # one process each, for its memory
    one = add("recipe", "run several stages in order; what is done is left out", _recipe)
    one.add_argument("recipe", type=Path, help="a TOML file with [[stage]]")
    one.add_argument("--anyway", action="store_true", help="also where a probe sees no hope")
    one = add("distill", "collect another model's right answers as data for sft", _distill)
    _run_flags(one)
    one.add_argument("--teacher", required=True, metavar="URL", help="an OpenAI-compatible server: http://…/v1")
    one.add_argument("--teacher-model", metavar="NAME", help="default: the first that the server has")
    one.add_argument("--samples", type=int, default=4, help="replies a prompt (default 4)")
    one.add_argument("--items", type=int, default=200, help="prompts (default 200)")
    one.add_argument("--api-key", default="none")
    arguments = parser.parse_args(argv)
    return functions[arguments.step](arguments)


def _run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run as TOML; flags stand over it")
    parser.add_argument("--preset", choices=sorted(PRESETS))
    parser.add_argument("--model", metavar="NAME", help="the base model; for eval also MODEL+RUN (default: the demo's)")
    parser.add_argument("--task", metavar="NAME", help="a generator of reasoning-gym, or a .jsonl or .parquet file")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the generator; may be repeated"
    )
    parser.add_argument("--out", metavar="FOLDER", help="of the run (default run1)")
    parser.add_argument("--start", metavar="RUN", help="go on from this run's adapter")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="any setting: --set grpo.group=16"
    )


def _config(arguments: argparse.Namespace) -> RunConfig:
    """The file, and the flags over it."""
    changes: dict[str, Any] = {}
    flags = {
        "preset": arguments.preset,
        "model.name": arguments.model.partition("+")[0] if arguments.model else None,
        "task.name": arguments.task,
        "out": arguments.out,
        "lora.start": arguments.start,
        "grpo.steps": arguments.steps,
        "seed": arguments.seed,
    }
    changes |= {key: value for key, value in flags.items() if value is not None}
    changes |= dict(_setting(text, "--set") for text in arguments.set)
    if arguments.option:
        changes["task.options"] = dict(_setting(text, "--option") for text in arguments.option)
    return load_config(arguments.config, changes)


def _setting(text: str, flag: str) -> tuple[str, Any]:
    """`key=value`; the value as JSON where it is, else a text."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{flag} {text} has no value", f"write {flag} {text}=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _needs_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"training needs PyTorch: {error}", "pip install 'stillhouse[train]'") from None


def _probe(arguments: argparse.Namespace) -> int:
    _needs_torch()
    import tempfile

    with tempfile.TemporaryDirectory(prefix="stillhouse-probe-") as folder:
        arguments.out = folder
        config = _config(arguments)
        from .grpo import open_run
        from .probe import probe

        run = open_run(config, resume=False)
        try:
            verdict = probe(run, _tell)
        finally:
            run.close()
    print(verdict)
    return 1 if verdict.hopeless else 0


def _sft(arguments: argparse.Namespace) -> int:
    _needs_torch()
    config = _config(arguments)
    from .sft import run_sft

    data = Path(arguments.data)
    return _until_stopped(lambda: run_sft(config, data, _tell, resume=arguments.resume), _go_on(config))


def _grpo(arguments: argparse.Namespace) -> int:
    _needs_torch()
    config = _config(arguments)
    from .grpo import run_grpo

    resume, anyway = arguments.resume, arguments.anyway
    code = _until_stopped(lambda: run_grpo(config, resume=resume, anyway=anyway, report=_tell), _go_on(config))
    if not code:
        _tell(f"saved in {config.out}; stillhouse serve {config.model.name} --lora {config.out}")
    return code


def _until_stopped(work: Callable[[], object], go_on: str) -> int:
    """Do some work; the exit code, and where Ctrl-C ended it a line that says how to go on."""
    try:
        work()
    except KeyboardInterrupt:
        _tell(f"stopped; {go_on}")
        return 130
    return 0


def _go_on(config: RunConfig) -> str:
    return f"--resume goes on from the last checkpoint in {config.out}"


def _eval(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from .evaluate import by_column, difference, evaluate, form_of, require_answers
    from .rollout import find_model, open_rollouts
    from .tasks import open_task

    paths, folder = find_model(arguments.model or config.model.name)
    task = open_task(config.task)
    items = task.held_out[: arguments.items]
    require_answers(items, config.task.held_out or config.task.name)
    base = find_model(f"{config.model.name}+{arguments.against}")[1] if arguments.against else None
    compared: dict[str, Path | None] = {"base": None} if base is None else {base.name: base / "adapter.gguf"}
    if folder:
        compared[folder.name] = folder / "adapter.gguf"
    for run in filter(None, (base, folder)):
        from .export import check_belongs, load_peft

        check_belongs(load_peft(run / "adapter"), [read_header(path) for path in paths])
    rollouts = open_rollouts(paths, config.rollout, config.grpo.max_tokens)
    settings = config.evaluation
    found = {}
    try:
        for name, adapter in compared.items():
            rollouts.use(adapter)
            found[name] = evaluate(
                rollouts,
                items,
                config.task,
                samples=arguments.samples,
                max_tokens=config.grpo.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                form=form_of(config.rewards),
                progress=_tell,
            )
    finally:
        rollouts.close()
    if arguments.replies:
        _write_replies(Path(arguments.replies), items, found)
    gain = difference(*found.values()) if len(found) == 2 else None
    parts = {name: by_column(it, items, arguments.by) if arguments.by else {} for name, it in found.items()}
    if arguments.json:
        told: dict[str, Any] = {name: it.summary() for name, it in found.items()} | ({"gain": gain} if gain else {})
        for name, some in parts.items():
            if some:
                told[name]["by"] = {value: it.summary() for value, it in some.items()}
        print(json.dumps(told, indent=2))
        return 0
    print(f"{task.name}: {len(items)} held-out items, temperature {settings.temperature}, top-p {settings.top_p}")
    for name, it in found.items():
        print(
            f"{name:<12} pass@1 {it.pass_1}  format {it.format:.2f}  cut off {it.truncated:.2f}  tokens {it.tokens:.0f}"
        )
        if it.samples > 1:
            print(f"{'':<12} pass@{it.samples} {it.pass_k(it.samples)}  maj@{it.samples} {it.majority}")
    if gain:
        print(f"{'gain':<12} {gain}  (95 %, the same items paired)")
    for value in next(iter(parts.values())):
        rates = "  ".join(f"{name} {some[value].pass_1}" for name, some in parts.items())
        print(f"{value:<12} {rates}")
    return 0


def _write_replies(path: Path, items: Sequence[Item], found: Mapping[str, Evaluation]) -> None:
    """Every reply of every model, with what it was asked and whether it is right."""
    with path.open("w", encoding="utf-8") as file:
        for name, evaluation in found.items():
            for item, judged in zip(items, evaluation.judged, strict=True):
                for text, right in zip(judged.texts, judged.right, strict=True):
                    row = {"model": name, "prompt": item.prompt, "text": text, "right": right}
                    file.write(json.dumps(row | {"answer": item.columns.get("answer")}, ensure_ascii=False) + "\n")


def _export(arguments: argparse.Namespace) -> int:
    _needs_torch()
    from . import export

    folder = Path(arguments.run)
    adapter = export.load_peft(folder / "adapter")
    names = {"gguf-lora": "adapter.gguf", "peft": "adapter", "mlx": "mlx", "merged": "merged.gguf"}
    output = Path(arguments.output) if arguments.output else folder / names[arguments.to]
    if arguments.to == "gguf-lora":
        export.save_gguf(adapter, output, half=arguments.half)
    elif arguments.to == "peft":
        export.save_peft(adapter, output)
    elif arguments.to == "mlx":
        export.save_mlx(adapter, output)
    else:
        from .rollout import find_model

        name = arguments.model or load_config(folder / "config.toml").model.name
        export.save_merged(adapter, find_model(name)[0], output)
    print(output)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .report import write_report

    folder = Path(arguments.run)
    print(write_report(folder, Path(arguments.output) if arguments.output else folder / "report.html"))
    return 0


def _compare_ppo(arguments: argparse.Namespace) -> int:
    _needs_torch()
    config = _config(arguments)
    if arguments.arm:
        from .ppo import measure

        print(json.dumps(measure(config, critic=arguments.arm == "ppo", report=_tell)))
        return 0
    import subprocess

    found: dict[str, dict[str, float]] = {}
    for arm in ("grpo", "ppo"):
        # Every group is learned from, so that both see the same number of replies.
        same = ["--set", "grpo.dynamic_sampling=false", "--out", f"{config.out}-{arm}"]
        command = [sys.executable, "-m", "stillhouse", "train", "compare-ppo", *_argv(arguments), *same, "--arm", arm]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return done.returncode
        found[arm] = json.loads(done.stdout.splitlines()[-1])
    print(f"{'':<24} {'GRPO':>10} {'PPO':>10}   GRPO takes")
    whole = {arm: it["rollout_s"] + it["update_s"] for arm, it in found.items()}
    rows = {"peak memory, GB": "peak_gb", "update, s": "update_s", "rollouts, s": "rollout_s"}
    table = {words: {arm: it[key] for arm, it in found.items()} for words, key in rows.items()}
    for words, row in (table | {"a step, s": whole}).items():
        print(f"{words:<24} {row['grpo']:>10.2f} {row['ppo']:>10.2f}   {row['grpo'] / row['ppo'] - 1:+.0%}")
    for arm, it in found.items():
        print(f"{arm.upper()}: pass@1 {it['before']:.3f} -> {it['after']:.3f} [{it['low']:.3f}, {it['high']:.3f}]")
    return 0


def _argv(arguments: argparse.Namespace) -> list[str]:
    """The flags of a run, written out again."""
    single = {"config": "--config", "preset": "--preset", "model": "--model", "task": "--task", "start": "--start"}
    single |= {"steps": "--steps", "seed": "--seed"}
    argv = [text for name, flag in single.items() if (value := getattr(arguments, name)) for text in (flag, str(value))]
    for name in ("option", "set"):
        argv += [text for value in getattr(arguments, name) for text in (f"--{name}", value)]
    return argv


def _recipe(arguments: argparse.Namespace) -> int:
    _needs_torch()
    from .recipe import read_recipe, run_recipe

    recipe = read_recipe(arguments.recipe)
    go_on = "the same command goes on from the last checkpoint"
    return _until_stopped(lambda: print(run_recipe(recipe, _tell, anyway=arguments.anyway)), go_on)


def _distill(arguments: argparse.Namespace) -> int:
    output = Path(arguments.out or "distilled.jsonl")
    arguments.out = None
    config = _config(arguments)
    from .distill import Teacher, distill
    from .tasks import open_task

    def collect() -> None:
        teacher = Teacher(arguments.teacher, arguments.teacher_model, arguments.api_key)
        items = open_task(config.task).train[: arguments.items]
        done = distill(teacher, items, config, arguments.samples, output, _tell)
        print(f"{output}: {done.kept} right replies of {done.asked}, for {done.prompts} prompts")

    return _until_stopped(collect, f"the same command asks only what is not in {output} yet")
