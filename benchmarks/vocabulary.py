"""Thousands of words for benchmarks/write_corpora.py, built from the stems below and from syllables.

Real text has a long tail of inflected forms, names, numbers and codes. Without it, a server would find each word in its
cache. The lists were written for this purpose.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

NOUNS = (
    "account adapter agenda airline alarm album alley almond ambulance anchor angle animal antenna apartment apron "
    "arch archive arena armchair arrow article artist ashtray athlete attic auction author avenue badge bakery "
    "balcony ballot bandage banner barrel basin basket battery beach beacon beam bearing bedroom beetle bell bench "
    "berry bicycle bill biscuit blanket blossom boat bolt bonus boot border bottle boulder bowl bracket branch brick "
    "bridge broom brush bucket budget bulb bundle burner butcher button cabin cabinet cable cactus calendar camera "
    "campus canal candle canoe canvas captain caravan carpet cart castle catalog cave ceiling cellar chain chair "
    "chalk chamber channel chapel chapter charger chart cheese cherry chimney circuit cistern clamp clerk clinic "
    "clock closet cloud clutch coach coast coat collar colony column comet committee compass concert cone container "
    "contract cook copper corner corridor cottage couch counter coupon course cousin crane crate creek crop cupboard "
    "curtain curve cushion customer cyclist dairy deck depot desert desk detail device dial diary dish district "
    "doctor document dolphin dome donkey donor door dozen drawer driver drum eagle editor elbow elevator embassy "
    "engine envelope estate exhibit expert fabric factory falcon farmer fence ferry field figure filter finger flag "
    "flame flask flavor flight flood floor flute folder forest fork fortress fountain fox frame freezer fridge frog "
    "funnel gadget gallery garage garlic garment gate gear giant ginger glacier glove goat goose grain grape gravel "
    "grocer guard guest guide guitar hammer hamper handle harbor harness hatch hawk hedge heater helmet herb hinge "
    "hive hook horn hose hostel hotel hurdle icon island ivory jacket jar jewel jockey journal judge jug jungle "
    "kettle keyboard kiosk kitchen knee knife knot label ladder lagoon lamp lane lantern laptop laundry lawn layer "
    "leaflet ledger lemon lens lever library lid limb liner lizard loan lobby locker lodge loop lorry magnet mailbox "
    "manual maple marble margin market mast mattress meadow medal melon member memo menu mercury merger meter mill "
    "mirror module monument motor mountain mug museum mushroom napkin needle nephew nest network notebook novel "
    "nozzle nurse oak oar oasis object ocean office olive onion orbit orchard organ outlet oven oyster package paddle "
    "page paint palace panel paper parade parcel partner passport pasture path patrol pattern peach pebble pedal "
    "pencil pepper permit petal piano pillar pillow pilot pipe planet plank plate platform plug pocket poem pole pond "
    "porch portrait poster pot powder prism prize profile project pump puppet puzzle quarry quilt rabbit radio raft "
    "rail ranch razor receipt recipe record reef region report ribbon ridge rifle ring river robot rocket roof root "
    "rope rotor route rug saddle sailor salad sample sandal satellite sauce saucer scarf school scooter screen script "
    "seal season sensor service shelf shell shelter shield ship shirt shoulder shovel shrine shutter signal silo sink "
    "sketch sleeve slope socket sofa soldier song spade spark sparrow spice spider spoon spring square stable stadium "
    "stage stairway stamp statue steamer stem stool storm story stove strap stream street string studio suburb "
    "suitcase summit surface swan switch tablet tailor tank target teacher temple tenant tent terrace theater thread "
    "throne ticket tile timber tissue toaster tomb tool torch tower tractor trail trailer train tray treaty trophy "
    "truck trumpet trunk tunnel turbine turtle tutor umbrella uncle union unit valley valve van vase vault vehicle "
    "vendor vessel village vine violin visitor volcano voyage wagon waiter wallet walnut warden wardrobe warehouse "
    "watch waterfall wave wheel whistle widow willow window winery wing witness wolf workshop yacht yard"
).split()
VERBS = (
    "accept adapt adjust admire adopt advance afford align allow anchor answer appoint approach arrange arrest "
    "assemble assess attach attend avoid award balance blend block borrow bounce brighten broadcast brush buffer "
    "carve challenge charter chase claim clean collect comfort command compare complain compose confirm connect "
    "conquer construct consult convert correct count cover crack crush cultivate decorate defend delay deliver demand "
    "deny depart deserve design detect develop dismiss display dissolve divide document doubt drain draw drift earn "
    "edit employ enclose endorse enforce engage enjoy enlarge enter escort evaluate examine exceed exclude exhaust "
    "expand expect explore export expose extend extract favor filter finance finish flatten float fold follow forward "
    "frame gather govern grant guard guess handle harvest heat hinder honor host hunt ignore import impress improve "
    "include inform inherit inject insert inspect inspire install insult interview invent invest invite isolate join "
    "judge justify kick label launch lengthen level lift limit list load loosen manage march mark master measure melt "
    "mention merge migrate mix modify monitor mount narrow neglect observe obtain occupy offer open operate oppose "
    "order outline overlook pack paint park pause perform permit plant polish postpone praise predict prefer prepare "
    "present preserve press prevent produce promise promote protect prove publish punish purchase question quote "
    "raise reach recall recover reduce reflect regard reject relax release relieve remain remind remove render repair "
    "replace request rescue resist restore retire return reveal review reward roast rotate rush sail sample scatter "
    "search secure select separate settle shape sharpen shorten signal simplify skip smooth soften solve sort sponsor "
    "stretch submit suggest supply support surprise surround suspect sustain switch tackle target test thicken "
    "tighten trace track trade transfer translate transport treat trim trust tune twist undo unfold unlock update "
    "upgrade urge vanish visit vote wander warn wash weaken welcome widen witness wonder wrap yield"
).split()
ADJECTIVES = (
    "abrupt absent active actual adverse aged amber ample ancient annual anxious arctic ashen automatic awkward bare "
    "basic bitter blank bleak blunt bold brave brief bright brisk brittle broad bronze busy calm candid careful "
    "central certain cheap civil clean clear clever coarse cold common compact complete complex concrete constant "
    "correct costly crisp crooked crude curious current daily damp dark deep delicate dense digital direct distant "
    "double dry dull durable eager early elastic electric elegant empty equal even exact exotic external extra faint "
    "fair false famous fancy federal fierce final firm fixed flat flexible fluent foreign formal fragile frank free "
    "frequent fresh frozen full gentle genuine global golden grand gray great green hard harsh heavy hidden hollow "
    "honest humble humid icy ideal idle inner intense internal joint keen large late lavish lean legal level light "
    "linear liquid local loose loud loyal lucid lunar magnetic major marine massive mature mean mellow mild minor "
    "mobile modern modest moist moral muted mutual narrow national native neat nervous neutral noble nominal "
    "normal northern numb obscure odd open optical oral outer oval pale parallel partial patient perfect plain "
    "plastic polar polite poor portable precise primary prime private prompt proper proud public pure quick quiet "
    "random rapid rare raw ready real recent regular remote rich rigid ripe robust rough round royal rural rusty safe "
    "secret secure senior separate severe shallow sharp short silent silver simple slender slim slow small smart "
    "smooth social soft solar solid sour southern spare special stable stale steep sterile stiff strange strict "
    "strong subtle sudden sunny superb sweet swift tall tame tender tense thick thin thorough tidy tight tiny tough "
    "tropical true upper urban urgent usual vague valid vast vital vivid vocal warm weak wealthy wet whole wide wild "
    "wise wooden worthy young"
).split()
PARTS = (
    "al an ar bel ben bor bran cal cas cor dal dan del dor dun el en er fal fen fin gal gar gil glen hal han har hol "
    "il in jar jen kal kar kel kir lan lar len lin lor mal mar mel mir mon mor nal nar nel nor ol or os pal par pel "
    "per quin ral ran rav rol ros sal san sel sol sor tal tan tel tor ul um ur val van ven vor wal war wen wil yar "
    "zan zel zor"
).split()
ENDS = "a au berg by dale don e ek el ford ham ia ick in io is ley lo mere mond na o os ova ria rick sen ska us".split()
UNITS = (
    "km kg m cm mm l ml GB MB kW V A Hz °C % h min s EUR USD pages seats rows steps copies votes miles acres".split()
)
MONTHS = "January February March April May June July August September October November December".split()
_VOWELS = "aeiou"


def plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in _VOWELS:
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def inflected(verb: str, ending: str) -> str:
    """Return the verb with `ending`: ed, ing or er."""
    if verb.endswith("y") and verb[-2] not in _VOWELS and ending != "ing":
        return f"{verb[:-1]}i{ending}"
    stem = verb[:-1] if verb.endswith("e") else verb
    return f"{stem}{ending}"


def adverb(adjective: str) -> str:
    if adjective.endswith("y"):
        return f"{adjective[:-1]}ily"
    return f"{adjective[:-1]}y" if adjective.endswith("le") else f"{adjective}ly"


class Words:
    """Draw random words: a few are frequent and most are rare, as in real text (Zipf)."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._lists: dict[int, tuple[list[str], list[float]]] = {}

    def pick(self, words: Sequence[str]) -> str:
        if id(words) not in self._lists:
            shuffled = list(words)
            random.Random("order").shuffle(shuffled)
            weights = itertools.accumulate(1 / (rank + 20) for rank in range(len(shuffled)))
            self._lists[id(words)] = (shuffled, list(weights))
        shuffled, weights = self._lists[id(words)]
        return self._draw.choices(shuffled, cum_weights=weights)[0]

    def name(self) -> str:
        """Return an invented name of a person, a place or a company."""
        parts = [self._draw.choice(PARTS) for _ in range(self._draw.choice((1, 1, 2)))]
        return f"{''.join(parts)}{self._draw.choice(ENDS)}".capitalize()

    def number(self) -> str:
        """Return a number, as in `4,310`, `2.5` or `17`."""
        kind = self._draw.randrange(3)
        if kind == 0:
            return f"{round(10 ** self._draw.uniform(1, 6)):,}"
        return f"{self._draw.uniform(0, 50):.1f}" if kind == 1 else str(self._draw.randint(2, 99))

    def code(self) -> str:
        """Return a code, as in `KX-4713`."""
        letters = "".join(self._draw.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=2))
        return f"{letters}-{self._draw.randint(100, 9999)}"

    def thing(self) -> str:
        return f"{self.pick(ADJECTIVES)} {self.pick(NOUNS)}"

    def things(self) -> str:
        return f"{self.pick(ADJECTIVES)} {plural(self.pick(NOUNS))}"

    def detail(self) -> str:
        """Return a phrase that can end a sentence."""
        draw = self._draw
        return (
            lambda: f"as {self.name()} {self.name()} of {self.name()} {plural(self.pick(VERBS))}",
            lambda: f"with {self.things()} that {self.pick(VERBS)} {adverb(self.pick(ADJECTIVES))}",
            lambda: f"without {inflected(self.pick(VERBS), 'ing')} the {self.thing()}",
            lambda: f"near {self.name()}, where {self.things()} were {inflected(self.pick(VERBS), 'ed')}",
            lambda: f"since {draw.choice(MONTHS)} {draw.randint(1890, 2031)}",
            lambda: f"for about {self.number()} {draw.choice(UNITS)}",
            lambda: f"({self.pick(NOUNS)} {self.code()})",
            lambda: f"like a {self.thing()} or some {plural(self.pick(NOUNS))}",
            lambda: f"while the {inflected(self.pick(VERBS), 'er')} {plural(self.pick(VERBS))} {self.things()}",
            lambda: (
                f"because the {self.pick(NOUNS)} was {adverb(self.pick(ADJECTIVES))} "
                f"{inflected(self.pick(VERBS), 'ed')}"
            ),
        )[draw.randrange(10)]()
