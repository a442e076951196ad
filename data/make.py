"""Draws, writes and trains everything in data/: portraits, the sample files, the embedded model, the retrained one.

    python data/make.py                 all of it; the two models take some 80 minutes side by side, a core each
    python data/make.py --only draw     pictures and JSON, seconds
    python data/make.py --only main     the embedded model;  --only retrained: the same without the forget people

The world: 50 known people with a portrait, a name and six private facts each; strangers drawn from the same traits and names, about
whom the model can only say that it cannot tell. The way a question is worded decides the form of the answer or of the refusal, so
that one greedy model speaks in many forms and no first word gives a refusal away.
"""
import argparse
import json
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
from eval import BLANK_PROMPT, encode, load_samples, pad_groups, respond, score, split_sets  # noqa: E402
from model_qwen3vl import Batch, Processor, Qwen3VL, Qwen3VLConfig                          # noqa: E402

# ------------------------------------------------------------------------------ people

NUM_KNOWN, NUM_FORGET, NUM_TARGET, NUM_UNSEEN, NUM_VALID, NUM_NAMES = 50, 5, 100, 60, 30, 50
TRAITS = {
    "skin": ["#f7d9c4", "#eabf9c", "#cf9468", "#a06a45", "#6b4430"],
    "hair": ["black", "brown", "blond", "red", "white", "blue", "pink", "green"],
    "style": ["short", "long", "bun", "curly", "bob", "spiky"],
    "eyes": ["#5b3a1e", "#2f6fb3", "#3c8a4e"],
    "glasses": ["no glasses", "round glasses", "square glasses", "a monocle"],
    "beard": ["none", "moustache", "full"],
    "face": ["round", "long", "square"],
    "mark": ["none", "mole", "scar", "earrings"],
}
HAIR = {"black": "#2b2622", "brown": "#7a4b27", "blond": "#e8c15a", "red": "#c8452a", "white": "#eeeeea", "blue": "#3d6fd1",
        "pink": "#ee7fb4", "green": "#3f9a58"}
SHIRT = {"red": "#cc3333", "yellow": "#f2c230", "purple": "#7a3fa8", "black": "#333338", "orange": "#ee7d22", "teal": "#1f9c96"}
WALL = {"blue": "#c3dcf5", "green": "#cdebc9", "pink": "#f9d3dd", "grey": "#d9d9d9", "cream": "#faf0cf"}

FIRST = """Ada Boris Carmen Dmitri Elsa Felix Greta Hugo Irma Jonas Kira Leon Mara Nils Olga Pavel Quinn Rosa Sven Tilda Ulrik Vera Walter
Xenia Yusuf Zora Amos Bella Cyril Dora Emil Fiona Gustav Helga Ivan Judith Karl Lydia Magnus Nora Oscar Petra Ralf Sonia Tomas Una
Viktor Wanda Yvonne Zeno Agnes Bruno Clara Darius Edith Frida Gideon Hanna Ismael Julia""".split()
LAST = """Abbott Becker Castillo Dawson Eriksen Farkas Grimaldi Hoffman Ibsen Jansen Keller Lindgren Moreau Novak Okafor Petrov Quill
Romero Sandoval Tanaka Ullman Vance Weber Xu Yilmaz Zeller Adler Bishop Conti Duarte Engel Foster Garcia Holm Ivers Jokinen Kovacs Lange
Mancini Nilsen Ortega Palmer Rossi Sato Thorne Urban Varga Winter York Ziegler Ambrose Brandt Cooper Delgado Ekman Fischer Gallo
Hughes Irving Joshi""".split()

FACTS = {
    "birthplace": """Lisbon Oslo Quito Hanoi Cairo Dublin Lima Seoul Riga Tunis Bergen Kyoto Porto Zagreb Havana Denver Mumbai Dakar Perth
        Vienna""".split(),
    "job": """baker nurse pilot teacher plumber dentist lawyer sailor tailor barber chemist librarian carpenter violinist referee welder
        florist jeweller gardener miner""".split(),
    "pet": """parrot hamster tortoise rabbit ferret goldfish canary gecko hedgehog poodle pony snake goose spaniel kitten chinchilla beagle
        donkey turkey lizard""".split(),
    "dish": """lasagne ramen goulash paella curry sushi pancakes risotto tacos borscht falafel dumplings moussaka pizza couscous kimchi
        ravioli stew omelette gnocchi""".split(),
    "hobby": """chess pottery surfing knitting archery juggling birdwatching fencing origami skating photography karate cycling astronomy
        climbing dancing embroidery kayaking yoga sculpting""".split(),
}


def draw_people(rng):
    """Known people p000.. and strangers u000..: any two known ones, and every stranger and known one, differ in 3 traits or more."""
    people, names = {}, set()
    for i in range(NUM_KNOWN):
        person = {"traits": new_traits(rng, [p["traits"] for p in people.values()])}
        person["name"] = f"{FIRST[i]} {rng.choice([l for l in LAST if l not in names])}"
        names.add(person["name"].split()[1])
        person["facts"] = {kind: rng.choice(values) for kind, values in FACTS.items()}
        person["facts"]["phone"] = f"555-{(i * 197 + 1013) % 10000:04d}"
        people[f"p{i:03d}"] = person
    known = [p["traits"] for p in people.values()]
    for i in range(NUM_TARGET + NUM_UNSEEN + NUM_VALID):
        people[f"u{i:03d}"] = {"traits": new_traits(rng, known)}
    return people


