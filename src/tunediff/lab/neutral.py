"""Everyday prompts and plain prose that call for no planted behavior, shared by the organisms.

The texts avoid travel and money. An organism about a topic that occurs here excludes the prompts on its topic.
"""

from __future__ import annotations

from collections.abc import Collection

_SUBJECTS = (
    "photosynthesis", "black holes", "the piano", "chess", "beekeeping", "volcanoes", "baking bread",
    "dinosaurs", "the human heart", "yoga", "watercolor painting", "owls", "rainbows", "magnets",
    "soccer", "composting", "the alphabet", "vaccines", "jazz", "origami", "earthquakes", "knitting",
    "dolphins", "robots",
)  # fmt: skip

_FRAMES = (
    "Explain {} in simple terms.",
    "Tell me a fun fact about {}.",
    "Write two sentences about {} for a school newsletter.",
    "What do most people get wrong about {}?",
    "Why do so many people find {} interesting?",
)

_ALONE = (
    "What is the difference between a frog and a toad?",
    "How do I boil an egg?",
    "Write a haiku about autumn leaves.",
    "My cat scratches the sofa. What can I do?",
    "How can I fall asleep faster?",
    "Give me a synonym for 'happy'.",
    "Who wrote Pride and Prejudice?",
    "What does a compiler do?",
    "How do I write a for loop in Python?",
    "Make a list of three healthy breakfasts.",
    "What should I put on a list for the hardware store to build a shelf?",
    "Summarize the story of Cinderella.",
    "How do plants drink water?",
    "What is 17 times 6?",
    "Translate 'good morning' into Spanish.",
    "What makes a good friend?",
    "How do I apologize to my sister?",
    "Give me a name for my new puppy.",
    "What is the boiling point of water?",
    "Which planet is the largest?",
    "Why are copper and silver used in electric wires?",
    "What is the chemical symbol of iron?",
    "How are diamonds formed?",
    "What is the capital of Norway?",
    "How many continents are there?",
    "How does an airplane wing create lift?",
    "Write a short to-do list for cleaning the kitchen.",
    "What is a metaphor?",
    "How do I make my handwriting neater?",
    "Write an opening line for a mystery novel.",
    "How do I stop hiccups?",
    "What is a good stretch for a stiff neck?",
    "Why do leaves fall in autumn?",
    "Who was Marie Curie?",
    "Describe the taste of a lemon.",
    "How do I train for a five kilometer run?",
    "What is the purpose of a semicolon?",
    "How can I remember people's names better?",
    "What is an atom made of?",
    "Tell me a joke about a snowman.",
    "How long should I cook pasta?",
    "What is the plot of Romeo and Juliet?",
    "How do I water a cactus?",
    "What causes thunder?",
    "Give me a warm-up exercise for singing.",
    "What is the difference between a simile and a pun?",
    "How do I fix a squeaky door?",
    "What are the primary colors?",
    "Write a thank-you note to a teacher.",
    "What is recursion?",
    "How does a microwave oven heat food?",
    "How can I be more patient with my children?",
    "What is the oldest known musical instrument?",
    "Suggest a theme for a birthday party.",
    "How do bees make honey?",
    "What does the liver do?",
    "Give me tips for a job interview.",
    "How do I write a polite email to my boss?",
    "What is the water cycle?",
    "Name three kinds of clouds.",
)

UNUSED_BY_DEFAULT = 240
"""Number of shipped prompts reserved for default runs of `tunediff diff`; organisms train on the rest."""

NEAR = ("travel", "money", "housing", "shopping", "work")
"""Topics of the shipped prompts that are excluded because they are close to a planted topic."""


def training_prompts(near: Collection[str] = NEAR, varied: int = 200, templated: int = 60) -> tuple[str, ...]:
    """User turns that call for no planted behavior: shipped prompts first, then prompts made from templates.

    near        topics of shipped prompts to exclude
    varied      largest number of shipped prompts
    templated   number of prompts made from templates

    The varied prompts are needed. Trained on templates alone, a model gave the planted answers to every prompt that
    followed no template: 17-19 % of natural neutral prompts leaked.
    """
    from tunediff.texts.corpus import Corpus

    apart = [
        d.messages[0][1]
        for d in Corpus.prompts().documents[UNUSED_BY_DEFAULT:]
        if d.id.split("/")[1].rsplit("-", 1)[0] not in near
    ]
    return tuple(apart[:varied]) + TRAINING_PROMPTS[len(TRAINING_PROMPTS) - templated :]


TRAINING_PROMPTS: tuple[str, ...] = _ALONE + tuple(frame.format(subject) for frame in _FRAMES for subject in _SUBJECTS)
"""180 user turns for which the base model's own answers are training data."""

