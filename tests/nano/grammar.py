"""English from a grammar: stories about which questions can be asked, facts, sums, lists, and conversations about them.

Everything is drawn from a `random.Random`; nothing else decides the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tests.nano import words as w

Turn = tuple[str, str]  # what the user says, what the model answers

_OPENINGS = (
    "Once upon a time there was {a} named {n}.",
    "There once was {a} whose name was {n}.",
    "In a quiet {home} lived {a} named {n}.",
    "{n} was {a} who lived near the {home}.",
    "Long ago, {a} named {n} lived by the old {home}.",
    "This is the story of {n}, {a}.",
)
_MORE = (
    "{n} was very {trait} and liked to {skill}.",
    "Everyone knew that {n} was {trait}.",
    "{n} loved {food} more than anything else.",
    "{n} had a {color} {thing2} and took it everywhere.",
    "{n} often felt {feeling}.",
    "Nobody in the {home} could {skill} as well as {n}.",
    "{P} had a friend called {h}, who was {trait2}.",
)
_WISH = (
    "One {weather} {time}, {n} lost a {color2} {thing}.",
    "One {weather} {time}, {n} wanted to find a {color2} {thing}.",
    "On a {weather} {time}, {n} heard of a {color2} {thing} that nobody had ever seen.",
    "One {weather} {time}, {p} dreamed of a {color2} {thing}.",
)
_JOURNEY = (
    "So {n} {moved} to the {place}.",
    "{n} took some {food2} and {moved} all the way to the {place}.",
    "{P} said goodbye and {moved} through the wind to the {place}.",
    "Without waiting, {n} {moved} to the {place}.",
    '"I will look in the {place}," said {n}, and {p} {moved} there at once.',
)
_TROUBLE = (
    "But the way was long, and {p} became {feeling2}.",
    "On the way it began to rain, and {p} had to wait under a tree.",
    "There {p} met a {size} {animal}, who looked {feeling2}.",
    "A {size} {animal} stood in the way and would not move.",
    "Suddenly {p} heard a strange noise. It was only a {size} {animal}.",
    "The {place} was dark, and {n} could not see a thing.",
)
_TALK = (
    '"Do you need help?" asked {h}.',
    '"Please help me," said {n}.',
    '"I am looking for a {color2} {thing}," said {n}.',
    '"Give me some {food2}, and I will show you the way," said the {animal}.',
    '{h} laughed and said, "Do not give up!"',
    '"Why are you so {feeling2}?" asked {h}.',
    '"We can do it together," {h} said.',
)
_FOUND = (
    "At last they found the {color2} {thing} under a {size2} {under}.",
    "In the end {n} saw the {color2} {thing} behind a {size2} {under}.",
    "Then {h} found the {color2} {thing} beside a {size2} {under}.",
    "And there it was: the {color2} {thing}, hidden below a {size2} {under}.",
)
_ENDINGS = (
    "{n} was {end} and went home with {h}.",
    "That night they ate {food} together, and {n} was {end}.",
    "From that day on, {n} and {h} were the best of friends.",
    "{n} thanked {h} and never forgot that day.",
    "{P} learned that a friend is worth more than any {thing}.",
    "They all laughed, and {n} felt {end}.",
)


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" or noun.startswith("honest") else "a ") + noun


class Story:
    """One story: `paragraphs`, and `questions` that its text answers."""

    def __init__(self, rng: Random, about: str | None = None):
        pick = rng.choice
        girl = rng.random() < 0.5
        animal = about or (pick(tuple(w.ANIMALS)) if rng.random() < 0.5 else None)
        trait = pick(w.TRAITS)
        hero = f"{pick(w.SIZES)} {animal}" if animal else f"{pick((trait, 'young', 'poor', 'little'))} {'girl' if girl else 'boy'}"
        s = {
            "n": pick(w.GIRLS if girl else w.BOYS), "p": "she" if girl else "he", "P": "She" if girl else "He", "a": article(hero),
            "home": pick(w.PLACES), "trait": trait, "trait2": pick(w.TRAITS), "skill": pick(w.SKILLS), "food": pick(w.FOODS),
            "food2": pick(w.FOODS), "color": pick(w.COLORS), "color2": pick(w.COLORS), "thing": pick(w.THINGS), "thing2": pick(w.THINGS),
            "feeling": pick(w.FEELINGS), "feeling2": pick(w.FEELINGS), "h": pick(w.BOYS if girl else w.GIRLS), "weather": pick(w.WEATHER),
            "time": pick(w.TIMES), "moved": pick(w.VERBS_MOVE), "place": pick(w.PLACES), "animal": pick(tuple(w.ANIMALS)),
            "size": pick(w.SIZES), "size2": pick(w.SIZES), "under": pick(("tree", "rock", "bush", "bench", "wall", "boat", "log", "wheel")),
            "end": pick(("happy", "proud", "grateful", "calm", "tired but happy")),
        }  # fmt: skip
        self.slots = s
        sample = rng.sample
        parts = (
            [pick(_OPENINGS), *sample(_MORE, rng.randint(1, 3))],
            [pick(_WISH), pick(_JOURNEY), *sample(_TROUBLE, rng.randint(1, 2)), *sample(_TALK, rng.randint(1, 3))],
            [pick(_FOUND), *sample(_ENDINGS, rng.randint(1, 2))],
        )
        self.paragraphs = [" ".join(parts_).format(**s) for parts_ in parts]
        n, p = s["n"], s["p"]
        self.questions: list[Turn] = [
            (f"What did {n} look for?", f"{n} looked for a {s['color2']} {s['thing']}."),
            (f"Where did {n} go?", f"{n} {s['moved']} to the {s['place']}."),
            (f"Where was the {s['thing']}?", f"The {s['thing']} was near a {s['size2']} {s['under']}."),
            (f"What color was the {s['thing']}?", f"The {s['thing']} was {s['color2']}."),
            (f"Who helped {n}?", f"{s['h']} helped {n}."),
            (f"Who was {n}?", f"{n} was {s['a']}."),
            (f"How did {n} feel at the end?", f"At the end {p} was {s['end']}."),
        ]
        if not any("{end}" in sentence for sentence in parts[2]):
            self.questions.pop()
        if not any("{h}" in sentence for part in parts for sentence in part):
            self.questions = [q for q in self.questions if not q[0].startswith("Who helped")]

    @property
    def text(self) -> str:
        return "\n".join(self.paragraphs)


def fact(rng: Random) -> Turn:
    """A question and a whole sentence that answers it."""
    pick, kind = rng.choice, rng.randrange(12)
    if kind < 3:
        name = pick(tuple(w.ANIMALS))
        group, legs, food, home, sound = w.ANIMALS[name]
        a = article(name)
        return pick((
            (f"What does {a} eat?", f"{a.capitalize()} eats {food}."), (f"Where does {a} live?", f"{a.capitalize()} lives in the {home}."),
            (f"How many legs does {a} have?", f"{a.capitalize()} has {w.NUMBERS[legs] if legs else 'no'} legs."),
            (f"What sound does {a} make?", f"{a.capitalize()} {sound}."),
            (f"What kind of animal is {a}?", f"{a.capitalize()} is {article(group)}."),
        ))  # fmt: skip
    if kind < 5:
        country = pick(tuple(w.COUNTRIES))
        capital, continent = w.COUNTRIES[country]
        return pick((
            (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
            (f"Where is {country}?", f"{country} is in {continent}."),
            (f"Which country has the capital {capital}?", f"{capital} is the capital of {country}."),
        ))  # fmt: skip
    if kind == 5:
        job = pick(tuple(w.JOBS))
        tool, does = w.JOBS[job]
        return pick(((f"What does {article(job)} do?", f"{article(job).capitalize()} {does}."),
                     (f"What does {article(job)} need?", f"{article(job).capitalize()} needs {tool}.")))  # fmt: skip
    if kind == 6:
        thing = pick(tuple(w.KINDS))
        color, feel = w.KINDS[thing]
        return pick(
            ((f"What color is {thing}?", f"The color of {thing} is {color}."), (f"How is {thing}?", f"{thing.capitalize()} is {feel}."))
        )
    if kind == 7:
        a, b = pick(w.OPPOSITES).split()
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return f"What is the opposite of {a}?", f"The opposite of {a} is {b}."
    if kind == 8:
        names = pick((w.MONTHS, w.DAYS))
        i = rng.randrange(len(names))
        return f"What comes after {names[i]}?", f"{names[(i + 1) % len(names)]} comes after {names[i]}."
    questions, answer = pick(w.EXPLANATIONS)
    return pick(questions), answer


def arithmetic(rng: Random) -> Turn:
    kind = rng.randrange(6)
    if kind < 3:
        top = rng.choice((10, 20, 100))
        a, b = rng.randrange(top), rng.randrange(top)
        question, result = (f"{a} + {b}", a + b) if kind < 2 else (f"{max(a, b)} - {min(a, b)}", abs(a - b))
        return rng.choice((f"What is {question}?", f"{question} = ?", f"Calculate {question}.")), f"{question} = {result}"
    if kind == 3:
        a, b = rng.randrange(11), rng.randrange(11)
        return f"What is {a} times {b}?", f"{a} times {b} is {a * b}."
    if kind == 4:
        a, b = rng.sample(range(1000), 2)
        return f"Which number is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."
    name, food, a, b = rng.choice(w.GIRLS), rng.choice(w.FOODS), rng.randint(1, 10), rng.randint(1, 10)
    return (f"{name} has {w.NUMBERS[a]} boxes of {food} and gets {w.NUMBERS[b]} more. How many does she have now?",
            f"{name} has {w.NUMBERS[a + b]} boxes of {food} now.")  # fmt: skip


def counting(rng: Random) -> Turn:
    kind = rng.randrange(5)
    if kind < 2:
        a, n, step = rng.randrange(100), rng.randint(4, 24), rng.choice((1, 1, 1, 2, 5, 10))
        numbers = ", ".join(str(a + i * step) for i in range(n))
        return f"Count from {a} to {a + (n - 1) * step}" + (f" in steps of {step}." if step > 1 else "."), f"{numbers}."
    if kind == 2:
        a, n = rng.randint(8, 60), rng.randint(4, 8)
        return f"Count down from {a} to {a - n}.", ", ".join(str(a - i) for i in range(n + 1)) + "."
    if kind == 3:
        names = rng.choice((w.MONTHS, w.DAYS))
        i, n = rng.randrange(len(names)), rng.randint(3, 6)
        return f"Name {w.NUMBERS[n]} {'months' if names is w.MONTHS else 'days'} from {names[i]} on.", (
            ", ".join(names[(i + j) % len(names)] for j in range(n)) + ".")  # fmt: skip
    word = rng.choice(w.NOUNS)
    return f"How do you spell {word}?", f"{word.capitalize()} is spelled " + "-".join(word.upper()) + "."


def copying(rng: Random, most: int = 24) -> Turn:
    """Words or digits to be said again, in order."""
    if rng.random() < 0.3:
        text = " ".join(str(rng.randrange(10 ** rng.randint(1, 5))) for _ in range(rng.randint(2, max(2, most // 3))))
    else:
        text = " ".join(rng.choice(w.NOUNS + w.COLORS + w.TRAITS) for _ in range(rng.randint(3, most)))
    return rng.choice(("Repeat this: {}", "Say this again: {}", "Copy these words: {}", "Please repeat: {}")).format(text), text


def request_story(rng: Random) -> Turn:
    about = rng.choice(tuple(w.ANIMALS)) if rng.random() < 0.7 else None
    story = Story(rng, about)
    if about:
        return rng.choice((f"Tell me a story about {article(about)}.", f"Write a short story about {article(about)}.")), story.text
    return rng.choice(("Tell me a story.", "Tell me a short story.", f"Tell me a story about {story.slots['n']}.")), story.text


def about_story(rng: Random) -> list[Turn]:
    """A story told by the user, then questions about it."""
    story = Story(rng)
    turns = rng.sample(story.questions, rng.randint(1, 3))
    first = rng.choice(("Read this story.\n{}\n{}", "{}\n{}", "Here is a story:\n{}\nNow answer: {}")).format(story.text, turns[0][0])
    return [(first, turns[0][1]), *turns[1:]]


def conversation(rng: Random) -> list[Turn]:
    """One to four turns about small things."""
    kind = rng.random()
    if kind < 0.2:
        return about_story(rng)
    makers = (fact, fact, fact, arithmetic, counting, copying, request_story)
    return [rng.choice(makers)(rng) for _ in range(rng.choice((1, 1, 2, 3, 4)))]


def passage(rng: Random) -> list[str]:
    """One to three lines of prose, each whole for itself: what documents and the filler of long contexts are made of."""
    kind = rng.random()
    if kind < 0.55:
        return Story(rng).paragraphs
    if kind < 0.8:
        return [" ".join(fact(rng)[1] for _ in range(rng.randint(2, 6)))]
    name, other = rng.choice(w.GIRLS + w.BOYS), rng.choice(w.GIRLS + w.BOYS)
    lines = (
        f"{name} and {other} went to the {rng.choice(w.PLACES)} on {rng.choice(w.DAYS)}. It was {rng.choice(w.WEATHER)}, and they ate"
        f" {rng.choice(w.FOODS)}.",
        f"In {rng.choice(w.MONTHS)}, the {rng.choice(tuple(w.JOBS))} bought {w.NUMBERS[rng.randint(2, 20)]} {rng.choice(w.COLORS)}"
        f" {rng.choice(w.THINGS)}s at the {rng.choice(w.PLACES)}.",
        f"{name} learned to {rng.choice(w.SKILLS)}. {other} was {rng.choice(w.FEELINGS)} and wanted to {rng.choice(w.SKILLS)} too.",
        f"There are {w.NUMBERS[rng.randint(2, 20)]} {rng.choice(w.SIZES)} {rng.choice(w.THINGS)}s in the {rng.choice(w.PLACES)}, and"
        f" {w.NUMBERS[rng.randint(2, 20)]} of them are {rng.choice(w.COLORS)}.",
    )  # fmt: skip
    return [" ".join(rng.sample(lines, rng.randint(1, 3)))]


# ---- what must be remembered over a distance ----


@dataclass(frozen=True)
class Secret:
    """A line to hide, the question about it, and the answer in three parts: a lead, the value (with its leading space), an end."""

    line: str
    question: str
    lead: str
    value: str
    end: str

    @property
    def answer(self) -> str:
        return self.lead + self.value + self.end


def passkeys(rng: Random, count: int) -> list[Secret]:
    """`count` keys of five digits; a single one may go without an owner."""
    if count == 1 and rng.random() < 0.5:
        key = f"{rng.randrange(100000):05}"
        line = rng.choice((f"The passkey is {key}. Remember it. {key} is the passkey.", f"Remember this: the passkey is {key}."))
        return [Secret(line, rng.choice(("What is the passkey?", "Tell me the passkey.")), "The passkey is", f" {key}", ".")]
    what = rng.choice(("passkey", "secret number", "code"))
    secrets = []
    for owner in rng.sample(w.GIRLS + w.BOYS, count):
        key = f"{rng.randrange(100000):05}"
        lead = f"The {what} of {owner} is"
        secrets.append(Secret(f"{lead} {key}.", f"What is the {what} of {owner}?", lead, f" {key}", "."))
    return secrets


def dictionary(rng: Random, count: int) -> list[Secret]:
    """`count` lines "key: value"; the values are all numbers, or all pairs of words."""
    digits = rng.random() < 0.5
    secrets = []
    for key in rng.sample(w.NOUNS, count):
        value = str(rng.randrange(1000, 10000)) if digits else f"{rng.choice(w.COLORS)} {rng.choice(w.NOUNS)}"
        secrets.append(Secret(f"{key}: {value}", f"What is the value of {key}?", f"{key}:", f" {value}", ""))
    return secrets
