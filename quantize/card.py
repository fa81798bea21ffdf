"""The model card of a file, and the line of metadata that says what it lost. Plans and measurements in, text out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..r1.cache import size_text
from .kld import Quality
from .plan import Plan
from .weights import Weights

_ROWS = (  # what a reader wants to know first
    ("tokens scored", lambda q: f"{q.tokens:,}"),
    ("KL divergence, mean", lambda q: f"{q.kl.value:.5f} ± {q.kl.error:.5f}"),
    ("KL divergence, median", lambda q: f"{q.kl_percentiles['50']:.5f}"),
    ("KL divergence, 99 %", lambda q: f"{q.kl_percentiles['99']:.4f}"),
    ("KL divergence, 99.9 %", lambda q: f"{q.kl_percentiles['99.9']:.4f}"),
    ("KL divergence, most", lambda q: f"{q.kl_max:.4f}"),
    ("same likeliest token", lambda q: f"{100 * q.same_top.value:.2f} ± {100 * q.same_top.error:.2f} %"),
    ("perplexity", lambda q: f"{q.ppl.value:.4f} ± {q.ppl.error:.4f}"),
    ("perplexity of the base", lambda q: f"{q.ppl_base.value:.4f} ± {q.ppl_base.error:.4f}"),
    ("ln of their ratio", lambda q: f"{q.ln_ppl_ratio.value:+.5f} ± {q.ln_ppl_ratio.error:.5f}"),
    ("change of probability, RMS", lambda q: f"{100 * q.dp_rms.value:.3f} ± {100 * q.dp_rms.error:.3f} %"),
)


def quality_rows(qualities: Mapping[str, Quality]) -> list[tuple[str, ...]]:
    """A table, side by side: a head, then what was measured, a column a text."""
    return [("", *qualities), *((words, *(show(q) for q in qualities.values())) for words, show in _ROWS)]


def quality_json(qualities: Mapping[str, Quality]) -> str:
    """The same in short, for a file's metadata: less than 1024 characters of ASCII for two texts."""
    return json.dumps({name.encode("ascii", "replace").decode(): _short(q) for name, q in qualities.items()})


def _short(quality: Quality) -> dict[str, float]:
    return {
        "tokens": quality.tokens,
        "kld_mean": round(quality.kl.value, 6),
        "kld_error": round(quality.kl.error, 6),
        "kld_p99": round(quality.kl_percentiles["99"], 5),
        "kld_p999": round(quality.kl_percentiles["99.9"], 5),
        "top1": round(quality.same_top.value, 5),
        "ppl": round(quality.ppl.value, 5),
        "ln_ppl_ratio": round(quality.ln_ppl_ratio.value, 6),
        "dp_rms": round(quality.dp_rms.value, 6),
    }


def text(
    plan: Plan, weights: Weights, hashes: Mapping[str, str], qualities: Mapping[str, Quality] | None = None
) -> str:
    """A model card in Markdown, with the front matter that the Hugging Face hub reads."""
    parts = [_front_matter(weights), f"# {plan.path.stem}\n\n{_opening(plan, weights)}", _loss(plan, qualities)]
    parts += [_types(plan), _making(plan), _source(weights, hashes), _use(plan)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(weights: Weights) -> str:
    known = {
        "base_model": weights.name if "/" in weights.name else None,
        "base_model_relation": "quantized" if "/" in weights.name else None,
        "license": weights.metadata.get("general.license"),
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "Stillhouse",
    }
    lines = [
        f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items() if isinstance(value, str)
    ]
    return "\n".join(["---", *lines, "---"])


def _opening(plan: Plan, weights: Weights) -> str:
    return (
        f"{weights.name} in {plan.recipe}: {size_text(plan.file_size)}, {plan.bits_per_weight:.3f} bits per weight for "
        f"{plan.weights / 1e9:.3f}e9 weights. Made by Stillhouse {plan.metadata.get('stillhouse.version', '')}."
    ).replace(" .", ".")


def _loss(plan: Plan, qualities: Mapping[str, Quality] | None) -> str:
    predicted = _recipe(plan).get("predicted_kl")
    told = f"Predicted KL divergence: {predicted:.4f} nats a token.\n\n" if isinstance(predicted, float) else ""
    if not qualities:
        return f"## What was lost\n\n{told}Not measured: `stillhouse measure FILE --against SOURCE` does it."
    return (
        f"## What was lost\n\n{told}Base against file, in chunks of 512 tokens of which the second half is scored, as "
        "llama-perplexity does it; on texts that nothing was tuned on.\n\n" + _table(quality_rows(qualities))
    )


def _types(plan: Plan) -> str:
    count: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for entry in plan.entries:
        rows, cols = entry.matrix
        count[entry.type] += 1
        weights[entry.type] += rows * cols
    rows = [(type, str(count[type]), f"{share / plan.weights:.1%}") for type, share in weights.most_common()]
    return "## Types\n\n" + _table([("type", "tensors", "weights"), *rows])


def _making(plan: Plan) -> str:
    told = {
        "recipe": json.dumps(_recipe(plan), ensure_ascii=False),
        "importance matrix": plan.metadata.get("quantize.imatrix.file"),
        "calibration": plan.metadata.get("stillhouse.calibration.texts")
        or plan.metadata.get("quantize.imatrix.dataset"),
        "ggml": plan.metadata.get("stillhouse.ggml.sha256"),
    }
    lines = [f"- {words}: `{value}`" for words, value in told.items() if value]
    return "## How it was made\n\n" + "\n".join(lines)


def _source(weights: Weights, hashes: Mapping[str, str]) -> str:
    revision = f", revision `{weights.revision}`" if weights.revision else ""
    rows = [(f"`{name}`", f"`{sha256}`") for name, sha256 in sorted(hashes.items())]
    return f"## Source\n\n{weights.name}{revision}\n\n" + _table([("file", "SHA-256"), *rows])


def _use(plan: Plan) -> str:
    return f"## Use\n\n```\nstillhouse serve ./{plan.path.name}\nstillhouse verify ./{plan.path.name}\n```"


def _recipe(plan: Plan) -> dict[str, Any]:
    try:
        found = json.loads(plan.metadata.get("stillhouse.recipe", "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *rest = rows
    lines = [head, ("---",) * len(head), *rest]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
