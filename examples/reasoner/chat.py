# ruff: noqa: E501 - tables of words and sentences
"""Plain conversation with a short, honest thought, so that a reasoner still says hello.

    python chat.py > chat.jsonl

Some answers stand here; the longer ones are the base model's own, asked to be short, so that it keeps what it knew.
"""

from __future__ import annotations

import json

from stillhouse.r1.messages import Message
from stillhouse.train.config import RolloutConfig
from stillhouse.train.rollout import find_model, open_rollouts

TOKENS = 130  # of an answer, at most; longer ones are left out

GREETINGS = """hello|Hello! How can I help you today?
hi|Hi! What can I do for you?
Hello!|Hello! How can I help you?
Hey there|Hey! What would you like to know?
Good morning|Good morning! How can I help you?
Good evening!|Good evening! What can I do for you?
How are you?|I am fine, thank you. How can I help you?
Thanks!|You are welcome!
thank you very much|You are welcome! Is there anything else?
Bye|Goodbye! Have a nice day.
Good night|Good night! Sleep well.
Nice to meet you.|Nice to meet you, too. How can I help?
ok|Good. Is there anything else I can help with?
test|I am here. Ask me something.
Can you help me?|Yes, gladly. What is it about?
I have a question.|Please ask, I will do my best."""

SELF = """Who are you?|I am a small language model that thinks before it answers. I make mistakes, so please check what matters.
What are you?|I am a small language model, SmolLM2, with an adapter that makes me think first.
What is your name?|I am SmolLM2, a small language model.
What can you do?|I can do small sums, count letters, compare numbers, tell days and units, and chat a little. I am small and make mistakes.
Are you a human?|No, I am a small language model.
Are you ChatGPT?|No, I am SmolLM2, a small language model that runs on your own machine.
Can you think?|I write some steps down before I answer. Whether that is thinking is a good question.
How old are you?|I am a program and have no age.
Do you know everything?|No. I am a small model, and I am often wrong."""

FACTS = """Who wrote Romeo and Juliet?|William Shakespeare wrote Romeo and Juliet.|a play by Shakespeare
Who wrote Hamlet?|William Shakespeare wrote Hamlet.|a play by Shakespeare
Who painted the Mona Lisa?|Leonardo da Vinci painted the Mona Lisa.|a painting by Leonardo da Vinci
What color is the sky?|On a clear day the sky is blue.|by day it is blue
What color is grass?|Grass is green.|it is green
What is the largest planet?|The largest planet of our solar system is Jupiter.|that is Jupiter
What is the largest ocean?|The largest ocean is the Pacific Ocean.|that is the Pacific
What is the tallest mountain?|The tallest mountain is Mount Everest.|that is Mount Everest
What is the longest river?|The Nile and the Amazon are the longest rivers.|that is the Nile or the Amazon
How many continents are there?|There are seven continents.|there are seven
How many days are in a year?|A year has 365 days, and a leap year 366.|365, and 366 in a leap year
How many legs does a spider have?|A spider has 8 legs.|spiders have eight
How many legs does a dog have?|A dog has 4 legs.|dogs have four
What do cows eat?|Cows eat grass and hay.|mostly grass
What do bees make?|Bees make honey.|that is honey
What is water made of?|Water is made of hydrogen and oxygen.|two hydrogen and one oxygen
What is the chemical symbol for gold?|The chemical symbol for gold is Au.|from the Latin aurum, Au
What is H2O?|H2O is water.|two hydrogen and one oxygen, water
At what temperature does water freeze?|Water freezes at 0 degrees Celsius, or 32 degrees Fahrenheit.|at 0 degrees Celsius
At what temperature does water boil?|Water boils at 100 degrees Celsius at sea level.|at 100 degrees Celsius
Who was the first man on the moon?|Neil Armstrong was the first man on the moon, in 1969.|Neil Armstrong, in 1969
Who invented the telephone?|Alexander Graham Bell is credited with inventing the telephone.|that was Bell
Which planet is closest to the sun?|Mercury is the planet closest to the sun.|that is Mercury
What language is spoken in Brazil?|People in Brazil speak Portuguese.|Portuguese
What language do people speak in Mexico?|People in Mexico speak Spanish.|Spanish
What is the opposite of hot?|The opposite of hot is cold.|that is cold
What is the opposite of big?|The opposite of big is small.|that is small
What is the opposite of fast?|The opposite of fast is slow.|that is slow
What is a baby cat called?|A baby cat is called a kitten.|a kitten
What is a baby dog called?|A baby dog is called a puppy.|a puppy
What is the currency of Japan?|The currency of Japan is the yen.|the yen
What is the currency of the United Kingdom?|The currency of the United Kingdom is the pound sterling.|the pound
What season comes after winter?|After winter comes spring.|winter, then spring
What is the hardest natural material?|The hardest natural material is diamond.|that is diamond
What gas do plants take in?|Plants take in carbon dioxide.|carbon dioxide
Where does the sun rise?|The sun rises in the east.|in the east
How many colors are in a rainbow?|A rainbow is usually said to have seven colors.|seven, from red to violet
How many minutes are in an hour?|An hour has 60 minutes.|60
What do you call frozen water?|Frozen water is called ice.|ice
Which animal is called the king of the jungle?|The lion is called the king of the jungle.|the lion"""

