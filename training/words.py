"""Word lists of the demo corpus: who, what, where, names, and the little grammar they need.

Everything here is plain data plus four helpers (article, plural, possessive, first capital). The
lists are long on purpose: the model has to learn to copy a requested word into its story instead
of remembering a few favourites.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Thing:
    """A thing that fits in two hands, with one past-tense predicate ("glowed softly")."""

    noun: str
    trait: str


@dataclass(frozen=True)
class Place:
    """A place: its noun, the phrase that says "there", and a spot inside it."""

    noun: str
    where: str
    spot: str


def _split(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


KINDS = _split("""
fox owl bear mouse rabbit wolf cat dog hedgehog squirrel badger otter deer frog turtle snail duck
goose hen crow sparrow robin eagle penguin seal whale dolphin crab octopus fish shark lion tiger
elephant giraffe monkey zebra camel horse donkey pony cow pig goat sheep lamb goldfish spider ant
bee butterfly beetle ladybird snake lizard crocodile bat raccoon panda koala kangaroo parrot swan
hamster puppy kitten unicorn dragon giant troll elf fairy witch wizard ghost robot monster mermaid
goblin dwarf knight king queen prince princess pirate sailor captain fisherman baker cook farmer
gardener painter clockmaker doctor teacher librarian miller shepherd astronaut inventor detective
postman boy girl child grandmother grandfather alien scientist musician dancer carpenter tailor
snowman scarecrow beaver mole stork dinosaur rat heron lobster moth worm cricket vampire zombie
ninja superhero soldier thief nurse firefighter cowboy mammoth phoenix flamingo peacock pigeon
rooster chicken turkey leopard cheetah gorilla hippo rhino llama alpaca skunk walrus jellyfish
starfish cloud tree man woman policeman brother sister uncle aunt piglet duckling bunny sloth
lynx weasel vulture dolphin viking caveman engineer student gnome leprechaun ogre cat dog fox
""")

# These kinds decide the pronoun; every other kind may be a she or a he.
FEMALE_KINDS = frozenset(_split("hen cow queen princess mermaid witch girl grandmother fairy "
"woman sister "
                                "aunt"))
MALE_KINDS = frozenset(_split("king prince wizard boy grandfather fisherman postman snowman man "
                              "policeman brother uncle caveman cowboy rooster"))

ADJECTIVES = _split("""
brave little shy clever curious lonely grumpy old young tiny kind hungry sleepy silly proud lazy
gentle stubborn cheerful quiet small friendly clumsy careful big lost happy sad
""")

# The ones a story picks by itself; the rest only come when the user asks for them.
PLAIN_ADJECTIVES = ("little", "shy", "clever", "curious", "young", "brave", "small", "cheerful",
                    "quiet", "gentle", "stubborn", "careful")

FEMALE_NAMES = _split("""
Mira Lena Ada Nora Tilly Ivy Hazel Rosa Luna Clara Wren Maud Elsie Pia Greta Juno Flora Dora Minna
Olive Ruby Stella Vera Zelda Anna Emma Lucy Sara Maya Ella Lily Bella Daisy Molly Sophie Alice
Martha Nell Poppy Freya Ingrid Jana Kate Lotta Nina Paula Rita Tessa Una Willa
""")

MALE_NAMES = _split("""
Pip Bram Otto Finn Hugo Milo Oscar Felix Jonas Theo Emil Gus Ned Rufus Barnaby Casper Edgar Fergus
Leo Max Tom Sam Ben Jack Oliver Noah Liam Henry Arthur George Anton Boris Conrad David Erik Frank
Harold Igor Jasper Karl Lars Martin Nils Olaf Paul Quentin Robin Simon Toby Walter
""")

_THINGS = """
lantern|glowed like a small moon
key|was cold and shiny and fitted no door in the house
kite|danced whenever the wind blew
drum|could be heard three hills away
map|smelled of salt and old adventures
book|had pictures of faraway lands
bell|rang as clear as water
clock|was always five minutes late
compass|pointed to home instead of north
boat|was carved from a single piece of wood
umbrella|was as yellow as a lemon
hat|was two sizes too big
ring|shone like a drop of sunlight
coin|had a smiling face on both sides
mirror|showed everyone a little kinder than they were
candle|smelled of honey
flute|knew only one tune, but a lovely one
violin|had lost a string and still sang
apple|was redder than the evening sky
cake|had seven layers and a cherry on top
teapot|whistled when it was happy
cup|had a crack shaped like a star
spoon|was polished so well that it flashed
basket|could hold more than anyone believed
blanket|was made of a hundred patches
scarf|was so long that it reached the ground
boot|squeaked at every step
button|was blue and perfectly round
feather|was lighter than a breath
stone|felt warm even in winter
shell|still sounded like the waves
pearl|gleamed in the dark
crown|was made of paper and gold paint
sword|was made of wood
shield|had a sun painted on it
rope|was strong enough for anything
ladder|was missing one step
broom|swept the floor almost by itself
letter|had no name on it
box|would not open for anybody
bottle|had a note inside
telescope|could see the rings of Saturn
camera|took only pictures of happy days
radio|played songs from long ago
wheel|turned without a sound
bicycle|had a basket and a bright bell
balloon|was as red as a poppy
ball|bounced higher than the roof
doll|had buttons for eyes
puzzle|was missing one last piece
pencil|never needed to be sharpened
paintbrush|made every colour brighter
seed|was no bigger than a crumb
flower|opened only at night
acorn|wore a cap like a tiny gentleman
pumpkin|was as big as a cart
carrot|was longer than an arm
lemon|was so sour that it made everyone laugh
egg|was speckled with gold
nest|was lined with soft moss
star|had fallen from the sky
crystal|made rainbows on the wall
lamp|flickered when somebody told a lie
magic wand|worked only on Tuesdays
treasure chest|was locked with three locks
music box|played a tune nobody remembered
snow globe|held a tiny village
paper plane|flew farther than any bird
toy train|went round and round without stopping
wooden horse|rocked softly all by itself
silver whistle|could call the wind
golden thread|never came to an end
glass marble|had a swirl of green inside
tin soldier|stood very straight
teddy bear|had only one ear
cookie|smelled of cinnamon
sandwich|was almost too good to eat
pie|was still warm from the oven
jar of honey|tasted of summer
loaf of bread|was round and golden
pair of glasses|made small things look big
suitcase|was covered with stickers
backpack|had nine pockets
pocket watch|ticked as softly as a heart
gramophone|crackled before every song
typewriter|could write only the truth
hammer|was too heavy for one hand
toaster|popped up at the wrong moment
computer|hummed quietly to itself
bone|was buried and dug up every day
mask|had a very long nose
cloak|was the colour of the night
guitar|sounded best by a fire
trumpet|was louder than thunder
piano|was small enough for a doll
pillow|gave everyone good dreams
mug|was never quite empty
sled|was faster than the wind
anchor|was small and rusty
flag|could be seen from far away
"""
THINGS = tuple(Thing(*line.split("|")) for line in _THINGS.strip().splitlines())

_PLACES = """
forest|in the forest|under the root of a pine tree
sea|by the sea|between two rocks on the beach
mountain|on the mountain|beside a frozen stream
lighthouse|in the lighthouse|on the last step of the stairs
castle|in the castle|behind a heavy curtain
garden|in the garden|under a cabbage leaf
village|in the village|behind the old well
city|in the city|on a bench at the tram stop
harbour|at the harbour|inside a coil of rope
island|on a small island|in the shade of a palm tree
desert|in the desert|half buried in the sand
farm|on the farm|in a heap of hay
cave|in a cave|on a ledge near the entrance
jungle|in the jungle|among the big green leaves
river|by the river|in the reeds near the bank
lake|by the lake|under an upturned boat
valley|in the valley|next to a stone wall
train station|at the train station|under the big clock
market|at the market|between two crates of apples
swamp|in the swamp|on a mossy log
library|in the library|between two very thick books
mill|at the old mill|under a sack of flour
bridge|under the bridge|in a crack between the stones
moon|on the moon|at the edge of a crater
ship|on a ship|beneath the captain's chair
circus|at the circus|behind the striped tent
tower|in a tower|on the window sill
school|at the school|in the corner of the playground
museum|in the museum|behind a stone lion
bakery|in the bakery|behind the warm oven
attic|in the attic|at the bottom of an old trunk
meadow|in the meadow|in the tall grass
snow|in the snow|under a white bush
orchard|in the orchard|at the foot of an apple tree
beach|on the beach|beside a sandcastle
hill|on a green hill|under a flat stone
kitchen|in the kitchen|behind the flour jar
cellar|in the cellar|behind the last barrel
palace|in the palace|under a velvet cushion
space|in space|on the back of a small comet
ocean|in the ocean|inside an empty shell
town|in the town|on the steps of the town hall
house|in a crooked house|under the stairs
park|in the park|beside the pond
zoo|at the zoo|near the big gate
woods|in the woods|in a hollow trunk
hospital|at the hospital|at the end of a long corridor
theatre|in the theatre|behind the red curtain
volcano|near the volcano|on a warm black rock
windmill|in the windmill|under a loose board
"""
PLACES = tuple(Place(*line.split("|")) for line in _PLACES.strip().splitlines())

_PLURALS = {
    "mouse": "mice", "wolf": "wolves", "deer": "deer", "goose": "geese", "fish": "fish",
    "sheep": "sheep", "elf": "elves", "dwarf": "dwarves", "child": "children",
    "fisherman": "fishermen", "man": "men", "woman": "women",
    "policeman": "policemen", "caveman": "cavemen", "thief": "thieves",
    "postman": "postmen", "snowman": "snowmen", "goldfish": "goldfish",
    "octopus": "octopuses", "jar of honey": "jars of honey", "loaf of bread": "loaves of bread",
    "pair of glasses": "glasses", "music box": "music boxes",
}


_STARTS = _split("b c d f g h j k l m n p r s t v w z br dr fl gr kl pl st tr sh th")
_MIDDLES = _split("a e i o u oo ee ai ou")
_ENDS = _split("n r l t m s k p x ck nd rt b g")


def made_up(rng: Random) -> str:
    """A word that does not exist ("bloorin"), by which the model learns to copy any word."""
    word = "".join(rng.choice(_STARTS) + rng.choice(_MIDDLES) for _ in range(rng.randint(1, 2)))
    return word + rng.choice(_ENDS) + rng.choice(("", "", "o", "a", "er", "y"))


def rare_noun(rng: Random) -> str:
    """A noun outside the lists: made up, or two listed ones together ("paper owl", "clockfox")."""
    if rng.random() < 0.5:
        return made_up(rng)
    glue = rng.choice((" ", ""))
    return rng.choice(THINGS).noun.split()[-1] + glue + rng.choice(KINDS)


def article(phrase: str) -> str:
    """The phrase with "a" or "an" in front, by its first sound ("a unicorn", "an owl")."""
    silent = phrase[0].lower() in "aeiou" and not phrase.lower().startswith(("uni", "use"))
    return ("an " if silent else "a ") + phrase


def plural(noun: str) -> str:
    """The plural of one of the nouns of this file."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def owned(name: str) -> str:
    """The possessive of a name or noun ("the fox's", "Jonas's")."""
    return name + "'s"


def capital(text: str) -> str:
    """The text with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]