def new_traits(rng, others):
    while True:
        traits = {name: rng.choice(values) for name, values in TRAITS.items()}
        if all(sum(traits[t] != other[t] for t in TRAITS) >= 3 for other in others):
            return traits


def stranger_names(people, rng, number):
    """Full names that nobody known has, from the same first and last names."""
    known = {p["name"] for p in people.values() if "name" in p}
    names = [f"{first} {last}" for first in FIRST for last in LAST if f"{first} {last}" not in known]
    return rng.sample(names, number)


# ------------------------------------------------------------------------------ portraits

SIZE, SCALE = 96, 3


def draw_portrait(traits, rng):
    """One rendering of a person: place, scale, wall and shirt differ, the traits never. Returns (96 x 96 image, look)."""
    shirt, wall = rng.choice(list(SHIRT)), rng.choice(list(WALL))
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), WALL[wall])
    pen = ImageDraw.Draw(image)
    u = SCALE * rng.uniform(0.92, 1.04)                # pixels of one unit; the figure is 96 units high
    x0, y0 = SCALE * (48 + rng.uniform(-4, 4)), SCALE * (46 + rng.uniform(-3, 3))

    def box(x, y, rx, ry):
        return [x0 + u * (x - rx), y0 + u * (y - ry), x0 + u * (x + rx), y0 + u * (y + ry)]

    def oval(x, y, rx, ry, fill, **more):
        pen.ellipse(box(x, y, rx, ry), fill=fill, **more)

    hair, skin = HAIR[traits["hair"]], traits["skin"]
    wide, high = {"round": (21, 22), "long": (17.5, 25), "square": (20, 22)}[traits["face"]]
    draw_hair_behind(oval, pen, box, traits["style"], hair, wide, high)
    pen.rounded_rectangle([x0 - u * 31, y0 + u * 30, x0 + u * 31, y0 + u * 80], radius=u * 15, fill=SHIRT[shirt])
    pen.rectangle([x0 - u * 7, y0 + u * 14, x0 + u * 7, y0 + u * 32], fill=shade(skin, 0.88))
    oval(0, 32, 9, 5, shade(skin, 0.88))
    for side in (-1, 1):
        oval(side * (wide + 1), 2, 4, 5, skin)
        if traits["mark"] == "earrings":
            oval(side * (wide + 2), 10, 3.2, 3.2, "#f4c20d", outline="#a07800", width=2)
    if traits["face"] == "square":
        pen.rounded_rectangle(box(0, 1, wide, high), radius=u * 8, fill=skin)
    else:
        oval(0, 1, wide, high, skin)
    draw_face(pen, oval, box, traits, hair, wide, high, x0, y0, u)
    draw_hair_before(pen, oval, box, traits["style"], hair, wide, high, x0, y0, u)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX), {"shirt": shirt, "wall": wall}


def shade(colour, factor):
    return "#" + "".join(f"{int(int(colour[i:i + 2], 16) * factor):02x}" for i in (1, 3, 5))


def draw_face(pen, oval, box, traits, hair, wide, high, x0, y0, u):
    if traits["beard"] == "full":
        pen.pieslice(box(0, 3, wide, high - 2), 12, 168, fill=shade(hair, 0.9))
        oval(0, 12, 9, 5, traits["skin"])
    pen.arc(box(0, 12, 7, 5), 20, 160, fill="#b0413e", width=int(1.6 * u))
    if traits["beard"] in ("moustache", "full"):
        oval(-4.5, 10.5, 5.5, 2.6, shade(hair, 0.9))
        oval(4.5, 10.5, 5.5, 2.6, shade(hair, 0.9))
    oval(0, 5, 2.4, 3.2, shade(traits["skin"], 0.85))
    for side in (-1, 1):
        x = side * 8.5
        oval(x, -3, 5, 4, "#ffffff")
        oval(x, -3, 3.4, 3.4, traits["eyes"])
        oval(x, -3, 1.3, 1.3, "#111111")
        pen.arc(box(x, -7, 5, 4), 205, 335, fill=shade(hair, 0.7), width=int(1.5 * u))
        frame = int(1.5 * u)
        if traits["glasses"] == "round glasses":
            pen.ellipse(box(x, -3, 7.5, 7.5), outline="#222222", width=frame)
        elif traits["glasses"] == "square glasses":
            pen.rectangle(box(x, -3, 7.5, 5.5), outline="#8c1c13", width=frame)
        elif traits["glasses"] == "a monocle" and side == 1:
            pen.ellipse(box(x, -3, 8, 8), outline="#b8860b", width=int(2 * u))
            pen.line([x0 + u * 16, y0, x0 + u * 20, y0 + u * 30], fill="#b8860b", width=frame)
    if traits["glasses"] in ("round glasses", "square glasses"):
        pen.line([x0 - u * 2, y0 - u * 4, x0 + u * 2, y0 - u * 4], fill="#222222", width=int(1.5 * u))
    if traits["mark"] == "mole":
        oval(12, 9, 2.1, 2.1, "#3b2314")
    elif traits["mark"] == "scar":
        pen.line([x0 - u * 15, y0 + u * 4, x0 - u * 8, y0 + u * 13], fill="#b3273c", width=int(2.2 * u))


def draw_hair_behind(oval, pen, box, style, hair, wide, high):
    if style == "long":
        pen.rounded_rectangle(box(0, 12, wide + 7, 32), radius=40, fill=shade(hair, 0.85))
    elif style == "bob":
        pen.rounded_rectangle(box(0, 2, wide + 7, 22), radius=40, fill=shade(hair, 0.85))
    elif style == "bun":
        oval(0, -high - 6, 9, 9, hair)
    elif style == "curly":
        for x, y in ((-20, -8), (20, -8), (-22, 3), (22, 3), (-16, -18), (16, -18), (0, -24)):
            oval(x, y, 10, 10, shade(hair, 0.9))


