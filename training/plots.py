"""The plot grammars of the stories, as data.

A plot is a list of beats (beginning, problem, turn, end) and every beat offers several wordings.
Each wording of a beat fits with each wording of the others, so any choice makes a sound story.
The fields in braces are filled by `stories.py`: `{Hero}` is the name, `{kind}` the animal,
`{she} {her} {obj} {self}` the hero's pronouns (with a capital: `{She} {Her}`), `{Helper}`,
`{helper}`, `{a_helper}`, `{hshe}` and `{Hshe}` the second character, `{thing}`, `{a_thing}`,
`{trait}` the object, `{place}`, `{where}`, `{spot}` the place.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plot:
    """One plot: its beats, and what can be asked about it afterwards.

    `mood_at` is the index of the beat before which a mood sentence fits. `themes` are the words by
    which a user may ask for the plot, `verbs` complete "a story about a fox who ... a lantern".
    """

    name: str
    themes: tuple[str, ...]
    verbs: tuple[str, ...]
    beats: tuple[tuple[str, ...], ...]
    mood_at: int
    what: str
    why: str
    helped: str
    found: str
    end: str
    moral: str
    short: str
    after: str


OPENINGS = (
    "Once upon a time there was {a_hero} called {Hero}, who lived {where}.",
    "{Where} lived {a_hero} called {Hero}.", "There was once {a_hero} named {Hero}, whose home "
    "was {where}.", "Long ago, {where}, there lived {a_hero} by the name of {Hero}.",
    "{Hero} was {a_hero} who lived {where}.",
)

PLOTS = (
    Plot(
        "lost", ("friendship", "losing something", "helping"),
        ("loses", "lost", "is looking for", "can't find"),
        (
            ("Of all {her} things, {Hero} loved {her} {thing} most, because it {trait}.",
             "{She} owned one treasure, {a_thing}. It {trait}."),
            ("One windy morning the {thing} was gone.",
             "But one evening {she} came home and the {thing} was nowhere to be seen.",
             "Then came a day when {she} could not find the {thing} anywhere."),
            ("{Hero} looked behind the door, under the bed and in every corner, but found nothing.",
             "{She} searched the whole morning, and a tear ran down {her} cheek."),
            ("\"Why are you so sad?\" asked {a_helper} called {Helper}. \"I have lost my {thing},\""
             " said {Hero}. \"Then let us look together,\" said {Helper}.",
             "Then {a_helper} named {Helper} came along. \"Four eyes see more than two,\" said "
             "{Helper}. \"I will help you.\""),
            ("They searched until the sun went down, and there it was, {spot}.",
             "They looked high and low, and at last {Helper} saw the {thing} {spot}."),
            ("{Hero} laughed with joy, and from that day on the two were friends.",
             "{Hero} thanked {Helper} with all {her} heart, and they walked home side by side."),
        ), 3,
        "{She} lost {her} {thing}.", "{Hero} was sad because the {thing} was lost.",
        "{A_helper} called {Helper} helped {obj} to look for the {thing}.",
        "They found the {thing} {spot}.", "In the end they found the {thing} {spot}, and {Hero} "
        "and {Helper} became friends.", "A search is shorter with a friend.",
        "{Hero} the {kind} lost {her} {thing}. {A_helper} called {Helper} helped {obj} to "
        "look, and they found it {spot}. They were friends from then on.",
        "The next morning {Hero} tied the {thing} to a long string so that it could never get lost "
        "again. {Helper} laughed so much that {hshe} fell over.",
    ),
    Plot(
        "found", ("honesty", "kindness", "finding something"),
        ("finds", "found", "discovers"),
        (
            ("One day {she} found {a_thing} {spot}. It {trait}.",
             "One morning something was lying {spot}. It was {a_thing}, and it {trait}."),
            ("{Hero} wanted to keep it, but {she} could not sleep that night. Somebody must be "
             "missing it.", "\"How lovely!\" thought {Hero}. \"But whose can it be?\""),
            ("So {she} went from door to door and asked everyone about the {thing}.",
             "So {she} carried the {thing} from house to house and asked everybody {she} met."),
            ("At the very last house sat {a_helper} called {Helper}, looking sad. \"That is my "
             "{thing}!\" cried {Helper}.", "In the evening {she} met {a_helper} named {Helper}. "
             "\"You have found my {thing}!\" said {Helper}. \"I thought it was gone forever.\""),
            ("{Hero} gave it back at once, and {Helper} was so glad that {hshe} made soup for two.",
             "{Hero} handed it over, and {Helper} danced with joy."),
            ("After that they shared the {thing}, one day each.",
             "{Hero} went home without the {thing}, but with a new friend."),
        ), 2,
        "{She} found {a_thing}.", "{Hero} was worried because somebody must be missing the "
        "{thing}.", "Nobody had to help {obj}, but {she} met {a_helper} called {Helper}, who "
        "owned the {thing}.", "{She} found the {thing} {spot}.",
        "In the end {Hero} gave the {thing} back to {Helper}, and they became friends.",
        "Giving something back can bring you more than keeping it.",
        "{Hero} the {kind} found {a_thing} {spot}. {She} asked everyone whose it was and gave it "
        "back to {a_helper} called {Helper}. So {she} won a friend.",
        "A week later {Helper} knocked on the door with a present. It was a second {thing}, just "
        "for {Hero}.",
    ),
    Plot(
        "storm", ("courage", "being brave", "fear", "a storm", "the night"),
        ("saves the night with", "is brave with", "guards"),
        (
            ("{She} was afraid of only one thing, and that was the dark.",
             "By day {she} was full of courage, but at night every sound made {obj} tremble."),
            ("One night a storm came up, and all the lights went out.",
             "Then one evening thick clouds rolled in, and it grew as black as ink."),
            ("Somewhere outside a voice called for help. It was {Helper}, {a_helper} who had lost "
             "the way.", "Through the rain {she} heard a small cry. {Helper} the {helper} was "
             "all alone {spot}."),
            ("{Hero} shook with fear. Then {she} took {her} {thing}, which {trait}, and stepped "
             "outside.", "\"I am afraid,\" thought {Hero}, \"but {Helper} is afraid too.\" {She} "
             "picked up {her} {thing}, which {trait}, and ran into the night."),
            ("Step by step {she} followed the voice until {she} found {Helper}, wet and cold.",
             "The wind howled, but {she} held the {thing} tight and did not turn back."),
            ("Soon both of them sat by a warm fire. \"You are the bravest {kind} I know,\" said "
             "{Helper}.", "When the sun rose, {Helper} was safe, and {Hero} was not afraid of "
             "the dark any more."),
        ), 2,
        "{She} had {a_thing} that {trait}.", "{Hero} was afraid of the dark.",
        "Nobody helped {obj}. {Hero} was the one who helped {Helper} the {helper}.",
        "{She} found {Helper} the {helper} out in the storm.",
        "In the end {Hero} saved {Helper} from the storm and was not afraid any more.",
        "Being brave means being afraid and going anyway.",
        "{Hero} the {kind} was afraid of the dark. One stormy night {she} took {her} {thing} and "
        "saved {a_helper} called {Helper}. After that the dark was not so bad.",
        "The next night {Helper} came back with a cake. They ate it in the dark, just for fun.",
    ),
    Plot(
        "contest", ("a contest", "being small", "winning", "a party"),
        ("wins with", "goes to a contest with", "shows everyone"),
        (
            ("Every summer there was a great contest {where}, and everyone showed something "
             "special.", "Once a year all the neighbours met for a feast and showed their finest "
             "things."),
            ("{Hero} had nothing but {a_thing}. It {trait}.",
             "All that {Hero} could bring was {a_thing}, which {trait}."),
            ("\"That is much too plain,\" said {Helper} the {helper}. Everyone laughed, and {Hero} "
             "looked at the ground.", "{Helper} the {helper} laughed out loud. \"What will you "
             "do with that?\""),
            ("But when {her} turn came, {she} took a deep breath and told the story of the "
             "{thing}.", "Still, {she} climbed onto the stage and showed what the {thing} could "
             "do."),
            ("It grew so quiet that you could hear a leaf fall, and then everybody clapped.",
             "Nobody had ever seen anything like it, and the clapping went on and on."),
            ("{Hero} won the first prize. Even {Helper} bowed and asked to hold the {thing} once.",
             "\"I was wrong,\" said {Helper}. \"Yours is the best of all.\" And they shared the "
             "prize."),
        ), 3,
        "{She} had {a_thing} that {trait}.", "{Hero} was sad because {Helper} laughed at the "
        "{thing}.", "Nobody helped {obj}, and {Helper} the {helper} even laughed at first.",
        "{She} found the courage to show {her} {thing}.", "In the end {Hero} won the contest "
        "with {her} {thing}, and {Helper} said sorry.", "Plain things can be the finest of all.",
        "{Hero} the {kind} brought {a_thing} to a contest. {Helper} the {helper} laughed at first, "
        "but {Hero} won the prize.", "The year after that, everyone came to the contest with "
        "{a_thing}. {Hero} brought a turnip.",
    ),
    Plot(
        "repair", ("patience", "mending", "learning", "work"),
        ("repairs", "breaks", "mends"),
        (
            ("{She} had {a_thing} from {her} grandmother. It {trait}.",
             "On {her} shelf stood {a_thing} that {trait}."),
            ("One day it fell to the floor and broke.",
             "But one morning there was a crack, and then a snap, and the {thing} was broken."),
            ("{Hero} pushed and pulled and pressed, but that only made it worse.",
             "{She} tried to mend it in a hurry, and it fell apart again."),
            ("\"Slowly,\" said {Helper}, {a_helper} who lived next door. \"One piece at a time.\"",
             "So {she} went to see {Helper}, {a_helper} who could mend anything. \"The best tool "
             "is patience,\" said {Helper}."),
            ("They worked for three days, and on the third evening the {thing} was whole again.",
             "Day after day they put the pieces together, until not one was missing."),
            ("You could still see a thin line, and {Hero} liked that part best.",
             "It was even better than before, and {Hero} gave {Helper} a big hug."),
        ), 3,
        "{She} had {a_thing}, and it broke.", "{Hero} was sad because the {thing} was broken.",
        "{A_helper} called {Helper} helped {obj} to mend the {thing}.",
        "{She} found out that {she} could mend the {thing} with patience.",
        "In the end {Hero} and {Helper} mended the {thing} together.",
        "With patience even broken things become whole.", "{Hero} the {kind} broke {her} "
        "{thing}. {A_helper} called {Helper} showed {obj} how to "
        "mend it, one piece at a time. In the end it was whole again.",
        "Soon the neighbours brought their broken things too, and {Hero} opened a little workshop.",
    ),
    Plot(
        "journey", ("a journey", "travelling", "adventure", "an adventure"),
        ("carries", "travels with", "delivers", "brings"),
        (
            ("One morning a letter came from {Helper}, an old friend. \"Please bring me "
             "{a_thing},\" it said.", "{Her} friend {Helper} the {helper} lived far away and "
             "wished for {a_thing}."),
            ("So {Hero} packed a bag, took the {thing}, which {trait}, and set out.",
             "{Hero} had just the right one. It {trait}. {She} packed it well and went on "
             "{her} way."),
            ("{She} crossed three hills, and then {she} came to a river without a bridge.",
             "On the second day a thick fog hid the road, and {she} did not know where to go."),
            ("\"I will not give up now,\" said {Hero}, and sat down to think.",
             "For a moment {she} wanted to turn back. Then {she} looked at the {thing} and "
             "smiled."),
            ("An old turtle heard {obj} and showed {obj} the way.",
             "A passing bird saw {obj} and called, \"Follow me!\""),
            ("At sunset {she} stood at the door of {Helper} the {helper}, who could hardly believe "
             "it. They talked until the stars came out.", "When {Helper} the {helper} opened the "
             "door and saw the {thing}, there was such joy "
             "that nobody thought of sleep."),
        ), 3,
        "{She} carried {a_thing} to {her} friend {Helper}.",
        "{Hero} went on a journey because {Helper} wished for {a_thing}.",
        "An animal on the road showed {obj} the way to {Helper}.",
        "{She} found the way to {Helper} the {helper}.", "In the end {Hero} reached {Helper} and "
        "gave {Helper} the {thing}.", "No road is too long when a friend is waiting.",
        "{Hero} the {kind} carried {a_thing} to {her} friend {Helper}, {a_helper}. The road was "
        "hard, but {she} did not give up, and they were happy to meet again.",
        "{Hero} stayed for a week. On the way home {she} sang so loudly that the hills sang back.",
    ),
    Plot(
        "quarrel", ("sharing", "a quarrel", "making friends", "friends"),
        ("shares", "quarrels about", "wants"),
        (
            ("{Her} neighbour was {Helper}, {a_helper}, and the two did everything together.",
             "{She} had one good friend, {a_helper} called {Helper}."),
            ("One day they saw {a_thing} {spot}. It {trait}, and both of them wanted it.",
             "One day they both found {a_thing} {spot}. It {trait}."),
            ("\"It is mine!\" said {Hero}. \"No, I saw it first!\" said {Helper}.",
             "They pulled from both sides, until they both fell into the mud."),
            ("They went home angry, and neither of them said good night.",
             "For three days they did not speak, and those days were very long."),
            ("Then {Hero} knocked at the door of {Helper}. \"You can have the {thing},\" {she} "
             "said. \"I would rather have you.\"", "On the fourth day {Hero} put the {thing} at "
             "the door of {Helper} with a note. \"It is no fun alone,\" said the note."),
            ("{Helper} smiled, and from then on the {thing} belonged to both of them.",
             "So they made a rule. On odd days it was for {Hero}, and on even days for {Helper}."),
        ), 3,
        "{She} wanted {a_thing}.", "{Hero} was angry because {Helper} wanted the {thing} too.",
        "Nobody helped {obj}. {Hero} and {Helper} the {helper} made peace by themselves.",
        "They found the {thing} {spot}.", "In the end {Hero} and {Helper} made peace and shared "
        "the {thing}.", "A friend is worth more than any treasure.",
        "{Hero} the {kind} and {her} friend {Helper}, {a_helper}, quarrelled about {a_thing}. Then "
        "{Hero} said sorry, and they shared it.", "Later they found a second {thing}, but they "
        "never used it. One was enough for two.",
    ),
    Plot(
        "mystery", ("a mystery", "a secret", "a surprise", "a strange noise"),
        ("hears", "hides", "wonders about"),
        (
            ("Every night at twelve {she} heard a strange noise.",
             "For a week there had been a strange sound at night."),
            ("Tap, tap, tap, it went, and nobody knew where it came from.",
             "It scratched and rattled, and in the morning there were tiny footprints on the "
             "floor."),
            ("{Hero} wanted to know the truth, so {she} hid and waited.",
             "\"I will find out,\" said {Hero}, and {she} followed the sound on the tips of {her} "
             "toes."),
            ("At midnight {she} saw a shadow {spot}. It was {Helper}, {a_helper} with {a_thing}.",
             "There, {spot}, sat {a_helper} called {Helper}, busy with {a_thing}."),
            ("The {thing} {trait}. \"It was meant to be a birthday surprise for you,\" said "
             "{Helper}.", "\"Oh no, you have found me,\" said {Helper}. \"I am making this "
             "{thing} for your birthday.\" It {trait}."),
            ("{Hero} laughed, and they celebrated the birthday right there in the middle of the "
             "night.", "{Hero} had never had a finer present, and the noise was never heard "
             "again."),
        ), 2,
        "{She} got {a_thing} from {Helper}.", "{Hero} was curious because there was a strange "
        "noise at night.", "Nobody helped {obj}. {A_helper} called {Helper} had made the noise.",
        "{She} found {Helper} the {helper} with {a_thing}.",
        "In the end it turned out that {Helper} had made the {thing} as a present for {Hero}.",
        "Some secrets are kept out of love.", "{Hero} the {kind} heard a strange noise every "
        "night. It was {Helper}, {a_helper}, who was making {a_thing} for {her} birthday.",
        "The next night it was quiet, and {Hero} could not sleep. So {Helper} tapped on the wall "
        "just once.",
    ),
)

# mood words -> (a sentence for the middle, a sentence for the end)
MOODS: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("funny", "silly", "hilarious", "crazy"): (
        ("Just then {she} sneezed so hard that {her} hat flew into a tree.",
         "{She} slipped on a banana skin, turned around twice and bowed, as if it had been a "
         "trick."),
        ("And the hat? It is still up there, and a pigeon lives in it.",
         "Everyone laughed, and a cow laughed loudest of all."),
    ),
    ("sad", "melancholy"): (
        ("It rained all day long, and nobody came by.",
         "{She} felt very small and very much alone."),
        ("But sometimes, when it rained, {Hero} still thought of that lonely day.",
         "And yet one little tear was left, and {Hero} kept it as a memory."),
    ),
    ("scary", "spooky", "creepy", "dark"): (
        ("A door creaked, and a cold wind blew, though every window was shut.",
         "Two yellow eyes were watching from the shadows."),
        ("But at midnight, they say, you can still hear footsteps there.",
         "The two yellow eyes blinked once and were gone."),
    ),
    ("happy", "cheerful", "nice", "sweet", "warm", "cute"): (
        ("The sun was shining, and even the clouds looked friendly.",
         "Somewhere somebody was baking bread, and the whole air smelled of it."),
        ("There was music and dancing until late in the night.",
         "And they were happy for many, many years."),
    ),
    ("calm", "bedtime", "sleepy", "quiet", "goodnight", "gentle"): (
        ("The world was quiet, and the evening light was soft.",
         "A gentle wind went through the grass and whispered hush."),
        ("Then the stars came out, and {Hero} fell asleep with a smile. Good night.",
         "The moon looked in at the window, and everyone slept. Sleep well."),
    ),
    ("exciting", "adventurous", "thrilling", "wild"): (
        ("{Her} heart beat like a drum. There was no time to lose!",
         "Suddenly the ground shook, and {she} only just jumped aside!"),
        ("What an adventure that had been!",
         "And {Hero} could hardly wait for the next adventure."),
    ),
    ("magic", "magical", "enchanted"): (
        ("All at once tiny sparks of silver floated through the air.",
         "A soft voice came from nowhere and said, \"Trust yourself.\""),
        ("And if you look closely, you can still see the silver sparks today.",
         "It was a kind of magic, and it never faded."),
    ),
}