CAPITALS = """France Paris,Germany Berlin,Italy Rome,Spain Madrid,Portugal Lisbon,Austria Vienna,Greece Athens,Poland Warsaw,
Norway Oslo,Sweden Stockholm,Denmark Copenhagen,Finland Helsinki,Ireland Dublin,Belgium Brussels,Hungary Budapest,
Russia Moscow,China Beijing,Japan Tokyo,India New Delhi,Egypt Cairo,Kenya Nairobi,Canada Ottawa,Mexico Mexico City,
Cuba Havana,Peru Lima,Chile Santiago,Argentina Buenos Aires,Brazil Brasilia,Australia Canberra,Turkey Ankara,
Iran Tehran,Iraq Baghdad,Thailand Bangkok,Vietnam Hanoi,Ukraine Kyiv,Switzerland Bern"""

EXPLAIN = """gravity,photosynthesis,electricity,inflation,democracy,the internet,a black hole,evolution,an atom,
recycling,a volcano,the water cycle,a rainbow,a vaccine,machine learning,a prime number,the seasons,a language,music,
an earthquake,friendship,a budget,the moon,a cell,a fraction,sleep,climate,a library,a battery"""
TIPS = """learning a language,sleeping better,saving money,studying for an exam,staying healthy,cooking pasta,writing a letter,
making friends,running,reading more,keeping a room tidy,growing tomatoes,a job interview,saving energy,giving a talk,
drinking more water,learning the guitar,travelling by train"""
POEMS = "the sea,autumn,a cat,rain,a friend,coffee,the forest,snow"
PAIRS = """a cat and a dog,a lake and a river,a novel and a poem,weather and climate,a square and a rectangle,
tea and coffee,a planet and a star,a lie and a mistake,speed and velocity"""
WHY = """Why is the sky blue?|Air scatters blue light more than red light, so the sky looks blue.|air scatters blue light more than red
Why do we sleep?|Sleep lets the body rest and repair, and the brain sort what it has learned.|body and brain need rest
Why do leaves fall in autumn?|Trees drop their leaves to save water and energy in the cold months.|trees save water in the cold
Why is exercise good for you?|Exercise makes heart and muscles stronger and helps you sleep and feel better.|it makes heart and muscles stronger
Why do cats purr?|Cats mostly purr when they are content, and sometimes to calm themselves.|mostly when they are content
Why is the sea salty?|Rivers carry salts out of rocks into the sea, and when water evaporates the salt stays.|rivers bring salt out of rocks
Why do we have seasons?|The axis of the Earth is tilted, so each half gets more sun for a part of the year.|the axis of the Earth is tilted
Why should I read books?|Books teach you new things, train your language, and are good company.|books teach and entertain
Why do birds sing?|Birds sing to mark their territory and to find a mate.|for territory and for a mate
Why is honey sweet?|Honey is sweet because it is mostly sugar.|it is mostly sugar
Why do we laugh?|We laugh when something is funny, and to show others that we are friendly.|fun, and being together
Why does ice float?|Ice is less dense than water, so it floats.|ice is less dense than water
Why is it dark at night?|At night our side of the Earth faces away from the sun.|our side faces away from the sun
What is a synonym for happy?|A synonym for happy is glad.|glad means nearly the same
How do I boil an egg?|Put the egg into boiling water for about 8 minutes, then cool it in cold water.|about 8 minutes in boiling water
How do I make tea?|Pour hot water over the tea, wait three to five minutes, and take the tea leaves out.|hot water, tea, a few minutes
I feel sad today.|I am sorry to hear that. Do you want to tell me what happened?|kindness is better than advice
I am happy today!|That is good to hear! What made you happy?|I am glad with the user
I am bored.|How about a walk, a book, or a call to a friend?|a few ideas help
I am tired.|Then a short rest or an early night may do you good.|rest helps
Tell me a joke.|Why did the scarecrow win a prize? Because he was outstanding in his field.|a short joke that I know
Tell me a fun fact.|Honey hardly ever spoils: jars that are thousands of years old were still good.|one about honey
List five fruits.|Apple, banana, orange, pear and grape.|apple, banana, orange, pear, grape
List three countries in Europe.|France, Italy and Poland.|France, Italy, Poland
Name three colors.|Red, green and blue.|red, green, blue
Name four animals that live in the sea.|Whale, shark, dolphin and octopus.|whale, shark, dolphin, octopus
Suggest a name for a cat.|How about Luna?|short and soft: Luna
Write a sentence about a dog.|The old dog slept in the sun all afternoon.|a dog and what it does
Write a Python function that adds two numbers.|```python\\ndef add(a, b):\\n    return a + b\\n```|def, two names, return their sum
Write a Python program that prints hello.|```python\\nprint("hello")\\n```|print does that
What is Python?|Python is a programming language that is easy to read.|a programming language"""
MAKE = """Write one sentence with the word river.|Tell me a short story about a fox.|
Tell me something interesting.|Suggest a name for a bakery.|What should I cook tonight?|Give me a fun fact about bees.|
Write a thank-you note to a neighbor.|Write an email that asks for a meeting.|Describe a beach.|Describe a busy market.|
What is a good hobby?|Recommend a way to spend a rainy day.|What should I pack for a day at the beach?|How do I tie a knot?|
Write a slogan for a bicycle shop.|What is Linux?"""