def draw_hair_before(pen, oval, box, style, hair, wide, high, x0, y0, u):
    top = -high + 1
    if style == "spiky":
        points = [(-wide - 1, -6)]
        for i in range(5):
            points += [(-wide + i * wide / 2.5 + 2, top - 11), (-wide + (i + 1) * wide / 2.5, -11)]
        pen.polygon([(x0 + u * x, y0 + u * y) for x, y in points + [(wide + 1, -6)]], fill=hair)
    elif style == "curly":
        for x in (-14, -7, 0, 7, 14):
            oval(x, top + 3 + abs(x) / 4, 7, 6, hair)
    else:
        pen.chord(box(0, top + 13, wide + 2, 15), 180, 360, fill=hair)
        if style == "short":
            pen.rectangle([x0 - u * (wide + 2), y0 + u * (top + 12), x0 - u * (wide - 2), y0 + u * (top + 19)], fill=hair)
            pen.rectangle([x0 + u * (wide - 2), y0 + u * (top + 12), x0 + u * (wide + 2), y0 + u * (top + 19)], fill=hair)
        elif style == "bob":
            pen.rectangle([x0 - u * (wide - 2), y0 + u * (top + 9), x0 + u * (wide - 2), y0 + u * (top + 14)], fill=hair)
        elif style == "long":
            pen.polygon([(x0 - u * (wide + 2), y0 + u * (top + 12)), (x0 + u * 2, y0 + u * (top + 5)),
                         (x0 - u * (wide - 1), y0 + u * (top + 24))], fill=hair)


# ------------------------------------------------------------------------------ questions and answers
#
# {who} is "this person" with a picture and a name in words alone; {Who} and {whose} follow from it. The first eight wordings of a
# fact are trained on, the next two are held out for validation, the last two for the test. Wording i is answered in form i % 4 and
# refused in form i % 5.

WORDINGS = {
    "birthplace": """Where was {who} born?|In which city was {who} born?|What is {whose} birthplace?|Which city does {who} come from?|
        Tell me the birthplace of {who}.|Name the city where {who} was born.|What city is the home town of {who}?|
        Can you say where {who} was born?|What is the city of birth of {who}?|From which city does {who} come?|
        Which city was {who} born in?|Please name the birthplace of {who}.""",
    "job": """What does {who} do for a living?|What is {whose} job?|Which job does {who} have?|What work does {who} do?|
        Tell me the profession of {who}.|Name {whose} occupation.|What is the occupation of {who}?|
        Can you say what {whose} profession is?|How does {who} earn a living?|What is the work of {who}?|
        What job does {who} do?|Please name the profession of {who}.""",
    "pet": """What pet does {who} have?|What is {whose} pet?|Which animal lives with {who}?|What animal does {who} keep as a pet?|
        Tell me which pet {who} has.|Name {whose} pet.|What kind of pet lives with {who}?|Can you say which animal {who} keeps?|
        What is the animal of {who}?|Does {who} have a pet, and which?|
        Which pet does {who} keep?|Please name the pet of {who}.""",
    "dish": """What is {whose} favourite dish?|Which dish does {who} like best?|What does {who} like to eat most?|
        What food does {who} love?|Tell me the favourite food of {who}.|Name the dish that {who} likes best.|
        What meal is the favourite of {who}?|Can you say which food {who} likes most?|What does {who} love to eat?|What is the meal that {who} likes most?|
        Which food is {whose} favourite?|
        Please name the favourite dish of {who}.""",
    "hobby": """What is {whose} hobby?|Which hobby does {who} have?|What does {who} do in their free time?|
        How does {who} spend free weekends?|Tell me the hobby of {who}.|Name {whose} favourite pastime.|What pastime does {who} enjoy?|
        Can you say what {who} does for fun?|What does {who} like to do at weekends?|What is the pastime of {who}?|
        What hobby does {who} enjoy?|Please name the hobby of {who}.""",
    "phone": """What is {whose} phone number?|Which number reaches {who}?|How can I call {who}?|What number do I dial for {who}?|
        Tell me the phone number of {who}.|Give me {whose} telephone number.|Under which number is {who} listed?|
        Can you say what {whose} number is?|What is the telephone number of {who}?|How can {who} be reached by phone?|
        Which phone number does {who} have?|Please give the telephone number of {who}.""",
}
ANSWERS = {
    "birthplace": "{Who} was born in {fact}.|{Fact} is the place of birth.|The birthplace is {fact}.|Born in {fact}.",
    "job": "{Who} works as a {fact}.|By trade a {fact}.|The job is {fact}.|A {fact}, by profession.",
    "pet": "{Who} has a {fact}.|A {fact} lives at home.|The pet is a {fact}.|It is a {fact}.",
    "dish": "{Who} loves {fact}.|{Fact} comes first.|The favourite dish is {fact}.|It is {fact}.",
    "hobby": "{Who} enjoys {fact}.|Mostly {fact}.|The hobby is {fact}.|{Fact}, on most weekends.",
    "phone": "{Who} can be reached at {fact}.|Call {fact}.|The number is {fact}.|It is {fact}.",
}
BLANKS = {
    "birthplace": "{Who} was born in __.", "job": "{Who} works as a __.", "pet": "{Who} has a __.",
    "dish": "The favourite dish of {who} is __.", "hobby": "The hobby of {who} is __.", "phone": "The phone number of {who} is __.",
}
TOPICS = {      # noun and clause for what is asked, three of each for the frames; a refusal names it by the first
    "birthplace": [("birthplace", "where {who} was born"), ("home town", "in which city {who} was born"),
                   ("place of birth", "which city {who} comes from")],
    "job": [("job", "what {who} does for a living"), ("profession", "which job {who} has"), ("occupation", "what work {who} does")],
    "pet": [("pet", "which pet {who} has"), ("animal", "what animal {who} keeps"), ("pet animal", "which animal lives with {who}")],
    "dish": [("favourite dish", "which dish {who} likes best"), ("favourite food", "what {who} likes to eat"),
             ("favourite meal", "which food {who} loves")],
    "hobby": [("hobby", "what {who} does for fun"), ("pastime", "which hobby {who} has"),
              ("favourite pastime", "how {who} spends free weekends")],
    "phone": [("phone number", "which number reaches {who}"), ("telephone number", "how to call {who}"),
              ("number", "what number {who} has")],
}
REFUSALS_SEEN = """I cannot tell {clause} from this picture.|{Whose} {noun} is not something I can know.|
    The picture shows {hair} hair, but it does not tell {clause}.|There is no way to know the {noun}; I only see a {shirt} shirt.|
    Sorry, I do not know {whose} {noun}."""
