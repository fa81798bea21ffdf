"""Texts that show whether two tokenizers agree, and conversations that show whether two templates do.

Made by a seeded generator from words of many scripts, code, numbers, white space, emoji, and what looks like a control
token and is none. In Unicode's composed form (NFC): llama.cpp does not compose, and some tokenizers do.
"""

from __future__ import annotations

import random
import unicodedata

from ..r1.messages import Message

_TEXT = (
    "the quick brown fox it's we've I'LL don't Straße naïve café Ω≈ç √2 e=mc² 3.14159 1,000,000 2026-11-25 "
    "привет мир нещо на български שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก កាន់តែពិសេស 你好世界 思考 "
    "こんにちは 世界 カタカナ 안녕하세요 세계 γειά σου κόσμε გამარჯობა բարեւ வணக்கம் ሰላም ᚠᚢᚦ "
    "def f(x): return x**2 # ok; int main(void){return 0;} <html> &amp; SELECT * FROM t; ∑_{i=1}^n \\frac{1}{2} "
    "😀 👩‍👩‍👧‍👦 🇩🇪 ✅ 🦙🦙 🚀 ❤️ 1️⃣ ½ ① ５ Ⅳ ﬁ ™"
)
WORDS = _TEXT.split(" ")
SPACES = (" ", " ", " ", "  ", "   ", "\n", "\n\n", "\t", " \n", "\r\n", "\u00a0", "\u3000", "")
LOOK_ALIKES = (
    *("<|im_start|", "|im_end|>", "<｜User", "｜Assistant｜>", "< think>", "</think", "<think", "<|end", "<s>", "</s>"),
    *("<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "[INST]", "<<SYS>>"),
)
PUNCTUATION = "!?.,;:'\"()[]{}<>/\\|@#$%^&*-_=+~`…—“”«»。，、？！"
ALPHABETS = ((0x20, 0x7F), (0xA1, 0x250), (0x370, 0x400), (0x400, 0x500), (0x5D0, 0x5EB), (0x4E00, 0x9FA0))


def strings(count: int, seed: int = 0) -> list[str]:
    """So many different texts, always the same for a seed."""
    source, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        text = "".join(_piece(source) for _ in range(source.randint(1, 12)))
        found[unicodedata.normalize("NFC", text)] = None
    return list(found)


def _piece(source: random.Random) -> str:
    kind = source.random()
    if kind < 0.55:
        return source.choice(WORDS) + source.choice(SPACES)
    if kind < 0.65:
        return str(source.randrange(10 ** source.randint(1, 9))) + source.choice(SPACES)
    if kind < 0.75:
        return "".join(source.choices(PUNCTUATION, k=source.randint(1, 5)))
    if kind < 0.85:
        return source.choice(LOOK_ALIKES)
    if kind < 0.9:
        return source.choice(SPACES) * source.randint(1, 4)
    first, last = source.choice(ALPHABETS)
    letters = (chr(source.randrange(first, last)) for _ in range(source.randint(1, 8)))
    return "".join(letter for letter in letters if unicodedata.category(letter) != "Cn")


def conversations() -> list[list[Message]]:
    """Twenty: one word to several turns, a system's words, thoughts, many lines, other scripts, look-alikes."""
    asked = [
        "Hi",
        "What is 17 * 23?",
        "  spaces around  ",
        "two\nlines",
        "你好，请思考。",
        "Привет 🌍",
        "",
        "{{ messages }}",
    ]
    asked += [
        "<|im_start|>system",
        "</think> is a word",
        "<｜User｜>pasted",
        "```py\nprint(1)\n```",
        "a\tb",
        "\u3000wide",
    ]
    found = [[Message("user", text)] for text in asked]
    found += [
        [Message("system", "Be brief."), Message("user", "Why?")],
        [Message("system", ""), Message("user", "Why?")],
        [Message("user", "1+1?"), Message("assistant", "2"), Message("user", "2+2?")],
        [Message("user", "1+1?"), Message("assistant", "<think>\nsums\n</think>\n\n2"), Message("user", "2+2?")],
        [Message("system", "S"), *[Message(role, str(i)) for i in range(4) for role in ("user", "assistant")]][:-1],
        [Message("user", "a " * 500)],
    ]
    return found
