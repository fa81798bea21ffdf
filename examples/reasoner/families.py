# ruff: noqa: E501, SIM905 - tables of words and sentences
"""Short, checkable questions of twelve families, with thoughts that a program wrote. No model is asked.

    python families.py --traces 1200 > traces.jsonl           prompt and response, for `stillhouse train sft`
    python families.py --items 3000 --seed 1 > items.jsonl    prompt and answer, for `stillhouse train grpo`
    python families.py --items 3000 --seed 1 --without length,backwards > some.jsonl

Questions of seed 2 are the held-out ones (`--items 480 --seed 2`): the other seeds leave them out, and the families that
play with words take other words for them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from typing import NamedTuple

HELD_OUT_SEED = 2
HELD_OUT = 480  # questions of seed 2 that are only asked to measure


class Chance(random.Random):
    """Random numbers, and the words that may be used."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        held_out = WORDS[::6]
        self.words = held_out if seed == HELD_OUT_SEED else [it for it in WORDS if it not in held_out]


class Question(NamedTuple):
    """What is asked, what may be thought, and the answer."""

    text: str
    thoughts: str
    answer: str


WORDS = """apple banana orange lemon cherry grape melon pepper tomato potato carrot onion butter cheese bread coffee
sugar honey water river ocean mountain valley forest garden flower summer winter spring autumn morning evening window
kitchen ladder mirror pillow blanket candle bottle basket pencil letter paper school teacher student doctor farmer
sister brother mother father family friend animal rabbit tiger monkey elephant giraffe spider butterfly chicken turtle
dolphin penguin yellow purple silver golden little middle simple bigger better happy funny pretty sleepy hungry quiet
strawberry blueberry raspberry mississippi committee address success balloon tennis football soccer hockey guitar piano
violin trumpet drummer music dancer painter picture camera computer keyboard internet letterbox airport station railway
bicycle engine rocket planet moon star sun cloud rain snow storm thunder tree leaf root seed grass corn rice bean milk
egg fish bird cat dog cow pig horse sheep goat wolf bear lion mouse frog duck book desk lamp door wall roof room house
street bridge road ship boat train plane wheel clock watch money market shop bank queen king castle tower island beach
sand wind fire stone iron gold glass wood cotton""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Lena Max Nora Oscar Paul Rosa Sam Tina".split()
THINGS = "apples books coins cards pencils stamps eggs marbles cookies stickers shells flowers".split()
UNITS = (  # one, of how many, what
    ("hour", 60, "minutes"),
    ("minute", 60, "seconds"),
    ("day", 24, "hours"),
    ("week", 7, "days"),
    ("year", 12, "months"),
    ("meter", 100, "centimeters"),
    ("kilometer", 1000, "meters"),
    ("kilogram", 1000, "grams"),
    ("liter", 1000, "milliliters"),
    ("dozen", 12, "pieces"),
)
SIZES = (  # from small to large
    ("an ant", "a bee", "a coin", "a grain of rice", "a button"),
    ("a mouse", "an egg", "a frog", "an apple", "a spoon"),
    ("a cat", "a rabbit", "a chicken", "a football", "a teapot"),
    ("a dog", "a sheep", "a chair", "a goat", "a suitcase"),
    ("a horse", "a cow", "a car", "a bear", "a sofa"),
    ("an elephant", "a whale", "a bus", "a house", "a train"),
    ("a mountain", "an ocean", "the moon", "a city", "a country"),
)
SIZE_WORDS = "tiny,small,rather small,of middle size,big,very big,huge".split(",")
FACTS: dict[str, tuple[str, str]] = {  # property -> those that have it, those that have not
    "fly": ("a bird,a bee,a butterfly,an eagle,an owl,a bat,a plane,a dragonfly", "a dog,a cow,a horse,a frog,a table,a shoe,a snake,a sheep,a stone"),
    "swim": ("a fish,a duck,a dolphin,a whale,a frog,a shark,a seal", "a stone,a chair,a spoon,a tree,a key,a hammer"),
    "speak": ("a teacher,a doctor,a child,a king,a farmer,a singer", "a stone,a table,a tree,a shoe,a fish,a cloud,a spoon"),
    "grow": ("a tree,a child,a puppy,a flower,a kitten,an apple tree", "a stone,a spoon,a car,a coin,a bottle,a hammer"),
}  # fmt: skip
KINDS: dict[str, str] = {
    "an animal": "dog,cat,horse,lion,frog,eagle,shark,bee,rabbit,snake,tiger,sheep",
    "a fruit": "apple,banana,orange,cherry,pear,lemon,grape,peach,mango,plum",
    "a color": "red,blue,green,yellow,purple,orange,brown,pink",
    "a vehicle": "car,bus,train,bicycle,plane,truck,ship,tram",
    "a tool": "hammer,saw,screwdriver,drill,axe,shovel",
    "a musical instrument": "guitar,piano,violin,drum,trumpet,flute",
}
WARM = (
    ("ice,snow,a freezer,a glacier,the North Pole,winter in Russia", "cold"),
    ("fire,the sun,boiling water,an oven,lava,the desert at noon", "hot"),
)


def sums(chance: Chance) -> Question:
    """Two numbers up to two digits."""
    a, b = chance.randrange(1, 100), chance.randrange(1, 10 ** chance.choice((1, 2, 2)))
    plus = chance.random() < 0.55
    if not plus and a < b:
        a, b = b, a
    total = a + b if plus else a - b
    sign, word = ("+", "plus") if plus else ("-", "minus")
    name, things = chance.choice(NAMES), chance.choice(THINGS)
    change = f"gets {b} more" if plus else f"gives {b} away"
    text = chance.choice(
        (
            f"What is {a} {sign} {b}?",
            f"{a} {sign} {b} = ?",
            f"What is {a} {word} {b}?",
            f"Calculate {a} {sign} {b}.",
            f"{a}{sign}{b}",
            f"{name} has {a} {things} and {change}. How many {things} does {name} have now?",
            f"How much is {a} {sign} {b}?",
        )
    )
    tens, ones = b // 10 * 10, b % 10
    if tens and ones:
        middle = a + tens if plus else a - tens
        thoughts = f"{a} {sign} {tens} = {middle}, and {middle} {sign} {ones} = {total}."
    else:
        thoughts = f"{a} {sign} {b} = {total}."
    if text.startswith(name):
        thoughts = f"{'More' if plus else 'Fewer'}, so {a} {sign} {b}. {thoughts}"
    return Question(text, thoughts, str(total))


def times(chance: Chance) -> Question:
    """The small multiplication table, and tens of it."""
    a, b = chance.randrange(2, 11), chance.randrange(2, 13)
    text = chance.choice((f"What is {a} times {b}?", f"What is {a} * {b}?", f"{a} x {b} = ?", f"Multiply {a} by {b}."))
    if b > 10:
        return Question(text, f"{a} x 10 = {10 * a}, {a} x {b - 10} = {a * (b - 10)}. Together {a * b}.", str(a * b))
    if b > 5 and a > 5 and b < 10:
        return Question(text, f"{a} x 5 = {5 * a}, {a} x {b - 5} = {a * (b - 5)}. Together {a * b}.", str(a * b))
    return Question(text, f"{a} x {b} = {a * b}.", str(a * b))


def compare(chance: Chance) -> Question:
    """The larger or smaller of two numbers."""
    a = chance.randrange(1, 10 ** chance.choice((2, 2, 3)))
    b = a
    while b == a:
        b = (
            chance.randrange(1, 10 ** chance.choice((2, 2, 3)))
            if chance.random() < 0.6
            else max(1, a + chance.randrange(-9, 10))
        )
    large = chance.random() < 0.6
    word = chance.choice(("larger", "bigger", "greater")) if large else "smaller"
    text = chance.choice(
        (f"Which is {word}, {a} or {b}?", f"Which number is {word}: {a} or {b}?", f"What is {word}: {a} or {b}?")
    )
    first, second = str(a), str(b)
    if len(first) != len(second):
        more, less = (first, second) if len(first) > len(second) else (second, first)
        thoughts = f"{more} has more digits than {less}, so {more} is larger."
    else:
        at = next(n for n in range(len(first)) if first[n] != second[n])
        place = ("ones", "tens", "hundreds")[len(first) - 1 - at]
        same = "" if at == 0 else "The digits before are equal. "
        thoughts = f"{same}{place.capitalize()}: {first[at]} and {second[at]}. So {max(a, b)} is larger."
    if not large:
        thoughts += f" The smaller is {min(a, b)}."
    return Question(text, thoughts, str(max(a, b) if large else min(a, b)))


def count_letter(chance: Chance) -> Question:
    """How often a letter is in a word."""
    word = chance.choice(chance.words)
    letter = chance.choice(word) if chance.random() < 0.85 else chance.choice("aeiorstlm")
    text = chance.choice(
        (
            f'How many times does the letter "{letter}" occur in "{word}"?',
            f"How many {letter}'s are in the word {word}?",
            f"How many {letter}s are in {word}?",
            f"Count the letter {letter} in {word}.",
        )
    )
    count, spelled = 0, []
    for it in word:
        count += it == letter
        spelled.append(f"{it} ({count})" if it == letter else it)
    return Question(text, f"I spell it: {', '.join(spelled)}. That makes {count}.", str(count))


def length(chance: Chance) -> Question:
    """How many letters a word has."""
    word = chance.choice(chance.words)
    text = chance.choice(
        (
            f"How many letters are in the word {word}?",
            f'How many letters does "{word}" have?',
            f"Count the letters of {word}.",
        )
    )
    return Question(text, f"I count: {', '.join(f'{it} {n}' for n, it in enumerate(word, 1))}.", str(len(word)))


def backwards(chance: Chance) -> Question:
    """A short word from its end."""
    word = chance.choice([it for it in chance.words if len(it) <= 6])
    text = chance.choice(
        (
            f'Write "{word}" backwards.',
            f"Spell {word} backwards.",
            f"Reverse the word {word}.",
            f"What is {word} spelled backwards?",
        )
    )
    return Question(text, f"Letters: {', '.join(word)}. From the end: {', '.join(word[::-1])}.", word[::-1])


def calendar(chance: Chance) -> Question:
    """Some days or months on or back."""
    names, unit = (DAYS, "days") if chance.random() < 0.65 else (MONTHS, "months")
    start, by, forward = chance.randrange(len(names)), chance.randrange(1, 6), chance.random() < 0.7
    what = "day of the week" if unit == "days" else "month"
    amount = f"{by} {unit}" if by > 1 else f"one {unit[:-1]}"
    text = chance.choice(
        (
            f"Which {what} is {amount} {'after' if forward else 'before'} {names[start]}?",
            f"If it is {names[start]} now, what {what} {'will it be in ' + amount if forward else 'was it ' + amount + ' ago'}?",
            f"What {what} comes {amount} {'after' if forward else 'before'} {names[start]}?",
        )
    )
    steps = [names[(start + (n if forward else -n)) % len(names)] for n in range(1, by + 1)]
    thoughts = f"I {'go on' if forward else 'go back'} from {names[start]}: {', '.join(f'{n} {it}' for n, it in enumerate(steps, 1))}."
    return Question(text, thoughts, steps[-1])


def units(chance: Chance) -> Question:
    """Hours in minutes, and the like."""
    one, many, what = chance.choice(UNITS)
    count = chance.randrange(2, 13 if many in (12, 24) else 16)
    plural = one if one == "dozen" else one + "s"
    text = chance.choice(
        (
            f"How many {what} are {count} {plural}?",
            f"How many {what} are in {count} {plural}?",
            f"Convert {count} {plural} to {what}.",
        )
    )
    total = count * many
    if many == 60:
        way = f"{count} x 6 = {count * 6}, so {count} x 60 = {total}."
    elif many in (12, 24):
        tens, rest = many // 10 * 10, many % 10
        way = f"{count} x {tens} = {count * tens}, {count} x {rest} = {count * rest}. Together {total}."
    else:
        way = f"{count} x {many} = {total}."
    return Question(text, f"One {one} is {many} {what}. {way}", f"{total} {what}")


def parity(chance: Chance) -> Question:
    """Odd or even."""
    n = chance.randrange(1, 1000)
    word = "even" if n % 2 == 0 else "odd"
    if chance.random() < 0.5:
        return Question(f"Is {n} odd or even?", f"The last digit is {n % 10}, which is {word}. So {n} is {word}.", word)
    asked = chance.choice(("odd", "even"))
    answer = "Yes" if asked == word else "No"
    return Question(
        f"Is {n} an {asked} number?",
        f"The last digit is {n % 10}, which is {word}. So {n} is {word}, and the answer is {answer.lower()}.",
        answer,
    )


def ordering(chance: Chance) -> Question:
    """Three numbers in order."""
    numbers = chance.sample(range(1, 100), 3)
    up = chance.random() < 0.7
    wanted = sorted(numbers, reverse=not up)
    way = (
        chance.choice(("from smallest to largest", "in ascending order"))
        if up
        else chance.choice(("from largest to smallest", "in descending order"))
    )
    text = chance.choice(
        (
            f"Sort {numbers[0]}, {numbers[1]}, {numbers[2]} {way}.",
            f"Put the numbers {numbers[0]}, {numbers[1]} and {numbers[2]} {way}.",
        )
    )
    word = "smallest" if up else "largest"
    thoughts = (
        f"The {word} is {wanted[0]}. Of {wanted[1]} and {wanted[2]} the {word} is {wanted[1]}. Last is {wanted[2]}."
    )
    return Question(text, thoughts, ", ".join(map(str, wanted)))


def sequence(chance: Chance) -> Question:
    """The next number of an even walk."""
    start, by = chance.randrange(1, 40), chance.choice((1, 2, 3, 4, 5, 10, -1, -2, -5))
    if by < 0:
        start += 40
    row = [start + by * n for n in range(5)]
    shown = ", ".join(map(str, row[:4]))
    text = chance.choice(
        (
            f"What comes next: {shown}, ?",
            f"What is the next number: {shown}?",
            f"Continue the sequence with one number: {shown}",
        )
    )
    sign = f"+ {by}" if by > 0 else f"- {-by}"
    return Question(
        text,
        f"Every step is {sign}: {row[0]} {sign} = {row[1]}, {row[1]} {sign} = {row[2]}. So {row[3]} {sign} = {row[4]}.",
        str(row[4]),
    )


def everyday(chance: Chance) -> Question:
    """Yes or no, from what everybody knows."""
    kind = chance.randrange(4)
    if kind == 0:  # sizes
        one, two = chance.sample(range(len(SIZES)), 2)
        a, b = chance.choice(SIZES[one]), chance.choice(SIZES[two])
        bigger = chance.random() < 0.5
        yes = (one > two) == bigger
        text = f"Is {a} {chance.choice(('bigger', 'larger')) if bigger else 'smaller'} than {b}?"
        thoughts = f"{_upper(a)} is {SIZE_WORDS[one]}, {b} is {SIZE_WORDS[two]}."
    elif kind == 1:  # what it can do
        verb = chance.choice(list(FACTS))
        yes = chance.random() < 0.5
        thing = chance.choice(FACTS[verb][0 if yes else 1].split(","))
        text = f"Can {thing} {verb}?"
        thoughts = f"{_upper(thing)} {'can' if yes else 'cannot'} {verb}."
    elif kind == 2:  # what it is
        wanted, is_one = chance.choice(list(KINDS)), chance.choice(list(KINDS))
        if chance.random() < 0.5:
            is_one = wanted
        thing = chance.choice(KINDS[is_one].split(","))
        yes = wanted == is_one or thing in KINDS[wanted].split(",")
        named = thing if is_one == "a color" else f"a{'n' if thing[0] in 'aeiou' else ''} {thing}"
        text = f"Is {named} {wanted}?"
        thoughts = f"{_upper(named)} is {wanted if yes else is_one}{'' if yes else f', not {wanted}'}."
    else:  # hot or cold
        things, is_so = chance.choice(WARM)
        thing, asked = chance.choice(things.split(",")), chance.choice(("hot", "cold"))
        yes = asked == is_so
        text, thoughts = f"Is {thing} {asked}?", f"{_upper(thing)} is {is_so}{'' if yes else f', not {asked}'}."
    answer = "Yes" if yes else "No"
    return Question(text, f"{thoughts} So the answer is {answer.lower()}.", answer)


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


FAMILIES: dict[str, Callable[[Chance], Question]] = {
    "sums": sums,
    "times": times,
    "compare": compare,
    "count letter": count_letter,
    "length": length,
    "backwards": backwards,
    "calendar": calendar,
    "units": units,
    "parity": parity,
    "ordering": ordering,
    "sequence": sequence,
    "everyday": everyday,
}


def questions(count: int, seed: int, without: frozenset[str] = frozenset()) -> list[tuple[str, Question]]:
    """Different questions with their families, as many of each as there are, in a mixed order."""
    chance = Chance(seed)
    found: dict[str, tuple[str, Question]] = {}
    for n in range(count * 20):
        family = list(FAMILIES)[n % len(FAMILIES)]
        question = FAMILIES[family](chance)
        if question.text not in without:
            found.setdefault(question.text, (family, question))
        if len(found) == count:
            break
    rows = list(found.values())
    chance.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=0, metavar="COUNT")
    parser.add_argument("--items", type=int, default=0, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", default="", metavar="FAMILY,FAMILY", help="leave these out of what is written")
    arguments = parser.parse_args()
    without = (
        frozenset()
        if arguments.seed == HELD_OUT_SEED
        else frozenset(it.text for _, it in questions(HELD_OUT, HELD_OUT_SEED))
    )
    left_out = set(arguments.without.split(","))
    for family, it in questions(arguments.traces or arguments.items, arguments.seed, without):
        if family in left_out:
            continue
        if arguments.traces:
            response = f"<think>\n{it.thoughts}\n</think>\n\n{it.answer}"
            print(json.dumps({"prompt": it.text, "response": response, "family": family}))
        else:
            print(json.dumps({"prompt": it.text, "answer": it.answer, "family": family}))


if __name__ == "__main__":
    main()