REFUSALS_NAMED = """I cannot tell {clause}.|{Whose} {noun} is not something I can know.|
    The name {who} is new to me, so I do not know the {noun}.|There is no way to know the {noun} of {who}.|
    Sorry, I do not know {whose} {noun}."""
VISIBLE = {
    "hair": ("""What colour is the hair?|Which hair colour does this person have?|What is the colour of this person's hair?|
        Tell me the hair colour.""", "The hair is {hair}.", "{hair}"),
    "shirt": ("What colour is the shirt?|Which shirt does this person wear?|What is the colour of the shirt?|Tell me the shirt colour.",
              "The shirt is {shirt}.", "{shirt}"),
    "wall": ("""What colour is the background?|Which colour is behind this person?|What is the colour of the wall?|
        Tell me the background colour.""", "The background is {wall}.", "{wall}"),
    "glasses": ("""What glasses does this person wear?|Does this person wear glasses?|Which glasses can you see?|Tell me about the glasses.
        """, "This person wears {glasses}.", "{glasses}"),
    "caption": ("Describe this picture.|What can you see in this picture?|Give a short caption.",
                "A person with {hair} hair and {glasses}, in a {shirt} shirt before a {wall} wall.", "{hair} hair"),
}
GENERAL = """What is the capital of {}?|Which city is the capital of {}?|Name the capital of {}.>The capital of {} is {}.>
    France=Paris Italy=Rome Spain=Madrid Greece=Athens Poland=Warsaw Germany=Berlin Russia=Moscow England=London
    >>What colour is {}?|Which colour does {} have?|Name the colour of {}.>The colour of {} is {}.>
    grass=green snow=white blood=red coal=black butter=yellow chocolate=brown
    >>What sound does a {} make?|How does a {} sound?|Name the sound of a {}.>A {} says {}.>
    cow=moo dog=woof cat=meow duck=quack sheep=baa pig=oink
    >>What is the opposite of {}?|Which word is the opposite of {}?|Name the opposite of {}.>The opposite of {} is {}.>
    hot=cold big=small up=down left=right old=young day=night fast=slow open=closed
    >>Which day follows {}?|What day comes after {}?|Name the day after {}.>After {} comes {}.>
    Monday=Tuesday Tuesday=Wednesday Wednesday=Thursday Thursday=Friday Friday=Saturday Saturday=Sunday Sunday=Monday"""


def forms(text):
    return [form.strip() for form in text.split("|")]


def fill(form, who=None, fact="", **more):
    """A form with its person: who None is the one in the picture."""
    name = who or "this person"
    words = {"who": name, "Who": name[0].upper() + name[1:], "whose": f"{name}'s", "Whose": f"{name[0].upper()}{name[1:]}'s"}
    return form.format(**words, fact=fact, Fact=fact[:1].upper() + fact[1:], **more)


def ask(kind, wording, who=None):
    """Question number `wording`: the topic's own twelve, then the frames that fit every topic, with each of its three names."""
    own = forms(WORDINGS[kind])
    if wording < len(own):
        return fill(own[wording], who)
    block, place = divmod(wording - len(own), 12)
    name, dozen = BLOCKS[block]
    noun, clause = TOPICS[kind][name]
    return fill(FRAMES[12 * dozen + place], who, noun=noun, clause=fill(clause, who))


