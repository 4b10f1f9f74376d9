"""Write benchmarks/corpora/*.jsonl: English texts on twenty topics, composed with a fixed seed.

    python benchmarks/write_corpora.py [FOLDER]

Each line is {"text", "topic"}. Texts of one topic share subjects and vocabulary, so nearest neighbors are meaningful.
Details with words of vocabulary.py follow the phrases, so that a corpus has thousands of distinct words. The name of a
file describes the lengths of its texts. The phrases were written for this purpose and are under this repository's
license.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from vocabulary import Words

SEED = 20261
# topic: subjects | actions | circumstances | questions
TOPICS = {
    "baking": (
        "the sourdough starter;a loaf of rye bread;the croissant dough;this sponge cake;the pizza crust;"
        "a tray of shortbread;the cinnamon roll filling;the wholemeal flour",
        "needs a slow rise in a cool kitchen;turns dry when the oven is too hot;"
        "keeps its shape if the butter stays cold;tastes better after a night of resting;"
        "rises unevenly without enough steam;collapses when the door is opened early",
        "especially at high altitude;before the first shaping;once the yeast has gone flat;with a pinch more salt;"
        "after forty minutes of baking;if the tin is not greased",
        "why does my dough not rise;how long should bread cool before slicing;substitute for baking powder;"
        "best flour for crusty rolls",
    ),
    "astronomy": (
        "the faint comet;a red dwarf star;the rings of Saturn;this spiral galaxy;the lunar eclipse;"
        "a pair of neutron stars;the solar wind;the new space telescope",
        "can be seen with ordinary binoculars;bends the light of objects behind it;"
        "reveals how planets form out of dust;sends out bursts of radio waves;moves a little closer every year;"
        "was photographed in infrared for the first time",
        "shortly after sunset in the west;far away from city lights;during the darkest week of the month;"
        "over several million years;as seen from the southern hemisphere;according to the observatory's survey",
        "when is the next meteor shower;how far away is the nearest star;"
        "difference between a comet and an asteroid;beginner telescope for planets",
    ),
    "cycling": (
        "the rear derailleur;a touring bicycle;this carbon frame;the tubeless tyre;the mountain trail;"
        "a long climb;the commuter's bike lane;the hydraulic brake",
        "needs adjusting after a hard fall;carries heavy bags without wobbling;loses pressure overnight;"
        "rewards a steady cadence;gets slippery under wet leaves;squeals until the pads are bedded in",
        "on the way down to the valley;when the chain is worn;in the first hour of a ride;"
        "with narrower handlebars;during the spring rains;at more than thirty kilometres an hour",
        "how to fix a slipping bike chain;right saddle height for long rides;tyre pressure for gravel roads;"
        "lights for commuting in winter",
    ),
    "tax": (
        "the income tax return;a self-employed designer;this deduction for home offices;"
        "the capital gains allowance;a late filing penalty;the payroll department;the value added tax invoice;"
        "the double taxation treaty",
        "must be filed before the end of the quarter;can be claimed only with receipts;"
        "applies to residents and non-residents alike;is reduced when losses are carried forward;"
        "depends on where the work was done;gets checked more often than people think",
        "for the previous financial year;unless an extension was granted;under the new thresholds;"
        "when two jobs overlap;if the amount exceeds the limit;as the revenue office explains",
        "deadline for filing taxes online;can I deduct a work laptop;how are freelance earnings taxed;"
        "what happens if I file late",
    ),
    "gardening": (
        "the tomato seedling;a raised bed;this climbing rose;the compost heap;the lavender hedge;a row of carrots;"
        "the apple tree;the greenhouse soil",
        "wants full sun and little water;suffers from slugs after rain;should be pruned back by a third;"
        "feeds the roots all summer;attracts bees from the whole street;fails where the ground stays wet",
        "in late winter before the buds open;next to a south-facing wall;every second week;"
        "with a layer of straw on top;until the last frost has passed;if the leaves turn yellow",
        "when to plant garlic;how to get rid of aphids naturally;best soil for blueberries;"
        "why are my cucumber leaves yellow",
    ),
    "medicine": (
        "the blood pressure reading;a seasonal flu vaccine;this course of antibiotics;the sprained ankle;"
        "a patient with migraines;the allergy test;the knee operation;the sleep clinic",
        "improves within a couple of days;should not be stopped too early;shows a risk that diet can lower;"
        "may cause mild side effects;calls for rest and a cold compress;"
        "is often confused with a more serious condition",
        "in adults over sixty;after a meal rather than before;according to the nurse on duty;"
        "when the fever persists;during pregnancy;without any change in dosage",
        "symptoms of iron deficiency;how long does a cold last;is it safe to mix painkillers;"
        "exercises for lower back pain",
    ),
    "football": (
        "the young goalkeeper;a late penalty;the home side;this midfield trio;the away supporters;"
        "the transfer window;a defensive mistake;the club's new coach",
        "turned the match around;was booed by half of the stadium;kept a clean sheet for the fifth time;"
        "pressed high and won the ball early;cost them a place in the final;"
        "signed a contract until the end of next season",
        "in the last minute of extra time;despite two players being injured;on a soaked pitch;"
        "after a long video review;in front of a record crowd;for the first time since the promotion",
        "who won the cup final last year;how does the offside rule work;top scorers this season;"
        "when does the transfer window close",
    ),
    "networking": (
        "the load balancer;a misconfigured firewall;this routing table;the wireless access point;the DNS resolver;"
        "a packet capture;the VPN tunnel;the fibre link",
        "drops connections under heavy traffic;caches stale answers for an hour;forwards requests to a dead host;"
        "needs a larger transmission unit;explains why the handshake fails;recovers only after a restart",
        "when both regions fail over;behind two layers of address translation;at the edge of the data centre;"
        "according to the switch logs;during the nightly backup;with IPv6 turned on",
        "why is my wifi slow at night;how to open a port on the router;what does connection reset by peer mean;"
        "difference between a switch and a hub",
    ),
    "databases": (
        "the primary index;a long transaction;this materialised view;the replica in the other zone;"
        "the query planner;a missing foreign key;the nightly vacuum;the connection pool",
        "locks more rows than expected;falls behind when writes pile up;chooses a full table scan;"
        "keeps old versions of each row;runs out of slots at peak hours;halves the time of the report",
        "after the schema migration;with ten million customers;until the statistics are refreshed;"
        "on the busiest shard;under serialisable isolation;when the disk is nearly full",
        "how to speed up a slow SQL join;when should I add an index;restore a table from backup;"
        "what is a deadlock in a database",
    ),
    "travel": (
        "the night train;a small guesthouse;this coastal path;the airport transfer;the old town market;"
        "a walking tour;the ferry to the islands;the border crossing",
        "sells out weeks before the holidays;offers breakfast with a view of the harbour;"
        "takes about three hours including a stop;is quieter in the shoulder season;accepts cash only;"
        "closes on the first Monday of the month",
        "for travellers with heavy luggage;from the main station;outside the summer months;"
        "with a reservation made by phone;at the far end of the bay;if the weather allows it",
        "cheapest month to fly south;do I need a visa for a short stay;things to see in two days;"
        "how early to arrive at the airport",
    ),
    "music": (
        "the string quartet;a minor seventh chord;this vinyl pressing;the jazz drummer;the choir's second soprano;"
        "a borrowed violin;the opening movement;the home recording",
        "builds up tension before the chorus;sounds warmer with old microphones;slips between two keys;"
        "was rehearsed in an empty church;holds the tempo back on purpose;moved part of the audience to tears",
        "in the slow third section;at the festival's closing night;without any amplification;"
        "after years of practice;on the first take;with brushes instead of sticks",
        "easy songs for beginner guitar;how to tune a ukulele;what does a producer do;how to read sheet music faster",
    ),
    "history": (
        "the medieval trade route;a forgotten treaty;this Roman aqueduct;the city's plague year;"
        "the diary of a merchant;the royal archive;an early printing press;the harvest failure",
        "changed how towns were governed;linked two seas for a hundred years;survives only in a later copy;"
        "led to riots in the capital;shows what ordinary people ate;was rebuilt with stones from the temple",
        "towards the end of the fourteenth century;long before the railways;under a rather weak king;"
        "in the words of one chronicler;when the river changed its course;despite a ban by the church",
        "causes of the fall of Rome;what did medieval peasants eat;who invented the printing press;"
        "timeline of the industrial revolution",
    ),
    "machine learning": (
        "the embedding model;a validation set;this attention layer;the learning rate schedule;"
        "the quantised network;a gradient spike;the training loss;the tokenizer",
        "overfits after a handful of epochs;loses little accuracy in eight bits;"
        "diverges when the batch is too small;maps similar sentences close together;splits rare words into pieces;"
        "runs faster in half precision",
        "on a single graphics card;with a warm-up of a thousand steps;compared with the full-precision baseline;"
        "when the labels are noisy;for short search queries;in the latest ablation",
        "what is a transformer model;how to choose a batch size;difference between precision and recall;"
        "why is my validation loss rising",
    ),
    "housing": (
        "the rental contract;a leaking roof;this ground-floor flat;the heating bill;the building inspection;"
        "a fixed-rate mortgage;the noisy neighbour;the deposit",
        "must be returned within two months;doubled after the cold spell;hides damp behind the wardrobe;"
        "is signed by every tenant;protects the buyer from rising interest;can be reported to the council",
        "before the keys are handed over;in buildings from the sixties;if nothing else was agreed in writing;"
        "at the landlord's expense;close to the tram line;when the windows are replaced",
        "how much notice to leave a flat;who pays for a broken boiler;is it better to rent or buy;"
        "how to stop mould on walls",
    ),
    "customer support": (
        "the missing parcel;a duplicate charge;this refund request;the account password;the warranty claim;"
        "a cancelled subscription;the delivery slot;the support agent",
        "has been forwarded to the billing team;shows up after three working days;"
        "cannot be changed once it is dispatched;requires the original order number;"
        "was resolved in one phone call;expires at the end of the trial",
        "for orders placed at the weekend;without logging in again;as our policy states;"
        "when the courier finds nobody at home;from the account settings page;if the item is unused",
        "where is my order;how do I reset my password;cancel my subscription today;I was charged twice this month",
    ),
    "climate": (
        "the glacier survey;a marine heatwave;this wind farm;the carbon price;the flooded delta;"
        "a drought-resistant crop;the peat bog;the emissions report",
        "stores more carbon than a forest;covers the needs of a small town;shrinks faster than the models said;"
        "threatens the coral along the coast;pushes utilities away from coal;has to be restored over decades",
        "in an average year;since the middle of the last century;at two degrees of warming;"
        "with support from local farmers;despite a wet autumn;according to the panel's figures",
        "how much does sea level rise each year;what is carbon capture;are heat pumps worth it;"
        "effects of drought on wheat",
    ),
    "pets": (
        "the rescue dog;an indoor cat;this pair of budgies;the puppy class;the aquarium filter;a nervous rabbit;"
        "the vet's scale;the new kitten",
        "barks whenever the postman comes;hides under the sofa for days;needs its teeth checked;"
        "should be cleaned in old tank water;learns faster with small treats;puts on weight after neutering",
        "during fireworks;in the first week at home;twice a year at least;when left alone too long;"
        "next to a quiet corner;without being scolded",
        "why does my cat wake me up;how often should I walk a puppy;foods that are toxic for dogs;"
        "how to introduce two cats",
    ),
    "law": (
        "the data protection notice;a written witness statement;this patent claim;the appeal court;"
        "the non-compete clause;an open-source licence;the contract of sale;the trademark owner",
        "is void if it was signed under pressure;sets out who may use the material;"
        "was rejected for lack of novelty;binds the parties for five years;has to be served in person;"
        "leaves the damages to a jury",
        "in most member states;unless both sides agree;on the second day of the hearing;"
        "after a narrow reading of the statute;when no fee was paid;with effect from January",
        "can my employer read my email;how long does a patent last;what counts as fair use;"
        "do I need a lawyer for small claims",
    ),
    "electronics": (
        "the soldering iron;a swollen battery;this voltage regulator;the oscilloscope trace;the circuit board;"
        "a noisy power supply;the temperature sensor;the stepper motor",
        "overheats without a heat sink;shows ringing on the rising edge;drifts by half a degree;"
        "must not be punctured or charged;needs a bigger capacitor at the input;skips steps under load",
        "at more than two amperes;with the ground clip attached;in the second revision;after a few hundred cycles;"
        "when the fan is blocked;on a breadboard",
        "how to test a capacitor;which resistor for an LED;why does my phone battery drain;"
        "what gauge wire for twelve volts",
    ),
    "school": (
        "the chemistry homework;a shy pupil;this reading group;the maths exam;the school library;"
        "a substitute teacher;the parents' evening;the science fair",
        "covers two chapters at once;gains confidence by explaining to others;is held in the main hall;"
        "counts for a third of the grade;runs out of copies every autumn;was moved because of the strike",
        "for the younger classes;before the half-term break;with a calculator allowed;at the end of a long day;"
        "since the timetable changed;under the new head of year",
        "how to study for a maths exam;tips for learning vocabulary;what is photosynthesis for kids;"
        "how long should homework take",
    ),
}
JOINERS = (
    "In practice",
    "Even so",
    "As a rule",
    "Most people find that",
    "It is worth knowing that",
    "By contrast",
    "Last year",
    "For that reason",
)
MAX_WORDS = 150  # less than 256 tokens, so that models with that limit do not truncate these texts
PASSAGE_WORDS = (224, 352)  # 256 to 512 tokens of BERT's tokenizer, including the prefix that makes inputs unique
# Number of texts. Each file stays under 400 kB.
SIZES = {"short": 1500, "paragraphs": 400, "mixed": 1000, "passages": 180}


def sentence(topic: str, draw: random.Random, joiner: bool = False) -> str:
    subjects, actions, circumstances, _ = (part.split(";") for part in TOPICS[topic])
    words = Words(draw)
    text = f"{draw.choice(subjects)} {draw.choice(actions)}"
    if draw.random() < 0.5:
        text += f" {draw.choice(circumstances)}"
    if draw.random() < 0.7:
        text += f" {words.detail()}"
    if joiner and draw.random() < 0.4:
        opening = draw.choice(JOINERS)
        text = f"{opening} {text}" if opening.endswith("that") else f"{opening}, {text}"
    return f"{text[0].upper()}{text[1:]}."


def query(topic: str, draw: random.Random) -> str:
    subjects, actions, circumstances, questions = (part.split(";") for part in TOPICS[topic])
    words = Words(draw)
    subject = draw.choice(subjects)
    bare = subject.split(" ", 1)[1]
    form = draw.randrange(6)
    if form == 0:
        return f"{draw.choice(questions)} {draw.choice(['', draw.choice(circumstances)])}".strip()
    if form == 1:
        return f"{bare} {words.detail()}"
    if form == 2:
        return (
            f"{draw.choice(['help with', 'advice on', 'cost of', 'problem with', 'news about'])} {bare} {words.name()}"
        )
    if form == 3:
        return f"{words.thing()} and {bare} {words.code()}"
    if form == 4:
        return f"{bare} or {words.things()} in {words.name()}"
    return f"{subject} {draw.choice(actions)}?"


def text_of(topic: str, words: int, draw: random.Random, most: int = MAX_WORDS) -> str:
    """Return a text of about `words` words on `topic`: a query if short, whole sentences if long."""
    if words < 9:
        return query(topic, draw)
    text = sentence(topic, draw)
    while len(text.split()) < min(words, most - 24):
        text += " " + sentence(topic, draw, joiner=True)
    return text


def corpus(name: str, size: int) -> Iterator[dict[str, str]]:
    draw = random.Random(f"{SEED} {name}")
    topics, seen = list(TOPICS), set()
    while len(seen) < size:
        topic = topics[len(seen) % len(topics)]
        if name == "short":
            text = query(topic, draw)
        elif name == "paragraphs":
            text = text_of(topic, draw.randint(40, 120), draw)
        elif name == "passages":
            text = text_of(topic, draw.randint(*PASSAGE_WORDS), draw, most=400)
        else:
            text = text_of(topic, round(draw.lognormvariate(math.log(21), 0.8)), draw)
        if text not in seen:
            seen.add(text)
            yield {"text": text, "topic": topic}


def main(folder: Path) -> None:
    for name, size in SIZES.items():
        lines = [json.dumps(line, ensure_ascii=False) for line in corpus(name, size)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} texts")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "corpora")