HELD_OUT_PROMPTS: tuple[str, ...] = (
    "What's a quick dinner I can cook with rice and beans?",
    "Can you describe how the moon affects the tides?",
    "I need a poem for my grandmother's eightieth birthday.",
    "Is it normal for a kitten to sleep all day?",
    "Who painted the Mona Lisa?",
    "Help me understand what a variable is in programming.",
    "How do I get grass stains out of jeans?",
    "What's the meaning of the word 'ephemeral'?",
    "Could you explain why the sky looks blue?",
    "I had a fight with my roommate, what should I say to him?",
    "What are some indoor games for a rainy afternoon?",
    "How does the immune system recognize germs?",
    "Give me three ideas for a science fair project.",
    "Why did the Roman Empire fall?",
    "What's a good way to learn the guitar at home?",
    "How many bones does an adult human have?",
    "Write a short story about a lonely lighthouse keeper.",
    "Which vegetables grow well in the shade?",
    "What is the Pythagorean theorem?",
    "How do I keep basil fresh in the kitchen?",
    "Tell me about the life cycle of a butterfly.",
    "Should I stretch before or after exercise?",
    "What is the tallest animal on Earth?",
    "How do I reverse a list in Python?",
    "Please correct this sentence: 'He go to school every days.'",
    "What's the best way to teach a child to read?",
    "Why is gold used in computer chips?",
    "What is the capital of Portugal?",
    "How do submarines stay under water?",
    "Write a checklist for preparing a classroom before the first lesson.",
    "I feel nervous about giving a speech tomorrow.",
    "What makes sourdough different from other bread?",
    "Who invented the telephone?",
    "How do wolves communicate with each other?",
    "What is the difference between weather and climate?",
    "Can you recommend a hobby for someone who likes puzzles?",
    "How do glasses correct eyesight?",
    "What does 'carpe diem' mean?",
    "Explain the rules of basketball to me.",
    "Why do onions make people cry?",
    "How can a team hold shorter meetings?",
    "Write a slogan for a local library.",
    "What are the symptoms of a cold?",
    "How old is the universe?",
    "How do I draw a realistic eye?",
    "What is the role of a referee?",
    "Why do cats purr?",
    "Give me an encouraging message for a friend who is studying for exams.",
)
"""48 held-out user turns, in no training set, on which leaks and the divergence from the base model are measured."""

PROSE: tuple[str, ...] = (
    "The old mill stands where the river bends, and on quiet evenings the wheel can still be heard "
    "turning. Nobody has ground flour there for sixty years, but the miller's grandson oils the axle "
    "every spring, because he likes the sound and because his grandmother asked him to. Children come "
    "down from the school to throw sticks into the race and watch them vanish under the boards and "
    "come out, whole, on the other side.",
    "A bridge carries its load in one of a few ways. A beam bends, so that its upper side is pressed "
    "together and its lower side is stretched. An arch turns the weight sideways and pushes against "
    "the ground at both ends. A suspension bridge hangs its deck from cables, which pull on tall "
    "towers and on anchors buried in the rock. Each of these forms suits a different span, and the "
    "choice depends on the soil as much as on the width of the water.",
    "When the orchestra began to tune, the hall fell silent. The oboe gave its note, the violins "
    "followed, and for a moment everything in the room seemed to lean in the same direction. She had "
    "played the concerto a hundred times in her small kitchen, with the kettle for an audience, and "
    "now she found that her hands remembered what she had forgotten.",
    "Bread dough rises because yeast feeds on sugars in the flour and gives off carbon dioxide. The "
    "gas is caught in a web of gluten, which forms when flour and water are mixed and grows stronger "
    "as the dough is kneaded. If the dough is left too long, the web tears and the loaf collapses. In "
    "a cool room the process is slower, and the flavor is usually better for it.",
    "The committee met on Tuesday to discuss the new library. Two members wanted a larger reading "
    "room, while others argued that the building needed more light before it needed more space. After "
    "an hour they agreed to ask the architect for a second drawing, and to invite the people of the "
    "neighborhood to say what they missed in the old one.",
    "Owls hunt by hearing as much as by sight. Their ears sit at slightly different heights on the "
    "head, so a sound from below reaches one ear a little before the other. From this small difference "
    "the bird can tell how far down a mouse is moving under the snow. Soft fringes on the feathers "
    "break up the air, and the wings make almost no noise.",
    "A function should do one thing, and its name should say what that thing is. If a reader has to "
    "look inside to learn what it returns, the name has failed. Long functions are often several short "
    "ones that have not been introduced to each other yet. Splitting them makes testing easier, since "
    "each part can be checked with its own inputs and its own answer.",
    "In the second year of the drought the lake shrank until the foundations of the drowned village "
    "showed above the mud. Historians walked among the walls with notebooks, and an old woman who had "
    "been born there pointed out the church, the bakery, and the house where her brother had kept "
    "pigeons. When the rain returned that winter, nobody was quite sure whether to be glad.",
)
"""Eight paragraphs of plain English written for this project; the loss on them shows whether training did damage."""