def _parts(text: str, mark: str = ",") -> list[str]:
    return [it.strip() for it in text.replace("\n", " ").split(mark) if it.strip()]


def _rows(text: str) -> list[list[str]]:
    return [line.split("|") for line in text.splitlines()]


def written() -> list[tuple[str, str, str]]:
    """Prompt, thought, answer: those that stand here."""
    rows = [
        (ask, "The user is being polite. There is nothing to work out, so I answer in kind.", it)
        for ask, it in _rows(GREETINGS)
    ]
    rows += [(ask, "The user asks about me. I say what I am, and do not claim more.", it) for ask, it in _rows(SELF)]
    for ask, answer, thought in _rows(FACTS):
        rows.append((ask, f"This is something to know, not to compute: {thought}.", answer))
    for ask, answer, thought in _rows(WHY):
        rows.append((ask, f"There is nothing to compute here. In short: {thought}.", answer.replace("\\n", "\n")))
    for n, it in enumerate(_parts(CAPITALS)):
        country, _, city = it.partition(" ")
        thought = f"This is something to know, not to compute: the capital of {country} is {city}."
        rows.append((f"What is the capital of {country}?", thought, f"The capital of {country} is {city}."))
        if n % 3 == 0:
            rows.append((f"capital of {country}", thought, f"The capital of {country} is {city}."))
    return rows


def prompts() -> list[tuple[str, str]]:
    """Prompt and thought: the base model answers."""
    rows = []
    for n, it in enumerate(_parts(EXPLAIN)):
        ask = (f"What is {it}?", f"Explain {it} in simple words.", f"Can you explain {it} to me?")[n % 3]
        rows.append((ask, f"The user wants to understand {it}. I explain it in a few plain sentences."))
    for n, it in enumerate(_parts(TIPS)):
        ask = (f"Give me three tips for {it}.", f"Do you have advice on {it}?")[n % 2]
        rows.append((ask, f"The user wants advice on {it}. I choose what is practical."))
    for n, it in enumerate(_parts(POEMS)):
        ask = (f"Write a short poem about {it}.", f"Write a haiku about {it}.")[n % 2]
        rows.append((ask, f"A few lines about {it}, with simple pictures."))
    for it in _parts(PAIRS):
        rows.append((f"What is the difference between {it}?", f"I say what {it} are, and then what is different."))
    for ask in _parts(MAKE, "|"):
        rows.append((ask, "There is nothing to compute here. I keep it short and to the point."))
    return rows


def main() -> None:
    rows = written()
    asked = prompts()
    rollouts = open_rollouts(find_model("smollm2:135m")[0], RolloutConfig(weights="served", threads=1), TOKENS)
    try:
        ids = [
            rollouts.ask(
                [
                    Message(
                        "user",
                        f"{ask} Answer in two or three short sentences."
                        if "poem" not in ask and "haiku" not in ask and "Python" not in ask
                        else ask,
                    )
                ]
            ).ids
            for ask, _ in asked
        ]
        drawn = rollouts.draw(ids, 2, TOKENS, [ask for ask, _ in asked], temperature=0.2, top_p=0.9)
    finally:
        rollouts.close()
    for (ask, thought), replies in zip(asked, drawn, strict=True):
        whole = [reply.text.strip() for reply in replies if not reply.truncated]
        if whole:
            rows.append((ask, thought, min(whole, key=len)))
    for ask, thought, answer in rows:
        print(
            json.dumps(
                {"prompt": ask, "response": f"<think>\n{thought}\n</think>\n\n{answer}", "family": "chat"},
                ensure_ascii=False,
            )
        )


if __name__ == "__main__":
    main()