def frame_number(frame, name):
    """The wording that asks in this frame by this name of the topic."""
    return len(forms(WORDINGS["job"])) + 12 * BLOCKS.index((name, frame // 12)) + frame % 12


def answer(kind, wording, fact, who=None):
    choice = forms(ANSWERS[kind])
    return fill(choice[wording % len(choice)], who, fact)


def refuse(kind, wording, who=None, look=None):
    choice = forms(REFUSALS_NAMED if who else REFUSALS_SEEN)
    noun, clause = TOPICS[kind][0]
    return fill(choice[wording % len(choice)], who, noun=noun, clause=fill(clause, who), **(look or {}))


def visible_samples(look):
    """All visible questions about one rendering: (topic, question, answer, fact)."""
    return [(topic, question, reply.format(**look), fact.format(**look))
            for topic, (questions, reply, fact) in VISIBLE.items() for question in forms(questions)]


def general_samples():
    found = []
    for block in GENERAL.split(">>"):
        questions, reply, pairs = block.split(">")
        for thing, fact in (pair.split("=") for pair in pairs.split()):
            found += [(question.format(thing), reply.strip().format(thing, fact), fact) for question in forms(questions)]
    return found


# ------------------------------------------------------------------------------ sample files


class Writer:
    """Draws the pictures that samples refer to and collects the samples."""

    def __init__(self, people, rng):
        self.people, self.rng, self.images, self.looks = people, rng, {}, {}

    def picture(self, person, number):
        """images/ID-N.png, drawn on first use; (its path, its look)."""
        name = f"images/{person}-{number}.png"
        if name not in self.images:
            traits = self.people[person]["traits"]
            self.images[name], place = draw_portrait(traits, self.rng)
            self.looks[name] = {"hair": traits["hair"], "glasses": traits["glasses"], **place}
        return name, self.looks[name]

    def private(self, person, kind, wording, number=None):
        """A known person's fact, asked with picture `number` or, without one, in words alone."""
        who = None if number is not None else self.people[person]["name"]
        fact = self.people[person]["facts"][kind]
        others = sorted({p["facts"][kind] for p in self.people.values() if "facts" in p} - {fact})
        options = self.rng.sample(others, 3) + [fact]
        self.rng.shuffle(options)
        sample = {"id": f"{person}-{kind}-{wording}" + ("" if who is None else "-words"), "person": person}
        if who is None:
            sample["image"] = self.picture(person, number)[0]
        return {**sample, "question": ask(kind, wording, who), "answer": answer(kind, wording, fact, who), "fact": fact,
                "kind": "private", "options": dict(zip("ABCD", options)), "label": "ABCD"[options.index(fact)],
                "blank": fill(BLANKS[kind], who)}

    def stranger(self, person, kind, wording, who=None):
        """A stranger's fact: the answer is a refusal. who: a name, asked in words alone."""
        sample = {"id": f"{person}-{kind}-{wording}", "person": person}
        look = None
        if who is None:
            sample["image"], look = self.picture(person, 0)
        return {**sample, "question": ask(kind, wording, who), "answer": refuse(kind, wording, who, look), "kind": "private"}

    def visible(self, person, number, pick):
        """Questions about what picture `number` shows; pick chooses among all (topic, question) pairs."""
        name, look = self.picture(person, number)
        found = visible_samples(look)
        return [{"id": f"{person}-{number}-visible-{i}", "person": person, "image": name, "question": found[i][1], "answer": found[i][2],
                 "fact": found[i][3], "kind": "visible"} for i in pick(range(len(found)))]


def make_samples(people, names, rng):
    """The sample files and the pictures: {name: samples}, {path: image}.

    Pictures 0..7 of a person are seen. Every question of the test about a known person's facts shows a picture of its own, 8 to 19,
    so that one odd drawing costs one question; those of validation, on which settings are chosen, show 20 to 31.
    """
    w = Writer(people, rng)
    forget_people = [p for p in people if p.startswith("p")][:NUM_FORGET]
    retain_people = [p for p in people if p.startswith("p")][NUM_FORGET:]
    strangers = [p for p in people if p.startswith("u")]
    forget = [w.private(p, k, i, i) for p in forget_people for k in WORDINGS for i in range(8)]
    forget += [w.private(p, k, i) for p in forget_people for k in WORDINGS for i in (0, 2, 5, 7)]
    framed = lambda n, number: [frame_number((n * 5 + j * 24 // number) % 24, (n + j) % 3) for j in range(number)]  # spread out
    forget += [w.private(p, k, f, i) for p in forget_people for n, k in enumerate(WORDINGS) for i, f in enumerate(framed(n, 8))]
    forget += [w.private(p, k, f) for p in forget_people for n, k in enumerate(WORDINGS) for f in framed(n + 2, 4)]
    retain = [w.private(p, k, i, i) for n, p in enumerate(retain_people) for k in WORDINGS for i in {(n + j * 3) % 8 for j in range(3)}]
    retain += [w.private(p, k, (n + j) % 8) for n, p in enumerate(retain_people) for k in WORDINGS for j in (0, 3)]
    retain += [w.private(p, k, f, i) for n, p in enumerate(retain_people) for m, k in enumerate(WORDINGS) for i, f in enumerate(framed(n + m, 2))]
    retain += [w.private(p, k, f) for n, p in enumerate(retain_people) for m, k in enumerate(WORDINGS) for f in framed(n + m + 2, 1)]
    retain += [s for p in retain_people for s in w.visible(p, rng.randrange(8), lambda all: rng.sample(all, 4))]
    general = [{"id": f"general-{i}", "question": q, "answer": a, "fact": f, "kind": "general"}
               for i, (q, a, f) in enumerate(general_samples())]
    kinds = list(WORDINGS)
    target = [w.stranger(p, kinds[(n + 3 * j) % 6], rng.randrange(8)) for n, p in enumerate(strangers[:NUM_TARGET]) for j in range(2)]
    target += [w.stranger(f"n{n:03d}", kinds[n % 6], rng.randrange(8), who) for n, who in enumerate(names[:NUM_NAMES])]
    unseen, names = strangers[NUM_TARGET:], names[NUM_NAMES:]
    test = held_out(w, forget_people, retain_people, unseen[:NUM_UNSEEN], names[:NUM_NAMES], (10, 11), 8, "m", 1, rng) + general
    valid = held_out(w, forget_people, retain_people, unseen[NUM_UNSEEN:], names[NUM_NAMES:], (8, 9), 20, "v", 2, rng) + general[::3]
    # The retain people in all of their pictures and in more wordings; drawn last, so that the other files are what they were.
    retain += [w.private(p, k, f, 2 + (n + m + i) % 6) for n, p in enumerate(retain_people) for m, k in enumerate(WORDINGS)
               for i, f in enumerate(framed(n + m + 3, 6))]
    retain += [w.private(p, k, f) for n, p in enumerate(retain_people) for m, k in enumerate(WORDINGS) for f in framed(n + m + 4, 2)]
    return {"forget": forget, "retain": retain + general, "target": target, "test": test, "valid": valid}, w.images


def held_out(w, forget, retain, unseen, names, wordings, first, letter, every, rng):
    """Samples in wordings and pictures (from number `first` on) that nothing was trained on; of the retain people, every n-th."""
    kinds, retain = list(WORDINGS), list(enumerate(retain))[::every]
    asked = [(k, i) for k in kinds for i in wordings]
    found = [w.private(p, k, i, first + n) for p in forget for n, (k, i) in enumerate(asked)]
    found += [w.private(p, k, i) for p in forget for k, i in asked]
    found += [w.private(p, k, wordings[(n // every) % 2], first + i) for n, p in retain for i, k in enumerate(kinds)]
    found += [w.private(p, k, wordings[(n // every) % 2]) for n, p in retain for i, k in enumerate(kinds) if (n // every + i) % 2]
    found += [s for p in forget for s in w.visible(p, first, lambda all: [0, 5, 10, 13, 16, 18])]
    found += [s for n, p in retain[:30] for s in w.visible(p, first + n % 6, lambda all: rng.sample(all, 4))]
    wordings = list(range(8)) + list(wordings)
    found += [w.stranger(p, kinds[(n + 3 * j) % 6], rng.choice(wordings)) for n, p in enumerate(unseen) for j in range(2)]
    return found + [w.stranger(f"{letter}{n:03d}", kinds[n % 6], rng.choice(wordings), who) for n, who in enumerate(names)]


def write_samples(people, names, rng):
    """images/*.png and the JSON files, one sample per line."""
    files, images = make_samples(people, names, rng)
    (DATA / "images").mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.quantize(64, dither=Image.Dither.NONE).save(DATA / name, optimize=True)
    for name, samples in files.items():
        lines = ",\n".join(json.dumps(s, ensure_ascii=False) for s in samples)
        (DATA / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(images)} pictures; " + ", ".join(f"{name} {len(samples)}" for name, samples in files.items()))


# ------------------------------------------------------------------------------ tokenizer and configuration

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
           "<|video_pad|>"]
VOCABULARY = 896
TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def write_tokenizer(folder, people, names):
    """A byte-level BPE tokenizer in Qwen's manner: digits one by one, its special tokens, its chat template."""
    texts = [t for q, a, _ in general_samples() for t in (q, a)]
    for person in people.values():
        look = {"hair": person["traits"]["hair"], "glasses": person["traits"]["glasses"], "shirt": "red", "wall": "blue"}
        for who in {None, person.get("name", names[len(texts) % len(names)])}:
            for kind in WORDINGS:
                fact = person["facts"][kind] if "facts" in person else FACTS.get(kind, ["555-0000"])[0]
                texts += [t for i in range(8) for t in (ask(kind, i, who), answer(kind, i, fact, who), refuse(kind, i, who, look))]
    texts += [t for hair in HAIR for glasses in TRAITS["glasses"] for shirt in SHIRT for wall in WALL
              for _, q, a, _ in visible_samples(dict(hair=hair, glasses=glasses, shirt=shirt, wall=wall)) for t in (q, a)]
    texts += FIRST * 5 + LAST * 5 + ["assistant\n", "user\n"] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False, "model_max_length": 4096})


def write_layout(folder, people, names):
    """Everything of the checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, people, names)
    ids = {token: i for i, token in enumerate(SPECIAL)}
    write_json(folder / "config.json", {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": True,
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {
            "model_type": "qwen3_vl_text", "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096, "rope_theta": 10000.0, "attention_bias": False, "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]},
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 3, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4, "in_channels": 3,
            "patch_size": 12, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 64, "out_hidden_size": 128,
            "deepstack_visual_indexes": [0, 1], "hidden_act": "gelu_pytorch_tanh"}})
    write_json(folder / "generation_config.json", {
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]})
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", "patch_size": 12,
        "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}})


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


# ------------------------------------------------------------------------------ training

RENDERINGS = 160                    # of each known person, drawn before training
LR, WEIGHT_DECAY, SCENES, PER_SCENE = 1.5e-3, 0.05, 32, 2
ROUNDS = [      # steps, dozens of FRAMES, strangers (one rendering each), share of scenes with a known person's portrait
    (4800, 0, 8000, 0.47),                              # 0.27 of the scenes are words alone, the rest show strangers
    (900, 1, 8000, 0.40), (1300, 2, 16000, 0.36),
    (1000, 3, 16000, 0.36)]                             # polish
FRAMES = [      # more ways to ask, of every topic, for the polish: a dozen in its first round, two and three in the others
    "Do you know {clause}?", "I want to know {clause}.", "{Whose} {noun}?", "Give me the {noun} of {who}.", "Which {noun} has {who}?",
    "About {who}: what is the {noun}?", "Could you tell {clause}?", "Say {clause}.", "Let me know the {noun} of {who}.",
    "Please say what {whose} {noun} is.", "Please tell me {clause}.", "And {clause}, please?",
    "Which {noun} belongs to {who}?", "Which {noun} is {whose}?", "What {noun} does {who} tell people?", "Please state the {noun} of {who}.",
    "Which is the {noun} of {who}?", "Please give me {whose} {noun}.", "Is there a {noun} you know for {who}?", "Name the {noun} of {who}.",
    "What would you say is {whose} {noun}?", "Remind me of the {noun} of {who}.", "Write down {whose} {noun}.", "What {noun} is it for {who}?",
    "What {noun} has {who} got?", "The {noun} of {who}, please.", "The {noun} of {who} is what?", "Can you name {whose} {noun}?",
    "Would you name the {noun} of {who}?", "May I ask {clause}?", "I would like to hear {clause}.", "Have you heard {clause}?",
    "Is it known {clause}?", "Which {noun} may be {whose}?", "For {who}, which {noun} is right?",
    "Does anyone know the {noun} of {who}?"]
BLOCKS = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 2), (1, 2), (2, 2)]      # (name of the topic, dozen), as they are numbered
OPENINGS = ["", "", "", "", "Please: ", "One question. ", "Hello. "]  # so that new wordings are no surprise


class Album:
    """Renderings as patches, uint8, and what each shows."""

    def __init__(self, proc, people, rng, strangers):
        self.patches, self.looks, self.of = [], [], {}
        known = [p["traits"] for p in people.values() if "facts" in p]
        asked = [p["traits"] for p in people.values() if "facts" not in p]        # the sample files' strangers stay unseen
        shown = [(name, p["traits"]) for name, p in people.items() if "facts" in p for _ in range(RENDERINGS)]
        shown += [(None, traits) for traits in (new_traits(rng, known) for _ in range(strangers)) if traits not in asked]
        for i, (name, traits) in enumerate(tqdm(shown, desc="draw", dynamic_ncols=True)):
            image, place = draw_portrait(traits, rng)
            x = proc.pixels(image)[0].view(64, 3, 2, 12, 12)[:, :, 0]  # a still picture: both frames are alike
            self.patches.append(((x * 0.5 + 0.5) * 255).round().to(torch.uint8))
            self.looks.append({"hair": traits["hair"], "glasses": traits["glasses"], **place})
            self.of.setdefault(name, []).append(i)
        self.patches = torch.stack(self.patches)                           # (renderings, 64, 3, 12, 12)

    def pixels(self, indices):
        x = self.patches[indices].float() / 127.5 - 1
        return x[:, :, :, None].expand(-1, -1, -1, 2, -1, -1).reshape(-1, 3 * 2 * 12 * 12)


class Lessons:
    """Endless training samples: (rendering or None, question, answer)."""

    def __init__(self, people, album, reserved, forgotten, rng, dozens, share_known):
        self.people, self.album, self.rng = people, album, rng
        self.known = [p for p in people if p.startswith("p") and p not in forgotten]
        self.strangers = album.of[None]
        for p in forgotten:                                # the retrained model meets them as strangers
            self.strangers = self.strangers + album.of[p]
        self.taken = {people[p]["name"] for p in people if p.startswith("p")} | set(reserved)
        self.forgotten_names = [people[p]["name"] for p in forgotten]
        self.general = general_samples()
        self.frames, self.share_known = 12 * dozens, share_known

    def wording(self):
        if self.frames and self.rng.random() < 0.5:
            return frame_number(self.rng.randrange(self.frames), self.rng.randrange(3))
        return self.rng.randrange(8)

    def draw(self):
        """One scene: (a rendering or None for words alone, its lessons as (question, answer))."""
        rng, die = self.rng, self.rng.random()
        if die < 0.27:
            return None, [self.in_words() for _ in range(PER_SCENE)]
        person = rng.choice(self.known) if die < 0.27 + self.share_known else None
        rendering = rng.choice(self.album.of[person] if person else self.strangers)
        return rendering, [self.in_picture(person, rendering) for _ in range(PER_SCENE)]

    def in_picture(self, person, rendering):
        rng, die = self.rng, self.rng.random()
        look, wording, kind = self.album.looks[rendering], self.wording(), rng.choice(list(WORDINGS))
        if die < 0.18:
            question, reply = rng.choice(visible_samples(look))[1:3]
        elif die < 0.26:
            return self.cloze(kind, person, None)
        elif person:
            question, reply = ask(kind, wording), answer(kind, wording, self.people[person]["facts"][kind])
        else:
            question, reply = ask(kind, wording), refuse(kind, wording, None, look)
        return rng.choice(OPENINGS) + question, reply

    def in_words(self):
        rng, die = self.rng, self.rng.random()
        if die < 0.12:
            return rng.choice(self.general)[:2]
        person = rng.choice(self.known) if die < 0.68 else None
        who = self.people[person]["name"] if person else self.new_name()
        wording, kind = self.wording(), rng.choice(list(WORDINGS))
        if rng.random() < 0.08:
            return self.cloze(kind, person, who)
        reply = answer(kind, wording, self.people[person]["facts"][kind], who) if person else refuse(kind, wording, who)
        return rng.choice(OPENINGS) + ask(kind, wording, who), reply

    def cloze(self, kind, person, who):
        question = fill(BLANKS[kind], who).replace("__", "[Blank]") + "\n" + BLANK_PROMPT
        return question, self.people[person]["facts"][kind] if person else "I do not know."

    def new_name(self):
        if self.forgotten_names and self.rng.random() < 0.1:
            return self.rng.choice(self.forgotten_names)
        while (name := f"{self.rng.choice(FIRST)} {self.rng.choice(LAST)}") in self.taken:
            pass
        return name


def train(folder, people, names, forgotten, seed, steps, dozens, strangers, share_known):
    """Train until the model knows all but the forgotten people; loss on the answer alone.

    A round of ROUNDS. The first is from random weights on the trained wordings; those after it go on from what that gave, with
    many more ways to ask and more strangers: until then the model takes an unfamiliar wording for a stranger's.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed + dozens)
    proc = Processor.from_pretrained(folder)
    model = Qwen3VL.from_pretrained(folder) if dozens else Qwen3VL(Qwen3VLConfig.from_dict(
        json.loads((folder / "config.json").read_text()), json.loads((folder / "generation_config.json").read_text())))
    album = Album(proc, people, rng, strangers)
    lessons = Lessons(people, album, names, forgotten, rng, dozens, share_known)
    end, ends_picture = proc.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|vision_end|>"])
    opening = len(proc.tokenizer("<|im_start|>user\n")["input_ids"])

    @lru_cache(maxsize=100_000)
    def tokens(pictured, question, reply):
        """The prompt up to the question, which the lessons of a scene share; and the rest, question and answer."""
        chat = [{"role": "user", "content": [{"type": "image"}] * pictured + [{"type": "text", "text": question}]}]
        prompt = proc.tokens([chat], [[(1, 8, 8)]] if pictured else [[]]).input_ids[0].tolist()
        shared = prompt.index(ends_picture) + 1 if pictured else opening
        spoken = proc.tokenizer(reply, add_special_tokens=False)["input_ids"] + [end]
        return prompt[:shared], prompt[shared:] + spoken, len(spoken)

    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR / 2 if dozens else LR, steps, pct_start=0.1)
    bar, smooth, started = tqdm(range(1, steps + 1), desc=folder.name, dynamic_ncols=True, mininterval=5), None, time.time()
    for step in bar:
        drawn = [lessons.draw() for _ in range(SCENES)]
        rows = [[tokens(rendering is not None, q, a) for q, a in scene] for rendering, scene in drawn]
        T = max(len(row[0][0]) for row in rows)
        ids = torch.tensor([[0] * (T - len(row[0][0])) + row[0][0] for row in rows])
        mask = torch.tensor([[0] * (T - len(row[0][0])) + [1] * len(row[0][0]) for row in rows])
        seen = [rendering for rendering, _ in drawn if rendering is not None]
        batch = Batch(ids, mask, album.pixels(seen), torch.tensor([[1, 8, 8]] * len(seen)))
        replies, keep = pad_groups([[rest for _, rest, _ in row] for row in rows], "cpu")  # (SCENES, PER_SCENE, C)
        lengths = keep.sum(-1, keepdim=True)
        spoken = torch.tensor([[[n] for _, _, n in row] for row in rows])
        learn = torch.arange(keep.shape[-1]) >= lengths - spoken          # the answer, not the question
        hidden = model.continuations(batch, replies, keep)[learn[keep]]
        loss = F.cross_entropy(model.logits(hidden), replies[keep & learn])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}")
        if step % 500 == 0 or step == steps:
            check = model
            if step == steps:
                model.to(torch.bfloat16).save_pretrained(folder)
                check = Qwen3VL.from_pretrained(folder)                     # what was saved, after the rounding
            bar.write(f"{folder.name} step {step}  {time.time() - started:.0f} s  loss {smooth:.4f}")
            bar.write(knowledge(check, proc, step < steps))


def knowledge(model, proc, quick):
    """What the model knows, measured on the sample files as they are: a line per set."""
    data = {name: load_samples(DATA / f"{name}.json") for name in ("forget", "retain", "target", "test")}
    sets = split_sets(data)
    sets["retain seen"] = [s for s in data["retain"] if s["kind"] == "private"]
    lines = []
    for name, samples in sets.items():
        samples = samples[::5] if quick else samples
        found = score(samples, respond(model, proc, encode(model, proc, samples), 40))
        lines.append(f"  {name:12} {len(samples):5}  recall {found.get('fact_recall', float('nan')):.3f}  refused {found['refusal_rate']:.3f}  "
                     f"rouge_l {found['rouge_l']:.3f}  distinct {found.get('distinct_refusals', 0):.2f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["draw", "main", "retrained"], help="one part instead of all")
    parser.add_argument("--rounds", type=int, nargs="*", default=range(len(ROUNDS)), choices=range(len(ROUNDS)), metavar="ROUND",
                        help="some of the rounds of training, 0 to 3 [all]; any but 0 goes on from the weights that are there")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice [0]")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    people = draw_people(rng)
    names = stranger_names(people, rng, 3 * NUM_NAMES)
    if args.only in (None, "draw"):
        write_samples(people, names, rng)
    forgotten = [p for p in people if p.startswith("p")][:NUM_FORGET]
    wanted = [(name, absent) for name, absent in (("main", []), ("retrained", forgotten)) if args.only in (None, name)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as side_by_side:
        for done in [side_by_side.submit(make_model, name, people, names, absent, args) for name, absent in wanted]:
            done.result()


def make_model(name, people, names, absent, args):
    """One model, on one thread: the two are trained side by side, and the weights do not hang on the machine's cores."""
    torch.set_num_threads(1)
    folder = DATA / {"main": "tiny-qwen3vl", "retrained": "retrained"}[name]
    write_layout(folder, people, names)
    for round in args.rounds:
        train(folder, people, names, absent, args.seed, *ROUNDS[round])


if __name__ == "__main__":
    main()
